"""Whether all entries end at the same model: what is compared must be the same work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.entries import LOCAL, OTHER_MODEL, PLACEMENTS

TOLERANCE = 1e-5
DETERMINISTIC = ("W4",)
"""Workloads in which nothing is random: one full-batch step a client, everybody."""

Weights = Mapping[str, np.ndarray]


def load(path: Path) -> dict[str, np.ndarray]:
    """Weights by name from an ``.npz`` file."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def largest_difference(one: Weights, other: Weights) -> float:
    """Largest absolute difference of any weight."""
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def apart(one: Weights, other: Weights, start: Weights) -> float:
    """Distance between two final models over the way from the start to the second.

    Batches in another order leave some; another amount of work would show.
    """
    between = sum(float(((one[n] - other[n]) ** 2).sum()) for n in start)
    way = sum(float(((other[n] - start[n]) ** 2).sum()) for n in start)
    return float(np.sqrt(between / way))


def findings(rows: pd.DataFrame) -> tuple[list[str], bool]:
    """The checks in words, and whether all hold.

    Args:
        rows: a row for each pass, workload and entry, with ``digest`` and ``difference``.
    """
    said, good = [], True
    for workload in rows["workload"].unique().tolist():
        here = rows[rows["workload"] == workload]
        ours = here[here["entry"].isin(set(PLACEMENTS) - set(OTHER_MODEL))]
        digests = ours["digest"].nunique()
        if digests:
            good &= digests == 1
            found = "one digest" if digests == 1 else f"{digests} DIGESTS"
            said.append(f"{workload}: {found} in {len(ours)} runs of our placements")
        others = here[here["entry"] != LOCAL].dropna(subset="difference")
        if workload in DETERMINISTIC and len(others):
            largest = others["difference"].max()
            good &= bool(largest <= TOLERANCE)
            verb = "agree" if largest <= TOLERANCE else "DISAGREE"
            names = ", ".join(others["entry"].unique())
            said.append(
                f"{workload}: final models {verb} with our local pool's: largest difference "
                f"{largest:.1e}, at most {TOLERANCE:g} ({names})"
            )
    return said, good
