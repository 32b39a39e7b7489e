"""Time and memory of a large client store: writing, opening, dealing, and the hosts' own parts.

    python -m benchmarks.store [--examples 1000000 --clients 10000] [--output FILE.csv]

The store holds random pictures of 28x28 bytes, as many of each client. Every step runs in a fresh
process, on a store that the page cache has just seen:

    write           the examples are drawn and written, a client after the other
    open            ``Store(folder)``: manifest and index
    prepare         what every process of a run does first: find the finished store and open it
    deal            what the driver does next: each client's rows, split in three
    host, S %       ``ClientData`` of S % of the clients, spread over the store: what a host keeps

Memory is what the process has more than before the step, in MB (10^6 bytes): ``private_mb`` (USS)
and ``pss_mb`` afterwards, ``peak_mb`` the resident peak meanwhile, with the pages of the store that
were mapped. ``own_mb`` are the bytes that a host's tensors hold: float32, four times the store's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.command_line import save
from selffl_ray.client_data import ClientData
from selffl_ray.datasets.base import Dataset, Group, no_files
from selffl_ray.datasets.partition import NaturalConfig, natural
from selffl_ray.datasets.splits import ClientRows, split_clients
from selffl_ray.datasets.store import Store, prepare
from selffl_ray.messages import DataSpec
from selffl_ray.registry import Component, register_dataset
from selffl_ray.seeding import generator
from selffl_ray.tasks import DataShape

NAME = "many_pictures"
SHAPE = (1, 28, 28)
CLASSES = 62
SHARES = (0.01, 0.1)
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class ManyPicturesConfig:
    """Options of the data set that is written."""

    examples: int = 1_000_000
    clients: int = 10_000


@register_dataset(NAME, ManyPicturesConfig)
def many_pictures(config: ManyPicturesConfig) -> Dataset:
    """Random pictures of many clients."""

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        for client, own in enumerate(np.array_split(np.empty(config.examples), config.clients)):
            rng = generator(seed, "benchmark", client_id=str(client))
            x = np.frombuffer(rng.bytes(len(own) * int(np.prod(SHAPE))), np.uint8)
            y = rng.integers(CLASSES, size=len(own))
            yield Group(f"client-{client}", x.reshape(-1, *SHAPE), y)

    return Dataset(
        name=NAME,
        title="Random pictures",
        licence="generated",
        shape=DataShape(SHAPE, CLASSES),
        find=no_files,
        read=read,
        shift_scale=(0.0, 1.0),
        natural=True,
    )


def memory() -> dict[str, float]:
    """Private, proportional and peak resident bytes of this process, in MB."""
    pages = _fields("/proc/self/smaps_rollup")
    private = pages["Private_Clean"] + pages["Private_Dirty"]
    peak = _fields("/proc/self/status")["VmHWM"]
    return {"private_mb": private, "pss_mb": pages["Pss"], "peak_mb": peak}


def _fields(path: str) -> dict[str, float]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {p[0].rstrip(":"): int(p[1]) * 1024 / MB for p in lines if p[-1] == "kB"}


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the work returns, still held as memory is looked at, and its seconds and memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory()
    began = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - began
    growth = {key: value - before[key] for key, value in memory().items()}
    return kept, {"seconds": seconds, **growth}


def write(config: ManyPicturesConfig, root: Path) -> dict[str, Any]:
    """Draw and write the store."""
    dataset = many_pictures(config)
    return measured(lambda: prepare(dataset, config, None, 0, root))[1]


def open_store(config: ManyPicturesConfig, root: Path) -> dict[str, Any]:
    """Open it by its folder."""
    (folder,) = root.glob(f"{NAME}-*")
    return measured(lambda: Store(folder))[1]


def prepare_again(config: ManyPicturesConfig, root: Path) -> dict[str, Any]:
    """Find it and open it."""
    return write(config, root)


def deal(config: ManyPicturesConfig, root: Path) -> dict[str, Any]:
    """The driver's part before any host starts."""
    dataset = many_pictures(config)
    store = prepare(dataset, config, None, 0, root)

    def work() -> object:
        return split_clients(natural(NaturalConfig(), dataset, store, 0), (0.6, 0.2, 0.2), 0.0, 0)

    return measured(work)[1]


def host(config: ManyPicturesConfig, root: Path, share: float) -> dict[str, Any]:
    """A host that is given a share of the clients."""
    store = prepare(many_pictures(config), config, None, 0, root)
    own = {}
    for index in range(0, config.clients, round(1 / share)):
        rows = np.arange(store.start_rows[index], store.start_rows[index + 1])
        train, val, test = np.split(rows, [len(rows) * 6 // 10, len(rows) * 8 // 10])
        own[index] = ClientRows(store.client_ids[index], train, val, test, 0)
    spec = DataSpec(Component(NAME, config), None, 0, str(root), store.manifest.digest)
    del store
    data, figures = measured(lambda: ClientData(spec, own, torch.device("cpu")))
    return {**figures, "own_mb": data.num_bytes / MB}


STEPS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
    "write": (write, ()),
    "open": (open_store, ()),
    "prepare": (prepare_again, ()),
    "deal": (deal, ()),
    **{f"host, {100 * share:g} %": (host, (share,)) for share in SHARES},
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--root", default=None, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    config = ManyPicturesConfig(examples=options.examples, clients=options.clients)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.root) as folder:
        for step, (work, arguments) in STEPS.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                figures = pool.apply(work, (config, Path(folder), *arguments))
            sizes = {"examples": config.examples, "clients": config.clients}
            rows.append({"step": step, **sizes, **figures})
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False), flush=True)
    save(pd.DataFrame(rows), options.output, "%.4f")


if __name__ == "__main__":
    main()
