"""Memory over many rounds, on Ray with two client actors, tracking and checkpoints on.

    python -m benchmarks.memory [--rounds 500] [--methods fedavg,selffl] [--output FILE.csv]

The default experiment (digits of 14 writers) with few steps a round, everything else as it stands:
evaluation every 5 rounds, a checkpoint every 10, an MLflow store. After every round the driver
actor reads the proportional set size (PSS: shared pages count in parts) of its own process and of
the client actors', and the bytes in use in Ray's object store. The figure is the slope after
round 50 by least squares, in kB (1000 bytes) a round, with its standard error. The error takes the
residuals as independent, which memory in steps is not, so it is rather too small.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import psutil

from benchmarks.command_line import chosen, save
from selffl_ray import load_config
from selffl_ray.api import make_job, placement_of
from selffl_ray.config import resolve
from selffl_ray.execution import run_jobs
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import algorithms
from selffl_ray.run_loop import Progress
from selffl_ray.run_writer import Job
from selffl_ray.runtime.actors import Control
from selffl_ray.runtime.cluster import cluster
from selffl_ray.runtime.driver_actor import follow
from selffl_ray.runtime.placement import PlacementPlan

WARM_UP = 50
"""Rounds that are left out: caches fill, and tables get their first rows."""
SERIES = ("driver", "host 0", "host 1", "object store")
GOAL = 20.0
"""Most kB a round."""


class Slope(NamedTuple):
    """Slope and its standard error, in units of y a unit of x."""

    slope: float
    error: float


def fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Slope:
    """Straight line by least squares through at least three points."""
    centred = x - x.mean()
    square = float(centred @ centred)
    slope = float(centred @ y) / square
    residual = y - y.mean() - slope * centred
    return Slope(slope, float(np.sqrt(residual @ residual / (len(x) - 2) / square)))


class Meter(Control):
    """Reads the memory in the server loop itself, whenever a round is finished.

    Args:
        folder: the run's. rounds: how many rows to make room for, before the first is read.
    """

    def __init__(self, folder: Path, rounds: int) -> None:
        super().__init__()
        self._folder = folder
        self._processes: list[psutil.Process] = []
        self.rows = np.zeros((rounds, len(SERIES)))

    def emit(self, event: Any) -> None:
        """A row for every round; nobody else listens."""
        if not isinstance(event, Progress):
            return
        if not self._processes:
            found = json.loads((self._folder / "environment.json").read_text())
            hosts = [actor["pid"] for actor in found["placement"]["actors"]]
            self._processes = [psutil.Process(pid) for pid in (os.getpid(), *hosts)]
        sizes = [process.memory_full_info().pss for process in self._processes]
        self.rows[event.round_index] = [*sizes, store_bytes()]


def store_bytes() -> float:
    """Bytes in use in the object store."""
    # After selffl_ray, which keeps it on loopback.
    import ray

    everything: dict[str, float] = ray.cluster_resources()
    free: dict[str, float] = ray.available_resources()
    return everything["object_store_memory"] - free.get("object_store_memory", 0.0)


def metered(
    _control: Control, job: Job, plan: PlacementPlan, rounds: int
) -> npt.NDArray[np.float64]:
    """What the driver actor does: the job, with a meter for whoever would listen."""
    meter = Meter(Path(job.folder), rounds)
    run_jobs(meter, [job], plan, "memory")
    return meter.rows


def measure(method: str, rounds: int, folder: Path) -> pd.DataFrame:
    """Memory of one run, a row a round."""
    settings = [
        f"method={method}",
        f"training.num_rounds={rounds}",
        "training.num_local_steps=2",
        "placement.clients_per_actor=7",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
    ]
    config = resolve(load_config(None, settings, folder=folder))
    with cluster() as here:
        plan = placement_of(prepare_experiment(config), here.nodes)
        job = make_job(config, folder / method)
        rows = follow(
            metered,
            (job, plan, rounds),
            plan=plan,
            label="memory",
            watch=lambda event: None,
            interrupted=lambda: False,
        )
    frame = pd.DataFrame(rows, columns=list(SERIES)).rename_axis("round_index").reset_index()
    frame.insert(0, "method", method)
    return frame


def slopes(frame: pd.DataFrame) -> pd.DataFrame:
    """Slopes in kB a round after the warm-up, by method and series."""
    rows = []
    for method, own in frame[frame["round_index"] >= WARM_UP].groupby("method", sort=False):
        x = own["round_index"].to_numpy(np.float64)
        for name in SERIES:
            found = fit(x, own[name].to_numpy(np.float64) / 1000)
            within = found.slope <= GOAL
            rows.append((method, name, found.slope, found.error, within, len(own)))
    columns = ["method", "series", "kB_a_round", "error", "within_goal", "points"]
    return pd.DataFrame(rows, columns=columns)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--methods", default="fedavg,selffl", help="names with commas")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    if options.rounds < WARM_UP + 3:
        parser.error(f"--rounds must be >= {WARM_UP + 3}, got {options.rounds}")
    methods = chosen(parser, "--methods", options.methods, algorithms.names())
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for method in methods:
            parts.append(measure(method, options.rounds, Path(folder)))
            print(slopes(parts[-1]).round(2).to_string(index=False), flush=True)
    frame = pd.concat(parts)
    save(frame, options.output, "%.0f")


if __name__ == "__main__":
    main()
