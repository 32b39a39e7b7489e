"""The calibration's tables in Markdown, from its figures.

A frame holds one ``calibration_base.Figure`` a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from analysis import calibration_base as base
from analysis import calibration_collapse as collapse
from analysis import calibration_inter as inter
from analysis import calibration_intra as intra
from analysis import calibration_regression as regression

STANDARD_ERRORS = 2
"""Added to the tolerance: our own figures have chance in them."""


def within(row: pd.Series) -> bool:
    """Whether a figure agrees with the specification's."""
    error = 0.0 if math.isnan(row["error"]) else row["error"]
    allowed = row["tolerance"] + STANDARD_ERRORS * error
    return bool(abs(row["value"] - row["specification"]) <= allowed)


def one(found: pd.DataFrame, **keys: object) -> pd.Series:
    """The one row with these values; None asks for NaN."""
    rows = found
    for column, value in keys.items():
        rows = rows[rows[column].isna() if value is None else rows[column] == value]
    assert len(rows) == 1, f"{len(rows)} figures for {keys}"
    return rows.iloc[0]


def number(row: pd.Series, digits: int = 3) -> str:
    """A figure with its standard error, if it has one."""
    error = "" if math.isnan(row["error"]) else f" ± {row['error']:.{digits}f}"
    # Adding 0 turns a rounded -0.0 into 0.0.
    return f"{round(row['value'], digits) + 0.0:.{digits}f}{error}"


def _compared(row: pd.Series) -> list[str]:
    """Cells specification and `within` of a row."""
    if math.isnan(row["specification"]):
        return ["", ""]
    return [f"{row['specification']:g}", "yes" if within(row) else "**no**"]


def _within(row: pd.Series) -> str:
    return "yes" if within(row) else "**no**"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def specification_table(found: pd.DataFrame, part: str) -> str:
    """Every figure of a part that the specification gives too."""
    rows = []
    given = found[(found["part"] == part) & found["specification"].notna()]
    for _, row in given.iterrows():
        difference = f"{row['value'] - row['specification']:+.3f}"
        clients = f"M={row['num_clients']:g}, {row['variant']}"
        cells = [row["estimator"], clients, f"{row['inter_var']:g}", row["quantity"]]
        rows.append([*cells, number(row), f"{row['specification']:g}", difference, _within(row)])
    header = ["estimator", "clients", "inter_var", "quantity", "found", "specification"]
    return _table([*header, "difference", "within"], rows)


def inter_tables(found: pd.DataFrame) -> str:
    """Bias, RMSE, coverage and risk of the inter-client estimators: a table a kind of clients."""
    part = found[found["part"] == "inter"]
    kinds = dict.fromkeys((s.num_clients, s.variant) for s in inter.SETTINGS)
    tables = []
    for clients, variant in kinds:
        own = part[(part["num_clients"] == clients) & (part["variant"] == variant)]
        values = [
            s.inter_var for s in inter.SETTINGS if (s.num_clients, s.variant) == (clients, variant)
        ]
        rows = [
            [quantity, name, *(number(_at(own, name, quantity, v)) for v in values)]
            for quantity in ("bias", "rmse", "coverage", "risk")
            for name in own[own["quantity"] == quantity]["estimator"].unique()
        ]
        header = ["quantity", "estimator", *(f"inter_var {v:g}" for v in values)]
        tables.append(f"M={clients}, {variant}:\n\n{_table(header, rows)}")
    return "\n\n".join(tables)


def _at(own: pd.DataFrame, name: str, quantity: str, inter_var: float) -> pd.Series:
    return one(own, estimator=name, quantity=quantity, inter_var=inter_var)


def ratio_table(found: pd.DataFrame) -> str:
    """Ratios to the truth, RMSE of the log, slopes, and what `moments` makes of them."""
    rows = []
    for sampling, names in intra.SAMPLINGS.items():
        for name in names:
            keys = {"part": "intra", "estimator": name, "variant": f"{sampling}, own"}
            cells = [sampling, name]
            for quantity in ("ratio", "log_rmse"):
                cells += [
                    number(one(found, **keys, quantity=quantity, num_examples=n), 2)
                    for n in intra.SIZES
                ]
            cells.append(number(one(found, **keys, quantity="slope"), 2))
            cells.append(number(one(found, **keys, quantity="moments_ratio"), 2))
            rows.append(cells)
    sizes = [f"n={n}" for n in intra.SIZES]
    header = ["batches", "estimator", f"ratio {sizes[0]}", *sizes[1:]]
    header += [f"RMSE of log {sizes[0]}", *sizes[1:], "slope", "`moments` over inter_var"]
    return _table(header, rows)


def intra_posterior_table(found: pd.DataFrame) -> str:
    """Coverage and risk of the intra-client estimators, own and pooled."""
    blocks = [(intra.BAYES, "own")]
    blocks += [
        (name, f"{sampling}, {pooling}")
        for sampling, names in intra.SAMPLINGS.items()
        for pooling in ("own", "pooled")
        for name in names
    ]
    rows = []
    for name, variant in blocks:
        cells = [variant, name]
        for quantity in ("coverage", "risk"):
            for size in (*intra.SIZES, None):
                row = one(
                    found,
                    part="intra",
                    estimator=name,
                    variant=variant,
                    quantity=quantity,
                    num_examples=size,
                )
                cells.append(number(row, 2))
        rows.append(cells)
    sizes = [*(f"n={n}" for n in intra.SIZES), "all"]
    header = ["batches, variances", "estimator", f"coverage {sizes[0]}", *sizes[1:]]
    return _table([*header, f"risk {sizes[0]}", *sizes[1:]], rows)


def regression_table(found: pd.DataFrame) -> str:
    """Ratios to the truth in linear regression."""
    part = found[found["part"] == "regression"]
    rows = []
    for name, variant in dict.fromkeys(zip(part["estimator"], part["variant"], strict=True)):
        own = [one(part, estimator=name, variant=variant, num_examples=n) for n in regression.SIZES]
        expected = [_compared(row) for row in own]
        rows.append(
            [
                name,
                variant,
                *(number(row, 2) for row in own),
                " / ".join(figure for figure, _ in expected).strip(" /"),
                " / ".join(good for _, good in expected).strip(" /"),
            ]
        )
    sizes = [f"n={n}" for n in regression.SIZES]
    return _table(["estimator", "variant", *sizes, "specification", "within"], rows)


def collapse_table(found: pd.DataFrame) -> str:
    """Fixed points by the package's functions."""
    part = found[found["part"] == "collapse"]
    rows = []
    for inter_var in collapse.INTER_VARS:
        for name in base.INTER:
            keys = {"estimator": name, "inter_var": inter_var}
            shrunk = one(part, **keys, variant=collapse.SHRUNK)
            undone = one(part, **keys, variant=collapse.DESHRUNK)
            cells = [f"{inter_var:g}", name, number(shrunk), *_compared(shrunk)]
            rows.append([*cells, number(undone)])
    header = ["inter_var", "estimator", "on shrunk uploads", "specification", "within"]
    return _table([*header, "on de-shrunk uploads"], rows)


def system_table(found: pd.DataFrame) -> str:
    """Estimates in runs of Self-FL, first and last round."""
    part = found[found["part"] == "collapse"]
    rows = []
    for inter_var in collapse.INTER_VARS:
        for preset in collapse.PRESETS:
            keys = {"inter_var": inter_var, "variant": f"Self-FL, {preset}"}
            cells = [
                number(one(part, **keys, quantity=quantity), 4)
                for quantity in ("first_round", "last_round", "closed_form")
            ]
            rows.append([f"{inter_var:g}", preset, *cells])
    header = ["inter_var", "preset", "first round (unshrunk)", "last round"]
    return _table([*header, "closed form for the run's own spread"], rows)
