"""What every method costs beside FedAvg, and beyond the gradients that it computes.

    python -m benchmarks.algorithms [--passes 3] [--methods a,b] [--output FILE.csv]

W1 in one process, on one thread, in processor time: other work on the machine slows the clock much
more than this. The steady rounds are those by which a run of 10 rounds exceeds one of 2. Each pass
runs every method once. Within a pass, ``gradients`` is a method's mini-batch gradients over
FedAvg's, ``time`` its processor time over FedAvg's, and ``overhead`` their quotient less one: what
a method costs beyond its gradients. Shown are medians over the passes.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import pandas as pd

from benchmarks.command_line import chosen, from_one, save
from benchmarks.workloads import workload_config
from selffl_ray import run_experiment
from selffl_ray.registry import algorithms

REFERENCE = "fedavg"


def steady(method: str) -> tuple[float, float]:
    """Processor seconds and gradients of the steady rounds of W1."""
    (short_s, short), (long_s, long) = (_run(method, rounds) for rounds in (2, 10))
    return long_s - short_s, long - short


def _run(method: str, rounds: int) -> tuple[float, float]:
    """Processor seconds of a whole run, and its gradients."""
    settings = ("placement.backend=local", f"method={method}", f"training.num_rounds={rounds}")
    config = workload_config("W1", *settings)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        result = run_experiment(config, output=folder)
        spent = time.process_time() - began
        return spent, float(result.rounds["cost/gradient_steps"].iloc[-1])


def one_pass(methods: list[str], number: int) -> list[dict[str, object]]:
    """Every method once, FedAvg among them."""
    rows: list[dict[str, object]] = []
    for method in dict.fromkeys((REFERENCE, *methods)):
        seconds, gradients = steady(method)
        rows.append({"method": method, "pass": number, "cpu_s": seconds, "gradients": gradients})
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    return rows


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Beside FedAvg's: medians over the passes of ratios within one pass, as machines drift."""
    cpu_s = rows.pivot(index="pass", columns="method", values="cpu_s")
    gradients = rows.pivot(index="pass", columns="method", values="gradients")
    time_ratio = cpu_s.div(cpu_s[REFERENCE], axis=0)
    steps_ratio = gradients.div(gradients[REFERENCE], axis=0)
    overhead = time_ratio / steps_ratio - 1
    found = {"time": time_ratio, "gradients": steps_ratio, "overhead": overhead}
    return pd.DataFrame({name: ratio.median() for name, ratio in found.items()}).round(2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passes", type=from_one, default=3)
    parser.add_argument("--methods", default=None, help="names with commas; all by default")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    methods = chosen(parser, "--methods", options.methods, algorithms.names())
    steady(REFERENCE)  # Prepares the data and warms the caches.
    rows = [row for n in range(options.passes) for row in one_pass(methods, n)]
    frame = pd.DataFrame(rows)
    print(table(frame).to_string())
    save(frame, options.output)


if __name__ == "__main__":
    main()
