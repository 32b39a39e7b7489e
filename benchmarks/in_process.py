"""Rounds of an experiment in this process, one by one, without tables, tracker and checkpoints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from selffl_ray.config import ExperimentConfig
from selffl_ray.driver import RoundRecord, Run, run_rounds
from selffl_ray.experiment import Prepared, fit_stacks, prepare_experiment
from selffl_ray.pool import ClientPool, LocalTransport
from selffl_ray.runtime.actors import device_bytes


class Spent(NamedTuple):
    """What a round took, training and aggregation: seconds of the processor and of the clock."""

    cpu_s: float
    wall_s: float
    record: RoundRecord


class Bench:
    """One pool with the data of one workload, for runs of several methods one after the other.

    Args:
        pool: the one to use; by default one in this process.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        num_hosts: int = 1,
        device: torch.device | None = None,
        pool: ClientPool | None = None,
    ) -> None:
        torch.set_num_threads(1)
        self.prepared = prepare_experiment(config)
        homes = [i % num_hosts for i in range(len(self.prepared.clients))]
        self.pool = pool or ClientPool(LocalTransport(num_hosts, device), homes)
        self._memory_bytes = device_bytes(device or torch.device("cpu"), 1.0)
        self.pool.load(self.prepared.data_spec, self.prepared.clients)

    def rounds(self, config: ExperimentConfig, evaluated: Collection[int] = ()) -> Iterator[Spent]:
        """Every round of a run on the same data, with what it took.

        Args:
            evaluated: rounds that end with an evaluation, which is then part of what they took.
        """
        prepared = fit_stacks(prepare_experiment(config), [self._memory_bytes])
        same = prepared.partition.digest == self.prepared.partition.digest
        assert same, "the pool holds the data of its workload only"
        self.pool.begin(prepared.run_spec, prepared.algorithm)
        start_P = torch.from_numpy(prepared.run_spec.start_params.copy())
        run = run_of(prepared, self.pool, evaluated)
        records = run_rounds(run, prepared.algorithm.init(start_P))
        for _ in prepared.plans:
            cpu, wall = time.process_time(), time.perf_counter()
            record = next(records)
            yield Spent(time.process_time() - cpu, time.perf_counter() - wall, record)


def run_of(prepared: Prepared, pool: ClientPool, evaluated: Collection[int] = ()) -> Run:
    """What the server loop needs of a prepared experiment, evaluated after some rounds only."""
    return Run(
        prepared.algorithm,
        prepared.federation,
        pool,
        prepared.plans,
        dataclasses.replace(prepared.evaluation, rounds=frozenset(evaluated)),
        prepared.config.faults,
        prepared.dataset.task,
    )


def total(rounds: Sequence[Spent]) -> tuple[float, float]:
    """Processor and clock seconds of several rounds together."""
    return sum(r.cpu_s for r in rounds), sum(r.wall_s for r in rounds)
