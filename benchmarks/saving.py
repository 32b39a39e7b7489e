"""Where the figures of a benchmark go."""

from __future__ import annotations

import platform
from pathlib import Path

import pandas as pd

from selffl_ray.environment import processor


def save(frame: pd.DataFrame, path: str | None, float_format: str = "%.5f") -> None:
    """Write figures as CSV, each row with the machine that gave them; without a path nothing."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rows = frame.assign(machine=f"{processor()}, {platform.platform()}")
    rows.to_csv(path, index=False, float_format=float_format)
