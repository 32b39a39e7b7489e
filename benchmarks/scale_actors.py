"""Rounds on two client actors over those on one, a round of each in turn.

The speed of a shared machine changes within seconds: of runs one after the other the ratio says as
much about the machine as about the actors.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence

from benchmarks.in_process import Bench
from benchmarks.workloads import workload_config
from selffl_ray.api import placement_of
from selffl_ray.experiment import prepare_experiment
from selffl_ray.pool import ClientPool
from selffl_ray.runtime.cluster import cluster
from selffl_ray.runtime.placement import Node
from selffl_ray.runtime.ray_pool import ActorShell, RayTransport

ROUNDS = {"W1": 60, "W3": 30, "W4": 15, "W2": 4}
"""Of each placement and pass, the first aside."""


def two_over_one(name: str, passes: int) -> float:
    """The median over all pairs of rounds, by the clock."""
    with cluster() as here:
        one, two = (_on_ray(name, count, here.nodes) for count in (1, 2))
        with contextlib.closing(one.pool), contextlib.closing(two.pool):
            return statistics.median(_in_turn(name, one, two, passes))


def _on_ray(name: str, num_actors: int, nodes: Sequence[Node]) -> Bench:
    """A workload on so many client actors; those of two of them find room beside each other."""
    per_actor = math.ceil(len(prepare_experiment(workload_config(name)).clients) / num_actors)
    config = workload_config(
        name, f"placement.clients_per_actor={per_actor}", "placement.cpus_per_actor=0.5"
    )
    plan = placement_of(prepare_experiment(config), nodes)
    shell = ActorShell("auto", f"{name}-{num_actors}", ((), ""))
    return Bench(config, pool=ClientPool(RayTransport(plan, shell, 600), plan.homes))


def _in_turn(name: str, one: Bench, two: Bench, passes: int) -> list[float]:
    """Clock time of every round on two actors over that of one before it; the first ones aside."""
    config = workload_config(name, f"training.num_rounds={1 + ROUNDS[name]}")
    ratios = []
    for _ in range(passes):
        pairs = list(zip(one.rounds(config), two.rounds(config), strict=True))
        assert all(a.record.digest == b.record.digest for a, b in pairs), "placements agree"
        ratios += [b.wall_s / a.wall_s for a, b in pairs[1:]]
    return ratios
