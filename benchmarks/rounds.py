"""Seconds a round beside a plain loop.

    python -m benchmarks.rounds W1 [W2 ...] [--passes 3] [--output FILE.csv]

Each pass runs the plain loop and then each of our placements, so that ratios compare what ran at
the same time on a machine that others may share. A placement's figure is the median of its steady
rounds (all but the first) over that of the plain loop of the same pass; "outside" is everything
but those steady rounds: start, data, first round, end.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd

from benchmarks.plain_loop import PlainLoop
from benchmarks.workloads import WORKLOADS, workload_config
from selffl_ray import run_experiment
from selffl_ray.environment import processor
from selffl_ray.experiment import prepare_experiment

PLACEMENTS = {
    "local pool": ["placement.backend=local"],
    "ray, 1 actor": ["placement.clients_per_actor=100000"],
    "ray, 2 actors": [],
    "ray, an actor each": ["placement.clients_per_actor=1"],
}
MOST_ACTORS = 20


def measure(name: str, label: str, plain: float | None) -> dict[str, object]:
    """One placement of one workload."""
    settings = PLACEMENTS[label]
    clients = len(prepare_experiment(workload_config(name)).client_ids)
    if label == "ray, 2 actors":
        settings = [f"placement.clients_per_actor={(clients + 1) // 2}"]
    config = workload_config(name, *settings)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rounds = run_experiment(config, output=folder).rounds["round_s"].tolist()
    whole = time.perf_counter() - began
    steady = statistics.median(rounds[1:])
    return {
        "workload": name,
        "entry": label,
        "round_s": steady,
        "ratio": None if plain is None else steady / plain,
        "outside_s": whole - sum(rounds[1:]),
    }


def one_pass(name: str, number: int) -> list[dict[str, object]]:
    """The plain loop, then every placement that fits."""
    prepared = prepare_experiment(workload_config(name))
    plain = statistics.median(PlainLoop(name, prepared).rounds()[1:])
    rows: list[dict[str, object]] = [
        {"workload": name, "entry": "plain loop", "round_s": plain, "ratio": 1.0}
    ]
    for label in PLACEMENTS:
        if label == "ray, an actor each" and len(prepared.client_ids) > MOST_ACTORS:
            continue
        rows.append(measure(name, label, plain))
    return [row | {"pass": number} for row in rows]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workloads", nargs="+", choices=sorted(WORKLOADS))
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for number in range(options.passes):
        for name in options.workloads:
            rows += one_pass(name, number)
            print(pd.DataFrame(rows[-5:]).to_string(index=False), flush=True)
    frame = pd.DataFrame(rows)
    medians = frame.groupby(["workload", "entry"], sort=False)[["round_s", "ratio", "outside_s"]]
    print(medians.median().round(4).to_string())
    if options.output:
        frame["machine"] = f"{processor()}, {platform.platform()}"
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(options.output, index=False, float_format="%.5f")


if __name__ == "__main__":
    main()
