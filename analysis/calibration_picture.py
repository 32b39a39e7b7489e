"""The calibration as one picture: inter-client estimators above, intra-client ones below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from analysis import calibration_base as base
from analysis import calibration_collapse as collapse
from analysis import calibration_inter as inter
from analysis import calibration_intra as intra

INTER_COLOURS = {
    "empirical": "#cc3311",
    "moments": "#0077bb",
    "dl": "#33bbee",
    "pm": "#009988",
    "ml": "#ee7733",
    "reml": "#777777",
}
OVER_TIME = ("round_window", "trajectory", "trajectory_rescaled")
INTRA_COLOURS = {
    "round_window": "#cc3311",
    "trajectory": "#ee7733",
    "trajectory_rescaled": "#aa8800",
    "split_half": "#777777",
    "gradient": "#0077bb",
    "gradient_chunks": "#33bbee",
    "fisher": "#009988",
    "sample_size": "#aa4499",
}
SIZE_COLOURS = dict(zip(intra.SIZES, ("#88ccee", "#4477aa", "#222255"), strict=True))
MARKERS = "osD^vPX*"


def draw(found: pd.DataFrame, path: Path) -> None:
    """Six panels into a PNG."""
    mpl.use("Agg")
    from matplotlib import pyplot

    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8}):
        figure, axes = pyplot.subplots(2, 3, figsize=(16, 9), layout="constrained")
        _bias(axes[0, 0], found)
        _inter_cost(axes[0, 1], found)
        _collapse(axes[0, 2], found)
        _over_examples(axes[1, 0], found)
        _coverage(axes[1, 1], found)
        _intra_cost(axes[1, 2], found)
        figure.suptitle(
            "Calibration of the uncertainty estimators against known variances. "
            "Above: between clients. Below: within a client.",
            fontsize=12,
        )
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _simulated(found: pd.DataFrame, name: str, quantity: str) -> pd.DataFrame:
    """Rows of one estimator with 20 clients of 20 coordinates, by inter_var."""
    rows = found[
        (found["part"] == "inter")
        & (found["estimator"] == name)
        & (found["quantity"] == quantity)
        & (found["num_clients"] == 20)
        & (found["variant"] == inter.Setting(inter_var=0).variant)
    ]
    return rows.sort_values("inter_var")


def _bias(axis: Any, found: pd.DataFrame) -> None:
    for marker, (name, colour) in zip(MARKERS, INTER_COLOURS.items(), strict=False):
        rows = _simulated(found, name, "bias")
        place = np.arange(len(rows))
        axis.errorbar(
            place,
            rows["value"],
            2 * rows["error"],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1,
            capsize=2,
            label=name,
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(place, [f"{v:g}" for v in rows["inter_var"]])
    axis.set(
        xlabel=r"true variance between clients $\sigma_0^2$ (mean intra variance = 1)",
        ylabel=r"bias of the estimate of $\sigma_0^2$ (bars: 2 s.e.)",
        title="Bias: `empirical` counts the intra variance in",
        ylim=(-0.5, 1.35),
    )
    axis.legend(ncols=3, loc="center", bbox_to_anchor=(0.45, 0.55))


def _inter_cost(axis: Any, found: pd.DataFrame) -> None:
    for marker, (name, colour) in zip(MARKERS, INTER_COLOURS.items(), strict=False):
        rows = _simulated(found, name, "risk")
        axis.plot(
            np.arange(len(rows)),
            100 * (rows["value"] - 1),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1,
            label=name,
        )
    axis.set_xticks(np.arange(len(rows)), [f"{v:g}" for v in rows["inter_var"]])
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set(
        xlabel=r"true variance between clients $\sigma_0^2$ (mean intra variance = 1)",
        ylabel="extra error of personal parameters over Bayes, %",
        title="Cost of plugging the estimate in",
    )
    axis.legend(loc="upper right")


def _collapse(axis: Any, found: pd.DataFrame) -> None:
    line = np.linspace(0, 9, 600)
    closed = [collapse.closed_form(v) for v in line]
    axis.plot(line, line, color="#999999", linestyle=":", label="truth")
    axis.plot(line, closed, color="#cc3311", label="closed form (5.3)")
    part = found[found["part"] == "collapse"]
    for name, variant, marker, label in (
        ("empirical", collapse.SHRUNK, "o", "`empirical`, iterated on shrunk uploads"),
        ("moments", collapse.SHRUNK, "s", "`moments`, iterated on shrunk uploads"),
        ("moments", collapse.DESHRUNK, "*", "`moments`, de-shrunk first"),
    ):
        rows = part[(part["estimator"] == name) & (part["variant"] == variant)]
        rows = rows[rows["quantity"] == "fixed_point"]
        style = {"color": INTER_COLOURS[name], "markersize": 8, "label": label}
        fill = "none" if name == "empirical" else "full"
        axis.plot(rows["inter_var"], rows["value"], marker, fillstyle=fill, **style)
    for preset, marker in zip(collapse.PRESETS, "x+", strict=True):
        rows = part[part["variant"] == f"Self-FL, {preset}"].pivot_table(
            index="inter_var", columns="quantity", values="value"
        )
        # A run's own draw has its own spread: it belongs beside the closed form for that spread.
        spread = rows["first_round"] - collapse.INTRA_VAR
        label = f"Self-FL run, {preset}, `empirical`"
        axis.plot(spread, rows["last_round"], marker, color="black", markersize=8, label=label)
    axis.set(
        xlabel=r"spread of the optima minus the intra variance $\sigma^2 = 1$",
        ylabel="estimate that the iteration ends at",
        title="Collapse of estimates on shrunk models",
        ylim=(-0.5, 13.5),
    )
    axis.legend(loc="upper left")


def _intra(found: pd.DataFrame, name: str, quantity: str, pooling: str = "own") -> pd.DataFrame:
    """Rows of one estimator, independent batches; the last is over all clients (NaN examples)."""
    return found[
        (found["part"] == "intra")
        & (found["estimator"] == name)
        & (found["variant"] == f"replacement, {pooling}")
        & (found["quantity"] == quantity)
    ]


def _over_examples(axis: Any, found: pd.DataFrame) -> None:
    sizes = np.asarray(intra.SIZES, dtype=float)
    axis.plot(sizes, 1 / sizes, color="black", linewidth=7, alpha=0.2, label="truth (1 / n)  1.00")
    for marker, (name, colour) in zip(MARKERS, INTRA_COLOURS.items(), strict=True):
        value = _intra(found, name, "ratio")["value"].to_numpy()[: len(sizes)]
        slope = _intra(found, name, "slope")["value"].item()
        axis.plot(
            sizes,
            value / sizes,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            linestyle="--" if name in OVER_TIME else "-",
            label=f"{name}  {round(slope, 2) + 0.0:.2f}",
        )
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(sizes, [f"{n:g}" for n in sizes])
    axis.minorticks_off()
    axis.set(
        xlabel="examples of the client, n",
        ylabel="mean estimate of the variance of its optimum",
        title="Variance over time (dashed) sees n only if rescaled",
        ylim=(8e-5, 0.06),
    )
    axis.legend(loc="lower left", ncols=2, fontsize=7, title="and slope against log 1 / n")


def _coverage(axis: Any, found: pd.DataFrame) -> None:
    names = [*INTRA_COLOURS]
    for size, colour in SIZE_COLOURS.items():
        rows = [_intra(found, name, "coverage") for name in names]
        at = [r[r["num_examples"] == size].iloc[0] for r in rows]
        axis.errorbar(
            [100 * r["value"] for r in at],
            np.arange(len(names)),
            xerr=[200 * r["error"] for r in at],
            fmt="o",
            color=colour,
            markersize=6,
            linewidth=1,
            label=f"n = {size}",
        )
    axis.axvline(100 * base.NOMINAL, color="black", linewidth=0.8)
    axis.set_yticks(np.arange(len(names)), names)
    axis.set(
        xlabel="true parameters inside their 90 % interval, % (bars: 2 s.e.)",
        title="Coverage, with `moments` (line: 90 %)",
        xlim=(0, 100),
        ylim=(-0.6, len(names) - 0.4),
    )
    axis.invert_yaxis()
    axis.legend(loc="lower left")


def _intra_cost(axis: Any, found: pd.DataFrame) -> None:
    names = [*INTRA_COLOURS]
    for pooling, fill, label in (
        ("own", "full", "each client's own estimate"),
        ("pooled", "none", "pooled over clients (the default)"),
    ):
        rows = [_intra(found, name, "risk", pooling) for name in names]
        overall = [r[r["num_examples"].isna()].iloc[0] for r in rows]
        axis.errorbar(
            [r["value"] for r in overall],
            np.arange(len(names)),
            xerr=[2 * r["error"] for r in overall],
            fmt="o",
            color="#4477aa",
            fillstyle=fill,
            markersize=7,
            linewidth=1,
            label=label,
        )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(np.arange(len(names)), names)
    axis.set(
        xlabel="error of personal parameters over Bayes (bars: 2 s.e.)",
        title="Cost of plugging in, with `moments`",
        ylim=(-0.6, len(names) - 0.4),
    )
    axis.invert_yaxis()
    axis.legend(loc="lower right")
