"""What a Self-FL run made of its uncertainties: one page of pictures and a short table.

    python -m analysis.uncertainty RUN_DIR [RUN_DIR ...] [--output DIR]

Reads the run's folder (``config.yaml``, ``environment.json`` and the three tables; nothing is run
again) and writes ``uncertainty.png`` and ``.svg`` into it, or ``<run>-uncertainty.*`` into
``--output``. Values are each client's newest; sizes are numbers of training examples. Exit status
2 and one line if a folder holds no such run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from selffl_ray import load_config
from selffl_ray.algorithms.selffl.alarms import UNEQUAL_SIZES
from selffl_ray.console import text_table
from selffl_ray.errors import DataError, UsageError

ALARMS = {
    "uncertainty/alarm_no_information": "no information",
    "uncertainty/alarm_ratio": "ratio",
    "uncertainty/alarm_floor": "floor",
}
"""Metrics of ``rounds.parquet``, and what they are called here."""

MOST_NAMED = 24
"""Clients up to which each is named on an axis."""

GREY, RED, BLUE = "#bbbbbb", "#cc3311", "#4477aa"


class RunData(NamedTuple):
    """A run's folder, as read.

    title: method, data set and seed; num_examples: training examples by client; the tables as they
    are in the files, ``clients`` and ``rounds`` possibly empty.
    """

    folder: Path
    title: str
    num_examples: pd.Series
    uncertainty: pd.DataFrame
    clients: pd.DataFrame
    rounds: pd.DataFrame


class Gain(NamedTuple):
    """What its personalized model gains a client over the global one, by client, and its unit."""

    by_client: pd.Series
    unit: str


class Page(NamedTuple):
    """All values of the page.

    newest: one row a client and group, by number of examples, with ``num_examples``, ``intra_var``,
    ``shrinkage``, ``num_local_steps`` and ``gain`` (NaN if not measured), each the last one known.
    inter: inter-client variance, rounds by groups. alarms: rounds with a probe by ALARMS, 0 or 1.
    heat: shrink factors, clients (as in newest) by groups, or by rounds if there is one group only.
    correlation: of log intra variance with log 1/n by group, NaN if sizes are too equal to tell.
    """

    newest: pd.DataFrame
    inter: pd.DataFrame
    alarms: pd.DataFrame
    heat: pd.DataFrame
    correlation: dict[str, float]
    gain_unit: str

    @property
    def groups(self) -> list[str]:
        """Parameter groups in the model's order."""
        return list(self.correlation)

    @property
    def sizes(self) -> str:
        """How many training examples clients have, in words."""
        num = self.newest["num_examples"]
        return f"{num.min()} to {num.max()}" if num.min() < num.max() else f"{num.min()} each"


def read_run(folder: Path) -> RunData:
    """The run of a folder.

    Raises:
        DataError: no such folder, no run of Self-FL in it, or a broken file.
    """
    if not (folder / "config.yaml").is_file():
        raise DataError(
            f"{folder}: there is no config.yaml; give the folder of a run, as in "
            "runs/<experiment>/<run>"
        )
    config = load_config(folder / "config.yaml", folder=Path.cwd())
    if not (folder / "uncertainty.parquet").is_file():
        raise DataError(
            f"{folder}: there is no uncertainty.parquet; a run of method selffl writes it (here "
            f"{config.method.name})"
        )
    try:
        environment = json.loads((folder / "environment.json").read_text())
        tables = {name: _read_table(folder, name) for name in ("uncertainty", "clients", "rounds")}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: unreadable ({' '.join(str(error).split())})") from error
    if "num_train_examples" not in environment:
        raise DataError(
            f"{folder}: environment.json has no num_train_examples, it is of an older version; "
            "repeat the run (selffl run config.yaml)"
        )
    if tables["uncertainty"]["shrinkage"].isna().all():
        raise DataError(
            f"{folder}: no shrink factor was estimated in {len(tables['rounds'])} rounds; look at "
            "the alarms in rounds.parquet, or run longer"
        )
    title = f"{config.method_label} on {config.data.component.name}, seed {config.seed}"
    sizes = pd.Series(environment["num_train_examples"], environment["client_ids"])
    return RunData(folder, title, sizes, **tables)


def _read_table(folder: Path, name: str) -> pd.DataFrame:
    """One of the tables; an empty frame where a run has not come to write it."""
    path = folder / f"{name}.parquet"
    return pd.read_parquet(path) if path.exists() else pd.DataFrame()


def page_of(run: RunData) -> Page:
    """The values of the page, from the tables alone."""
    table = run.uncertainty
    groups = list(dict.fromkeys(table["group"]))
    # last() is the last value that is not null: an absent client keeps what it had.
    newest = table.sort_values("round_index").groupby(["client_id", "group"], sort=False).last()
    newest = newest.reset_index()
    newest["num_examples"] = newest["client_id"].map(run.num_examples)
    gain = gain_of(run.clients)
    newest["gain"] = newest["client_id"].map(gain.by_client).astype(float)
    newest["group"] = pd.Categorical(newest["group"], groups, ordered=True)
    newest = newest.sort_values(["num_examples", "client_id", "group"]).reset_index(drop=True)
    order = list(dict.fromkeys(newest["client_id"]))
    across = "round_index" if len(groups) == 1 else "group"
    source = table if len(groups) == 1 else newest.astype({"group": str})
    heat = source.pivot_table("shrinkage", "client_id", across, aggfunc="last", dropna=False)
    inter = table.pivot_table("inter_var", "round_index", "group", aggfunc="first")
    found = [name for name in ALARMS if name in run.rounds]
    alarms = run.rounds.set_index("round_index")[found].dropna() if found else pd.DataFrame()
    return Page(
        newest[["client_id", "group", "num_examples", *VALUES]],
        inter[[g for g in groups if g in inter]],
        alarms,
        heat.loc[order, groups if len(groups) > 1 else slice(None)],
        {g: _correlation(newest[newest["group"] == g]) for g in groups},
        gain.unit,
    )


VALUES = ("intra_var", "shrinkage", "num_local_steps", "gain")


def gain_of(clients: pd.DataFrame) -> Gain:
    """Local minus global accuracy at the last evaluation, in points; global minus local error.

    On test data; on validation data where a run has no others.
    """
    nothing = Gain(pd.Series(dtype=float), "")
    if clients.empty:
        return nothing
    for split in ("test", "val"):
        own = clients[clients["split"] == split]
        own = own[own["round_index"] == own["round_index"].max()].set_index("client_id")
        if own.empty:
            continue
        if "local_accuracy" in own:
            better = 100 * (own["local_accuracy"] - own["global_accuracy"])
            return Gain(better, f"local - global {split} accuracy (points)")
        return Gain(own["global_mse"] - own["local_mse"], f"global - local {split} error (MSE)")
    return nothing


def _correlation(rows: pd.DataFrame) -> float:
    """Of log intra variance with log 1/n; NaN if sizes or variances do not allow one."""
    known = rows[rows["intra_var"] > 0]
    num, var = known["num_examples"].to_numpy(float), known["intra_var"].to_numpy(float)
    if len(known) < 3 or num.max() < UNEQUAL_SIZES * num.min() or np.ptp(var) == 0:
        return float("nan")
    return float(np.corrcoef(np.log(var), -np.log(num))[0, 1])


def correlation_text(page: Page, group: str) -> str:
    """The correlation, or why there is none."""
    num = page.newest["num_examples"]
    if not np.isnan(page.correlation[group]):
        return f"{page.correlation[group]:.2f}"
    if num.max() < UNEQUAL_SIZES * num.min():
        return f"sizes are {'equal' if num.min() == num.max() else 'nearly equal'}"
    return "too few or equal variances"


def summary(run: RunData, page: Page) -> str:
    """The short table for a terminal."""
    rows = []
    for group in page.groups:
        shrinkage = page.newest.loc[page.newest["group"] == group, "shrinkage"]
        spread = (shrinkage.min(), shrinkage.median(), shrinkage.max())
        rows.append([group, *(f"{v:.3f}" for v in spread), correlation_text(page, group)])
    header = ["group", "shrinkage min", "median", "max", "corr(log intra var, log 1/n)"]
    clients = page.newest["client_id"].nunique()
    return "\n".join(
        [
            f"{run.folder}: {run.title}; {clients} clients, {page.sizes} training examples",
            text_table(header, rows),
            alarm_line(page.alarms),
        ]
    )


def alarm_line(alarms: pd.DataFrame) -> str:
    """How often each alarm was raised."""
    if alarms.empty:
        return "alarms: not recorded (no probe after the warm-up)"
    counts = ", ".join(f"{ALARMS[name]} {int(alarms[name].sum())}" for name in alarms)
    return f"alarms in {len(alarms)} probes: {counts}"


# -- the picture --------------------------------------------------------------------------------


def draw(run: RunData, page: Page) -> Figure:
    """The page."""
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.add_gridspec(2, 3)
    colours = _colours(page.groups)
    _intra_panel(figure.add_subplot(grid[0, 0]), page, colours)
    _size_panel(figure.add_subplot(grid[0, 1]), page, colours)
    _gain_panel(figure.add_subplot(grid[0, 2]), page, colours)
    below = grid[1, 0].subgridspec(2, 1, height_ratios=[4, 1], hspace=0.0)
    variances = figure.add_subplot(below[0])
    _inter_panel(variances, page, colours)
    _alarm_panel(figure.add_subplot(below[1], sharex=variances), page)
    _steps_panel(figure.add_subplot(grid[1, 1]), page)
    _heat_panel(figure, figure.add_subplot(grid[1, 2]), page)
    last = int(run.uncertainty["round_index"].max())
    figure.suptitle(f"{run.title}: uncertainties after round {last}", fontsize=14)
    if len(page.groups) > 1:
        handles, labels = variances.get_legend_handles_labels()
        columns = min(len(labels), 8)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _colours(groups: Sequence[str]) -> dict[str, object]:
    if len(groups) == 1:
        return {groups[0]: BLUE}
    if len(groups) <= 10:
        return dict(zip(groups, colormaps["tab10"].colors, strict=False))
    shades = colormaps["viridis"](np.linspace(0, 0.95, len(groups)))
    return dict(zip(groups, shades, strict=True))


def _scatter(axes: Axes, page: Page, x: str, y: str, colours: dict[str, object]) -> None:
    for group in page.groups:
        own = page.newest[page.newest["group"] == group]
        axes.scatter(own[x], own[y], color=colours[group], s=30, alpha=0.8, linewidths=0)


def _size_axis(axes: Axes, page: Page) -> None:
    """Numbers of examples: logarithmic with whole numbers on it, unless they are nearly equal."""
    num = page.newest["num_examples"]
    axes.set_xlabel("training examples n")
    if num.max() < UNEQUAL_SIZES * num.min():
        axes.set_xlim(num.min() - 1.5, num.max() + 1.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    axes.set_xscale("log")
    axes.set_xlim(num.min() / 1.15, num.max() * 1.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _intra_panel(axes: Axes, page: Page, colours: dict[str, object]) -> None:
    axes.set_ylabel("raw variance, on the estimator's scale")
    _size_axis(axes, page)
    _title(axes, "Intra-client variance against size (dashed: 1/n)", correlations(page))
    if not (page.newest["intra_var"] > 0).any():
        _say(axes, "no variance above 0")
        return
    _scatter(axes, page, "num_examples", "intra_var", colours)
    axes.set_yscale("log")
    num = np.array(axes.get_xlim())
    for group in page.groups:
        own = page.newest[(page.newest["group"] == group) & (page.newest["intra_var"] > 0)]
        level = np.exp(np.log(own["intra_var"] * own["num_examples"]).mean())
        axes.plot(num, level / num, color=colours[group], linewidth=1, linestyle="--", zorder=0)


def correlations(page: Page) -> str:
    """All correlations in one line, the extreme ones if there are many."""
    known = {group: r for group, r in page.correlation.items() if not np.isnan(r)}
    head = "correlation of log variance with log 1/n: "
    if not known:
        return f"no correlation: {correlation_text(page, page.groups[0])}"
    if len(page.groups) == 1:
        return head + correlation_text(page, page.groups[0])
    if len(known) > 3:
        return f"{head}{min(known.values()):.2f} to {max(known.values()):.2f}"
    return head + ", ".join(f"{r:.2f} {group}" for group, r in known.items())


def _title(axes: Axes, title: str, remark: str = "") -> None:
    axes.set_title(f"{title}\n" if remark else title, fontsize=11)
    if remark:
        place = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(remark, (0.5, 1), (0, 6), ha="center", fontsize=9, color="#555555", **place)


def _size_panel(axes: Axes, page: Page, colours: dict[str, object]) -> None:
    _scatter(axes, page, "num_examples", "shrinkage", colours)
    _size_axis(axes, page)
    axes.set(ylim=(-0.04, 1.04), ylabel="shrinkage (0: own model, 1: its start)")
    _title(axes, "Shrinkage against size")


def _gain_panel(axes: Axes, page: Page, colours: dict[str, object]) -> None:
    axes.set(ylim=(-0.04, 1.04), ylabel="shrinkage (0: own model, 1: its start)")
    _title(axes, "Shrinkage against what the personalized model gains")
    if page.newest["gain"].isna().all():
        _say(axes, "the clients were not evaluated")
        return
    axes.axvline(0, color=GREY, linewidth=1, zorder=0)
    _scatter(axes, page, "gain", "shrinkage", colours)
    axes.set_xlabel(page.gain_unit)


def _inter_panel(axes: Axes, page: Page, colours: dict[str, object]) -> None:
    """Positive ones on a logarithmic axis; those estimated as 0 as triangles at its foot."""
    for group in page.inter.columns:
        values = page.inter[group]
        style = {"drawstyle": "steps-post", "linewidth": 1.5, "color": colours[group]}
        axes.plot(values.index, values.where(values > 0), label=group, **style)
        zero = values.index[values == 0]
        foot = axes.get_xaxis_transform()
        axes.plot(zero, np.full(len(zero), 0.03), "v", color=colours[group], transform=foot)
    if (page.inter > 0).any(axis=None):
        axes.set_yscale("log")
    else:
        axes.set_yticks([])
    axes.set_ylabel("raw variance")
    axes.tick_params(labelbottom=False)
    remark = "triangles: estimated as 0" if (page.inter == 0).any(axis=None) else ""
    _title(axes, "Inter-client variance and alarms over rounds", remark)


def _alarm_panel(axes: Axes, page: Page) -> None:
    axes.set_yticks(range(len(ALARMS)), list(ALARMS.values()), fontsize=8)
    axes.set_ylim(-0.7, len(ALARMS) - 0.3)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if page.alarms.empty:
        _say(axes, "no alarms recorded")
        return
    for height, name in enumerate(ALARMS):
        raised = page.alarms[name] > 0
        rounds = page.alarms.index
        axes.plot(rounds[~raised], np.full((~raised).sum(), height), ".", color=GREY, markersize=4)
        axes.plot(rounds[raised], np.full(raised.sum(), height), "X", color=RED, markersize=7)


def _steps_panel(axes: Axes, page: Page) -> None:
    own = page.newest[page.newest["group"] == page.groups[0]]
    place = np.arange(len(own))
    axes.bar(place, own["num_local_steps"], color=BLUE, width=0.85)
    _client_axis(axes.xaxis, own, rotation=90)
    axes.set_ylabel("steps")
    _title(axes, "Local steps (early stop or readout)")


def _heat_panel(figure: Figure, axes: Axes, page: Page) -> None:
    heat = page.heat
    single = len(page.groups) == 1
    shades = colormaps["viridis"].with_extremes(bad="#e6e6e6")
    limits = {"vmin": 0, "vmax": 1, "cmap": shades}
    image = axes.imshow(heat, aspect="auto", interpolation="nearest", origin="lower", **limits)
    own = page.newest[page.newest["group"] == page.groups[0]]
    _client_axis(axes.yaxis, own, rotation=0)
    figure.colorbar(image, ax=axes, label="shrinkage")
    if single:
        every = max(1, -(-heat.shape[1] // 10))
        axes.set_xticks(range(0, heat.shape[1], every), heat.columns[::every])
        axes.set_xlabel("round")
        remark = f"one parameter group: {page.groups[0]}"
        remark += "; grey: absent, or no estimate" if heat.isna().any(axis=None) else ""
        _title(axes, "Shrinkage by client and round", remark)
    else:
        axes.set_xticks(range(heat.shape[1]), heat.columns, rotation=30, ha="right")
        _title(axes, "Shrinkage by client and layer")


def _client_axis(axis: object, own: pd.DataFrame, rotation: int) -> None:
    """Names with training examples while they are few; otherwise places in that order."""
    if len(own) <= MOST_NAMED:
        names = [f"{c} ({n})" for c, n in zip(own["client_id"], own["num_examples"], strict=True)]
        axis.set_ticks(range(len(own)), names, rotation=rotation, fontsize=8)
        return
    axis.set_major_locator(MaxNLocator(integer=True))
    axis.set_label_text("client, by number of training examples")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#555555")


# -- the command --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"analysis.uncertainty: {message}; see --help\n")


def pictures(folders: Sequence[Path], output: Path | None) -> list[Path]:
    """Where each run's page goes, without its ending.

    Raises:
        DataError: two runs would share a name.
    """
    if output is None:
        return [folder / "uncertainty" for folder in folders]
    places = [output / f"{folder.resolve().name}-uncertainty" for folder in folders]
    if len(set(places)) < len(places):
        raise DataError(
            f"--output {output}: two of the runs have the same folder name and would be written to "
            "one file; leave --output out, and each page goes into its run's folder"
        )
    return places


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = _Parser(prog="python -m analysis.uncertainty", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, help="folder for the pictures; the run's by default")
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in options.folders]
        for run, place in zip(runs, pictures(options.folders, options.output), strict=True):
            page = page_of(run)
            figure = draw(run, page)
            place.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(place.with_suffix(".png"), dpi=110)
            figure.savefig(place.with_suffix(".svg"), metadata={"Date": None})
            print(f"{summary(run, page)}\npage: {place}.png and .svg\n")
    except (UsageError, OSError) as error:
        print(f"analysis.uncertainty: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
