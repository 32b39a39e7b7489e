"""The prototype study on Fashion-MNIST, on the real system, beside the prototype's figures.

    python -m analysis.prototype [--seeds 0,1,2] [--output analysis/results/prototype]

Writes one CSV row a run and a Markdown table: mean over seeds, what the prototype gave, and whether
the difference lies within the tolerance (5 points for dir01 global, 2.5 elsewhere). As in the
prototype, FedAvg's rate and local training's rate and length are chosen for each scenario by the
sum of both accuracies on seed 100, and Self-FL keeps one configuration; early stops are rounded to
the nearest step (the package's default rounds up and lowers the rate). Local training stands there
twice, because its best length moves its figures by more than the tolerance: as chosen by the
prototype's rule on our partitions (500 or 1,000 steps), and with 100 steps, the shortest choice of
the prototype's grid. Which one the prototype chose is not on record.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from selffl_ray import load_config, run_experiment

CONFIG = Path(__file__).parents[1] / "tune_configs" / "prototype.yaml"

SCENARIOS = {
    "dir01": ["data.partition.alpha=0.1"],
    "dir05": ["data.partition.alpha=0.5"],
    "rot": ["data.partition.name=rotation", "data.partition.alpha=100"],
    "iid": ["data.partition.alpha=100"],
}
TOLERANCE = {("dir01", "global"): 5.0}
USUAL_TOLERANCE = 2.5


CHOSEN: dict[tuple[str, str], tuple[str, ...]] = {}
"""Choices made so far, by scenario and variant."""
TUNING_SEED = 100
RATES = ("0.03", "0.1", "0.3")


NOTE = """Local training stands here twice: as chosen by the prototype's rule (rate and number of
steps by the sum of both accuracies on seed 100), and with 100 steps, the shortest choice of its
grid. The choice moves its figures by more than the tolerance, and which one the prototype made is
not on record. Self-FL rows are single configurations."""


class Variant(NamedTuple):
    """A row of the prototype's tables.

    settings: fixed; choices: settings one of which is chosen for each scenario on seed 100;
    expected: (global, local) by scenario in percent.
    """

    label: str
    settings: tuple[str, ...]
    expected: dict[str, tuple[float, float]]
    choices: tuple[tuple[str, ...], ...] = ()


def _expected(*pairs: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return dict(zip(SCENARIOS, pairs, strict=True))


def _selffl(preset: str, *more: str) -> tuple[str, ...]:
    return ("method.name=selffl", f"method.preset={preset}", "method.intra_pooling=own", *more)


LOCAL = _expected((57.9, 91.4), (68.8, 80.1), (31.4, 67.5), (73.5, 67.7))

VARIANTS = (
    Variant(
        "fedavg",
        ("method=fedavg",),
        _expected((80.5, 80.5), (81.1, 81.1), (68.7, 68.7), (82.4, 82.4)),
        tuple((f"training.learning_rate={rate}",) for rate in RATES),
    ),
    Variant(
        "local, 100 steps in all",
        ("method=local", "training.num_rounds=5", "evaluation.last=1"),
        LOCAL,
    ),
    Variant(
        "local, rate and length chosen",
        ("method=local",),
        LOCAL,
        tuple(
            (f"training.learning_rate={rate}", f"training.num_rounds={rounds}", "evaluation.last=1")
            for rate in RATES
            for rounds in (5, 25, 50)
        ),
    ),
    Variant(
        "interpolated",
        _selffl("interpolated"),
        _expected((82.5, 93.5), (81.2, 86.3), (69.8, 73.6), (82.6, 82.7)),
    ),
    Variant(
        "no shrinkage (interpolated, kappa 0)",
        _selffl("interpolated", "method.kappa=0"),
        _expected((82.5, 93.6), (81.2, 86.1), (69.8, 72.8), (82.6, 79.9)),
    ),
    Variant(
        "two_tap",
        _selffl("two_tap"),
        _expected((82.4, 93.4), (81.3, 86.4), (69.8, 72.9), (82.6, 82.5)),
    ),
    Variant(
        "exact, rho 0.1",
        _selffl("exact", "method.rounding=nearest"),
        _expected((82.6, 92.6), (81.3, 84.3), (69.5, 67.6), (76.6, 68.1)),
    ),
    Variant(
        "as_described, eta 0.3, rho 0.1",
        _selffl("as_described", "method.contraction=0.1"),
        _expected((83.2, 92.0), (79.8, 82.2), (68.0, 65.9), (80.3, 75.4)),
    ),
    Variant(
        "as_described, eta 0.1, rho 0.01",
        _selffl("as_described", "training.learning_rate=0.1"),
        _expected((84.5, 93.7), (81.3, 85.3), (69.0, 72.0), (82.1, 79.5)),
    ),
)


def runs(seeds: list[int], labels: list[str] | None) -> Iterator[dict[str, object]]:
    """One row a scenario, seed and variant."""
    for scenario in SCENARIOS:
        for seed in seeds:
            for variant in VARIANTS:
                if labels is not None and variant.label not in labels:
                    continue
                chosen = _chosen(scenario, variant)
                yield _run(scenario, seed, variant, chosen) | {"chosen": " ".join(chosen)}


def _chosen(scenario: str, variant: Variant) -> tuple[str, ...]:
    """The choice with the highest sum of both accuracies on the tuning seed."""
    if not variant.choices:
        return ()
    if (scenario, variant.label) in CHOSEN:
        return CHOSEN[scenario, variant.label]

    def both(choice: tuple[str, ...]) -> float:
        row = _run(scenario, TUNING_SEED, variant, choice)
        return float(row["global"]) + float(row["local"])

    CHOSEN[scenario, variant.label] = max(variant.choices, key=both)
    return CHOSEN[scenario, variant.label]


def _run(scenario: str, seed: int, variant: Variant, chosen: tuple[str, ...]) -> dict[str, Any]:
    partition = SCENARIOS[scenario]
    fixed = ["placement.backend=local", "tracking.enabled=false", f"seed={seed}"]
    config = load_config(CONFIG, [*partition, *variant.settings, *chosen, *fixed])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = run_experiment(config, output=folder)
        final = result.summary["final"]
        table = result.uncertainty
        shrinkage = None
        if not table.empty:
            last = table[table["round_index"] == table["round_index"].max()]
            shrinkage = float(last["shrinkage"].median())
    return {
        "scenario": scenario,
        "variant": variant.label,
        "seed": seed,
        "global": 100 * final["test/global_accuracy"],
        "local": 100 * final["test/local_accuracy"],
        "median_shrinkage": shrinkage,
        "gradient_steps": final["cost/gradient_steps"],
        "seconds": time.monotonic() - began,
    }


def table(rows: pd.DataFrame) -> str:
    """Markdown: found, expected and difference for every variant, scenario and measure."""
    lines = [
        "| variant | scenario | measure | found | prototype | difference | tolerance | within |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        for scenario, expected in variant.expected.items():
            own = rows[(rows["variant"] == variant.label) & (rows["scenario"] == scenario)]
            if own.empty:
                continue
            for measure, wanted in zip(("global", "local"), expected, strict=True):
                mean, std = own[measure].mean(), own[measure].std()
                allowed = TOLERANCE.get((scenario, measure), USUAL_TOLERANCE)
                good = "yes" if abs(mean - wanted) <= allowed else "**no**"
                lines.append(
                    f"| {variant.label} | {scenario} | {measure} | {mean:.1f} ± {std:.1f} | "
                    f"{wanted:.1f} | {mean - wanted:+.1f} | {allowed:g} | {good} |"
                )
    return "\n".join(lines)


def shrinkage_table(rows: pd.DataFrame) -> str:
    """Markdown: median shrink factor over clients after the last probe, mean over seeds."""
    known = rows.dropna(subset=["median_shrinkage"])
    means = known.pivot_table("median_shrinkage", "variant", "scenario", sort=False)
    lines = [
        "Median shrink factor over the clients at the end, mean over seeds:",
        "",
        f"| variant | {' | '.join(SCENARIOS)} |",
        f"| --- |{' --- |' * len(SCENARIOS)}",
    ]
    for label, row in means.iterrows():
        lines.append(f"| {label} | {' | '.join(f'{row[s]:.2f}' for s in SCENARIOS)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=None, help="labels, separated by semicolons")
    parser.add_argument("--output", default="analysis/results/prototype")
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    labels = options.variants.split(";") if options.variants else None
    found: list[dict[str, object]] = []
    for row in runs(seeds, labels):
        found.append(row)
        print(row, flush=True)
    rows = pd.DataFrame(found)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(output.with_suffix(".csv"), index=False, float_format="%.4f")
    command = f"python -m analysis.prototype --seeds {options.seeds}"
    text = f"Command: `{command}`\n\n{table(rows)}\n\n{NOTE}\n\n{shrinkage_table(rows)}\n"
    output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
