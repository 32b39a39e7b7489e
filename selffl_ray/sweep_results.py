"""Tables of a sweep: a row a trial, and configurations ranked with intervals over seeds.

Only what does not depend on the machine stands in them, so a sweep that was killed and resumed
gives the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from selffl_ray.sweep import Configuration, Trial, schedule_text

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95
ENDED = "ended.json"
"""In the folder of a trial that Tune ended: it was done, or the scheduler stopped it."""
FAILURE = "failure.json"
"""In the folder of a trial that failed: why."""
RESTART = "restart.json"
"""In the folder of a trial whose driver actor died, until another one goes on: how often, why."""

SCHEDULES = (
    "Population-based training: each row is a schedule, not a configuration. Where a label says "
    "from k after n, the run began as a copy of trial k in its state after n rounds; differences "
    "between rows are not differences between their last options. Options by the round from which "
    "they were set (what is not named again stays):"
)


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
    # Imported here: a run needs none. It is what scipy.stats computes Student's t with, which takes
    # twenty times as long to import.
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(array) - 1, 0.5 + CONFIDENCE / 2))
    half = quantile * array.std(ddof=1) / math.sqrt(len(array))
    return Interval(float(array.mean()), float(half))


def trial_rows(trials: Sequence[Trial], folder: Path) -> pd.DataFrame:
    """What each trial left in its folder, in the order of the trials.

    Args:
        folder: holds the trials' folders.
    """
    # Imported here: it takes a third of a second, and a run needs none of it.
    import pandas as pd

    return pd.DataFrame([_row(trial, folder / trial.name) for trial in trials])


def _row(trial: Trial, folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    summary: dict[str, Any] = {"status": "UNFINISHED"}
    if path.exists():
        summary = json.loads(path.read_text())
    if summary["status"] == "STOPPED" and not (folder / ENDED).exists():
        # By Ctrl-C or the end of the time, not by the scheduler.
        summary["status"] = "UNFINISHED"
    if summary["status"] != "FINISHED" and (folder / FAILURE).exists():
        summary |= {"status": "FAILED", **json.loads((folder / FAILURE).read_text())}
    final: Mapping[str, float] = summary.get("final", {})
    kept = {k: v for k, v in final.items() if k.startswith(("val/", "test/", "new/", "cost/"))}
    return {
        "scene": trial.configuration.scene,
        "configuration": trial.configuration.number,
        "label": trial.configuration.label,
        "seed": trial.seed,
        "trial": trial.name,
        "status": summary["status"],
        "error": summary.get("error") or "",
        "rounds": summary.get("rounds", 0),
        "digest": summary.get("digest") or "",
        **({"schedule": schedule_text(trial.schedule)} if trial.schedule else {}),
        **dict(sorted(kept.items())),
    }


class Ranked(NamedTuple):
    """A configuration in the ranking of its scene.

    value: of the metric; difference: to the scene's reference, paired by seed (None for itself);
    level: not told from the best, whose paired difference to it includes 0.
    """

    scene: str
    configuration: int
    label: str
    seeds: tuple[int, ...]
    value: Interval
    difference: Interval | None
    level: bool


def rank(rows: pd.DataFrame, metric: str, mode: str, references: Mapping[str, int]) -> list[Ranked]:
    """Configurations whose every seed was finished, scene by scene, best first.

    Args:
        references: by scene, number of the configuration that the others are compared with.
    """
    if metric not in rows:
        return []
    return [
        one
        for scene in dict.fromkeys(rows["scene"])
        for one in _rank_scene(rows[rows["scene"] == scene], metric, mode, references[scene])
    ]


def _rank_scene(rows: pd.DataFrame, metric: str, mode: str, reference: int) -> list[Ranked]:
    table = values_by_seed(rows, metric)
    whole = table.loc[:, table.notna().all()]
    sign = -1 if mode == "max" else 1
    order = sorted(map(int, whole.columns), key=lambda c: (sign * whole[c].mean(), c))
    found = []
    for number in order:
        own = rows[rows["configuration"] == number]
        found.append(
            Ranked(
                own["scene"].iloc[0],
                number,
                own["label"].iloc[0],
                tuple(int(s) for s in whole.index),
                interval(whole[number].tolist()),
                difference(whole, number, reference),
                interval((whole[number] - whole[order[0]]).tolist()).includes_zero,
            )
        )
    return found


class Finals(NamedTuple):
    """What is confirmed: configurations, and by scene the number of the one to compare with."""

    chosen: tuple[Configuration, ...]
    references: Mapping[str, int]


def finals(
    ranking: Sequence[Ranked],
    chosen: Sequence[Configuration],
    references: Mapping[str, Configuration],
    *,
    top: int,
    per: Sequence[str],
) -> Finals:
    """The best of every scene and group, and the scene's reference.

    Args:
        per: keys whose values make the groups. With them the best of the reference's group takes
            the reference's place, so that a tuned method is compared with tuned ones.
    """
    by_number = {one.number: one for one in chosen}
    best: list[Configuration] = []
    compared: dict[str, int] = {}
    for scene, reference in references.items():
        groups: dict[str, list[Configuration]] = {}
        for one in (by_number[r.configuration] for r in ranking if r.scene == scene):
            groups.setdefault(_group(one, per), []).append(one)
        for group in groups.values():
            best += group[:top]
        own = groups.get(_group(reference, per), []) if per else []
        compared[scene] = own[0].number if own else reference.number
        best += [reference] if not own and reference not in best else []
    return Finals(tuple(best), compared)


def _group(one: Configuration, per: Sequence[str]) -> str:
    return json.dumps([one.settings[key] for key in per], sort_keys=True)


def best_of_each_scene(ranking: Sequence[Ranked]) -> list[Ranked]:
    """The first of every scene."""
    first: dict[str, Ranked] = {}
    for one in ranking:
        first.setdefault(one.scene, one)
    return list(first.values())


def values_by_seed(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Values of the finished trials: a row a seed, a column a configuration, NaN where missing."""
    finished = rows[metric].where(rows["status"] == "FINISHED")
    return rows.assign(value=finished).pivot(index="seed", columns="configuration", values="value")


def difference(table: pd.DataFrame, number: int, reference: int) -> Interval | None:
    """A configuration minus the reference, paired by seed; None for itself or without a pair."""
    if number == reference or reference not in table or table[reference].isna().any():
        return None
    return interval((table[number] - table[reference]).tolist())


# -- for people ---------------------------------------------------------------------------------


def shown(value: Interval, metric: str, *, signed: bool = False) -> str:
    """``94.31 ± 0.52`` in percent for accuracies and shares, plain otherwise."""
    factor, digits = (100.0, 2) if _is_share(metric) else (1.0, 5)
    text = f"{value.mean * factor:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(value.half) else f"{text} ± {value.half * factor:.{digits}f}"


def _is_share(metric: str) -> bool:
    return "accuracy" in metric or "harmed" in metric


def markdown(
    rows: pd.DataFrame,
    metric: str,
    mode: str,
    references: Mapping[str, int],
    *,
    title: str,
    command: str,
) -> str:
    """The rankings as Markdown: the metric, differences, the other accuracies, the cost."""
    ranking = rank(rows, metric, mode, references)
    lines = [f"# {title}", "", f"Command: `{command}`", ""]
    for scene in dict.fromkeys(one.scene for one in ranking):
        lines += [f"## {scene}", ""] if scene else []
        own = rows[rows["scene"] == scene]
        lines += _scene_table([r for r in ranking if r.scene == scene], own, metric, references)
        lines.append("")
    return "\n".join([*lines, *_footnotes(rows, ranking)]) + "\n"


def _scene_table(
    ranking: Sequence[Ranked], rows: pd.DataFrame, metric: str, references: Mapping[str, int]
) -> list[str]:
    others = _other_metrics(rows, metric)
    reference = references[ranking[0].scene]
    header = ["configuration", metric, "minus reference"]
    for name in others:
        header += [name, "minus reference"] if _is_test(name) else [name]
    header.append("gradient steps")
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for one in ranking:
        own = rows[rows["configuration"] == one.configuration]
        value = shown(one.value, metric)
        cells = [one.label, f"**{value}**" if one.level else value]
        cells.append(_shown_difference(one.configuration, reference, one.difference, metric))
        for name in others:
            cells.append(shown(interval(own[name].tolist()), name))
            if _is_test(name):
                found = difference(values_by_seed(rows, name), one.configuration, reference)
                cells.append(_shown_difference(one.configuration, reference, found, name))
        cells.append(f"{_steps(own):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _is_test(metric: str) -> bool:
    return metric.startswith("test/")


def _shown_difference(number: int, reference: int, found: Interval | None, metric: str) -> str:
    if number == reference:
        return "reference"
    return "-" if found is None else shown(found, metric, signed=True)


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


def _footnotes(rows: pd.DataFrame, ranking: Sequence[Ranked]) -> list[str]:
    notes = []
    if ranking:
        seeds = ", ".join(map(str, ranking[0].seeds))
        notes.append(
            f"Means and 95 % t intervals over seeds {seeds} (accuracies and shares in percent); "
            "differences are paired by seed. Bold: the best, and what is not "
            "told from it (the interval of the paired difference includes 0). With so many "
            "configurations some intervals exclude 0 by chance."
        )
        notes.append("Gradient steps: training and the readouts of the last evaluation, a seed.")
    if ranking and "schedule" in rows:
        notes += ["", SCHEDULES, ""]
        by_number = rows.set_index("configuration")["schedule"]
        notes += [f"- {one.label}: {by_number[one.configuration]}" for one in ranking]
    left = rows[rows["status"] != "FINISHED"]
    for status, group in left.groupby("status"):
        names = ", ".join(group["trial"].tolist()[:5])
        more = f" and {len(group) - 5} more" if len(group) > 5 else ""
        notes += ["", f"Not in the table, {str(status).lower()}: {names}{more}."]
    return notes
