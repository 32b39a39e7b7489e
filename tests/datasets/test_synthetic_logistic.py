"""Synthetic(alpha, beta): the distributions it promises, and what its parameters do and do not."""

from __future__ import annotations

import numpy as np
import pytest

from selffl_ray.config import load_config
from selffl_ray.datasets.synthetic_logistic import SyntheticLogisticConfig, draw
from selffl_ray.errors import ConfigError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets


def drawn(seed=0, clients=None, **options):
    """(x, y) of every client."""
    config = SyntheticLogisticConfig(**options)
    return [draw(config, seed, c) for c in range(clients or config.num_clients)]


def test_features_of_a_client_have_variances_that_fall_as_j_to_the_minus_1_2():
    # Sizes have a heavy tail: among 30 clients some are large.
    x, _ = max(drawn(max_examples=4000), key=lambda pair: len(pair[1]))
    assert len(x) > 2000
    expected = np.arange(1, 61) ** -1.2
    np.testing.assert_allclose(x.var(axis=0), expected, rtol=6 * np.sqrt(2 / len(x)))
    centred = (x - x.mean(axis=0)) / x.std(axis=0)
    correlation = centred.T @ centred / len(x)
    assert np.abs(correlation - np.eye(60)).max() < 6 / np.sqrt(len(x))


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_centres_differ_by_beta_between_clients_and_by_1_within(beta):
    pairs = drawn(beta=beta, num_clients=300, max_examples=400)
    centres = np.stack([x.mean(axis=0) for x, _ in pairs])
    noise = 1 / 60  # of the mean of 60 coordinates of variance 1
    between = centres.mean(axis=1).var()
    assert between == pytest.approx(beta**2 + noise, rel=0.3)
    # A mean of >= 50 examples adds at most the variance of the features over 50, 4.7 / 50 / 60.
    assert centres.var(axis=1).mean() == pytest.approx(1.0, rel=0.05)


def test_sizes_are_50_and_a_lognormal_number_more():
    """Median 50 + e^4 = 104.6; a quarter above 50 + e^(4 + 2 * 0.6745) = 260."""
    sizes = np.asarray([len(y) for _, y in drawn(num_clients=500, dimension=1, num_classes=2)])
    assert sizes.min() >= 50
    assert 92 < np.median(sizes) < 120
    assert 210 < np.quantile(sizes, 0.75) < 330
    capped = [len(y) for _, y in drawn(num_clients=500, dimension=1, max_examples=80)]
    assert capped == np.minimum(sizes, 80).tolist()


def fit_accuracy(pairs):
    """Of one linear classifier on its own training data: 1 if the labels come from one."""
    from sklearn.linear_model import LogisticRegression

    x, y = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return LogisticRegression(C=1e4, max_iter=400).fit(x, y).score(x, y)


SMALL = {"dimension": 4, "num_classes": 3, "num_clients": 5, "max_examples": 100}


@pytest.mark.parametrize(
    ("options", "one_model"),
    [
        ({"models": "published", "alpha": 0.0}, False),
        ({"models": "shared", "alpha": 0.0}, True),
        ({"models": "shared", "alpha": 2.0}, False),
        ({"models": "iid"}, True),
    ],
)
def test_clients_have_one_model_or_each_its_own(options, one_model):
    pairs = drawn(**SMALL, **options)
    assert min(fit_accuracy([pair]) for pair in pairs if len(set(pair[1])) > 1) > 0.99
    together = fit_accuracy(pairs)
    assert (together > 0.99) if one_model else (together < 0.9)


def test_the_published_alpha_changes_no_label_and_the_shared_one_does():
    """One number added to all classes' scores leaves the highest the highest."""
    by_models = {}
    for models in ("published", "shared"):
        near, far = (
            drawn(models=models, alpha=alpha, max_examples=200, num_clients=10)
            for alpha in (0.1, 3.0)
        )
        for one, other in zip(near, far, strict=True):
            np.testing.assert_array_equal(one[0], other[0])
        same = [np.mean(one[1] == other[1]) for one, other in zip(near, far, strict=True)]
        by_models[models] = np.mean(same)
    assert by_models["published"] == 1.0
    assert by_models["shared"] < 0.7


def test_iid_clients_with_beta_0_have_the_same_features():
    pairs = drawn(models="iid", beta=0.0, num_clients=20, max_examples=500)
    centres = np.stack([x.mean(axis=0) for x, _ in pairs])
    assert np.abs(centres).max() < 5 / np.sqrt(50)


def test_clients_depend_on_the_seed_and_on_themselves_only():
    few, more, other = drawn(num_clients=2), drawn(num_clients=4), drawn(seed=1, num_clients=2)
    for one, same in zip(few, more, strict=False):
        np.testing.assert_array_equal(one[0], same[0])
        np.testing.assert_array_equal(one[1], same[1])
    assert not np.array_equal(few[0][0][:5], other[0][0][:5])
    assert not np.array_equal(few[0][0][:5], few[1][0][:5])


def test_the_set_is_prepared_with_its_clients_and_sizes():
    sets = ["data.name=synthetic_logistic", "data.num_clients=12", "data.max_examples=90"]
    found = prepare_experiment(load_config(None, sets))
    config = SyntheticLogisticConfig(num_clients=12, max_examples=90)
    assert found.client_ids[-1] == "client-11"
    sizes = [len(draw(config, 0, c)[1]) for c in range(12)]
    assert [len(c.train) + len(c.val) + len(c.test) for c in found.clients] == sizes
    assert found.config.model.component.name == "linear"
    assert datasets.make(Component("synthetic_logistic")).title.startswith("Synthetic(1, 1)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.5}, r"data\.alpha must be >= 0, got -0\.5"),
        ({"beta": float("inf")}, r"data\.beta must be >= 0, got inf"),
        ({"num_clients": 0}, r"data\.num_clients must be >= 1, got 0"),
        ({"dimension": 0}, r"data\.dimension must be >= 1, got 0"),
        ({"num_classes": 1}, r"data\.num_classes must be >= 2, got 1"),
        ({"max_examples": 0}, r"data\.max_examples must be >= 1, got 0"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticLogisticConfig(**options)
