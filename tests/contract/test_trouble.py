"""What every registered algorithm must keep to under simulated trouble.

Clients come and go, drop out and hand in partial work, and in the first and the fourth round there
is nobody at all. A method that needs everybody must say so by name before the run.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from selffl_ray import trees
from selffl_ray.checkpoint import Counters, load_checkpoint, save_checkpoint
from selffl_ray.driver import run_rounds
from selffl_ray.errors import ConfigError
from selffl_ray.registry import algorithms
from tests.contract import harness

ROUNDS = 6
NOBODY = (0, 3)
TROUBLE = (
    "training.num_rounds=6",
    "training.participation_rate=0.6",
    "training.num_local_epochs=1",
    "training.batch_size=5",
    "evaluation.every=1",
    "evaluation.max_clients=3",
    "model.hidden=[8]",
    "data.partition.sizes={min: 20, max: 110}",
    "training.trouble={dropout: {probability: 0.3, concentration: 2}, deadline: 6, late: partial, "
    "stragglers: {spread: 0.8, jitter: 0.2}}",
)


@pytest.fixture(scope="module")
def stays(tmp_path_factory):
    """A trace in which all 14 writers are there, except in two rounds."""
    path = tmp_path_factory.mktemp("trace") / "stays.csv"
    rows = [f"form-{i:02d},{a},{b}" for i in range(14) for a, b in ((1, 2), (4, ROUNDS))]
    path.write_text("\n".join(["client_id,first_round,last_round", *rows]) + "\n")
    return f"training.trouble.trace={path}"


def prepared_or_refused(name, stays):
    """The experiment; None if the method says that it needs everybody."""
    settings = harness.as_allowed(name, (*TROUBLE, stays))
    if settings == (*TROUBLE, stays):
        return harness.prepared_with(name, settings)
    with pytest.raises(
        ConfigError, match=rf"^training\.trouble must keep nobody away with method {name}"
    ):
        harness.prepared_with(name, settings)
    return None


def same(one, other):
    return all(
        torch.equal(torch.nan_to_num(a.double()), torch.nan_to_num(b.double()))
        for (_, a), (_, b) in zip(trees.leaves(one), trees.leaves(other), strict=True)
    )


def goes_on(prepared, folder):
    """Digests after round 3, a round of nobody, from a checkpoint on other hosts."""
    pool = harness.open_pool(prepared)
    rounds = run_rounds(harness.loop(prepared, pool), harness.start(prepared))
    record = [next(rounds) for _ in range(4)][-1]
    counters = Counters(record.plan.round_index, record.gradient_steps, "run")
    states = pool.export_states(changed_only=False)
    save_checkpoint(folder, counters, record.server, states, keep=2)
    saved = load_checkpoint(
        folder / "round_3",
        "run",
        harness.start(prepared),
        prepared.algorithm.init_client(torch.from_numpy(prepared.run_spec.start_params.copy()), 1),
    )
    other = harness.open_pool(prepared, 3)
    other.import_states(saved.states)
    rest = run_rounds(
        harness.loop(prepared, other),
        saved.server,
        first_round=4,
        gradient_steps=saved.counters.gradient_steps,
    )
    return [record.digest for record in rest]


@pytest.mark.parametrize("name", algorithms.names())
def test_a_method_meets_those_that_answer_and_a_round_of_nobody_changes_nothing(
    name, stays, tmp_path
):
    prepared = prepared_or_refused(name, stays)
    if prepared is None:
        return
    assert [r for r, plan in enumerate(prepared.plans) if not len(plan.cohort)] == list(NOBODY)
    outcomes = {o for plan in prepared.plans for o in plan.trouble.outcome}
    assert outcomes >= {"answered", "partial", "dropped"}
    done = harness.finish(prepared)
    servers = [harness.start(prepared), *(record.server for record in done.records)]
    for index, record in enumerate(done.records):
        plan, metrics = record.plan, record.metrics
        assert metrics["clients/participants"] == len(plan.cohort)
        assert metrics["clients/faults"] == 0
        assert metrics["clients/asked"] == plan.num_asked >= len(plan.cohort)
        assert same(servers[index], servers[index + 1]) == (index in NOBODY)
        assert ("train/loss" in metrics) == (index not in NOBODY)
        assert 0 <= metrics["test/local_accuracy"] <= 1
        assert all(np.isfinite(value) for value in metrics.values())
    # Who never counted has kept the state that it had before the first round.
    ever = set(np.concatenate([plan.cohort for plan in prepared.plans]).tolist())
    assert set(done.pool.transport._hosts[0]._states.indices()) <= ever
    never = dataclasses.replace(prepared.evaluation, rounds=frozenset())
    unseen = dataclasses.replace(prepared, evaluation=never)
    assert harness.digests(done) == harness.digests(harness.finish(unseen, 5))
    assert goes_on(unseen, tmp_path) == harness.digests(done)[4:]


def test_partial_work_costs_the_steps_that_are_planned(stays):
    prepared = harness.prepared_with("fedavg", (*TROUBLE, stays))
    done = harness.finish(prepared)
    spent = np.diff([0, *(record.gradient_steps for record in done.records)])
    assert spent.tolist() == [plan.trouble.steps.sum() for plan in prepared.plans]
    assert spent[1] > 0


def test_whoever_is_asked_is_sent_the_model_and_only_who_counts_sends_one_back(stays):
    prepared = harness.prepared_with("fedavg", (*TROUBLE, stays))
    size = 4 * prepared.federation.spec.num_params
    for record in harness.finish(prepared).records:
        assert record.metrics["comm/bytes_down"] == size * record.plan.num_asked
        assert record.metrics["comm/bytes_up"] == size * len(record.plan.cohort)
    assert any(plan.num_asked > len(plan.cohort) > 0 for plan in prepared.plans)
