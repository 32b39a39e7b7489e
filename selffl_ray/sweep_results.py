"""Tables of a sweep: a row a trial, and configurations ranked with intervals over seeds.

Only what does not depend on the machine stands in them, so a sweep that was killed and resumed
gives the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from selffl_ray.sweep import Trial

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and the half width of its t interval; NaN half width with a single value."""

    mean: float
    half: float

    @property
    def includes_zero(self) -> bool:
        """Whether 0 lies within; a single value excludes nothing but itself."""
        return self.mean == 0 or math.isnan(self.half) or abs(self.mean) <= self.half


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval over seeds."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return Interval(float(array.mean()), math.nan)
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(array) - 1))
    half = quantile * array.std(ddof=1) / math.sqrt(len(array))
    return Interval(float(array.mean()), float(half))


def trial_rows(trials: Sequence[Trial], folder: Path) -> pd.DataFrame:
    """What each trial left in its folder, in the order of the trials.

    Args:
        folder: holds the trials' folders.
    """
    return pd.DataFrame([_row(trial, folder / trial.name) for trial in trials])


def _row(trial: Trial, folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    summary: dict[str, Any] = {"status": "UNFINISHED"}
    if path.exists():
        summary = json.loads(path.read_text())
    final: Mapping[str, float] = summary.get("final", {})
    kept = {k: v for k, v in final.items() if k.startswith(("val/", "test/", "new/", "cost/"))}
    return {
        "configuration": trial.configuration.number,
        "label": trial.configuration.label,
        "seed": trial.seed,
        "trial": trial.name,
        "status": summary["status"],
        "error": summary.get("error") or "",
        "rounds": summary.get("rounds", 0),
        "digest": summary.get("digest") or "",
        **dict(sorted(kept.items())),
    }


class Ranked(NamedTuple):
    """A configuration in the ranking.

    value: of the metric; difference: to the reference, paired by seed (None for itself);
    level: not told from the best, whose paired difference to it includes 0.
    """

    configuration: int
    label: str
    seeds: tuple[int, ...]
    value: Interval
    difference: Interval | None
    level: bool


def rank(rows: pd.DataFrame, metric: str, mode: str, reference: int) -> list[Ranked]:
    """Configurations whose every seed was finished, best first.

    Args:
        reference: number of the configuration that the others are compared with.
    """
    finished = rows[rows["status"] == "FINISHED"]
    if finished.empty or metric not in finished:
        return []
    table = finished.pivot_table(metric, "seed", "configuration", sort=False)
    table = table.loc[:, table.notna().all()] if not table.empty else table
    labels = dict(zip(rows["configuration"], rows["label"], strict=True))
    sign = -1 if mode == "max" else 1
    order = sorted(map(int, table.columns), key=lambda c: (sign * table[c].mean(), c))
    if not order:
        return []
    best = table[order[0]]
    return [
        Ranked(
            c,
            labels[c],
            tuple(int(s) for s in table.index),
            interval(table[c].tolist()),
            None
            if c == reference or reference not in table
            else interval((table[c] - table[reference]).tolist()),
            interval((table[c] - best).tolist()).includes_zero,
        )
        for c in order
    ]


# -- for people ---------------------------------------------------------------------------------


def shown(value: Interval, metric: str, *, signed: bool = False) -> str:
    """``94.31 ± 0.52`` in percent for accuracies and shares, plain otherwise."""
    factor, digits = (100.0, 2) if _is_share(metric) else (1.0, 5)
    text = f"{value.mean * factor:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(value.half) else f"{text} ± {value.half * factor:.{digits}f}"


def _is_share(metric: str) -> bool:
    return "accuracy" in metric or "harmed" in metric


def markdown(
    rows: pd.DataFrame, metric: str, mode: str, reference: int, *, title: str, command: str
) -> str:
    """The ranking as Markdown: the metric, differences, the other accuracies, the cost."""
    ranking = rank(rows, metric, mode, reference)
    others = _other_metrics(rows, metric)
    opened = [name for name in others if name.startswith("test/")]
    header = ["configuration", metric, "minus reference"]
    header += [h for name in others for h in (name, *(["minus reference"] * (name in opened)))]
    header.append("gradient steps")
    lines = [
        f"# {title}",
        "",
        f"Command: `{command}`",
        "",
        "| " + " | ".join(header) + " |",
        "| --- |" + " ---: |" * (len(header) - 1),
    ]
    for one in ranking:
        own = rows[rows["configuration"] == one.configuration]
        value = shown(one.value, metric)
        cells = [one.label, f"**{value}**" if one.level else value]
        cells.append(_difference(rows, one.configuration, reference, metric))
        for name in others:
            cells.append(shown(interval(own[name].tolist()), name))
            if name in opened:
                cells.append(_difference(rows, one.configuration, reference, name))
        cells.append(f"{_steps(own):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_footnotes(rows, ranking, metric)]) + "\n"


def _difference(rows: pd.DataFrame, configuration: int, reference: int, metric: str) -> str:
    """A configuration minus the reference, paired by seed, as text."""
    if configuration == reference:
        return "reference"
    by_seed = rows.pivot_table(metric, "seed", "configuration")
    if reference not in by_seed or by_seed[reference].isna().any():
        return "-"
    return shown(
        interval((by_seed[configuration] - by_seed[reference]).tolist()), metric, signed=True
    )


def _other_metrics(rows: pd.DataFrame, metric: str) -> list[str]:
    score = "mse" if "val/local_mse" in rows else "accuracy"
    wanted = [f"{s}/{who}_{score}" for s in ("val", "test") for who in ("local", "global")]
    return [name for name in wanted if name in rows and name != metric]


def _steps(own: pd.DataFrame) -> float:
    """Gradients computed, training and personalization together, mean over seeds."""
    return float(
        sum(
            own[c].mean() for c in ("cost/gradient_steps", "cost/personalization_steps") if c in own
        )
    )


def _footnotes(rows: pd.DataFrame, ranking: Sequence[Ranked], metric: str) -> list[str]:
    unit = "percent" if _is_share(metric) else "as measured"
    notes = []
    if ranking:
        seeds = ", ".join(map(str, ranking[0].seeds))
        notes.append(
            f"Means and 95 % t intervals over seeds {seeds} (accuracies and shares in percent; "
            f"{metric} {unit}); differences are paired by seed. Bold: the best, and what is not "
            "told from it (the interval of the paired difference includes 0). With so many "
            "configurations some intervals exclude 0 by chance."
        )
        notes.append("Gradient steps: training and the readouts of the last evaluation, a seed.")
    left = rows[rows["status"] != "FINISHED"]
    for status, group in left.groupby("status"):
        names = ", ".join(group["trial"].tolist()[:5])
        more = f" and {len(group) - 5} more" if len(group) > 5 else ""
        notes += ["", f"Not in the table, {str(status).lower()}: {names}{more}."]
    return notes
