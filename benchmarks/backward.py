"""What the dense networks' own backward pass saves beside automatic differentiation.

    python -m benchmarks.backward [--workloads W1,W3,W4] [--passes 5] [--output FILE.csv]

FedAvg in one process on one thread, evaluation off. In each pass a run with the one and a run with
the other, which begins by turns; processor seconds of a steady round (the first one, which tries
out the shapes, is left out), their ratio within the pass, and medians. Both must end with the same
bits, or the program stops.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any
from unittest.mock import patch

import pandas as pd

from benchmarks.command_line import chosen, from_one, save
from benchmarks.in_process import Bench, total
from benchmarks.workloads import workload_config
from selffl_ray.models.base import Model
from selffl_ray.models.build import build_model

OWN, AUTOMATIC = "own", "automatic"
DENSE = ("W1", "W3", "W4")


def without_forward(*options: Any) -> Model:
    """The same model, left to automatic differentiation."""
    return dataclasses.replace(build_model(*options), forward=None)


def seconds(bench: Bench, workload: str, way: str) -> tuple[float, str]:
    """Processor seconds of a steady round, and the digest after the last."""
    build = build_model if way == OWN else without_forward
    with patch("selffl_ray.host.build_model", build):
        rounds = list(bench.rounds(workload_config(workload)))
    return total(rounds[1:])[0] / len(rounds[1:]), rounds[-1].record.digest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", default=None, help="with commas; of dense networks")
    parser.add_argument("--passes", type=from_one, default=5)
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    rows = []
    for workload in chosen(parser, "--workloads", options.workloads, DENSE):
        bench = Bench(workload_config(workload))
        for run in range(options.passes):
            ways = (OWN, AUTOMATIC) if run % 2 else (AUTOMATIC, OWN)
            found = {way: seconds(bench, workload, way) for way in ways}
            (own_s, own), (automatic_s, automatic) = found[OWN], found[AUTOMATIC]
            assert own == automatic, f"{workload}: {own} against {automatic}"
            row = {"workload": workload, "pass": run, "own_s": own_s, "automatic_s": automatic_s}
            rows.append(row | {"ratio": own_s / automatic_s, "digest": own})
            print(
                f"{workload} pass {run}: {own_s:.3f} s, {automatic_s:.3f} s automatic", flush=True
            )
        ratios = [r["ratio"] for r in rows if r["workload"] == workload]
        print(f"{workload}: {statistics.median(ratios):.2f} of the time (median of ratios)")
    save(pd.DataFrame(rows), options.output)


if __name__ == "__main__":
    main()
