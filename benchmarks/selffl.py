"""What Self-FL costs beside FedAvg on the same training steps, by realisation and estimator.

    python -m benchmarks.selffl [--passes 3] [--variants a,b] [--output FILE.csv]

W1 in one process on one thread, evaluation off, so that readouts of personalized models are not
part of it. Each run has 12 rounds; the ten from the third on are steady, and two of them probe.
A variant runs between two runs of FedAvg, and its base is their median, so that both saw the same
load. ``steps`` is the number of mini-batch gradients that training took over FedAvg's (a probe's
are not training), ``cpu`` and ``wall`` the processor and clock time over FedAvg's, and ``overhead``
and ``wall_overhead`` these over ``steps``, less one. Medians over the passes. The goal is an
overhead of at most 25 % of the default.

Variants: the presets; the default with every other estimator of either kind. Estimators that read
a synthetic data set's true variances have nothing to read here and are left out.
"""

from __future__ import annotations

import argparse
import math
import statistics

import pandas as pd

from benchmarks.command_line import chosen, from_one, save
from benchmarks.in_process import Bench, Spent, total
from benchmarks.workloads import workload_config
from selffl_ray.algorithms.selffl.config import PRESETS, SelfFLConfig
from selffl_ray.config import ExperimentConfig
from selffl_ray.registry import algorithms, inter_estimators, intra_estimators

ROUNDS, WARM = 12, 2
GOAL = 0.25
NEEDS_TRUTH = "known"


def variants() -> dict[str, tuple[str, ...]]:
    """Settings of every variant by name."""
    found = {f"preset {name}": (f"method.preset={name}",) for name in PRESETS}
    default = SelfFLConfig()
    for kind, registry in (("intra", intra_estimators), ("inter", inter_estimators)):
        used = getattr(default, kind).name
        for name in registry.names():
            if name not in (used, NEEDS_TRUTH):
                found[f"{kind} {name}"] = (f"method.{kind}={name}",)
    return found


def config_of(*settings: str) -> ExperimentConfig:
    """W1 with the method and options of a run."""
    return workload_config("W1", f"training.num_rounds={ROUNDS}", *settings)


class Cost:
    """Of the steady rounds of one run: training steps, processor and clock seconds."""

    def __init__(self, bench: Bench, config: ExperimentConfig) -> None:
        rounds = list(bench.rounds(config))
        self.cpu_s, self.wall_s = total(rounds[WARM:])
        self.steps = _gradients(rounds) - _probed(bench, config)


def _gradients(rounds: list[Spent]) -> int:
    return rounds[-1].record.gradient_steps - rounds[WARM - 1].record.gradient_steps


def _probed(bench: Bench, config: ExperimentConfig) -> int:
    """Gradients that are counted for the probes of the steady rounds."""
    options = algorithms.options(config.method)
    if not isinstance(options, SelfFLConfig):
        return 0
    batch = config.training.batch_size
    each = sum(math.ceil(len(c.train) / batch) for c in bench.prepared.partition.clients)
    return each * sum(options.probes(r) for r in range(WARM, ROUNDS))


def one_pass(
    bench: Bench, wanted: dict[str, tuple[str, ...]], number: int
) -> list[dict[str, object]]:
    """Every variant once, FedAvg before and after each."""
    rows: list[dict[str, object]] = []
    before = Cost(bench, config_of("method=fedavg"))
    for name, settings in wanted.items():
        own = Cost(bench, config_of("method=selffl", *settings))
        after = Cost(bench, config_of("method=fedavg"))
        steps = own.steps / after.steps
        cpu = own.cpu_s / statistics.median((before.cpu_s, after.cpu_s))
        wall = own.wall_s / statistics.median((before.wall_s, after.wall_s))
        ratios = {"steps": steps, "cpu": cpu, "wall": wall}
        over = {"overhead": cpu / steps - 1, "wall_overhead": wall / steps - 1}
        rows.append({"variant": name, "pass": number, "cpu_s": own.cpu_s, **ratios, **over})
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
        before = after
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passes", type=from_one, default=3)
    parser.add_argument("--variants", default=None, help="names with commas; all by default")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    known = variants()
    wanted = {name: known[name] for name in chosen(parser, "--variants", options.variants, known)}
    bench = Bench(config_of("method=fedavg"))
    Cost(bench, config_of("method=fedavg"))  # Warms the caches.
    frame = pd.DataFrame(r for n in range(options.passes) for r in one_pass(bench, wanted, n))
    print("\nmedians over the passes")
    medians = frame.drop(columns=["pass"]).groupby("variant", sort=False).median()
    print(medians.round(3).to_string())
    default = f"preset {SelfFLConfig().preset}"
    if default in medians.index:
        found = float(medians.loc[default, "overhead"])
        verdict = "met" if found <= GOAL else "missed"
        print(f"{default}, the default: {found:+.1%} of at most {GOAL:.0%}: {verdict}")
    save(frame, options.output)


if __name__ == "__main__":
    main()
