"""Forest plots: a scene's paired differences with their intervals, local beside global."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.compare.paired import GLOBAL, LOCAL, Compared, Outcome, titles
from analysis.report.figures import COLOURS, LEGEND_LINE, MARKERS, STYLE, Picture, short

WIDTH = 8.0
BAR = 0.24
"""Inches for every reference of a baseline."""
GAP = 0.16
"""Inches between baselines."""
MOST_BODY = 9.0
"""Most inches of all baselines together: the figure fits a page, its bars move closer."""
FRAME = 1.5
"""Inches of title and axis."""
LEGEND_COLUMNS = 2
LEGEND_LETTERS = 44
"""Letters in a line of the legend, which then has room for its columns."""
TITLE_LETTERS = 76
WIDEST = 2.5
"""An axis ends at so many times the farthest mean or bootstrap end: intervals of two or three seeds
would leave no room for anything else."""


def forests(compared: Sequence[Compared], pooled: Sequence[Compared]) -> list[Picture]:
    """One figure a scene, one over all, of what is counted; scenes without pairs have none."""
    found = []
    with mpl.rc_context(STYLE):
        for title in titles([*compared, *pooled]):
            own = [o for o in (*compared, *pooled) if o.scene == title and o.differences]
            own = [o for o in own if o.counted]
            if any(o.outcome in (LOCAL, GLOBAL) for o in own):
                found.append(_forest(title, own))
    return found


def _forest(title: str, compared: Sequence[Compared]) -> Picture:
    outcomes = [o for o in (LOCAL, GLOBAL) if any(own.outcome is o for own in compared)]
    references = list(dict.fromkeys(own.reference for own in compared))
    baselines = list(dict.fromkeys(own.baseline for own in compared))
    legend = _legend(references)
    lines = sum(str(handle.get_label()).count("\n") + 1 for handle in legend) / LEGEND_COLUMNS
    body = min(len(baselines) * (GAP + BAR * len(references)), MOST_BODY)
    height = FRAME + LEGEND_LINE * lines + body
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    for axes, outcome in zip(panels, outcomes, strict=True):
        here = [own for own in compared if own.outcome is outcome]
        _panel(axes, here, references, baselines)
        _frame(axes, here[0], outcome)
    panels[0].set_yticks(range(len(baselines)), [short(label) for label in baselines])
    panels[0].set_ylim(len(baselines) - 0.5, -0.5)
    figure.suptitle("\n".join(textwrap.wrap(f"Reference minus baseline, {title}", TITLE_LETTERS)))
    figure.legend(handles=legend, loc="outside lower left", ncols=LEGEND_COLUMNS)
    kept = "".join(c if c.isalnum() else "-" for c in title.lower())
    caption = (
        f"Paired differences in {title}: thin line 95 % t interval over pairs, thick line "
        "hierarchical bootstrap; filled where the t interval excludes 0."
    )
    return Picture(f"differences-{'-'.join(filter(None, kept.split('-')))}", "", caption, figure)


def _panel(
    axes: Axes, compared: Sequence[Compared], references: Sequence[str], baselines: Sequence[str]
) -> None:
    step = 1 / (len(references) + GAP / BAR)
    low, high = _limits(compared)
    axes.set_xlim(low, high)
    for own in compared:
        at = references.index(own.reference)
        y = baselines.index(own.baseline) + (at - (len(references) - 1) / 2) * step
        _draw(axes, own, y, at)
    axes.axvline(0, color="#444444", linewidth=1, zorder=1)
    for edge in np.arange(0.5, len(baselines) - 1):
        axes.axhline(edge, color="#e6e6e6", linewidth=0.8, zorder=0)


def _limits(compared: Sequence[Compared]) -> tuple[float, float]:
    """Ends of the axis: all intervals, but no farther than ``WIDEST`` times what lies inside."""
    inner, outer = [], []
    for own in compared:
        assert own.interval is not None, "kept only with a pair"
        inner += [own.interval.mean, *(own.bootstrap or ())]
        outer += [own.interval.mean - (own.interval.half or 0)]
        outer += [own.interval.mean + (own.interval.half or 0)]
    factor = compared[0].factor
    most = WIDEST * max(map(abs, inner)) or max(map(abs, outer)) or 1 / factor
    low = max(min(*outer, *inner, 0.0), -most)
    high = min(max(*outer, *inner, 0.0), most)
    margin = 0.06 * (high - low) or 0.5 / factor
    return (low - margin) * factor, (high + margin) * factor


def _draw(axes: Axes, own: Compared, y: float, at: int) -> None:
    """Bootstrap thick, t interval thin with an arrow where it leaves the plot, the mean on top."""
    assert own.interval is not None, "kept only with a pair"
    colour, factor = COLOURS[at % len(COLOURS)], own.factor
    if own.bootstrap is not None:
        ends = [end * factor for end in own.bootstrap]
        axes.plot(ends, [y, y], color=colour, alpha=0.35, linewidth=6, solid_capstyle="butt")
    if own.interval.low is not None and own.interval.high is not None:
        left, right = axes.get_xlim()
        low, high = own.interval.low * factor, own.interval.high * factor
        axes.plot([max(low, left), min(high, right)], [y, y], color=colour, linewidth=1.3)
        for beyond, edge, sign in ((low < left, left, "<"), (high > right, right, ">")):
            if beyond:
                axes.plot([edge], [y], marker=sign, color=colour, markersize=5, clip_on=False)
    axes.plot(
        [own.interval.mean * factor],
        [y],
        marker=MARKERS[at % len(MARKERS)],
        markersize=6,
        markeredgecolor=colour,
        markerfacecolor=colour if own.interval.excludes_zero else "white",
        linestyle="none",
        zorder=3,
    )


def _frame(axes: Axes, own: Compared, outcome: Outcome) -> None:
    unit = "points" if own.factor != 1 else own.score
    axes.set_title(f"{outcome.name} {own.score}", loc="left")
    toward = ("baseline better", "reference better")[:: own.better]
    ends = f"\N{LEFTWARDS ARROW} {toward[0]}  |  {toward[1]} \N{RIGHTWARDS ARROW}"
    axes.set_xlabel(f"{unit}\n{ends}", fontsize="small")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _legend(references: Sequence[str]) -> list[Line2D]:
    found = [
        Line2D(
            [],
            [],
            color=COLOURS[at % len(COLOURS)],
            marker=MARKERS[at % len(MARKERS)],
            linewidth=1.3,
            label="\n".join(textwrap.wrap(label, LEGEND_LETTERS)),
        )
        for at, label in enumerate(references)
    ]
    grey = "#555555"
    return [
        *found,
        Line2D([], [], color=grey, linewidth=1.3, label="95 % t interval over pairs"),
        Line2D([], [], color=grey, alpha=0.35, linewidth=6, label="hierarchical bootstrap"),
        Line2D(
            [], [], color=grey, marker="o", markerfacecolor="white", linestyle="none",
            label="hollow: not told apart from 0",
        ),
    ]  # fmt: skip
