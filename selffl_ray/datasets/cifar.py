"""CIFAR-10 and CIFAR-100, in the binary version or the one for Python.

A row is a label (two in CIFAR-100: coarse, then fine) and 3,072 bytes: 1,024 red, 1,024 green,
1,024 blue, each row by row. The binary version is nothing but rows; the one for Python has pickles
of Python 2, of which nothing is executed (``inert_pickle``).

Pixels x become (x / 255 - mean) / deviation with one mean and one deviation for all three colours,
which keeps what a picture's tint is: the colours' means lie within a fifth of a deviation of each
other. Both numbers follow from the colours' own published means and deviations over the training
part, (0.4914, 0.4822, 0.4465) and (0.2470, 0.2435, 0.2616) for CIFAR-10.

Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets import inert_pickle
from selffl_ray.datasets.base import TEST, TRAIN, Dataset, Group
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

SHAPE = (3, 32, 32)
NUM_PIXELS = 3 * 32 * 32

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip
FINE = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905 - a hundred words are easier to read without quotes
)
COARSE = tuple(
    """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things
    large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals
    non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
    """.split()  # noqa: SIM905
)

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CifarConfig:
    """Options of ``data: {name: cifar10}``."""

    max_examples: int | None = None
    """Keep only the first so many training examples (and all of the test ones)."""

    def __post_init__(self) -> None:
        if self.max_examples is not None and self.max_examples < 1:
            raise ConfigError(f"data.max_examples must be >= 1, got {self.max_examples}")


@dataclass(frozen=True, kw_only=True)
class Cifar100Config(CifarConfig):
    """Options of ``data: {name: cifar100}``."""

    labels: Literal["fine", "coarse"] = "fine"
    """100 classes, or the 20 groups that they form."""


class Layout(NamedTuple):
    """How the files of one of the two sets are named and what is in them.

    train, test: file names without ``.bin``; folders: where the binary and the Python version
    unpack to; places: label bytes of a binary row and which of them counts; key, num_classes: the
    labels in a pickle, and how many there are.
    """

    train: tuple[str, ...]
    test: str
    folders: tuple[str, str]
    places: tuple[int, int]
    key: str
    num_classes: int


@register_dataset("cifar10", CifarConfig)
def cifar10(config: CifarConfig) -> Dataset:
    """60,000 colour photographs of 32x32, 10 classes; no clients of its own."""
    layout = Layout(
        tuple(f"data_batch_{k}" for k in range(1, 6)),
        "test_batch",
        ("cifar-10-batches-bin", "cifar-10-batches-py"),
        (1, 0),
        "labels",
        10,
    )
    return _dataset(config, "cifar10", layout, CLASSES, (0.4734, 0.2516))


@register_dataset("cifar100", Cifar100Config)
def cifar100(config: Cifar100Config) -> Dataset:
    """60,000 colour photographs of 32x32, 100 classes or 20; no clients of its own."""
    names = {"fine": FINE, "coarse": COARSE}[config.labels]
    layout = Layout(
        ("train",),
        "test",
        ("cifar-100-binary", "cifar-100-python"),
        (2, 1 if config.labels == "fine" else 0),
        f"{config.labels}_labels",
        len(names),
    )
    return _dataset(config, "cifar100", layout, names, (0.4782, 0.2682))


def _dataset(
    config: CifarConfig,
    name: str,
    layout: Layout,
    label_names: tuple[str, ...],
    shift_scale: tuple[float, float],
) -> Dataset:
    def find(source: str | None) -> tuple[Path, ...]:
        return _find(name, source, layout)

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        yield from _groups(files, layout, config.max_examples)

    return Dataset(
        name=name,
        title=f"CIFAR-{name.removeprefix('cifar')} (Krizhevsky 2009)",
        licence="as published by its author; the files are not part of this package",
        shape=DataShape(SHAPE, len(label_names)),
        find=find,
        read=read,
        label_names=label_names,
        shift_scale=shift_scale,
        defaults={
            "data": {"partition": {"name": "dirichlet"}},
            "model": {"name": "cnn"},
            "training": {"learning_rate": 0.05},
        },
    )


def _find(name: str, source: str | None, layout: Layout) -> tuple[Path, ...]:
    """Training files, then the test file; of the binary version if both are there."""
    remedy = f"give the folder that {' or '.join(layout.folders)} lies in, or it itself"
    if source is None:
        raise DataError(f"{name}: data.source is not set; {remedy}")
    root = Path(source).expanduser()
    for folder, ending in zip(layout.folders, (".bin", ""), strict=True):
        for place in (root, root / folder):
            files = [place / f"{stem}{ending}" for stem in (*layout.train, layout.test)]
            there = [file.is_file() for file in files]
            if all(there):
                return tuple(files)
            if any(there):
                raise DataError(
                    f"{name}: {files[there.index(False)]} is missing beside "
                    f"{files[there.index(True)].name}; unpack the archive again"
                )
    raise DataError(f"{name}: data.source: {root} has no {files[0].name} (.bin or not); {remedy}")


def _groups(files: tuple[Path, ...], layout: Layout, most: int | None) -> Iterator[Group]:
    *train, test = files
    left, first = most, None
    for path in train:
        x, y = read_batch(path, layout)
        # A file that is cut between two rows has no other trace.
        if len(y) != (first := first or len(y)):
            raise DataError(
                f"{path}: {len(y)} images, but {train[0].name} has {first}; one of them is "
                "truncated, unpack the archive again"
            )
        keep = slice(0, left)
        left = None if left is None else left - len(y[keep])
        if len(y[keep]):
            yield Group("", x[keep], y[keep], np.full(len(y[keep]), TRAIN, np.uint8))
    x, y = read_batch(test, layout)
    yield Group("", x, y, np.full(len(y), TEST, np.uint8))


def read_batch(path: Path, layout: Layout) -> tuple[Pixels, Labels]:
    """Images (N, 3, 32, 32) and labels (N,) of one file of either version.

    Raises:
        DataError: truncated, not such a file, labels out of range, counts that disagree, a pickle
            that asks for anything but arrays.
    """
    raw = path.read_bytes()
    x, y = _rows(path, raw, layout) if path.suffix == ".bin" else _unpickled(path, raw, layout)
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < layout.num_classes:
        raise DataError(
            f"{path}: {layout.key} must lie in 0..{layout.num_classes - 1}, found "
            f"{int(y.min())}..{int(y.max())}; unpack the archive again"
        )
    return x.reshape(-1, *SHAPE), y


def _rows(path: Path, raw: bytes, layout: Layout) -> tuple[Pixels, Labels]:
    num_labels, place = layout.places
    width = num_labels + NUM_PIXELS
    if not raw or len(raw) % width:
        raise DataError(
            f"{path}: {len(raw)} bytes are no whole number of rows of {width}; the file is "
            "truncated or another one, unpack the archive again"
        )
    rows = np.frombuffer(raw, np.uint8).reshape(-1, width)
    return rows[:, num_labels:], rows[:, place].astype(np.int64)


def _unpickled(path: Path, raw: bytes, layout: Layout) -> tuple[Pixels, Labels]:
    try:
        content = inert_pickle.load(raw, encoding="bytes")
        found = {_name(key): value for key, value in content.items()}
        x, y = found["data"].numbers("|u1"), _integers(layout.key, found[layout.key])
        if x.ndim != 2 or x.shape[1] != NUM_PIXELS or not len(x):
            raise ValueError(f"data are {x.shape} instead of (N, {NUM_PIXELS})")
        if len(y) != len(x):
            raise ValueError(f"{len(y)} {layout.key} for {len(x)} images")
    except inert_pickle.BROKEN as error:
        raise DataError(
            f"{path}: not a batch of CIFAR ({type(error).__name__}: {error}); unpack the archive "
            "again"
        ) from error
    return x, y


def _name(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _integers(key: str, values: Any) -> Labels:
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise TypeError(f"{key} are not a list of whole numbers")
    return np.asarray(values, np.int64)
