"""A checked sweep, before anything starts: its trials, and where each of them will run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selffl_ray.errors import ConfigError
from selffl_ray.experiment import Prepared, prepare_experiment
from selffl_ray.runtime.placement import (
    ActorPlan,
    Node,
    PlacementPlan,
    check_feasible,
    plan_placement,
)
from selffl_ray.sweep import (
    Configuration,
    SweepConfig,
    Trial,
    configurations,
    references_of,
    trials,
)
from selffl_ray.sweep_population import check_population
from selffl_ray.sweep_scheduler import SchedulerConfig
from selffl_ray.sweep_search import Search, check_search


@dataclass(frozen=True)
class Stage:
    """Trials that are run and ranked together: the selection, or the confirmation."""

    name: str
    trials: tuple[Trial, ...]
    plans: tuple[PlacementPlan, ...]
    scheduler: SchedulerConfig
    until: int | None = None
    """Hold the trials after so many rounds, to be gone on with in a later stage."""


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep, before anything starts.

    With a searcher, what is known by then: its first batch.
    """

    sweep: SweepConfig
    chosen: tuple[Configuration, ...]
    references: dict[str, Configuration]
    """By scene."""
    first: Stage
    prepared: tuple[Prepared, ...]
    """Each configuration with the first seed."""


def plan_sweep(sweep: SweepConfig, nodes: Sequence[Node]) -> SweepPlan:
    """Check a sweep: every configuration, the metric, the placement of every trial.

    Raises:
        UsageError: in one line, naming the key, the value and the remedy.
    """
    here = Path.cwd()
    if sweep.searcher.name == "variants":
        chosen = configurations(sweep, here)
    else:
        check_search(sweep, here)
        chosen = Search(sweep, here).ask()
    references = references_of(sweep, chosen)
    first, prepared = plan_selection(sweep, chosen, nodes)
    if sweep.scheduler.name == "pbt":
        check_population(sweep, chosen, prepared, here)
    return SweepPlan(sweep, tuple(chosen), references, first, prepared)


def plan_selection(
    sweep: SweepConfig, chosen: Sequence[Configuration], nodes: Sequence[Node]
) -> tuple[Stage, tuple[Prepared, ...]]:
    """The first stage, or a batch of it, and its configurations prepared with the first seed."""
    here = Path.cwd()
    planned = trials(sweep, chosen, sweep.seeds, here, open_test=sweep.open_test)
    prepared, plans = _placed(sweep, planned, len(chosen), nodes)
    return Stage("select", tuple(planned), plans, sweep.scheduler), prepared


def plan_members(
    sweep: SweepConfig, members: Sequence[Trial], nodes: Sequence[Node], until: int | None
) -> Stage:
    """The members of a population on their way to the next comparison, or to the end."""
    _, plans = _placed(sweep, members, len(members), nodes)
    return Stage("select", tuple(members), plans, SchedulerConfig(), until)


def plan_confirmation(
    sweep: SweepConfig, best: Sequence[Configuration], nodes: Sequence[Node]
) -> Stage:
    """The second stage: fresh seeds, test data opened, no trial ended early."""
    assert sweep.confirm is not None
    planned = trials(sweep, best, sweep.confirm.seeds, Path.cwd(), open_test=True)
    _, plans = _placed(sweep, planned, len(best), nodes)
    return Stage("confirm", tuple(planned), plans, SchedulerConfig())


def _placed(
    sweep: SweepConfig, planned: Sequence[Trial], count: int, nodes: Sequence[Node]
) -> tuple[tuple[Prepared, ...], tuple[PlacementPlan, ...]]:
    """The first ``count`` trials prepared, a configuration each; and the place of every trial."""
    first = planned[:count]
    prepared = tuple(prepare_experiment(t.config) for t in first)
    fewest = min(t.config.training.num_rounds for t in first)
    if (sweep.scheduler.grace or 0) > fewest:
        raise ConfigError(
            f"scheduler.grace: {sweep.scheduler.grace} rounds are more than the {fewest} of a trial"
        )
    for trial, found in zip(first, prepared, strict=True):
        if "val" not in found.evaluation.splits:
            raise ConfigError(
                f"metric: {sweep.metric} needs validation examples, and "
                f"{trial.configuration.label} has none: evaluation.splits must give them a share"
            )
    plans = {
        t.configuration.number: placement_of_trial(sweep, p, nodes)
        for t, p in zip(first, prepared, strict=True)
    }
    return prepared, tuple(plans[t.configuration.number] for t in planned)


def placement_of_trial(
    sweep: SweepConfig, prepared: Prepared, nodes: Sequence[Node]
) -> PlacementPlan:
    """A trial's actors, within the CPUs that it reserves; checked against the whole cluster."""
    placement, count = prepared.config.placement, len(prepared.client_ids)
    if placement.backend == "local":
        return PlacementPlan(
            (ActorPlan(tuple(range(count)), 0, 0),), sweep.cpus_per_trial, "", "local"
        )
    if placement.clients_per_actor == "auto":
        each = math.ceil(count / sweep.actors_per_trial)
        placement = replace(placement, clients_per_actor=each)
    gpus = sum(n.gpus for n in nodes)
    share = Node("a trial", sweep.cpus_per_trial, gpus, sum(n.memory_bytes for n in nodes))
    plan = plan_placement(placement, [share], prepared.client_ids, prepared.work)
    check_feasible(plan, nodes)
    return plan
