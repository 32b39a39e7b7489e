"""Figures of a section, each small enough to be read on a phone; the first rows in colour.

Every figure is drawn from a :class:`~analysis.report.summary.Summary` and names its data in its
title.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.report.answer import SPLIT_WORDS
from analysis.report.bars import cost_pictures, harmed_picture
from analysis.report.clients import distribution
from analysis.report.figures import (
    GREY,
    MARKERS,
    STYLE,
    Picture,
    add_legend,
    bars_axes,
    coloured,
    factor_of,
    first_rows,
    new_axes,
    others,
    short,
    unit_of,
)
from analysis.report.frames import curve, curve_metrics
from analysis.report.layout import name
from analysis.report.summary import Summary

MOST_BANDS = 3
"""Rows whose intervals are drawn beside their curves; more of them hide each other."""


def pictures(summary: Summary) -> list[Picture]:
    """All figures of a section; those without data are left out."""
    with mpl.rc_context(STYLE):
        found = [_plane(summary), _clients(summary)]
        found += [_curves(summary, metric) for metric in curve_metrics(summary)]
        found += [harmed_picture(summary), *cost_pictures(summary)]
    return [picture for picture in found if picture is not None]


def _plane(summary: Summary) -> Picture | None:
    """Global against local score with the diagonal."""
    points = [
        (row, a, b)
        for row in summary.rows
        if (a := row.mean(summary.global_)) and (b := row.mean(summary.local))
    ]
    if not points:
        return None
    figure, axes = new_axes(4.4)
    colours, factor = coloured(summary), factor_of(summary)
    for at, (row, a, b) in reversed(list(enumerate(points))):
        colour = colours[row.label]
        bare = colour == GREY
        axes.errorbar(
            a.mean * factor,
            b.mean * factor,
            xerr=None if bare or a.half is None else a.half * factor,
            yerr=None if bare or b.half is None else b.half * factor,
            fmt=MARKERS[at % len(MARKERS)],
            color=colour,
            markersize=7,
            elinewidth=1.2,
            capsize=3,
            label=None if bare else short(row.label),
        )
    means = np.asarray([[a.mean, b.mean] for _, a, b in points]) * factor
    low, high = _plane_limits(axes, means, summary.score)
    axes.plot([low, high], [low, high], color="#666666", linewidth=1, linestyle=":", zorder=0)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel(f"global {unit_of(summary)}")
    axes.set_ylabel(f"local {unit_of(summary)}")
    axes.set_title(f"Global and local, {SPLIT_WORDS[summary.split]}", loc="left")
    add_legend(figure, axes, reverse=True)
    # The two errors of a regression task are against different truths.
    helps = "; above it personalization helps on average" * (summary.score == "accuracy")
    caption = (
        f"Global against local score, {SPLIT_WORDS[summary.split]}; bars: 95 % intervals over "
        f"seeds, cut at the frame. Dotted: both equal{helps}.{others(summary)}"
    )
    return Picture(name(summary, "plane"), "Global, local, clients", caption, figure)


def _plane_limits(axes: Axes, means: npt.NDArray[np.float64], score: str) -> tuple[float, float]:
    """The intervals whole, unless they are wider than the points are apart: few seeds."""
    low, high = float(means.min()), float(means.max())
    room = max(high - low, 5.0 if score == "accuracy" else 0.5 * high)
    low = max(min(axes.get_xlim()[0], axes.get_ylim()[0]), low - room)
    high = min(max(axes.get_xlim()[1], axes.get_ylim()[1]), high + room)
    return (max(low, 0.0), min(high, 100.5)) if score == "accuracy" else (low, high)


def _curves(summary: Summary, metric: str) -> Picture | None:
    """A metric by round, mean and band over seeds."""
    figure, axes = new_axes()
    colours, factor = coloured(summary), factor_of(summary)
    means = []
    for at, row in reversed(list(enumerate(summary.rows))):
        found = curve(row, metric)
        if found.empty:
            continue
        means.append(found["mean"].to_numpy(np.float64) * factor)
        grey = colours[row.label] == GREY
        axes.plot(
            found["round_index"] + 1,
            found["mean"] * factor,
            color=colours[row.label],
            marker=None if grey else MARKERS[at % len(MARKERS)],
            markersize=4,
            linewidth=0.8 if grey else 1.6,
            alpha=0.5 if grey else 1.0,
            label=None if grey else short(row.label),
        )
        if at < MOST_BANDS or row is summary.reference:
            _band(axes, found, factor, colours[row.label])
    if not means:
        return None
    split, _, measured = metric.partition("/")
    who = measured.partition("_")[0]
    _frame_curves(axes, np.concatenate(means), summary.score)
    axes.set_xlabel("rounds done")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"{who} {unit_of(summary)}")
    axes.set_title(f"{who.capitalize()}, {SPLIT_WORDS[split]}", loc="left")
    add_legend(figure, axes, reverse=True)
    whose = "" if len(summary.rows) <= MOST_BANDS else f" of the best {MOST_BANDS} rows"
    whose += " and the reference" * bool(whose and summary.reference is not None)
    caption = (
        f"{who.capitalize()} score on {SPLIT_WORDS[split]} by round: mean over seeds; dashed: 95 % "
        f"t interval{whose}, cut at the frame.{others(summary)}"
    )
    return Picture(name(summary, f"curves-{split}-{who}"), "Learning curves", caption, figure)


def _band(axes: Axes, found: pd.DataFrame, factor: float, colour: str) -> None:
    """The interval of a curve, if it has one."""
    if found["low"].isna().any():
        return
    rounds, ends = found["round_index"] + 1, (found["low"] * factor, found["high"] * factor)
    axes.fill_between(rounds, *ends, color=colour, alpha=0.08, linewidth=0)
    for end in ends:
        axes.plot(rounds, end, color=colour, alpha=0.45, linewidth=0.7, linestyle="--")


def _frame_curves(axes: Axes, values: npt.NDArray[np.float64], score: str) -> None:
    """Limits by the means, not by the bands: with few seeds these are wide early on."""
    if score != "accuracy":
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        return
    room = 0.3 * max(values.max() - values.min(), 5.0)
    axes.set_ylim(max(0.0, values.min() - room), min(100.5, values.max() + room))


def _clients(summary: Summary) -> Picture | None:
    """Box and points over clients."""
    if not any(row.clients for row in summary.rows):
        return None
    figure, axes, rows = bars_axes(summary)
    colours, factor = coloured(summary), factor_of(summary)
    for at, row in enumerate(rows):
        values = distribution(row.clients, natural=summary.section.natural) * factor
        if not len(values):
            continue
        axes.boxplot(
            values,
            positions=[at],
            orientation="horizontal",
            widths=0.6,
            showfliers=False,
            manage_ticks=False,
            medianprops={"color": colours[row.label], "linewidth": 2},
            boxprops={"color": "#555555"},
        )
        # Neighbours in value are set apart, so that equal ones do not hide each other.
        order = np.argsort(np.argsort(values))
        heights = at + 0.2 * (order % 3 - 1)
        axes.scatter(values, heights, s=9, color=colours[row.label], alpha=0.6, zorder=3)
    axes.set_xlabel(f"local {unit_of(summary)} of a client")
    axes.set_title(f"Over clients, {SPLIT_WORDS[summary.split]}", loc="left")
    points = "a client, averaged over seeds" if summary.section.natural else "a client of one seed"
    caption = (
        f"Personalized score of each client, {SPLIT_WORDS[summary.split]}. A point is {points}; "
        f"box: quartiles and median, whiskers: 1.5 box lengths.{first_rows(summary)}"
    )
    return Picture(name(summary, "clients"), "Global, local, clients", caption, figure)
