"""The same numbers for programs: ``methods.csv`` and ``differences.csv``, in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.compare.layout import method_measures
from analysis.compare.paired import Compared
from analysis.compare.scenes import Scene
from analysis.report.frames import ends


def methods_frame(scenes: Sequence[Scene]) -> pd.DataFrame:
    """One line a scene, method and metric: mean, t interval over seeds, and whether it is bold."""
    lines = []
    for scene in scenes:
        for measure in method_measures(scene.summary):
            bold = scene.summary.ranking(measure).bold
            for row, mark in zip(scene.summary.rows, bold, strict=True):
                interval = row.mean(measure.metric)
                about = {"scene": scene.title, "method": row.label, "metric": measure.metric}
                reason = measure.missing if interval is None else None
                lines.append(about | ends(interval) | {"bold": mark, "reason": reason})
    return pd.DataFrame(lines)


def differences_frame(compared: Sequence[Compared]) -> pd.DataFrame:
    """One line a scene (or all), reference, baseline and outcome: reference minus baseline."""
    return pd.DataFrame([_line(own) for own in compared])


def _line(own: Compared) -> dict[str, Any]:
    interval = ends(own.interval)
    num_pairs = interval.pop("num_seeds")
    low, high = own.bootstrap or (None, None)
    helped, equal, harmed = own.shares or (None, None, None)
    return {
        "scene": own.scene,
        "reference": own.reference,
        "baseline": own.baseline,
        "outcome": own.outcome.name,
        "metric": own.metric,
        "higher_is_better": own.better > 0,
        **interval,
        "num_pairs": num_pairs,
        "num_scenes": own.num_scenes,
        "standing": own.standing,
        "counted": own.counted,
        "bootstrap_low": low,
        "bootstrap_high": high,
        "num_clients": None if own.each is None else len(own.each),
        "clients_helped": helped,
        "clients_equal": equal,
        "clients_harmed": harmed,
        "rank_biserial": None if own.ranks is None else own.ranks.effect,
        "p_wilcoxon": None if own.ranks is None else own.ranks.p_value,
        "p_holm": own.holm_p,
        "reason": own.reason or None,
    }
