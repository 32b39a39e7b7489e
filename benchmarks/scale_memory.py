"""Memory of a federation: what the driver holds, what a client adds, and what a large one takes.

Each measurement runs in a process of its own, so that nothing of another is left in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import torch

from benchmarks.in_process import run_of
from selffl_ray import ExperimentConfig, load_config
from selffl_ray.allocator import give_back_freed_memory
from selffl_ray.driver import run_rounds
from selffl_ray.experiment import Prepared, prepare_experiment
from selffl_ray.host import ClientHost
from selffl_ray.pool import ClientPool, LocalTransport

SPAWN = multiprocessing.get_context("spawn")
SAMPLE_S = 0.005


class Taken(NamedTuple):
    """Bytes and seconds of some rounds of a federation.

    peak: most resident memory in the rounds over that before the first; unique: what belongs to the
    process alone after the last, without what it has freed and kept; data: the clients' examples;
    model: one model's parameters.
    """

    clients: int
    peak: int
    unique: int
    data: int
    model: int
    round_s: float
    whole_s: float


def alone(function: Callable[..., Taken], *arguments: Any) -> Taken:
    """What the function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as process:
        return process.submit(function, *arguments).result()


def federation(clients: int, *settings: str, examples: int = 2) -> ExperimentConfig:
    """Many clients with hardly any data, and a multilayer perceptron."""
    return load_config(
        None,
        [
            "data.name=synthetic_logistic",
            f"data.num_clients={clients}",
            f"data.max_examples={examples}",
            "model.name=mlp",
            "placement.backend=local",
            "tracking.enabled=false",
            "evaluation.splits=[0.5,0.0,0.5]",
            "training.learning_rate=0.01",
            "training.num_local_steps=1",
            *settings,
        ],
    )


def in_driver(config: ExperimentConfig) -> Taken:
    """Memory of the driver alone: the clients live in another process."""
    began = time.perf_counter()
    prepared = prepare_experiment(config)
    with contextlib.closing(_OtherProcess()) as transport:
        pool = ClientPool(transport, [0] * len(prepared.clients))
        return _measure(prepared, pool, began)


def in_all(config: ExperimentConfig, folder: str | None) -> Taken:
    """Memory of driver and clients in one process; state in ``folder`` if one is given."""
    began = time.perf_counter()
    prepared = prepare_experiment(config)
    spec = dataclasses.replace(prepared.run_spec, state_folder=folder)
    prepared = dataclasses.replace(prepared, run_spec=spec)
    pool = ClientPool(LocalTransport(), [0] * len(prepared.clients))
    return _measure(prepared, pool, began)


def _measure(prepared: Prepared, pool: ClientPool, began: float) -> Taken:
    pool.load(prepared.data_spec, prepared.clients)
    pool.begin(prepared.run_spec, prepared.algorithm)
    start_P = torch.from_numpy(prepared.run_spec.start_params.copy())
    records = run_rounds(run_of(prepared, pool), prepared.algorithm.init(start_P))
    with _peak() as peak:
        seconds = [record.metrics["time/round_s"] for record in records]
    _empty_allocators()
    unique = psutil.Process().memory_full_info().uss
    count, model = len(prepared.clients), start_P.nbytes
    whole = time.perf_counter() - began
    return Taken(count, peak[0], unique, _data_bytes(prepared), model, seconds[-1], whole)


def _empty_allocators() -> None:
    """Return what the allocators keep for later, where they can; it is no client's."""
    pa.default_memory_pool().release_unused()
    give_back_freed_memory()


def _data_bytes(prepared: Prepared) -> int:
    """Bytes of all clients' examples: float32 features and int64 labels."""
    each = 4 * math.prod(prepared.store.manifest.x_shape) + 8
    return each * sum(len(c.train) + len(c.val) + len(c.test) for c in prepared.clients)


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """Most resident memory over that at the start, looked at every few milliseconds."""
    process, done, found = psutil.Process(), threading.Event(), [0]
    start = process.memory_info().rss

    def look() -> None:
        while not done.wait(SAMPLE_S):
            found[0] = max(found[0], process.memory_info().rss - start)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


class _OtherProcess:
    """A transport with one host, in a process of its own."""

    num_hosts = 1

    def __init__(self) -> None:
        self._end, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(theirs,))
        self._process.start()

    def call(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], shared: Any = None
    ) -> dict[int, Any]:
        first = () if shared is None else (shared,)
        found = {}
        for host, own in arguments.items():
            self._end.send((method, (*first, *own)))
            found[host] = self._end.recv()
        return found

    def restart(self, host: int) -> None:
        raise NotImplementedError("the host of a measurement does not die")

    def close(self) -> None:
        self._end.send(None)
        self._process.join()


def _serve(end: Connection) -> None:
    host = ClientHost()
    while (asked := end.recv()) is not None:
        method, arguments = asked
        end.send(getattr(host, method)(*arguments))


def large(clients: int, rate: float, folder: Path | None, rounds: int = 3) -> Taken:
    """Rounds of Ditto on a perceptron 784-100-10, each client with a model of its own."""
    settings: Sequence[str] = (
        "data.dimension=784",
        "model.hidden=[100]",
        "method=ditto",
        f"training.num_rounds={rounds}",
        f"training.participation_rate={rate}",
    )
    return alone(in_all, federation(clients, *settings), None if folder is None else str(folder))
