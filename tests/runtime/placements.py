"""One experiment under several placements, and everything about it that must not depend on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from selffl_ray.config import load_config
from selffl_ray.driver import Run, run_rounds
from selffl_ray.experiment import Prepared, prepare_experiment
from selffl_ray.participation import RoundPlan
from selffl_ray.pool import ClientPool, LocalTransport


class Outcome(NamedTuple):
    """Digests and metrics (times aside) of every round, and each client's final model."""

    digests: list[str]
    metrics: list[dict[str, float]]
    models: dict[int, bytes]


def prepared_with(*settings: str) -> Prepared:
    """An experiment from ``dotted.key=value`` settings."""
    return prepare_experiment(load_config(None, settings))


def stacked(prepared: Prepared, stack_size: int) -> Prepared:
    """The same experiment in stacks of another size."""
    spec = dataclasses.replace(prepared.run_spec, stack_size=stack_size)
    return dataclasses.replace(prepared, run_spec=spec)


def local_pool(num_clients: int, num_hosts: int) -> ClientPool:
    """Hosts in this process; clients are dealt in turn."""
    return ClientPool(LocalTransport(num_hosts), [i % num_hosts for i in range(num_clients)])


def locally(prepared: Prepared, num_hosts: int, stack_size: int) -> Outcome:
    """Run in this process."""
    pool = local_pool(len(prepared.clients), num_hosts)
    return outcome(stacked(prepared, stack_size), pool)


def outcome(prepared: Prepared, pool: ClientPool) -> Outcome:
    """Run on a pool, whatever it did before."""
    pool.load(prepared.data_spec, prepared.clients)
    pool.begin(prepared.run_spec, prepared.algorithm)
    run = Run(
        prepared.algorithm,
        prepared.federation,
        pool,
        prepared.plans,
        prepared.evaluation,
        prepared.config.faults,
        prepared.dataset.task,
    )
    start_P = torch.from_numpy(prepared.run_spec.start_params.copy())
    records = list(run_rounds(run, prepared.algorithm.init(start_P)))
    return Outcome(
        [record.digest for record in records],
        [_timeless(record.metrics) for record in records],
        _models(prepared, pool, records[-1].server),
    )


def _timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def _models(prepared: Prepared, pool: ClientPool, server: Any) -> dict[int, bytes]:
    last = prepared.plans[-1]
    everybody = np.arange(len(prepared.clients), dtype=np.int64)
    plan = RoundPlan(last.round_index, everybody, last.learning_rate)
    message = prepared.algorithm.broadcast(server, plan)
    return {i: m.tobytes() for i, m in pool.personal_models(plan, message).items()}


def moved(found: Outcome) -> bool:
    """Whether something was trained at all: no two rounds leave the same digest."""
    return len(set(found.digests)) == len(found.digests)


def different(one: Outcome, other: Outcome) -> Sequence[str]:
    """What differs between two outcomes, in words."""
    names = [f"digest of round {r}" for r, d in enumerate(one.digests) if other.digests[r] != d]
    for r, metrics in enumerate(one.metrics):
        again = other.metrics[r]
        names += [f"{k} of round {r}" for k in metrics | again if metrics.get(k) != again.get(k)]
    names += [f"model of client {i}" for i in one.models if one.models[i] != other.models.get(i)]
    return names
