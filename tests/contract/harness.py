"""Small real runs for tests that hold for every entry of a registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from selffl_ray.config import load_config
from selffl_ray.driver import RoundRecord, Run, run_rounds
from selffl_ray.errors import ConfigError
from selffl_ray.experiment import Prepared, prepare_experiment
from selffl_ray.pool import ClientPool, LocalTransport

DIGITS = (
    "training.num_rounds=4",
    "training.participation_rate=0.5",
    "training.num_local_steps=4",
    "evaluation.every=2",
    "data.partition.sizes={min: 20, max: 110}",
)


class Finished(NamedTuple):
    """A run in this process: records of its rounds, its pool (with all states), what it ran."""

    records: list[RoundRecord]
    pool: ClientPool
    prepared: Prepared


def prepared_with(method: str, settings: Sequence[str] = DIGITS, *, seed: int = 0) -> Prepared:
    """A small experiment with unequal clients and partial participation."""
    return prepare_experiment(load_config(None, [*settings, f"method={method}", f"seed={seed}"]))


def prepared_as_allowed(
    method: str, settings: Sequence[str] = DIGITS, *, seed: int = 0
) -> Prepared:
    """The same, with all clients in every round if the method refuses partial participation."""
    return prepared_with(method, as_allowed(method, settings), seed=seed)


def as_allowed(method: str, settings: Sequence[str]) -> Sequence[str]:
    """The settings, with full participation if the method refuses anything else by name."""
    try:
        prepared_with(method, settings)
    except ConfigError as error:
        if not str(error).startswith("training.participation_rate must be 1 "):
            raise
        return (*settings, "training.participation_rate=1")
    return settings


def open_pool(prepared: Prepared, num_hosts: int = 1) -> ClientPool:
    """A pool in this process, ready for the first round."""
    homes = [i % num_hosts for i in range(len(prepared.clients))]
    pool = ClientPool(LocalTransport(num_hosts), homes)
    pool.load(prepared.data_spec, prepared.clients)
    pool.begin(prepared.run_spec, prepared.algorithm)
    return pool


def start(prepared: Prepared) -> Any:
    """The server before the first round."""
    return prepared.algorithm.init(torch.from_numpy(prepared.run_spec.start_params.copy()))


def loop(prepared: Prepared, pool: ClientPool) -> Run:
    """What the server loop needs."""
    return Run(
        prepared.algorithm,
        prepared.federation,
        pool,
        prepared.plans,
        prepared.evaluation,
        prepared.config.faults,
        prepared.dataset.task,
    )


def finish(prepared: Prepared, num_hosts: int = 1) -> Finished:
    """Run to the end."""
    pool = open_pool(prepared, num_hosts)
    return Finished(list(run_rounds(loop(prepared, pool), start(prepared))), pool, prepared)


def digests(finished: Finished) -> list[str]:
    """One a round."""
    return [record.digest for record in finished.records]
