"""Any table of examples in Parquet files, as on the Hugging Face hub, with a column for the client.

What the columns hold is said by the options and checked; nothing is guessed. Inputs are either
encoded pictures (a column of bytes, or of structs with a field ``bytes``) or numbers (columns of
numbers, of lists, or of nested lists, one after the other). Each example has the shape
``data.shape``, pictures as (channels, height, width).

A client's rows keep their order in the files, which are read by name. Files may also lie in one
folder a client, named ``<client column>=<client>``. The official split is a column, or a word
in the name of the file or its folder (``data/test-00000-of-00001.parquet``,
``default/test/0000.parquet``); folders that all files lie in say nothing.
Clients without training rows are new clients, if no client has both training and test rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import TEST, TRAIN, UNSEEN, Dataset, Group
from selffl_ray.datasets.parquet_columns import (
    Column,
    class_labels,
    client_names,
    fill_numbers,
    fill_pictures,
    folder_value,
    open_file,
    part_in_name,
    parts,
)
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class ParquetConfig:
    """Options of ``data: {name: parquet}``."""

    client: str | None = "client_id"
    """Column that names the client; null makes one pool of all rows, to be partitioned."""
    label: str = "label"
    """Column of the class: whole numbers from 0, or names out of label_names."""
    image: str | None = None
    """Column of encoded pictures."""
    features: tuple[str, ...] = ()
    """Columns of numbers or lists of numbers; either these or ``image``."""
    shape: tuple[int, ...] = (1, 28, 28)
    """Of one example."""
    num_classes: int = 10
    label_names: tuple[str, ...] = ()
    """Of the classes in order; needed if the labels are names."""
    split: str | None = None
    """Column of the official part: train, test, or validation (also valid, val, dev)."""
    split_in_names: bool = False
    """The files, or folders below the one they all lie in, are named by the official part."""
    invert: bool = False
    """Turn pictures from dark on a white ground into light on a dark one."""

    def __post_init__(self) -> None:
        if not self.shape or any(size < 1 for size in self.shape):
            raise ConfigError(f"data.shape must hold positive numbers, got {list(self.shape)}")
        if self.image is not None and self.features:
            raise ConfigError("data.image and data.features: give the one or the other, not both")
        if self.image is not None and (len(self.shape) != 3 or self.shape[0] not in (1, 3)):
            raise ConfigError(
                "data.shape of pictures must be 1 or 3 channels, height, width, got "
                f"{list(self.shape)}"
            )
        if self.invert and self.image is None:
            raise ConfigError("data.invert turns pictures only; set data.image or leave it out")
        if self.num_classes < 2:
            raise ConfigError(f"data.num_classes must be >= 2, got {self.num_classes}")
        if self.label_names and len(set(self.label_names)) != self.num_classes:
            raise ConfigError(
                f"data.label_names must be {self.num_classes} different names (data.num_classes), "
                f"got {len(set(self.label_names))}"
            )
        if self.split is not None and self.split_in_names:
            raise ConfigError("data.split and data.split_in_names: give the one or the other")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the inputs come from."""
        return self.features if self.image is None else (self.image,)

    @property
    def has_split(self) -> bool:
        """Whether the rows belong to official parts."""
        return self.split is not None or self.split_in_names


@register_dataset("parquet", ParquetConfig)
def parquet(config: ParquetConfig) -> Dataset:
    """One's own table in Parquet files: pictures or numbers, a label, and a column of clients."""
    return Dataset(
        name="parquet",
        title="Examples in Parquet files",
        licence="that of the files",
        shape=DataShape(config.shape, config.num_classes),
        find=find_parquet,
        read=lambda files, seed: read_parquet(files, config),
        label_names=config.label_names,
        shift_scale=None if config.image is None else (0.0, 1.0),
        natural=config.client is not None,
        # 2: transparent pictures are laid over white, deep ones refused; parts by closer folders.
        version=2,
        defaults={
            "experiment": "parquet",
            "data": {"partition": {"name": "natural" if config.client else "dirichlet"}},
            "evaluation": {"splits": [0.8, 0.2, 0.0] if config.has_split else [0.6, 0.2, 0.2]},
        },
    )


def find_parquet(source: str | None) -> tuple[Path, ...]:
    """A file, all files below a folder, or those that a pattern (``*``, ``?``) fits, by name.

    Raises:
        DataError: no source, or no file.
    """
    remedy = "give a *.parquet file, a folder of them or a pattern as data.source"
    if source is None:
        raise DataError(f"parquet: data.source is not set; {remedy}")
    path = Path(source).expanduser().absolute()
    if path.is_file():
        return (path,)
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
    else:
        files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not files:
        raise DataError(f"parquet: no *.parquet file at {path}; {remedy}")
    return tuple(files)


def read_parquet(files: Sequence[Path], config: ParquetConfig) -> Iterator[Group]:
    """Clients in the order of their first rows, or one pool; inputs decoded once into one array.

    Raises:
        DataError: naming file, column and row of what is not as the options say.
    """
    if not config.columns:
        raise DataError(
            "parquet: neither data.image nor data.features is set; name the columns of the inputs"
        )
    needed = [config.label, *config.columns, *([] if config.split is None else [config.split])]
    opened = [open_file(path, needed, config.client) for path in files]
    y = np.concatenate(
        [class_labels(c.of(config.label), config.num_classes, config.label_names) for c in opened]
    )
    top = Path(os.path.commonpath([path.parent for path in files]))
    official = np.concatenate([_official(c, config, top) for c in opened])
    x = np.empty((len(y), *config.shape), np.float32 if config.image is None else np.uint8)
    start = 0
    for column in opened:
        rows = x[start : start + column.num_rows]
        if config.image is None:
            fill_numbers(column, config.features, rows)
        else:
            fill_pictures(column.of(config.image), rows)
        start += column.num_rows
    if config.invert:
        np.subtract(255, x, out=x)
    if config.client is None:
        yield Group("", x, y, official if config.has_split else None)
        return
    names = [name for c in opened for name in _clients(c, config.client)]
    for client, rows, part in _by_client(names, official):
        yield Group(client, x[rows], y[rows], part if config.has_split else None)


def _official(file: Column, config: ParquetConfig, top: Path) -> npt.NDArray[np.uint8]:
    if config.split is not None:
        return parts(file.of(config.split))
    part = part_in_name(file.path, top) if config.split_in_names else TRAIN
    return np.full(file.num_rows, part, np.uint8)


def _clients(file: Column, client: str) -> list[str]:
    fixed = folder_value(file.path, client)
    return client_names(file.of(client)) if fixed is None else [fixed] * file.num_rows


def _by_client(
    names: Sequence[str], official: npt.NDArray[np.uint8]
) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
    """Name, rows and official parts of each client."""
    index: dict[str, int] = {}
    owner = np.fromiter((index.setdefault(n, len(index)) for n in names), np.int64, len(names))
    official = _with_unseen(official, owner, list(index))
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=len(index)))
    starts = np.concatenate([[0], ends])
    for client, start, end in zip(index, starts, ends, strict=False):
        rows = order[start:end]
        yield client, rows, official[rows]


def _with_unseen(
    official: npt.NDArray[np.uint8], owner: npt.NDArray[np.int64], clients: list[str]
) -> npt.NDArray[np.uint8]:
    """Mark clients without training rows as unseen, if no client is trained and tested on."""
    trains, tests = (np.zeros(len(clients), bool) for _ in range(2))
    trains[owner[official == TRAIN]] = True
    tests[owner[official == TEST]] = True
    if trains.all():
        return official
    if (tests & trains).any():
        raise DataError(
            f"parquet: client {clients[int(np.argmin(trains))]!r} has no training rows "
            f"({int((~trains).sum())} of {len(clients)} clients), while others have training and "
            "test rows; leave out data.split and data.split_in_names, or take these clients out"
        )
    return np.where(trains[owner], official, np.uint8(UNSEEN))
