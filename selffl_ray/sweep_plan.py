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
    SchedulerConfig,
    SweepConfig,
    Trial,
    configurations,
    references_of,
    trials,
)


@dataclass(frozen=True)
class Stage:
    """Trials that are run and ranked together: the selection, or the confirmation."""

    name: str
    trials: tuple[Trial, ...]
    plans: tuple[PlacementPlan, ...]
    scheduler: SchedulerConfig


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep, before anything starts."""

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
    chosen = configurations(sweep, here)
    references = references_of(sweep, chosen)
    planned = trials(sweep, chosen, sweep.seeds, here, open_test=sweep.open_test)
    prepared = tuple(prepare_experiment(t.config) for t in planned[: len(chosen)])
    for one, found in zip(chosen, prepared, strict=True):
        if "val" not in found.evaluation.splits:
            raise ConfigError(
                f"metric: {sweep.metric} needs validation examples, and {one.label} has none: "
                "evaluation.splits must give them a share"
            )
    plans = {
        one.number: placement_of_trial(sweep, p, nodes)
        for one, p in zip(chosen, prepared, strict=True)
    }
    first = Stage(
        "select",
        tuple(planned),
        tuple(plans[t.configuration.number] for t in planned),
        sweep.scheduler,
    )
    return SweepPlan(sweep, tuple(chosen), references, first, prepared)


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
