"""What a data set is to the rest of the package."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.errors import ConfigError
from selffl_ray.tasks import CLASSIFICATION, DataShape, Task

TRAIN, TEST, VAL, UNSEEN = 0, 1, 2, 3
"""Values of the official split of an example. UNSEEN is every example of a client that the
publisher keeps out of training: it becomes a new client."""


class Group(NamedTuple):
    """Examples that belong together: one natural client, or a piece of a common pool.

    client_id: the natural client's name; empty in a pool.
    x: (N, *input_shape), uint8 pixels, int64 tokens or floats. y: (N,) int64 labels, or floats.
    official: (N,) uint8 TRAIN, TEST, VAL or UNSEEN as published, or None without a published split.
    """

    client_id: str
    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    official: npt.NDArray[np.uint8] | None = None


class KnownVariances(NamedTuple):
    """The truth behind synthetic data: for the ``known`` estimators and for judging the others."""

    inter_var: float
    intra_var_M: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set and how to read it.

    find: source option -> the files to read, or a DataError that says where to get them; files may
        be empty if the data are generated or come with a library.
    read: (files, seed) -> groups in a fixed order.
    shift_scale: for images, pixels 0..255 become (x / 255 - shift) / scale; None leaves x as it is.
    natural: the groups are clients; otherwise they are one pool to be partitioned.
    depends_on_seed: the data are drawn with the experiment's seed.
    overlap: two rows of a client that lie no more than so many rows apart may share content, as do
        windows of one text. Its parts are then cut by position, with so many rows left out between
        two of them, and its rows are not dealt to other clients.
    version: to be raised when ``read`` gives other groups for the same files, so that stores which
        an earlier release prepared are not taken for new ones.
    made_with: for data that a program generates: files -> that program and its version. The store
        is then known by it instead of by where the files lie and how old they are.
    num_groups: files -> so many groups ``read`` will give, at most, where that is known before;
        tells how far the preparation of a store is.
    """

    name: str
    title: str
    licence: str
    shape: DataShape
    find: Callable[[str | None], tuple[Path, ...]]
    read: Callable[[tuple[Path, ...], int], Iterator[Group]]
    task: Task = CLASSIFICATION
    label_names: tuple[str, ...] = ()
    shift_scale: tuple[float, float] | None = None
    natural: bool = False
    depends_on_seed: bool = False
    known: Callable[[], KnownVariances] | None = None
    overlap: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Parts of an experiment's configuration that suit this set; the user's own keys win."""
    version: int = 1
    made_with: Callable[[tuple[Path, ...]], str] | None = None
    num_groups: Callable[[tuple[Path, ...]], int] | None = None

    def features(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Stored inputs as a model takes them: float32 features, or int64 tokens unchanged."""
        if self.shape.num_tokens is not None:
            return x.astype(np.int64, copy=False)
        floats = x.astype(np.float32)
        if self.shift_scale is not None:
            shift, scale = self.shift_scale
            floats /= 255.0
            floats -= shift
            floats /= scale
        return floats


def content_digest(files: Sequence[Path]) -> str:
    """Start of a SHA-256 over names and bytes of files, for ``made_with``; not of their place."""
    sha = hashlib.sha256()
    for path in files:
        raw = path.read_bytes()
        sha.update(f"{path.name}|{len(raw)}|".encode() + raw)
    return sha.hexdigest()[:16]


def no_files(source: str | None) -> tuple[Path, ...]:
    """``find`` of a set that needs no files; a ``source`` is then a mistake."""
    if source is not None:
        raise ConfigError(
            f"data.source: this data set reads no files, got {source!r}; leave it out"
        )
    return ()
