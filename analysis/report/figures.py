"""What all figures share: size, style, colours, the frame of a chart of rows.

Drawn without pyplot: no global state, no window.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.report.summary import RowSummary, Summary

# Okabe and Ito's palette without yellow: told apart by colour-blind people too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#9a9a9a"
KINDS = ("#3d4f60", "#8fa3b5", "#cbb58a")
"""Bars that do not stand for rows."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 5.2
"""Inches; scaled to a phone's width the letters still have ten pixels."""
HEIGHT = 3.7
BAR = 0.42
HARMED_BAR = 0.6
"""Inches a bar, and several bars in one place."""
MOST_ROWS = 12
"""Most rows in a figure of bars or boxes."""
LINE_LETTERS = 24
"""Letters in a line of a label."""
SHORT_LETTERS = 12
"""Longest label of which three fit beside each other."""
LEGEND_LINE = 0.18
"""Inches a line of a legend."""
STYLE: dict[Any, Any] = {
    "font.size": 11.0,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.hashsalt": "selffl_ray",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Picture:
    """A figure with its name, the group it is shown in, and what it shows, in a sentence."""

    name: str
    group: str
    caption: str
    figure: Figure


def factor_of(summary: Summary) -> float:
    """What a score is multiplied by to be shown."""
    return 100.0 if summary.score == "accuracy" else 1.0


def unit_of(summary: Summary) -> str:
    """The score with its unit, for an axis."""
    return "accuracy (%)" if summary.score == "accuracy" else "mean squared error"


def short(label: str) -> str:
    """A label in one or two lines that leave room for the plot."""
    lines = textwrap.wrap(label, LINE_LETTERS, max_lines=2, placeholder=" …")
    return "\n".join(lines)


def coloured(summary: Summary) -> dict[str, str]:
    """A colour for the first rows and the reference; grey for the others."""
    rows = list(summary.rows)
    if summary.reference in rows[len(COLOURS) :]:
        rows.insert(len(COLOURS) - 1, summary.reference)
    found = {row.label: GREY for row in summary.rows}
    chosen = list(dict.fromkeys(row.label for row in rows))[: len(COLOURS)]
    return found | dict(zip(chosen, COLOURS, strict=False))


def new_axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one plot."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def add_legend(figure: Figure, axes: Axes, *, reverse: bool) -> None:
    """Below the plot, never over data."""
    handles, labels = axes.get_legend_handles_labels()
    if reverse:  # the best rows are drawn last, on top of the others
        handles, labels = handles[::-1], labels[::-1]
    if handles:
        columns = 2 if max(map(len, labels)) > SHORT_LETTERS else 3
        lines = math.ceil(len(labels) / columns) * max(1 + own.count("\n") for own in labels)
        # The plot keeps its size: the figure grows by what is more than two lines.
        figure.set_figheight(figure.get_figheight() + LEGEND_LINE * max(0, lines - 2))
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, columnspacing=1.0)


def others(summary: Summary) -> str:
    """What a caption says of rows without a colour."""
    rest = len(summary.rows) - len(COLOURS)
    return f" {rest} further rows are grey." if rest > 0 else ""


def bars_axes(summary: Summary, bar: float = BAR) -> tuple[Figure, Axes, Sequence[RowSummary]]:
    """Horizontal axes with a row's label at each place, the best on top."""
    rows = charted(summary)
    figure, axes = new_axes(1.3 + bar * len(rows))
    axes.set_yticks(range(len(rows)), [short(row.label) for row in rows])
    if any("\n" in label.get_text() for label in axes.get_yticklabels()):
        axes.tick_params(axis="y", labelsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return figure, axes, rows


def charted(summary: Summary) -> tuple[RowSummary, ...]:
    """The rows that a chart of rows has room for: the best ones and the reference."""
    rows = summary.rows[:MOST_ROWS]
    if summary.reference is None or summary.reference in rows:
        return rows
    return (*rows[:-1], summary.reference)


def first_rows(summary: Summary) -> str:
    """What a caption says of rows that are not in the chart."""
    shown, all_rows = len(charted(summary)), len(summary.rows)
    return f" {shown} of {all_rows} rows, by local score." if shown < all_rows else ""
