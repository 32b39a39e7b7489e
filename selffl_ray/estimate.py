"""What a run will cost, before it starts: steps, traffic, memory, time."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from selffl_ray.console import duration, size
from selffl_ray.experiment import Prepared
from selffl_ray.gradients import RowEngine
from selffl_ray.participation import DROPPED, LATE, PARTIAL, RoundPlan
from selffl_ray.runtime.placement import ACTOR_BYTES, PlacementPlan
from selffl_ray.stacking import blank_batch
from selffl_ray.sweep_mutation import legs, replaced
from selffl_ray.sweep_plan import SweepPlan


def estimate_run(prepared: Prepared, plan: PlacementPlan) -> list[str]:
    """Lines for a person. Time is extrapolated from one gradient step tried here, on a CPU."""
    training, federation = prepared.config.training, prepared.federation
    steps = num_steps(prepared)
    traffic = [prepared.algorithm.traffic(p) for p in prepared.plans]
    width = torch.empty(0, dtype=federation.spec.dtype).element_size()
    sent = sum(
        (t.down * p.num_asked + t.up * len(p.cohort)) * width
        for t, p in zip(traffic, prepared.plans, strict=True)
    )
    rows = sum(len(c.train) + len(c.val) + len(c.test) for c in prepared.clients)
    data = rows * int(np.prod(prepared.dataset.shape.input_shape)) * 4
    return [
        f"{training.num_rounds} rounds, {steps} local steps in all, model of "
        f"{federation.spec.num_params} parameters, {_stacks(prepared, plan)}",
        f"traffic of the method {size(sent)}, data in the hosts {size(data)}",
        _training_time(prepared, plan, steps),
        *([found] if (found := trouble_line(prepared.plans)) else []),
    ]


def _on_gpus(prepared: Prepared, plan: PlacementPlan) -> bool:
    placed = all(actor.gpus > 0 for actor in plan.actors)
    return placed and prepared.config.placement.device == "auto"


def _stacks(prepared: Prepared, plan: PlacementPlan) -> str:
    if prepared.config.placement.stack_size == "auto" and _on_gpus(prepared, plan):
        return "stacks as tall as the GPUs' memory allows"
    return f"stacks of up to {_height(prepared, len(plan.actors))}"


def _height(prepared: Prepared, hosts: int) -> int:
    """Clients in the tallest stack, where so many hosts share a round's clients."""
    together = math.ceil(max(len(plan.cohort) for plan in prepared.plans) / hosts)
    return min(prepared.run_spec.stack_size, max(1, together))


def _training_time(prepared: Prepared, plan: PlacementPlan, steps: int) -> str:
    if _on_gpus(prepared, plan):
        return "training time on GPUs is not estimated: what is here is no guide to it"
    # Each actor computes with one thread, and all of them together on the cores that they share.
    cores = max(1, round(sum(a.cpus for a in plan.actors)))
    workers = min(len(plan.actors), cores)
    seconds = steps * step_seconds(prepared, len(plan.actors)) / workers
    return f"training about {duration(seconds)} on {workers} cores, besides start-up and evaluation"


def trouble_line(plans: Sequence[RoundPlan]) -> str:
    """What simulated trouble leaves of the cohorts; empty where none is simulated."""
    found = [plan.trouble for plan in plans if plan.trouble is not None]
    if not found:
        return ""
    sizes = [len(plan.cohort) for plan in plans]
    names = ("there", "asked", "dropped", "late", "partial")
    counts = [
        (o.num_available, len(o.asked), o.count(DROPPED), o.count(LATE), o.count(PARTIAL))
        for o in found
    ]
    means = ", ".join(f"{m:.1f} {n}" for n, m in zip(names, np.mean(counts, axis=0), strict=True))
    return (
        f"clients a round: {means}; {np.mean(sizes):.1f} answer ({min(sizes)} to {max(sizes)}, "
        f"nobody in {sizes.count(0)} of {len(sizes)} rounds); virtual time "
        f"{sum(o.virtual_s for o in found):.4g} s"
    )


TRIAL_START_S = 3.0
"""Start of a trial whose actors serve from the last one: reading data, tables, MLflow."""


def estimate_sweep(plan: SweepPlan, cpus: float) -> list[str]:
    """Lines for a person: trials, how many at once, hours and memory."""
    sweep = plan.sweep
    searched = sweep.searcher.trials  # of a search, only the first batch is known
    suggestions = searched or len(plan.chosen)
    count = suggestions * len(sweep.seeds)
    side_by_side = max(1, int(cpus / sweep.cpus_per_trial))
    side_by_side = min(side_by_side, sweep.concurrent or side_by_side, len(plan.first.trials))
    step = {}
    seconds = 0.0
    for prepared in plan.prepared:
        spec = prepared.federation.spec
        key = (spec.num_params, prepared.config.training.batch_size)
        if key not in step:
            step[key] = step_seconds(prepared)
        steps = min(num_steps(prepared), sweep.budget.gradient_steps or sys.maxsize)
        starts = len(legs(sweep.scheduler, prepared.config.training.num_rounds))
        seconds += len(sweep.seeds) * (steps * step[key] + starts * TRIAL_START_S)
    seconds *= suggestions / len(plan.chosen)
    actors = 1 + max(len(p.actors) for p in plan.first.plans)
    more = ""
    if sweep.confirm is not None:
        best, seeds = sweep.confirm.top, len(sweep.confirm.seeds)
        of = "".join(f" of each {key}" for key in (*sweep.within, *sweep.confirm.per))
        more = f"; then the best {best}{of} with {seeds} fresh seeds (and the reference)"
    return [
        *scheduler_lines(plan),
        f"{suggestions} {'suggestions' if searched else 'configurations'} x {len(sweep.seeds)} "
        f"seeds = {count} trials, "
        f"{side_by_side} at once{more}",
        f"about {duration(seconds / side_by_side)} for training and starts, besides evaluation",
        f"about {side_by_side * actors * ACTOR_BYTES / 2**30:.1f} GiB for the actors",
        *_troubles(plan),
    ]


def _troubles(plan: SweepPlan) -> list[str]:
    """The cohorts of each kind of simulated trouble, with the first seed."""
    found: dict[str, list[str]] = {}
    for one, prepared in zip(plan.chosen, plan.prepared, strict=True):
        found.setdefault(trouble_line(prepared.plans), []).append(str(one.number))
    return [f"{', '.join(of)}: {line}" for line, of in found.items() if line]


def scheduler_lines(plan: SweepPlan) -> list[str]:
    """How trials are ended early, or copied and changed; nothing without a scheduler."""
    scheduler, count = plan.sweep.scheduler, len(plan.chosen)
    rounds = max(p.config.training.num_rounds for p in plan.prepared)
    if scheduler.name == "none":
        return []
    if scheduler.name == "asha":
        return [
            f"scheduler asha: from round {scheduler.first_rung(rounds)} of {rounds} on, one in "
            f"{scheduler.reduction} goes on at each rung"
        ]
    ends = [str(end) for end in legs(scheduler, rounds) if end is not None]
    share = replaced(scheduler, count)
    return [
        f"scheduler pbt: of {count} trials compared after {', '.join(ends)} of {rounds} rounds the "
        f"worst {share} end, and changed copies of the best {share} go on",
        "changed: " + ", ".join(f"{k} {_entry(v)}" for k, v in scheduler.mutate.items()),
        "what comes out is a schedule, not a configuration",
    ]


def _entry(entry: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in entry.items()) if isinstance(entry, dict) else f"{entry}"
    )


def num_steps(prepared: Prepared) -> int:
    """Local steps of all clients over the whole run; readouts and probes aside."""
    training = prepared.config.training
    steps_M = np.asarray([training.steps(int(n)) for n in prepared.federation.num_examples_M])
    return int(
        sum(
            steps_M[plan.cohort].sum() if plan.trouble is None else plan.trouble.steps.sum()
            for plan in prepared.plans
        )
    )


def step_seconds(prepared: Prepared, hosts: int = 1) -> float:
    """One client's gradient step in the tallest stack, the best of five.

    Args:
        hosts: how many share a round's clients.
    """
    model, task = prepared.model, prepared.dataset.task
    engine = RowEngine(model, task, torch.device("cpu"))
    size_ = max(len(c.train) for c in prepared.clients)
    length = prepared.config.training.batch_length(size_)
    count = _height(prepared, hosts)
    x, y, weight = blank_batch(model, task, count, length)
    theta = torch.from_numpy(prepared.run_spec.start_params).repeat(count, 1)
    best, threads = float("inf"), torch.get_num_threads()
    # As in the hosts; and a second thread would wait for a core where others work on both.
    torch.set_num_threads(1)
    for _ in range(5):
        began = time.thread_time()
        engine.loss_and_grad(theta, x, y, weight)
        best = min(best, time.thread_time() - began)
    torch.set_num_threads(threads)
    return best / count
