"""What the commands of the benchmarks share: names in their options, and where figures go."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Collection
from pathlib import Path

import pandas as pd

from selffl_ray.numerics import processor


def from_one(text: str) -> int:
    """Type of an option that takes a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1, got {text!r}")
    return int(text)


def chosen(
    parser: argparse.ArgumentParser, flag: str, text: str | None, known: Collection[str]
) -> list[str]:
    """Names with commas between them, as given; all that are known if none is. Ends at others."""
    names = list(known) if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{flag}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def save(frame: pd.DataFrame, path: str | None, float_format: str = "%.5f") -> None:
    """Write figures as CSV, each row with the machine that gave them; without a path nothing."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rows = frame.assign(machine=f"{processor()}, {platform.platform()}")
    rows.to_csv(path, index=False, float_format=float_format)
