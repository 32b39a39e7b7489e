"""EMNIST, handwritten digits and letters in six selections, from IDX files, plain or gzipped.

The published images are transposed, and the labels of ``letters`` start at 1; both are put right
here, so that a picture looks like one of MNIST's and labels start at 0. The files do not say who
wrote what, so there are no natural clients (FEMNIST is the same source with its writers).

Source: Cohen et al. 2017, "EMNIST: an extension of MNIST to handwritten letters", arXiv:1702.05373.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Literal

import numpy as np

from selffl_ray.datasets.base import TEST, TRAIN, Dataset, Group
from selffl_ray.datasets.idx import IdxConfig, average, find_file, read_pair
from selffl_ray.errors import DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

MERGED = digits + ascii_uppercase + "abdefghnqrt"
"""Without the small letters that look like their capitals."""
CHARACTERS = {
    "byclass": digits + ascii_uppercase + ascii_lowercase,
    "bymerge": MERGED,
    "balanced": MERGED,
    "letters": ascii_lowercase,
    "digits": digits,
    "mnist": digits,
}
"""Classes of each selection, in the order of their labels; a letter of ``letters`` is in either
case."""


@dataclass(frozen=True, kw_only=True)
class EmnistConfig(IdxConfig):
    """Options of ``data: {name: emnist}``."""

    selection: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced"
    """Which of the six published selections; their names are part of the files' names."""


@register_dataset("emnist", EmnistConfig)
def emnist(config: EmnistConfig) -> Dataset:
    """Handwritten digits and letters, 28x28, 10 to 62 classes; no clients of its own (EMNIST)."""
    characters = CHARACTERS[config.selection]
    first = 1 if config.selection == "letters" else 0

    def find(source: str | None) -> tuple[Path, ...]:
        return _find(source, config.selection)

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        labels = range(first, first + len(characters))
        for part, keep in ((TRAIN, slice(0, config.max_examples)), (TEST, slice(None))):
            images, own = files[:2] if part == TRAIN else files[2:]
            x, y = read_pair(images, own, labels)
            upright = average(x[keep].transpose(0, 2, 1), config.pool)
            yield Group(
                "", upright[:, None], y[keep] - first, np.full(len(y[keep]), part, np.uint8)
            )

    side = 28 // config.pool
    return Dataset(
        name="emnist",
        title=f"EMNIST {config.selection} (Cohen et al. 2017)",
        licence="as published by NIST; the files are not part of this package",
        shape=DataShape((1, side, side), len(characters)),
        find=find,
        read=read,
        label_names=tuple(characters),
        # Those of byclass, as usual for every selection: they differ by a hundredth.
        shift_scale=(0.1736, 0.3317),
        defaults={"data": {"partition": {"name": "dirichlet"}}},
    )


def _find(source: str | None, selection: str) -> tuple[Path, ...]:
    remedy = f"give the folder with emnist-{selection}-train-images-idx3-ubyte(.gz) and the others"
    if source is None:
        raise DataError(f"emnist: data.source is not set; {remedy}")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(f"emnist: data.source: there is no folder {folder}; {remedy}")
    return tuple(
        find_file(folder, f"emnist-{selection}-{part}-{kind}")
        for part in ("train", "test")
        for kind in ("images", "labels")
    )
