"""Seconds a round on a CUDA device: stacks of clients against one by one, and actors that share it.

    python -m benchmarks.gpu [W1 W2 W3 W3s W4 R1] [--stacks 1,8,all,auto] [--actors 1,2,4,8]
                             [--rounds 5] [--output FILE.csv]

The workloads are those of ``benchmarks.workloads``. Entries of each:

  plain loop       one model of torch on the device, one client after the other (not of R1)
  local, CPU       all clients in this process on one thread of the processor (not of R1)
  local, stacks    all clients in this process on the device, so many in a stack; "auto" is what
                   the package chooses
  ray, k actors    k client actors, each with 1/k of the device, stacks as the package chooses

``round_s`` is the median of the rounds after the first, without evaluation; ``first_s`` the first
one, with the device's start where it is new; ``peak_mb`` the device memory that torch had in use at
most in this process. A round ends when its result is in this process's memory, so nothing is still
under way on the device. ``ratio`` is over one by one on the device.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from benchmarks.command_line import save
from benchmarks.export import workload_of
from benchmarks.in_process import Bench
from benchmarks.ours import rounds_of
from benchmarks.plain_loop import PlainLoop
from benchmarks.workloads import ON_GPU, WORKLOADS, workload_config
from selffl_ray.api import request_run
from selffl_ray.experiment import prepare_experiment
from selffl_ray.numerics import be_exact
from selffl_ray.runtime.cluster import cluster

ONE_BY_ONE = "local, stacks of 1"


class Measured(NamedTuple):
    """An entry's rounds, and the device memory that it took in this process."""

    entry: str
    rounds_s: list[float]
    peak_mb: float | None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workloads", nargs="*", metavar="workload", help=", ".join(ON_GPU))
    parser.add_argument("--stacks", default="1,8,all,auto", help="clients in a stack, with commas")
    parser.add_argument("--actors", default="1,2,4,8", help="numbers of actors, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    if unknown := [name for name in options.workloads if name not in ON_GPU]:
        parser.error(f"unknown workload {', '.join(unknown)}; known: {', '.join(ON_GPU)}")
    counts = [n for n in options.stacks.split(",") if n not in ("all", "auto")]
    counts += [k for k in options.actors.split(",") if k]
    if wrong := [n for n in (*counts, str(options.rounds)) if not n.isdecimal() or int(n) < 1]:
        parser.error(
            "--stacks, --actors and --rounds take numbers from 1 (--stacks also all and auto), "
            f"got {', '.join(wrong)}"
        )
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device on this machine")
    # All entries with the same arithmetic, the plain loop's too.
    be_exact()
    names, rounds = options.workloads or list(ON_GPU), options.rounds
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}", flush=True)
    rows: list[dict[str, Any]] = []

    def note(name: str, measured: Iterator[Measured]) -> pd.DataFrame:
        rows.extend(_shown(name, list(_told(name, measured))))
        frame = _with_ratios(pd.DataFrame(rows))
        # After each workload, so that what was measured stays if a later one fails.
        device = f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
        save(frame.assign(device=device), options.output)
        return frame

    for name in names:
        frame = note(name, _in_process(name, options.stacks.split(","), rounds))
    if options.actors:
        with cluster():
            for name in names:
                actors = [int(k) for k in options.actors.split(",")]
                frame = note(name, _on_ray(name, actors, rounds))
    print(frame.to_string(index=False, float_format="%.4f"))


def _in_process(name: str, stacks: list[str], rounds: int) -> Iterator[Measured]:
    cuda = torch.device("cuda")
    config = workload_config(name, f"training.num_rounds={rounds}", "placement.backend=local")
    prepared = prepare_experiment(config)
    if name in WORKLOADS:
        # The plain loop knows no other model, and a processor would take minutes.
        loop = PlainLoop(workload_of(prepared), cuda)
        yield Measured("plain loop", loop.rounds(), None)
        yield Measured("local, CPU", [s.wall_s for s in Bench(config).rounds(config)], None)
    bench = Bench(config, device=cuda)
    for size in stacks:
        number = str(len(prepared.clients)) if size == "all" else size
        sized = workload_config(
            name,
            f"training.num_rounds={rounds}",
            "placement.backend=local",
            f"placement.stack_size={number}",
        )
        torch.cuda.reset_peak_memory_stats()
        took = [s.wall_s for s in bench.rounds(sized)]
        entry = f"local, stacks of {number}" if size != "auto" else "local, auto"
        yield Measured(entry, took, torch.cuda.max_memory_allocated() / 2**20)


def _on_ray(name: str, actors: list[int], rounds: int) -> Iterator[Measured]:
    clients = len(prepare_experiment(workload_config(name)).clients)
    for k in actors:
        each = -(-clients // k)
        # 20 clients fill 7 actors of three, where 8 were asked for.
        started = -(-clients // each)
        config = workload_config(
            name,
            f"training.num_rounds={rounds}",
            f"placement.clients_per_actor={each}",
            f"placement.gpus_per_client={1 / k}",
        )
        with tempfile.TemporaryDirectory() as folder:
            yield Measured(
                f"ray, {started} actor{'s' if started > 1 else ''}",
                rounds_of(request_run(config, output=folder)).rounds_s,
                None,
            )


def _told(name: str, measured: Iterator[Measured]) -> Iterator[Measured]:
    for one in measured:
        seconds = " ".join(f"{s:.4f}" for s in one.rounds_s)
        print(f"{time.strftime('%X')} {name} {one.entry}: {seconds}", flush=True)
        yield one


def _shown(name: str, measured: list[Measured]) -> list[dict[str, Any]]:
    return [
        {
            "workload": name,
            "entry": entry,
            "round_s": statistics.median(rounds_s[1:] or rounds_s),
            "first_s": rounds_s[0],
            "peak_mb": peak_mb,
        }
        for entry, rounds_s, peak_mb in measured
    ]


def _with_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Over one by one of the same workload."""
    alone = frame[frame["entry"] == ONE_BY_ONE].set_index("workload")["round_s"]
    base = frame["workload"].map(alone) if len(alone) else np.nan
    return frame.assign(ratio=frame["round_s"] / base)


if __name__ == "__main__":
    main()
