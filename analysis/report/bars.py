"""Bars: clients harmed, gradient steps, bytes, seconds."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.ticker import MaxNLocator

from analysis.report.answer import SPLIT_WORDS
from analysis.report.figures import (
    BAR,
    HARMED_BAR,
    KINDS,
    Picture,
    add_legend,
    bars_axes,
    charted,
    coloured,
    first_rows,
)
from analysis.report.layout import name
from analysis.report.summary import RowSummary, Summary


def harmed_picture(summary: Summary) -> Picture | None:
    """Share of clients harmed, against the own global model, local training and FedAvg."""
    kinds = [m for m in summary.columns() if "harmed_vs" in m.metric]
    kinds = [m for m in kinds if any(row.values(m.metric) for row in summary.rows)]
    if not kinds:
        return None
    figure, axes, rows = bars_axes(summary, HARMED_BAR if len(kinds) > 1 else BAR)
    height = min(0.8 / len(kinds), 0.6)
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
    add_legend(figure, axes, reverse=False)
    than = {
        "global": "the run's global model",
        "local": "the one of local training",
        "fedavg": "FedAvg's",
    }
    against = ", ".join(than[m.metric.rsplit("_", 1)[1]] for m in kinds)
    caption = (
        f"Share of clients whose personalized model is worse on their own examples than {against}; "
        f"same partition, mean over seeds. No bar: not compared.{first_rows(summary)}"
    )
    return Picture(name(summary, "harmed"), "Clients harmed and cost", caption, figure)


def cost_pictures(summary: Summary) -> list[Picture]:
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
    values = [total(row) for row in charted(summary)]
    if all(value is None for value in values):
        return None
    figure, axes, rows = bars_axes(summary)
    colours = coloured(summary)
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
        name(summary, f"cost-{what}"),
        "Clients harmed and cost",
        caption + first_rows(summary),
        figure,
    )
