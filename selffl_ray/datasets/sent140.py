"""Sentiment140: positive and negative tweets, one client a user, from LEAF's files or the raw CSV.

In LEAF's files ``x`` holds lists of six strings (id, date, query, user, text, part), of which the
text is the fifth, and ``y`` is 1 for positive and 0 for everything else: neutral tweets of the
small test file count as negative there. The raw CSV has no header, six columns (polarity 0, 2 or 4,
id, date, query, user, text) and is in ISO-8859-1, where every byte is a character.

Words become token ids by a hash, see ``selffl_ray.datasets.text``. Users have 2.4 tweets on average
(Go, Bhayani, Huang 2009): the partition leaves out those with fewer than ten unless told otherwise.
"""

from __future__ import annotations

import csv
from array import array
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
    strings,
)
from selffl_ray.datasets.text import MOST_BUCKETS, word_windows
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

TRAINING_FILE = "training.1600000.processed.noemoticon.csv"
NUM_FIELDS, TEXT = 6, 4
"""Strings of a tweet in LEAF's files, and which of them is the text."""
POLARITY, USER, CSV_TEXT = 0, 4, 5
"""Columns of the raw file."""
POSITIVE, NEUTRAL, NEGATIVE = "4", "2", "0"


@dataclass(frozen=True, kw_only=True)
class Sent140Config(LeafConfig):
    """Options of ``data: {name: sent140}``."""

    layout: Literal["leaf", "csv"] = "leaf"
    """LEAF's JSON, or the raw CSV, which needs ``split: none``."""
    neutral: Literal["drop", "negative"] | None = None
    """Of the raw CSV: what becomes of tweets of polarity 2; by default they are left out."""
    num_buckets: int = 4095
    """Ids that words are hashed to."""
    max_words: int = 25
    """Words of a tweet that are kept, the first ones."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_buckets <= MOST_BUCKETS:
            raise ConfigError(
                f"data.num_buckets must lie in 1..{MOST_BUCKETS}, got {self.num_buckets}"
            )
        if self.max_words < 1:
            raise ConfigError(f"data.max_words must be >= 1, got {self.max_words}")
        if self.layout == "csv" and self.split != "none":
            raise ConfigError(
                f"data.layout: the raw CSV has no official split, but data.split is {self.split}; "
                "set data.split=none"
            )
        if self.layout == "leaf" and self.neutral is not None:
            raise ConfigError(
                "data.neutral: LEAF's files no longer say which tweets were neutral; leave it out"
            )


@register_dataset("sent140", Sent140Config)
def sent140(config: Sent140Config) -> Dataset:
    """Sentiment of tweets, two classes, each user a client (LEAF's files or the raw CSV)."""

    def convert(x: list[Any], y: list[Any]) -> Examples:
        texts = [_text_of(at, entry) for at, entry in enumerate(x)]
        tokens = word_windows(texts, config.max_words, config.num_buckets)
        return Examples(tokens, class_labels(y, 2))

    def find(source: str | None) -> tuple[Path, ...]:
        if config.layout == "leaf" or source is None:
            return find_leaf("sent140", config.split, source)
        return _find_csv(Path(source).expanduser())

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        if config.layout == "csv":
            return read_tweets(files[0], config)
        return leaf_groups(files, config.split, convert)

    return Dataset(
        name="sent140",
        title="Sentiment140 (Go, Bhayani, Huang 2009)",
        licence="as published by its authors for research; the files are not part of this package",
        shape=DataShape((config.max_words,), 2, config.num_buckets + 1),
        find=find,
        read=read,
        label_names=("negative", "positive"),
        natural=True,
        defaults={
            **leaf_defaults("sent140", config),
            "model": {"name": "textcnn", "pool": "mean", "kernel": min(3, config.max_words)},
            "data": {"partition": {"name": "natural", "min_examples": 10}},
        },
    )


def _text_of(at: int, entry: Any) -> str:
    if not isinstance(entry, list) or len(entry) != NUM_FIELDS:
        raise ListError(
            f"x[{at}] must be a list of {NUM_FIELDS} strings (id, date, query, user, text, part)"
        )
    return strings(entry, f"x[{at}]")[TEXT]


def _find_csv(source: Path) -> tuple[Path, ...]:
    path = source / TRAINING_FILE if source.is_dir() else source
    if not path.is_file():
        raise DataError(
            f"sent140: data.source: there is no file {path}; give the raw CSV or the folder of "
            f"{TRAINING_FILE}"
        )
    return (path,)


def read_tweets(path: Path, config: Sent140Config) -> Iterator[Group]:
    """Users of the raw CSV in the order of their first tweets; each user's tweets in file order.

    Raises:
        DataError: rows of another number of columns, another polarity, a user without a name, a
            file that ends inside a row.
    """
    index: dict[str, int] = {}
    # Of two million tweets these arrays take 100 MB, lists of their texts ten times as much.
    owners, labels, tokens = array("q"), array("q"), array("H")
    for polarity, user, text in _rows(path):
        if polarity == NEUTRAL and config.neutral != "negative":
            continue
        owners.append(index.setdefault(user, len(index)))
        labels.append(int(polarity == POSITIVE))
        tokens.frombytes(word_windows([text], config.max_words, config.num_buckets).tobytes())
    order = np.argsort(owners, kind="stable")
    x = np.asarray(tokens).reshape(-1, config.max_words)[order]
    y = np.asarray(labels)[order]
    sizes = np.bincount(owners, minlength=len(index))
    for user, end, size in zip(index, np.cumsum(sizes), sizes, strict=True):
        yield Group(user, x[end - size : end], y[end - size : end])


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Polarity, user and text of each tweet."""
    _refuse_truncated(path)
    with path.open(encoding="iso-8859-1", newline="") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if len(row) != NUM_FIELDS:
                    raise DataError(
                        f"{where}: {len(row)} columns instead of {NUM_FIELDS} (polarity, id, date, "
                        "query, user, text); fetch the file again"
                    )
                polarity, user = row[POLARITY], row[USER]
                if polarity not in (NEGATIVE, NEUTRAL, POSITIVE):
                    raise DataError(f"{where}: polarity must be 0, 2 or 4, found {polarity[:20]!r}")
                if not user:
                    raise DataError(f"{where}: user is empty; every tweet needs its user's name")
                yield polarity, user, row[CSV_TEXT]
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: not a CSV row ({error}); fetch the file again"
            ) from error


def _refuse_truncated(path: Path) -> None:
    """The CSV reader would take the half of a last row for a whole one."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        if file.read(1) not in (b"\n", b'"', b""):
            raise DataError(f"{path}: it ends inside a row ({size} bytes); fetch the file again")
