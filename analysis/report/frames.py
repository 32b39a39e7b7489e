"""The same numbers for programs: tables in long form.

``table.csv``, ``differences.csv``, ``clients.csv``, ``curves.csv``: full precision, shares and
accuracies in [0, 1]; an empty cell was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from analysis.report.measures import Measure
from analysis.report.statistics import Interval, t_interval
from analysis.report.summary import RowSummary, Summary


def table_frame(summaries: Sequence[Summary]) -> pd.DataFrame:
    """One line a row, metric and round (``final`` or ``selected``)."""
    return pd.DataFrame([line for summary in summaries for line in _table(summary)])


def _about(summary: Summary, row: str) -> dict[str, Any]:
    return {"data": summary.section.title, "stage": summary.section.stage, "row": row}


def ends(interval: Interval | None) -> dict[str, Any]:
    """An interval's columns; empty ones where nothing was measured."""
    if interval is None:
        return {"mean": None, "half_width": None, "low": None, "high": None, "num_seeds": 0}
    return {
        "mean": interval.mean,
        "half_width": interval.half,
        "low": interval.low,
        "high": interval.high,
        "num_seeds": interval.num,
    }


def _table(summary: Summary) -> Iterator[dict[str, Any]]:
    for measure in [*summary.columns(), *summary.costs()]:
        bold = summary.ranking(measure).bold
        for row, mark in zip(summary.rows, bold, strict=True):
            yield _final(summary, row, measure, mark)
            if values := list(row.selected(measure.metric).values()):
                yield {
                    **_about(summary, row.label),
                    "metric": measure.metric,
                    "round": "selected",
                    **ends(t_interval(values)),
                    "bold": False,
                    "reason": None,
                }


def _final(summary: Summary, row: RowSummary, measure: Measure, bold: bool) -> dict[str, Any]:
    interval = row.mean(measure.metric)
    return {
        **_about(summary, row.label),
        "metric": measure.metric,
        "round": "final",
        **ends(interval),
        "bold": bold,
        "reason": measure.missing if interval is None else None,
    }


def difference_frame(summaries: Sequence[Summary]) -> pd.DataFrame:
    """One line a row and metric: the row minus the reference row, paired by seed."""
    lines = []
    for summary in summaries:
        for own in summary.differences():
            assert summary.reference is not None
            both = ((summary.global_, own.by_global), (summary.local, own.by_local))
            for metric, interval in both:
                about = _about(summary, own.label)
                reference = {"reference": summary.reference.label, "metric": metric}
                lines.append(about | reference | ends(interval))
    return pd.DataFrame(lines)


def clients_frame(summaries: Sequence[Summary]) -> pd.DataFrame:
    """One line a row, seed and client: its final personalized score."""
    lines = [
        _about(summary, row.label)
        | {"metric": summary.local, "seed": key.seed, "client_id": client, "value": value}
        for summary in summaries
        for row in summary.rows
        for key, scores in row.clients.items()
        for client, value in scores.items()
    ]
    return pd.DataFrame(lines)


def curve(row: RowSummary, metric: str) -> pd.DataFrame:
    """Mean and interval over seeds by round, where all runs of the row have the metric."""
    series = [n.series[metric] for n in row.numbers if metric in n.series]
    if not series:
        return pd.DataFrame()
    common = sorted(set.intersection(*(set(own) for own in series)))
    lines = [{"round_index": at} | ends(t_interval([s[at] for s in series])) for at in common]
    return pd.DataFrame(lines)


def curves_frame(summaries: Sequence[Summary]) -> pd.DataFrame:
    """Curves of the global and the local score, on every split that was evaluated."""
    parts = []
    for summary in summaries:
        for row in summary.rows:
            for metric in curve_metrics(summary):
                found = curve(row, metric)
                about = _about(summary, row.label) | {"metric": metric}
                if not found.empty:
                    parts.append(found.assign(**about)[[*about, *found.columns]])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def curve_metrics(summary: Summary) -> list[str]:
    """Metrics that have a curve: test before validation, global before local."""
    wanted = [f"{s}/{w}_{summary.score}" for s in ("test", "val") for w in ("global", "local")]
    there = {name for row in summary.rows for n in row.numbers for name in n.series}
    return [metric for metric in wanted if metric in there]
