"""scikit-learn's handwritten digits, one client a handwriting form.

The 1,797 digits of 8x8 pixels are the test part of UCI's optical digits. They are stored form after
form, and every form is the same text of 130 digits with a few missing, which tells where one ends:
13 of the 14 segments are exact subsequences of that text (the third differs in its last label), and
no cut between two exact segments could be moved by one without breaking that. The description
speaks of 13 writers, so a client is called a form, not a person. Labels are balanced in each form:
clients differ in handwriting only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from selffl_ray.datasets.base import Dataset, Group, no_files
from selffl_ray.errors import DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

BOUNDARIES = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
INEXACT_FORM = 2
"""The one form whose labels are a subsequence of the text only without the last."""


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """``data: {name: digits}`` has no options of its own."""


@register_dataset("digits", DigitsConfig)
def digits(config: DigitsConfig) -> Dataset:
    """1,797 handwritten digits of 8x8 pixels on 14 forms, each a client (scikit-learn's copy)."""
    return Dataset(
        name="digits",
        title="Optical recognition of handwritten digits, 14 forms",
        licence="UCI Machine Learning Repository; shipped with scikit-learn (BSD-3-Clause)",
        shape=DataShape((1, 8, 8), 10),
        find=no_files,
        read=_read,
        label_names=tuple("0123456789"),
        natural=True,
        defaults={"evaluation": {"splits": [0.2, 0.2, 0.6]}},
    )


def _read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
    # Imported here: scikit-learn takes a second, and only preparing the store needs it.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    check_forms(labels)
    x = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    for form, (start, end) in enumerate(pairwise(BOUNDARIES)):
        yield Group(f"form-{form:02d}", x[start:end], labels[start:end].astype(np.int64))


def check_forms(labels: Sequence[int]) -> None:
    """Refuse a copy of the digits whose forms do not lie where they should.

    Raises:
        DataError: another number of digits, or a segment that is not a form.
    """
    if len(labels) != BOUNDARIES[-1]:
        raise DataError(
            f"digits: expected {BOUNDARIES[-1]} examples, scikit-learn has {len(labels)}; install "
            "the version that the constraints file names"
        )
    text = list(labels[: BOUNDARIES[1]])
    for form, (start, end) in enumerate(pairwise(BOUNDARIES)):
        exact = end - 1 if form == INEXACT_FORM else end
        if not _is_subsequence(labels[start:exact], text):
            raise DataError(
                f"digits: rows {start} to {end - 1} are not a handwriting form, so the clients "
                "would be wrong; install the scikit-learn that the constraints file names"
            )


def _is_subsequence(part: Sequence[int], whole: Sequence[int]) -> bool:
    rest = iter(whole)
    return all(label in rest for label in part)
