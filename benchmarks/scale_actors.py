"""Rounds on two client actors over those on one, and a tenth's over everybody's, each in turn.

The speed of a shared machine changes within seconds: of runs one after the other the ratio says as
much about the machine as about the actors.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.in_process import Bench, Spent
from benchmarks.workloads import workload_config
from selffl_ray.api import placement_of
from selffl_ray.config import ExperimentConfig
from selffl_ray.experiment import prepare_experiment
from selffl_ray.pool import ClientPool
from selffl_ray.runtime.cluster import cluster
from selffl_ray.runtime.placement import Node
from selffl_ray.runtime.ray_pool import ActorShell, RayTransport

ROUNDS = {"W1": 60, "W3": 30, "W4": 15, "W2": 4}
"""Of each placement and pass, the first aside."""


class Ratio(NamedTuple):
    """Medians over all pairs of rounds: by the clock, and of the slowest host's own seconds."""

    clock: float
    in_hosts: float


def two_over_one(name: str, passes: int) -> Ratio:
    """A round on two client actors over one on a single actor."""
    config = workload_config(name, f"training.num_rounds={1 + ROUNDS[name]}")
    with cluster() as here:
        one, two = (_on_ray(name, count, here.nodes) for count in (1, 2))
        pairs = _in_turn((one, config), (two, config), passes)
    assert all(a.record.digest == b.record.digest for a, b in pairs), "placements agree"
    return ratio(pairs)


def tenth_over_all(passes: int) -> Ratio:
    """A round of W3s, a tenth of the clients, over one of W3, all of them; on two client actors."""
    rounds = f"training.num_rounds={1 + ROUNDS['W3']}"
    everybody, tenth = (workload_config(name, rounds) for name in ("W3", "W3s"))
    with cluster() as here:
        # Two pools: a run begins by having its hosts forget the last one.
        pools = [_on_ray("W3", 2, here.nodes, label) for label in ("all", "tenth")]
        return ratio(_in_turn((pools[0], everybody), (pools[1], tenth), passes))


def _on_ray(name: str, num_actors: int, nodes: Sequence[Node], label: str = "") -> Bench:
    """A workload on so many client actors; those of two pools find room beside each other."""
    per_actor = math.ceil(len(prepare_experiment(workload_config(name)).clients) / num_actors)
    config = workload_config(
        name, f"placement.clients_per_actor={per_actor}", "placement.cpus_per_actor=0.45"
    )
    plan = placement_of(prepare_experiment(config), nodes)
    shell = ActorShell("auto", f"{name}-{num_actors}{label}", ((), ""))
    return Bench(config, pool=ClientPool(RayTransport(plan, shell, 600), plan.homes))


def _in_turn(
    first: tuple[Bench, ExperimentConfig], second: tuple[Bench, ExperimentConfig], passes: int
) -> list[tuple[Spent, Spent]]:
    """A round of each run after the other, the first round of both aside; then both pools end."""
    with contextlib.closing(first[0].pool), contextlib.closing(second[0].pool):
        found = []
        for _ in range(passes):
            runs = (bench.rounds(config) for bench, config in (first, second))
            found += list(zip(*runs, strict=True))[1:]
    return found


def ratio(pairs: Sequence[tuple[Spent, Spent]]) -> Ratio:
    """Of the second of each pair over the first."""
    clock = statistics.median(b.wall_s / a.wall_s for a, b in pairs)
    return Ratio(clock, statistics.median(_in_hosts(b) / _in_hosts(a) for a, b in pairs))


def _in_hosts(spent: Spent) -> float:
    return spent.record.metrics["time/train_s"]
