"""FEMNIST from LEAF's files: polarity, range, classes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from selffl_ray.config import load_config
from selffl_ray.datasets.femnist import CHARACTERS, FemnistConfig
from selffl_ray.errors import DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from tests.datasets.leaf_files import content, write


def inks(number, seed=0):
    """(N, 28, 28) bytes: a few strokes of 255 and grey on 0."""
    rng = np.random.default_rng(seed)
    return (rng.integers(256, size=(number, 28, 28)) * (rng.random((number, 28, 28)) < 0.1)).astype(
        np.uint8
    )


def in_file(ink):
    """As LEAF writes it: white is 1, row by row."""
    return ((255 - ink.astype(float)) / 255).reshape(len(ink), -1).tolist()


def femnist(**options):
    return datasets.make(Component("femnist", FemnistConfig(split="none", **options)))


def read(path, **options):
    dataset = femnist(**options)
    return dataset, list(dataset.read(dataset.find(str(path)), 0))


def test_ink_is_1_on_0_and_every_grey_comes_back_exactly(tmp_path):
    ink = inks(3)
    ink[0, :10, :26] = np.arange(260).reshape(10, 26) % 256  # every grey there is
    path = write(tmp_path / "all_data_0.json", {"f0000_14": (in_file(ink), [0, 35, 61])})
    dataset, (group,) = read(path)
    np.testing.assert_array_equal(group.x[:, 0], ink)
    assert group.x.dtype == np.uint8
    assert group.client_id == "f0000_14"
    np.testing.assert_allclose(dataset.features(group.x)[:, 0], ink / 255, rtol=1e-6)


def test_files_that_were_turned_already_are_read_as_they_are_when_told_so(tmp_path):
    ink = inks(2)
    turned = (ink / 255).reshape(2, -1).tolist()
    path = write(tmp_path / "a.json", {"f0": (turned, [1, 2])})
    _, (group,) = read(path, ink="light")
    np.testing.assert_array_equal(group.x[:, 0], ink)


@pytest.mark.parametrize(("ink", "other"), [("dark", "light"), ("light", "dark")])
def test_pictures_of_the_wrong_polarity_are_noticed(tmp_path, ink, other):
    values = (inks(2) / 255).reshape(2, -1)
    x = (values if ink == "dark" else 1 - values).tolist()
    path = write(tmp_path / "a.json", {"f0": (x, [1, 2])})
    with pytest.raises(
        DataError, match=f"user_data of 'f0': x is mostly ink .*set data.ink={other}"
    ):
        read(path, ink=ink)


def test_classes_are_digits_then_capitals_then_small_letters():
    assert CHARACTERS[0] == "0"
    assert CHARACTERS[10] == "A"
    assert CHARACTERS[36] == "a"
    assert femnist().shape.num_outputs == len(femnist().label_names) == 62


BROKEN = {
    "bytes": (lambda x: x.__setitem__(0, [255.0] * 784), [1], r"x must lie in 0\.\.1, found 255"),
    "short": (lambda x: x[0].pop(), [1], r"x must be lists of 784 numbers, found \(783,\)"),
    "class": (lambda x: None, [62], r"y must lie in 0\.\.61, found 62\.\.62"),
}


@pytest.mark.parametrize(("change", "y", "message"), BROKEN.values(), ids=BROKEN)
def test_pictures_that_are_not_leafs_are_refused(tmp_path, change, y, message):
    x = in_file(inks(1))
    change(x)
    path = write(tmp_path / "a.json", {"f0": (x, y)})
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: user_data of 'f0': ")


def test_writers_of_leafs_folders_become_clients_with_their_test_part(tmp_path):
    """Five writers in two files, one left as an empty key, as LEAF's scripts leave them."""
    rng = np.random.default_rng(0)
    for part, size in (("train", 6), ("test", 2)):
        for file in range(2):
            users = {
                f"f{writer:04d}_14": (
                    in_file(inks(size, writer)),
                    rng.integers(62, size=size).tolist(),
                )
                for writer in range(5)
                if writer % 2 == file
            }
            other = content(users)
            other["user_data"]["f9999_00"] = {"x": [], "y": []}
            other["hierarchies"] = ["hsf"] * (len(users) + 1)
            path = tmp_path / part / f"all_data_{file}_niid_0_keep_0_{part}_9.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(other))
    found = prepare_experiment(load_config(None, ["data.name=femnist", f"data.source={tmp_path}"]))
    assert sorted(found.client_ids) == [f"f{writer:04d}_14" for writer in range(5)]
    assert [(len(c.train), len(c.val), len(c.test)) for c in found.clients] == [(5, 1, 2)] * 5
    assert found.model.shape.input_shape == (1, 28, 28)
