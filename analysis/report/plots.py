"""Figures of a section, each small enough to be read on a phone; the first rows in colour.

Every figure is drawn from a :class:`~analysis.report.summary.Summary` and names its data in its
title. Drawn without pyplot: no global state, no window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.report.answer import SPLIT_WORDS
from analysis.report.clients import distribution
from analysis.report.frames import curve, curve_metrics
from analysis.report.layout import name
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
BAR = 0.34
HARMED_BAR = 0.6
"""Inches a bar, and three bars in one place."""
MOST_ROWS = 24
"""Most rows in a figure of bars or boxes."""
MOST_LETTERS = 26
SHORT_LETTERS = 12
"""Longest label of which three fit beside each other."""
STYLE = {
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


def pictures(summary: Summary) -> list[Picture]:
    """All figures of a section; those without data are left out."""
    with mpl.rc_context(STYLE):
        found = [_plane(summary), _clients(summary)]
        found += [_curves(summary, metric) for metric in curve_metrics(summary)]
        found += [_harmed(summary), *_costs(summary)]
    return [picture for picture in found if picture is not None]


def _factor(summary: Summary) -> float:
    return 100.0 if summary.score == "accuracy" else 1.0


def _unit(summary: Summary) -> str:
    return "accuracy (%)" if summary.score == "accuracy" else "mean squared error"


def _short(label: str) -> str:
    return label if len(label) <= MOST_LETTERS else f"{label[: MOST_LETTERS - 1]}…"


def _coloured(summary: Summary) -> dict[str, str]:
    """A colour for the first rows and the reference; grey for the others."""
    rows = list(summary.rows)
    if summary.reference in rows[len(COLOURS) :]:
        rows.insert(len(COLOURS) - 1, summary.reference)
    found = {row.label: GREY for row in summary.rows}
    chosen = list(dict.fromkeys(row.label for row in rows))[: len(COLOURS)]
    return found | dict(zip(chosen, COLOURS, strict=False))


def _axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes, *, reverse: bool) -> None:
    """Below the plot, never over data."""
    handles, labels = axes.get_legend_handles_labels()
    if reverse:  # the best rows are drawn last, on top of the others
        handles, labels = handles[::-1], labels[::-1]
    if handles:
        columns = 2 if max(map(len, labels)) > SHORT_LETTERS else 3
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, columnspacing=1.0)


def _others(summary: Summary) -> str:
    rest = len(summary.rows) - len(COLOURS)
    return f" {rest} further rows are grey." if rest > 0 else ""


def _plane(summary: Summary) -> Picture | None:
    """Global against local score with the diagonal."""
    points = [
        (row, a, b)
        for row in summary.rows
        if (a := row.mean(summary.global_)) and (b := row.mean(summary.local))
    ]
    if not points:
        return None
    figure, axes = _axes(4.4)
    colours, factor = _coloured(summary), _factor(summary)
    for at, (row, a, b) in reversed(list(enumerate(points))):
        colour = colours[row.label]
        axes.errorbar(
            a.mean * factor,
            b.mean * factor,
            xerr=None if a.half is None else a.half * factor,
            yerr=None if b.half is None else b.half * factor,
            fmt=MARKERS[at % len(MARKERS)],
            color=colour,
            markersize=7,
            elinewidth=1.2,
            capsize=3,
            label=None if colour == GREY else _short(row.label),
        )
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    if summary.score == "accuracy":
        low, high = max(low, 0.0), min(high, 100.5)
    axes.plot([low, high], [low, high], color="#666666", linewidth=1, linestyle=":", zorder=0)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel(f"global {_unit(summary)}")
    axes.set_ylabel(f"local {_unit(summary)}")
    axes.set_title(f"Global and local, {SPLIT_WORDS[summary.split]}", loc="left")
    _legend(figure, axes, reverse=True)
    side = "above" if summary.score == "accuracy" else "below"
    caption = (
        f"Global against local score, {SPLIT_WORDS[summary.split]}; bars: 95 % intervals "
        "over seeds. "
        f"{side.capitalize()} the dotted diagonal personalization helps on average."
        f"{_others(summary)}"
    )
    return Picture(name(summary, "plane"), "Global, local, clients", caption, figure)


def _curves(summary: Summary, metric: str) -> Picture | None:
    """A metric by round, mean and band over seeds."""
    figure, axes = _axes()
    colours, factor = _coloured(summary), _factor(summary)
    means = []
    for at, row in reversed(list(enumerate(summary.rows))):
        found = curve(row, metric)
        if found.empty:
            continue
        means.append(found["mean"].to_numpy(np.float64) * factor)
        colour, rounds = colours[row.label], found["round_index"] + 1
        grey = colour == GREY
        axes.plot(
            rounds,
            found["mean"] * factor,
            color=colour,
            marker=None if grey else MARKERS[at % len(MARKERS)],
            markersize=4,
            linewidth=0.8 if grey else 1.6,
            alpha=0.5 if grey else 1.0,
            label=None if grey else _short(row.label),
        )
        if not grey and found["low"].notna().all():
            low, high = found["low"] * factor, found["high"] * factor
            axes.fill_between(rounds, low, high, color=colour, alpha=0.08, linewidth=0)
            for end in (low, high):
                axes.plot(rounds, end, color=colour, alpha=0.45, linewidth=0.7, linestyle="--")
    if not means:
        return None
    split, _, measured = metric.partition("/")
    who = measured.partition("_")[0]
    _frame_curves(axes, np.concatenate(means), summary.score)
    axes.set_xlabel("rounds done")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"{who} {_unit(summary)}")
    axes.set_title(f"{who.capitalize()}, {SPLIT_WORDS[split]}", loc="left")
    _legend(figure, axes, reverse=True)
    caption = (
        f"{who.capitalize()} score on {SPLIT_WORDS[split]} by round: mean over seeds, dashed: 95 % "
        f"t interval, cut at the frame.{_others(summary)}"
    )
    return Picture(name(summary, f"curves-{split}-{who}"), "Learning curves", caption, figure)


def _frame_curves(axes: Axes, values: npt.NDArray[np.float64], score: str) -> None:
    """Limits by the means, not by the bands: with few seeds these are wide early on."""
    if score != "accuracy":
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        return
    room = 0.3 * max(values.max() - values.min(), 5.0)
    axes.set_ylim(max(0.0, values.min() - room), min(100.5, values.max() + room))


def _bars_axes(summary: Summary, bar: float = BAR) -> tuple[Figure, Axes, Sequence[RowSummary]]:
    """Horizontal axes with a row's label at each place, the best on top."""
    rows = summary.rows[:MOST_ROWS]
    figure, axes = _axes(1.3 + bar * len(rows))
    axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return figure, axes, rows


def _first(summary: Summary) -> str:
    rest = len(summary.rows) - MOST_ROWS
    return f" The first {MOST_ROWS} of {len(summary.rows)} rows." if rest > 0 else ""


def _clients(summary: Summary) -> Picture | None:
    """Box and points over clients."""
    if not any(row.clients for row in summary.rows):
        return None
    figure, axes, rows = _bars_axes(summary)
    colours, factor = _coloured(summary), _factor(summary)
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
    axes.set_xlabel(f"local {_unit(summary)} of a client")
    axes.set_title(f"Over clients, {SPLIT_WORDS[summary.split]}", loc="left")
    points = "a client, averaged over seeds" if summary.section.natural else "a client of one seed"
    caption = (
        f"Personalized score of each client, {SPLIT_WORDS[summary.split]}. A point is {points}; "
        f"box: quartiles and median, whiskers: 1.5 box lengths.{_first(summary)}"
    )
    return Picture(name(summary, "clients"), "Global, local, clients", caption, figure)


def _harmed(summary: Summary) -> Picture | None:
    """Share of clients harmed, against the own global model, local training and FedAvg."""
    kinds = [m for m in summary.columns() if "harmed_vs" in m.metric]
    kinds = [m for m in kinds if any(row.values(m.metric) for row in summary.rows)]
    if not kinds:
        return None
    figure, axes, rows = _bars_axes(summary, HARMED_BAR)
    height = 0.8 / len(kinds)
    for kind, measure in enumerate(kinds):
        offset = (kind - (len(kinds) - 1) / 2) * height
        found = [row.mean(measure.metric) for row in rows]
        at = [place + offset for place, own in enumerate(found) if own is not None]
        shares = [100 * own.mean for own in found if own is not None]
        title = f"vs {measure.metric.rsplit('_', 1)[1]}"
        bars = axes.barh(at, shares, height, color=KINDS[kind], label=title)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_xlim(left=0)
    axes.margins(x=0.1)
    axes.set_xlabel("clients harmed (%)")
    axes.set_title(f"Clients harmed, {SPLIT_WORDS[summary.split]}", loc="left")
    _legend(figure, axes, reverse=False)
    caption = (
        "Share of clients whose personalized model is worse on their own examples than the run's "
        "global model, than local training, than FedAvg on the same partition; mean over seeds. "
        f"No bar: not compared.{_first(summary)}"
    )
    return Picture(name(summary, "harmed"), "Clients harmed and cost", caption, figure)


def _costs(summary: Summary) -> list[Picture]:
    """Bars of gradient steps, of bytes, of seconds."""

    def total(row: RowSummary, *metrics: str) -> float | None:
        found = [row.mean(metric) for metric in metrics]
        means = [own.mean for own in found if own is not None]
        return sum(means) if means else None

    ways = ("cost/total_bytes_down", "cost/total_bytes_up")
    wanted: list[tuple[str, str, Callable[[RowSummary], float | None], float]] = [
        ("steps", "gradient steps of a run", lambda row: total(row, "cost/total_steps"), 1.0),
        ("bytes", "MB of a run, down and up", lambda row: total(row, *ways), 1e-6),
        ("seconds", "seconds of a run", lambda row: total(row, "cost/seconds"), 1.0),
    ]
    found = [_cost(summary, *one) for one in wanted]
    return [picture for picture in found if picture is not None]


def _cost(
    summary: Summary,
    what: str,
    title: str,
    total: Callable[[RowSummary], float | None],
    factor: float,
) -> Picture | None:
    values = [total(row) for row in summary.rows[:MOST_ROWS]]
    if all(value is None for value in values):
        return None
    figure, axes, rows = _bars_axes(summary)
    colours = _coloured(summary)
    at = [place for place, value in enumerate(values) if value is not None]
    shown = [value * factor for value in values if value is not None]
    bars = axes.barh(at, shown, 0.6, color=[colours[rows[place].label] for place in at])
    digits = 0 if max(shown) >= 100 else 1
    axes.bar_label(bars, [f"{value:,.{digits}f}" for value in shown], fontsize=9, padding=3)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.set_xlabel(title)
    axes.set_title(f"Cost: {title.partition(' of ')[0]}", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    caption = f"{title[0].upper()}{title[1:]}, all clients together, mean over seeds."
    return Picture(
        name(summary, f"cost-{what}"), "Clients harmed and cost", caption + _first(summary), figure
    )
