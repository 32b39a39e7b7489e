"""EMNIST: IDX files whose images are transposed and whose letters count from 1."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from selffl_ray.datasets.base import TEST, TRAIN
from selffl_ray.datasets.emnist import CHARACTERS, EmnistConfig
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import Component, datasets
from selffl_ray.tasks import DataShape
from tests.datasets.test_idx import idx_bytes, images


def emnist(selection="balanced", **options):
    return datasets.make(Component("emnist", EmnistConfig(selection=selection, **options)))


def write_set(folder, selection, labels, *, packed=True):
    """As published: each image with rows and columns exchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, y) in enumerate(zip(("train", "test"), labels, strict=True)):
        for kind, values in (
            ("images-idx3", images(len(y), seed).transpose(0, 2, 1)),
            ("labels-idx1", np.asarray(y)),
        ):
            raw = idx_bytes(values)
            name = f"emnist-{selection}-{part}-{kind}-ubyte"
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(raw) if packed else raw)
    return folder


def groups_of(dataset, folder):
    return list(dataset.read(dataset.find(str(folder)), 0))


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("selection", CHARACTERS)
def test_images_stand_upright_and_labels_count_from_zero(tmp_path, selection, packed):
    classes = len(CHARACTERS[selection])
    first = 1 if selection == "letters" else 0
    y = ([first, first + classes - 1, first + 3], [first + 2, first])
    write_set(tmp_path, selection, y, packed=packed)
    train, test = groups_of(emnist(selection), tmp_path)
    for seed, (group, part, expected) in enumerate(((train, TRAIN, y[0]), (test, TEST, y[1]))):
        np.testing.assert_array_equal(group.x[:, 0], images(len(expected), seed))
        assert group.y.tolist() == [label - first for label in expected]
        assert set(group.official.tolist()) == {part}
    dataset = emnist(selection)
    assert dataset.shape == DataShape((1, 28, 28), classes)
    assert len(dataset.label_names) == classes
    assert dataset.label_names[0] == ("a" if selection == "letters" else "0")


def test_selections_have_the_published_numbers_of_classes():
    sizes = {name: len(characters) for name, characters in CHARACTERS.items()}
    assert sizes == {
        "byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10
    }  # fmt: skip
    assert all(len(set(characters)) == len(characters) for characters in CHARACTERS.values())


@pytest.mark.parametrize(
    ("selection", "label", "known"),
    [("letters", 0, r"1\.\.26, found 0"), ("letters", 27, r"1\.\.26"), ("balanced", 47, r"0\.\.46"),
     ("digits", 10, r"0\.\.9"), ("byclass", 62, r"0\.\.61")],
)  # fmt: skip
def test_labels_of_another_selection_are_refused(tmp_path, selection, label, known):
    write_set(tmp_path, selection, ([label, 1], [1]))
    message = rf"emnist-{selection}-train-labels-idx1-ubyte\.gz: labels must lie in {known}"
    with pytest.raises(DataError, match=message):
        groups_of(emnist(selection), tmp_path)


def test_options_of_idx_sets_hold_here_too(tmp_path):
    write_set(tmp_path, "digits", ([3, 4, 5], [6, 7]))
    train, test = groups_of(emnist("digits", pool=14, max_examples=2), tmp_path)
    assert train.y.tolist() == [3, 4]
    assert test.y.tolist() == [6, 7]
    corner = images(3, 0)[0, :14, 14:].mean()
    assert train.x.shape == (2, 1, 2, 2)
    assert train.x[0, 0, 0, 1] == pytest.approx(corner)
    with pytest.raises(ConfigError, match=r"data\.pool must divide 28"):
        EmnistConfig(pool=3)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"emnist: data\.source is not set; give the folder with em"
    ):
        emnist().find(None)
    with pytest.raises(DataError, match=r"emnist: data\.source: there is no folder .*nowhere"):
        emnist().find(str(tmp_path / "nowhere"))
    write_set(tmp_path, "letters", ([1], [1]))
    message = r"has no file emnist-balanced-train-images-idx3-ubyte \(plain or \.gz\)"
    with pytest.raises(DataError, match=message):
        emnist().find(str(tmp_path))


def test_counts_that_disagree_are_refused(tmp_path):
    write_set(tmp_path, "letters", ([1, 2, 3], [1]))
    path = tmp_path / "emnist-letters-train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.asarray([1, 2]))))
    with pytest.raises(DataError, match=r"\(2,\) labels for 3 images in emnist-letters-train-im"):
        groups_of(emnist("letters"), tmp_path)
