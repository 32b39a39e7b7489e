"""FEMNIST: handwritten digits and letters in LEAF's files, one client a writer.

The files hold 784 numbers a picture, pixel / 255, row by row, dark ink (near 0) on a white ground
(1). Here ink is 1 on 0, as in MNIST. A writer whose pictures are dark on average gives away files
that were turned already; guessing is refused and ``data.ink`` says which they are.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selffl_ray.datasets.base import Dataset, Group
from selffl_ray.datasets.leaf import (
    Examples,
    LeafConfig,
    ListError,
    class_labels,
    find_leaf,
    leaf_defaults,
    leaf_groups,
    numbers,
)
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

SIDE = 28
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
"""Classes in LEAF's order."""


@dataclass(frozen=True, kw_only=True)
class FemnistConfig(LeafConfig):
    """Options of ``data: {name: femnist}``."""

    ink: Literal["dark", "light"] = "dark"
    """In the files: dark on a white ground, as LEAF writes it, or light on a dark one."""


@register_dataset("femnist", FemnistConfig)
def femnist(config: FemnistConfig) -> Dataset:
    """Handwritten digits and letters, 28x28, 62 classes, each writer a client (LEAF's files)."""

    def convert(x: list[Any], y: list[Any]) -> Examples:
        return Examples(_pictures(x, config.ink), class_labels(y, len(CHARACTERS)))

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        return leaf_groups(files, config.split, convert)

    return Dataset(
        name="femnist",
        title="FEMNIST (LEAF; Caldas et al. 2018, from NIST Special Database 19)",
        licence="NIST Special Database 19: public domain in the US; LEAF's code is BSD-2-Clause",
        shape=DataShape((1, SIDE, SIDE), len(CHARACTERS)),
        find=lambda source: find_leaf("femnist", config.split, source),
        read=read,
        label_names=tuple(CHARACTERS),
        shift_scale=(0.0, 1.0),
        natural=True,
        defaults=leaf_defaults("femnist", config),
    )


def _pictures(x: list[Any], ink: Literal["dark", "light"]) -> np.ndarray:
    """(N, 1, 28, 28) uint8, 255 where there is ink."""
    pixels = numbers(x, "x", SIDE * SIDE).astype(np.float64)
    if len(pixels) and not 0 <= pixels.min() <= pixels.max() <= 1:
        raise ListError(
            f"x must lie in 0..1, found {pixels.min():g}..{pixels.max():g}; LEAF divides by 255"
        )
    if ink == "dark":
        pixels = 1.0 - pixels
    if len(pixels) and pixels.mean() > 0.5:
        other = "light" if ink == "dark" else "dark"
        raise ListError(
            f"x is mostly ink ({pixels.mean():.2f} on average) if ink is {ink} in the files; set "
            f"data.ink={other}"
        )
    return np.round(255 * pixels).astype(np.uint8).reshape(-1, 1, SIDE, SIDE)
