"""What the measurements should show, as data, and where each goal stands.

A figure is the median over the passes of a quotient within each pass, or of a plain column.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from benchmarks.entries import (
    EVALUATED,
    FLOWER,
    LOCAL,
    ONE_ACTOR,
    PFL,
    PLAIN,
    SELFFL,
    TWO_ACTORS,
)


class Cell(NamedTuple):
    """A column of an entry on a workload."""

    workload: str
    entry: str
    column: str = "round_s"


class Goal(NamedTuple):
    """``top``, over ``below`` if there is one, is at most ``must``, and better at most ``aim``."""

    text: str
    top: Cell
    below: Cell | None
    must: float
    aim: float | None = None


def _beside(workload: str, entry: str) -> tuple[Cell, Cell]:
    """Two actors over another entry."""
    return Cell(workload, TWO_ACTORS), Cell(workload, entry)


def _speed(workload: str, must: float, aim: float) -> Goal:
    return Goal(f"{workload}, 2 actors, x plain loop", *_beside(workload, PLAIN), must, aim)


def _workers(workload: str, must: float) -> Goal:
    return Goal(f"{workload}, 2 actors over 1", *_beside(workload, ONE_ACTOR), must)


def _evaluation(workload: str, must: float) -> Goal:
    top, below = Cell(workload, EVALUATED, "eval_s"), Cell(workload, EVALUATED)
    return Goal(f"{workload}, evaluation over a round", top, below, must)


GOALS = (
    _speed("W1", 0.70, 0.45),
    _speed("W2", 0.48, 0.38),
    _speed("W3", 0.70, 0.40),
    _speed("W3s", 2.0, 1.0),
    _speed("W4", 0.70, 0.30),
    Goal("W1, 2 actors over pfl", *_beside("W1", PFL), 1.0),
    Goal("W1, 2 actors over Flower", *_beside("W1", FLOWER), 1.0),
    Goal("W2, 2 actors over Flower", *_beside("W2", FLOWER), 1.0),
    Goal("W1, s outside steady rounds", Cell("W1", TWO_ACTORS, "outside_s"), None, 12.0, 9.0),
    Goal("W1, peak PSS, GB", Cell("W1", TWO_ACTORS, "peak_gb"), None, 1.5, 1.2),
    Goal("W4, peak PSS, GB", Cell("W4", TWO_ACTORS, "peak_gb"), None, 1.6, 1.3),
    _workers("W1", 0.60),
    _workers("W2", 0.55),
    _workers("W3", 0.60),
    _workers("W4", 0.60),
    Goal("W4 over W3, 2 actors", Cell("W4", TWO_ACTORS), Cell("W3", TWO_ACTORS), 2.5),
    Goal("W3s over W3, 2 actors", Cell("W3s", TWO_ACTORS), Cell("W3", TWO_ACTORS), 0.2),
    _evaluation("W1", 0.20),
    _evaluation("W2", 0.30),
    Goal("W1, Self-FL over FedAvg, local pool", Cell("W1", SELFFL), Cell("W1", LOCAL), 1.25),
)


def figure(rows: pd.DataFrame, goal: Goal) -> float:
    """The goal's figure; NaN if no pass has what it needs.

    Args:
        rows: a row for each pass, workload and entry.
    """
    top = _by_pass(rows, goal.top)
    values = top if goal.below is None else top / _by_pass(rows, goal.below)
    return float(values.median())


def _by_pass(rows: pd.DataFrame, cell: Cell) -> pd.Series[float]:
    if cell.column not in rows:
        return pd.Series(dtype=float)
    here = rows[(rows["workload"] == cell.workload) & (rows["entry"] == cell.entry)]
    return here.set_index("pass")[cell.column]


def standing(value: float, goal: Goal) -> str:
    """``aim`` or ``must`` is reached, ``missed``, or ``not measured``."""
    if math.isnan(value):
        return "not measured"
    if goal.aim is not None and value <= goal.aim:
        return "aim"
    return "must" if value <= goal.must else "missed"


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every goal with its figure and where it stands."""
    found = []
    for goal in GOALS:
        value = figure(rows, goal)
        found.append(
            {
                "goal": goal.text,
                "must": f"<= {goal.must:g}",
                "aim": "" if goal.aim is None else f"<= {goal.aim:g}",
                "figure": value,
                "stands": standing(value, goal),
            }
        )
    return pd.DataFrame(found)
