"""What every registered data set that is on this machine must keep to.

SELFFL_RAY_TEST_DATA names a folder with the files of those that no package brings.
"""

from __future__ import annotations

import numpy as np
import pytest

from selffl_ray.config import load_config
from selffl_ray.errors import DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from tests.real_data import source_of


def prepared(name):
    """The set, with its usual options; skips only where its files are not found."""
    source = source_of(name)
    sets = [f"data.name={name}", *([f"data.source={source}"] if source else [])]
    config = load_config(None, sets)
    try:
        datasets.make(config.data.component).find(source)
    except DataError as error:
        pytest.skip(f"{name} is not on this machine: {error}")
    return prepare_experiment(config)


@pytest.mark.parametrize("name", datasets.names())
def test_it_runs_with_nothing_but_its_name(name):
    found = prepared(name)
    assert len(found.client_ids) == len(set(found.client_ids)) >= 2
    assert found.store.manifest.licence
    assert found.store.manifest.title


@pytest.mark.parametrize("name", datasets.names())
def test_a_number_of_groups_that_is_told_before_is_right(name):
    found = prepared(name)
    if found.dataset.num_groups is None:
        pytest.skip(f"{name} does not tell it")
    files = found.dataset.find(found.config.data.source)
    assert found.dataset.num_groups(files) == found.store.manifest.num_batches


@pytest.mark.parametrize("name", datasets.names())
def test_stored_examples_have_the_shape_that_models_are_built_for(name):
    found = prepared(name)
    client = found.clients[0]
    x, y = found.store.read(client.train)
    features = found.dataset.features(x)
    assert features.shape == (len(client.train), *found.dataset.shape.input_shape)
    assert np.isfinite(features).all()
    if found.dataset.task.score_name == "accuracy":
        assert y.dtype == np.int64
        assert 0 <= y.min() <= y.max() < found.dataset.shape.num_outputs


@pytest.mark.parametrize("name", datasets.names())
def test_splits_are_disjoint_and_digests_are_stable(name):
    first, again = prepared(name), prepared(name)
    assert first.store.manifest.digest == again.store.manifest.digest
    assert first.partition.digest == again.partition.digest
    for client in first.clients:
        rows = np.concatenate([client.train, client.val, client.test])
        assert len(rows) == len(set(rows.tolist()))


@pytest.mark.parametrize("name", datasets.names())
def test_the_summary_says_what_it_is(name):
    assert datasets.get(name).summary
    assert datasets.make(Component(name)).licence
