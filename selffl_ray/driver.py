"""The server loop: one round after the other, whatever the method and wherever the clients are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selffl_ray import trees
from selffl_ray.algorithms.base import (
    NOTHING,
    Alarm,
    Algorithm,
    Federation,
    Gather,
    Mean,
    NotAvailable,
    Record,
    Reports,
    Total,
    UncertaintyRows,
)
from selffl_ray.errors import RunError
from selffl_ray.evaluation import ClientScores, split_metrics
from selffl_ray.events import Event, Whereabouts, client_failed, host_was_slow, named
from selffl_ray.faults import (
    SLOW_SHARE,
    Abort,
    Decision,
    FaultsConfig,
    Replace,
    Retry,
    decide,
    outcome_of,
)
from selffl_ray.flat import digest
from selffl_ray.messages import ClientFailure, Commit, Split
from selffl_ray.participation import DROPPED, LATE, PARTIAL, RoundPlan
from selffl_ray.pool import ClientPool, HostLost, RoundAnswers, StateLostError
from selffl_ray.rebalancer import Rebalancer
from selffl_ray.tasks import Task

logger = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]

SHOWN = 3
"""Most failures of a round that are told one by one."""


@dataclass(frozen=True)
class EvaluationPlan:
    """When to evaluate, whom, and on what.

    rounds: indices of the rounds after which to evaluate; client_index: clients that take part;
    new_index: clients held out as new; splits: ``val`` and ``test`` as wanted.
    """

    rounds: frozenset[int]
    client_index: Indices
    new_index: Indices
    splits: tuple[Split, ...]


@dataclass
class RoundRecord:
    """Everything about a finished round: for tables, tracker, checkpoint, progress.

    metrics has the contract's names. scores are there after rounds that were evaluated. events:
    what went wrong, see ``events.py``.
    """

    plan: RoundPlan
    server: Any
    metrics: dict[str, float]
    digest: str
    gradient_steps: int
    uncertainty: UncertaintyRows | None = None
    alarms: tuple[Alarm, ...] = ()
    scores: dict[Split, ClientScores] = field(default_factory=dict)
    events: Sequence[Event] = ()


@dataclass(frozen=True)
class Run:
    """What the loop needs: a method on a federation, the clients, plans and policies.

    note: told what goes wrong, as it happens. renewed: (round, client) of hosts that were replaced
    because they ran out of memory. rebalancer: moves clients between hosts, if it may.
    """

    algorithm: Algorithm
    federation: Federation
    pool: ClientPool
    plans: Sequence[RoundPlan]
    evaluation: EvaluationPlan
    faults: FaultsConfig
    task: Task
    note: Callable[[Event], None] = lambda event: None
    renewed: frozenset[tuple[int, int]] = frozenset()
    rebalancer: Rebalancer | None = None


def run_rounds(
    run: Run, server: Any, *, first_round: int = 0, gradient_steps: int = 0
) -> Iterator[RoundRecord]:
    """Yield a record after every round, from ``first_round`` on.

    Args:
        server: state before ``first_round``; gradient_steps: spent before it.

    Raises:
        RunError: too few clients answered. StateLostError: a host died and took state along.
    """
    for plan in run.plans[first_round:]:
        began = time.perf_counter()
        answers, record = RoundAnswers({}, {}, {}, []), NOTHING
        # Of a cohort that simulated trouble has left empty nobody is asked, and nothing changes.
        if len(plan.cohort):
            answers, server, record = _train(run, server, plan)
        gradient_steps += sum(answers.gradients.values())
        metrics = dict(record.metrics)
        metrics |= {alarm.metric: float(alarm.text is not None) for alarm in record.alarms}
        metrics |= _round_metrics(run, plan, answers, gradient_steps)
        metrics["time/round_s"] = time.perf_counter() - began
        done = RoundRecord(
            plan=plan,
            server=server,
            metrics=metrics,
            digest=_digest(server, answers),
            gradient_steps=gradient_steps,
            uncertainty=record.uncertainty,
            alarms=record.alarms,
        )
        if plan.round_index in run.evaluation.rounds:
            evaluate(run, done)
        yield done


def _train(run: Run, server: Any, plan: RoundPlan) -> tuple[RoundAnswers, Any, Record]:
    """One round of a cohort: its answers, the next server, and what the aggregation tells."""
    if run.rebalancer is not None:
        run.rebalancer.move(plan, len(run.plans) - plan.round_index)
    message = run.algorithm.broadcast(server, plan)
    answers = _ask_cohort(run, plan, message)
    if run.rebalancer is not None:
        run.rebalancer.take(answers)
    run.pool.accept(Commit(plan.round_index, answers.accepted))
    before = _shapes(server)
    server, sums, reports = _reduce(run, server, plan, answers)
    server, record = run.algorithm.aggregate(server, sums, reports)
    _check_server(before, _shapes(server), plan.round_index)
    return answers, server, record


def _shapes(server: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in trees.leaves(server)}


def _check_server(before: Any, after: Any, round_index: int) -> None:
    """Updates of the same wrong shape agree with each other, but not with what the server has.

    Raises:
        RunError: naming the part that changed.
    """
    changed = sorted(n for n in before | after if before.get(n) != after.get(n))
    if changed:
        name = changed[0]
        raise RunError(
            f"round {round_index}: aggregating changed the shape of the server's {name} from "
            f"{before.get(name)} to {after.get(name)}; have the method's updates the right shape?"
        )


def _ask_cohort(run: Run, plan: RoundPlan, message: tuple[Any, Any]) -> RoundAnswers:
    """Ask the cohort until the fault policy is content.

    Raises:
        RunError: too few answered. StateLostError: hosts ran out of memory and are to be replaced.
    """
    answers, index, attempt = None, plan.cohort, 0
    renewed = {client for r, client in run.renewed if r == plan.round_index}
    while True:
        answers = run.pool.local_update(plan, index, message, run.federation, answers)
        failures = list(answers.failing.values())
        missing = len(plan.cohort) - len(answers.accepted)
        assert missing == len(failures), "everybody who is asked answers or fails"
        decision = decide(run.faults, len(plan.cohort), failures, attempt, renewed)
        new = [f for f in failures if f.client_index in index]
        _note_failures(run, (plan.round_index, attempt), new, decision)
        if isinstance(decision, Abort):
            why = _in_words(run, failures[:1])
            raise RunError(f"round {plan.round_index}: {decision.reason}; first failure: {why}")
        if failures:
            what = f"going on without {missing} of {len(plan.cohort)}"
            if isinstance(decision, Retry | Replace):
                what = "asking again" if isinstance(decision, Retry) else "replacing hosts"
            why = _in_words(run, failures[:SHOWN])
            logger.warning("round %d: %s (%s)", plan.round_index, what, why)
        if isinstance(decision, Replace):
            raise StateLostError(_starved(run, failures, decision))
        if not isinstance(decision, Retry):
            _note_slow(run, plan, answers)
            return answers
        index = np.asarray(decision.client_index, np.int64)
        attempt += 1


def _where(run: Run, failure: ClientFailure) -> Whereabouts:
    return run.pool.whereabouts(int(run.pool.homes[failure.client_index]))


def _in_words(run: Run, failures: Sequence[ClientFailure]) -> str:
    return "; ".join(named(f, run.federation.client_ids, _where(run, f)) for f in failures)


def _note_failures(
    run: Run, at: tuple[int, int], failures: Sequence[ClientFailure], decision: Decision
) -> None:
    """An event for each client that failed in an attempt (``at``: round and attempt)."""
    for failure in failures:
        name = run.federation.client_ids[failure.client_index]
        outcome = outcome_of(decision, failure.client_index)
        run.note(client_failed(failure, name, at, _where(run, failure), outcome))


def _starved(run: Run, failures: Sequence[ClientFailure], decision: Replace) -> list[HostLost]:
    """Hosts to replace, each with the cause of the first of its clients that failed."""
    found: dict[int, HostLost] = {}
    for failure in failures:
        if failure.client_index in decision.client_index:
            host = int(run.pool.homes[failure.client_index])
            found.setdefault(host, HostLost(host, failure.cause, "memory"))
    return list(found.values())


def _note_slow(run: Run, plan: RoundPlan, answers: RoundAnswers) -> None:
    """An event for every host that came near the limit."""
    limit_s = run.faults.client_timeout_s
    for host, seconds in answers.host_seconds.items():
        if seconds > SLOW_SHARE * limit_s:
            where = run.pool.whereabouts(host)
            run.note(host_was_slow(seconds, limit_s, plan.round_index, where))


def _reduce(
    run: Run, server: Any, plan: RoundPlan, answers: RoundAnswers
) -> tuple[Any, tuple[Tensor, ...], Reports]:
    """The reductions in order; those that the server weighs may change its state."""
    rows = trees.pick_rows([answers.reports[i] for i in answers.accepted.tolist()])
    reports = Reports(plan, answers.accepted, rows)
    means = iter(run.pool.mean_results(answers, plan, run.federation))
    sums: tuple[Tensor, ...] = ()
    for which, reduction in enumerate(run.algorithm.reductions):
        if isinstance(reduction, Mean):
            result = next(means)
        elif isinstance(reduction, Gather):
            result = run.pool.gather(which, answers.accepted)
        else:
            assert isinstance(reduction, Total)
            server, weights = reduction.weigh(server, reports, sums)
            result = run.pool.total(which, weights)
        sums = (*sums, result)
    return server, sums, reports


def _round_metrics(
    run: Run, plan: RoundPlan, answers: RoundAnswers, gradient_steps: int
) -> dict[str, float]:
    spec, count = run.federation.spec, len(answers.accepted)
    traffic = run.algorithm.traffic(plan)
    width = torch.empty(0, dtype=spec.dtype).element_size()
    num = run.federation.num_examples_M[answers.accepted]
    loss = np.asarray([answers.loss[i] for i in answers.accepted.tolist()])
    return {
        **({"train/loss": float((num * loss).sum() / num.sum())} if count else {}),
        **_trouble_metrics(plan),
        "time/train_s": answers.seconds,
        # Whoever is asked is sent the model; who fails sends nothing back.
        "comm/bytes_down": float(traffic.down * width * plan.num_asked),
        "comm/bytes_up": float(traffic.up * width * count),
        "cost/gradient_steps": float(gradient_steps),
        "clients/participants": float(count),
        "clients/faults": float(answers.faults),
    }


def _trouble_metrics(plan: RoundPlan) -> dict[str, float]:
    """What simulated trouble did; nothing where none is simulated."""
    found = plan.trouble
    if found is None:
        return {}
    return {
        "clients/available": float(found.num_available),
        "clients/asked": float(len(found.asked)),
        "clients/dropped": float(found.count(DROPPED)),
        "clients/late": float(found.count(LATE)),
        "clients/partial": float(found.count(PARTIAL)),
        "time/virtual_s": found.virtual_s,
    }


def _digest(server: Any, answers: RoundAnswers) -> str:
    """SHA-256 over the server's tensors, who was accepted, and how much they computed."""
    counts = [answers.gradients[i] for i in answers.accepted.tolist()]
    return digest((leaf for _, leaf in trees.leaves(server)), [*answers.accepted.tolist(), *counts])


def evaluate(run: Run, done: RoundRecord) -> None:
    """Score everybody on the newest broadcast and the newest states; adds to the record."""
    began = time.perf_counter()
    algorithm, plan = run.algorithm, run.evaluation
    params = algorithm.global_params(done.server)
    arrays = None if isinstance(params, NotAvailable) else params.cpu().numpy()
    spent = 0
    groups = ((plan.client_index, plan.splits), (plan.new_index, ("new",)))
    for index, splits in groups:
        if not len(index) or not splits:
            continue
        at = RoundPlan(done.plan.round_index, index, done.plan.learning_rate)
        message = algorithm.broadcast(done.server, at)
        scores, gradients, _ = run.pool.evaluate(at, message, arrays, splits)
        spent += gradients
        done.scores |= scores
    for split, found in done.scores.items():
        done.metrics |= split_metrics(found, split, run.task)
    done.metrics["cost/personalization_steps"] = float(spent)
    done.metrics["time/eval_s"] = time.perf_counter() - began
