"""The columns of the tables: which metric, in which unit, and which direction is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.report.statistics import Interval

Unit = Literal["percent", "score", "count", "megabytes", "seconds"]
FACTORS: dict[Unit, float] = {
    "percent": 100.0,
    "score": 1.0,
    "count": 1.0,
    "megabytes": 1e-6,
    "seconds": 1.0,
}
SCORE_DIGITS = 3
"""Significant digits of the smallest mean in a column of errors."""


@dataclass(frozen=True)
class Measure:
    """A column.

    metric: name in :class:`~analysis.report.numbers.RunNumbers`' ``final``.
    better: 1 if higher is better, -1 if lower is, 0 if neither (never bold).
    missing: why a row may lack it.
    optional: the column is left out if no row has it.
    """

    metric: str
    title: str
    unit: Unit
    better: int
    missing: str = "not measured in this run"
    optional: bool = False


def score_measures(split: str, score: str) -> list[Measure]:
    """Columns of the table of scores.

    Args:
        split: ``test`` or ``val``; score: ``accuracy`` or ``mse``.
    """
    unit: Unit = "percent" if score == "accuracy" else "score"
    up = 1 if score == "accuracy" else -1
    local = f"{split}/local_{score}"
    no_global = "the method has no global model"
    alone = "needs the clients of exactly one row of that method on the same partition"
    return [
        Measure(f"{split}/global_{score}", "global", unit, up, no_global),
        Measure(local, "local", unit, up),
        Measure(f"{local}_mean", "client mean", unit, up),
        Measure(f"{local}_std", "client std", unit, 0),
        Measure(f"{local}_worst10", "worst tenth", unit, up),
        Measure(f"{local}_best10", "best tenth", unit, up),
        Measure(f"{split}/clients_harmed_vs_global", "harmed vs global", "percent", -1, no_global),
        Measure(
            f"{split}/clients_harmed_vs_local",
            "harmed vs local",
            "percent",
            -1,
            alone,
            optional=True,
        ),
        Measure(
            f"{split}/clients_harmed_vs_fedavg",
            "harmed vs fedavg",
            "percent",
            -1,
            alone,
            optional=True,
        ),
        Measure(f"new/local_{score}", "new clients, local", unit, up, optional=True),
    ]


def cost_measures() -> list[Measure]:
    """Columns of the table of costs."""
    return [
        Measure("cost/total_steps", "gradient steps", "count", 0),
        Measure("cost/rounds", "rounds", "count", 0),
        Measure("cost/total_bytes_down", "MB down", "megabytes", 0),
        Measure("cost/total_bytes_up", "MB up", "megabytes", 0),
        Measure("cost/seconds", "seconds", "seconds", 0),
    ]


def decimals(unit: Unit, values: Sequence[float]) -> int:
    """Digits behind the point for a column of values in their shown unit."""
    if unit == "count":
        return 0
    if unit != "score":
        return 1
    sizes = [abs(v) for v in values if v and math.isfinite(v)]
    return max(0, SCORE_DIGITS - 1 - math.floor(math.log10(min(sizes)))) if sizes else 1


def number(value: float, digits: int) -> str:
    """Fixed digits, thousands apart, and no negative zero."""
    text = f"{value:,.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text


def shown(interval: Interval, factor: float, digits: int) -> str:
    """``94.5 ± 0.7``; without the half-width where there is none or it is exactly 0."""
    text = number(interval.mean * factor, digits)
    if not interval.half:
        return text
    return f"{text} ± {number(interval.half * factor, digits)}"


def signed(value: float, factor: float, digits: int) -> str:
    """``+1.4``, ``−0.3``, ``0.0``."""
    text = number(value * factor, digits)
    if text.startswith("-"):
        return f"\N{MINUS SIGN}{text[1:]}"
    return f"+{text}" if text.strip("0.,") else text


def span(low: float, high: float, factor: float, digits: int) -> str:
    """``−0.3 to +3.1``."""
    return f"{signed(low, factor, digits)} to {signed(high, factor, digits)}"
