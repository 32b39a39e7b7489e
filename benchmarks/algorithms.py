"""Seconds a round of every method, beside FedAvg's and beside the gradients that it computes.

    python -m benchmarks.algorithms [--passes 3] [--methods a,b] [--output FILE.csv]

W1 in one process. Each pass runs FedAvg and then every method, so that ratios compare what ran at
the same time. ``gradients`` is the mini-batch gradients of a method's steady rounds over FedAvg's,
``time`` its seconds over FedAvg's, and ``overhead`` their quotient less one: what a method costs
beyond its gradients. Rounds are summed, all but the first: some methods' rounds differ in length.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import pandas as pd

from benchmarks.workloads import workload_config
from selffl_ray import run_experiment
from selffl_ray.environment import processor
from selffl_ray.registry import algorithms

REFERENCE = "fedavg"


def steady(method: str) -> tuple[float, float]:
    """Seconds and gradients of the steady rounds of a run of W1."""
    config = workload_config("W1", "placement.backend=local", f"method={method}")
    with tempfile.TemporaryDirectory() as folder:
        rounds = run_experiment(config, output=folder).rounds
    gradients = rounds["cost/gradient_steps"]
    return float(rounds["round_s"].iloc[1:].sum()), float(gradients.iloc[-1] - gradients.iloc[0])


def one_pass(methods: list[str], number: int) -> list[dict[str, object]]:
    """FedAvg, then every method."""
    base_s, base_gradients = steady(REFERENCE)
    rows: list[dict[str, object]] = []
    for method in methods:
        seconds, gradients = steady(method)
        time, more = seconds / base_s, gradients / base_gradients
        rows.append(
            {
                "method": method,
                "seconds": seconds,
                "time": time,
                "gradients": more,
                "overhead": time / more - 1,
                "pass": number,
            }
        )
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--methods", default=None, help="names with commas; all by default")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    methods = options.methods.split(",") if options.methods else algorithms.names()
    steady(REFERENCE)  # Prepares the data and warms the caches.
    rows = [row for n in range(options.passes) for row in one_pass(methods, n)]
    frame = pd.DataFrame(rows)
    medians = frame.groupby("method", sort=False)[["time", "gradients", "overhead"]].median()
    print(medians.round(3).to_string())
    if options.output:
        frame["machine"] = f"{processor()}, {platform.platform()}"
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(options.output, index=False, float_format="%.5f")


if __name__ == "__main__":
    main()
