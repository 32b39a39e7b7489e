"""The forms of scikit-learn's digits: real clients, found by their text, checked when read."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from sklearn.datasets import load_digits

from selffl_ray.datasets.digits import BOUNDARIES, check_forms
from selffl_ray.datasets.store import prepare, store_root
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import Component, datasets
from selffl_ray.tasks import DataShape

SIZES = [130, 126, 130, 130, 130, 130, 130, 123, 128, 130, 128, 130, 122, 130]


@pytest.fixture(scope="module")
def raw():
    return load_digits()


@pytest.fixture
def dataset():
    return datasets.make(Component("digits"))


def is_subsequence(part, whole):
    """By position: every label is found behind the one before."""
    at = -1
    for label in part:
        later = np.flatnonzero(whole[at + 1 :] == label)
        if not len(later):
            return False
        at += 1 + int(later[0])
    return True


def test_there_are_14_forms_of_122_to_130_digits_with_the_images_they_came_with(dataset, raw):
    store = prepare(dataset, None, None, 0, store_root())
    assert store.client_ids == [f"form-{i:02d}" for i in range(14)]
    assert np.diff(store.start_rows).tolist() == SIZES
    x, y = store.read(np.arange(1797))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[:, 0], raw.images / 16)
    np.testing.assert_array_equal(y, raw.target)
    assert dataset.natural
    assert dataset.shape == DataShape((1, 8, 8), 10)
    assert dataset.defaults == {"evaluation": {"splits": [0.2, 0.2, 0.6]}}
    assert (x.min(), x.max()) == (0, 1)
    np.testing.assert_array_equal(dataset.features(x), x)


def test_boundaries_are_the_sums_of_the_sizes():
    assert list(BOUNDARIES) == [0, *np.cumsum(SIZES).tolist()]


def test_every_form_but_the_third_is_a_subsequence_of_the_first_130_labels(raw):
    text = raw.target[:130]
    exact = [is_subsequence(raw.target[a:b], text) for a, b in pairwise(BOUNDARIES)]
    assert exact == [form != 2 for form in range(14)]
    assert is_subsequence(raw.target[256:385], text), "the third differs in its last label only"


def test_no_cut_between_exact_forms_could_be_moved(raw):
    text = raw.target[:130]
    for form in range(1, 14):
        if form in (2, 3):
            continue
        before, cut, after = BOUNDARIES[form - 1 : form + 2]
        for moved in range(-12, 13):
            pair = (raw.target[before : cut + moved], raw.target[cut + moved : after])
            assert all(is_subsequence(p, text) for p in pair) == (moved == 0)


def test_every_form_has_all_ten_digits_nearly_equally_often(raw):
    for start, end in pairwise(BOUNDARIES):
        counts = np.bincount(raw.target[start:end], minlength=10)
        assert counts.min() >= 9
        assert counts.max() <= 14


def test_the_published_copy_is_accepted(raw):
    check_forms(raw.target)


def test_a_shorter_or_longer_copy_is_refused(raw):
    with pytest.raises(DataError, match="expected 1797 examples, scikit-learn has 1796; install"):
        check_forms(raw.target[:-1])
    with pytest.raises(DataError, match="scikit-learn has 1798"):
        check_forms(np.append(raw.target, 3))


@pytest.mark.parametrize("form", range(1, 14))
def test_a_copy_in_another_order_is_refused_naming_the_rows(raw, form):
    start, end = BOUNDARIES[form : form + 2]
    labels = raw.target.copy()
    labels[start:end] = labels[start:end][::-1]
    with pytest.raises(DataError, match=rf"rows {start} to {end - 1} are not a handwriting form"):
        check_forms(labels)


@pytest.mark.parametrize("form", range(1, 14))
@pytest.mark.parametrize("back", [1, 2])
def test_one_wrong_label_is_refused_if_the_text_cannot_hold_it(raw, form, back):
    start, end = BOUNDARIES[form : form + 2]
    exact = end - 1 if form == 2 else end  # the published third form ends in a wrong label
    refused = 0
    for label in range(10):
        labels = raw.target.copy()
        labels[end - back] = label
        if is_subsequence(labels[start:exact], labels[:130]):
            check_forms(labels)
        else:
            refused += 1
            with pytest.raises(DataError, match=rf"rows {start} to {end - 1} are not"):
                check_forms(labels)
    assert refused >= 3 or (form, back) == (2, 1)


def test_the_forms_are_checked_when_the_digits_are_read(dataset, raw, monkeypatch):
    shuffled = np.random.default_rng(0).permutation(raw.target)
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda **_: (raw.data, shuffled))
    with pytest.raises(DataError, match="not a handwriting form"):
        list(dataset.read((), 0))


def test_a_shuffled_copy_is_refused(raw):
    shuffled = np.random.default_rng(0).permutation(raw.target)
    with pytest.raises(DataError, match=r"not a handwriting form.*constraints file"):
        check_forms(shuffled)


def test_a_source_is_refused(dataset):
    with pytest.raises(ConfigError, match=r"data\.source: this data set reads no files"):
        dataset.find("/some/folder")
