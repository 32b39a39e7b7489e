"""What every registered uncertainty estimator must keep to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from selffl_ray.errors import ConfigError
from selffl_ray.estimators.inter_base import block_from_rows, floored
from selffl_ray.registry import Component, inter_estimators, intra_estimators
from tests.contract import harness

INTRA = pytest.mark.parametrize("intra", intra_estimators.names())
INTER = pytest.mark.parametrize("inter", inter_estimators.names())

GAUSSIAN = (
    "data={name: gaussian, num_clients: 8, num_examples: [16, 64], dimension: 12}",
    "training.num_rounds=4",
    "training.num_local_steps=8",
    "training.learning_rate=0.2",
    "evaluation.every=4",
)


def selffl(intra="gradient_chunks", inter="moments", granularity="model"):
    return (
        f"{{name: selffl, intra: {intra}, inter: {inter}, granularity: {granularity}, "
        "probe_every: 1, curvature: 1.0}"
    )


@INTRA
@pytest.mark.parametrize("granularity", ["model", "layer", "parameter"])
def test_an_intra_estimator_gives_variances_and_the_same_bits_for_any_placement(intra, granularity):
    prepared = harness.prepared_with(selffl(intra, granularity=granularity), GAUSSIAN)
    alone, spread = harness.finish(prepared), harness.finish(prepared, 3)
    assert harness.digests(alone) == harness.digests(spread)
    table = alone.records[-1].uncertainty
    known = ~np.isnan(table.intra_var)
    assert known.all(), "after four rounds every estimator knows every client"
    assert (table.intra_var > 0).all()
    assert ((table.shrinkage >= 0) & (table.shrinkage <= 1)).all()
    np.testing.assert_allclose(table.agg_weight.sum(), len(set(table.group)), rtol=1e-9)


@INTER
@pytest.mark.parametrize("granularity", ["model", "layer", "parameter"])
def test_an_inter_estimator_gives_a_variance_and_the_same_bits_for_any_placement(
    inter, granularity
):
    prepared = harness.prepared_with(selffl(inter=inter, granularity=granularity), GAUSSIAN)
    alone, spread = harness.finish(prepared), harness.finish(prepared, 3)
    assert harness.digests(alone) == harness.digests(spread)
    assert (alone.records[-1].uncertainty.inter_var >= 0).all()


@INTER
def test_an_inter_estimator_grows_with_the_spread_and_with_the_scale(inter):
    estimator = inter_estimators.make(Component(inter))
    if estimator.known:
        pytest.skip("the known variance is not estimated")
    rng = np.random.default_rng(3)
    noise, spread = rng.standard_normal((2, 12, 30))
    intra = np.full(12, 1.0)

    def solve(rows, scale=1.0):
        return estimator.solve(block_from_rows(rows * scale), floored(intra * scale**2))

    near, far = solve(noise + 0.1 * spread), solve(noise + 3 * spread)
    assert far > near + 3
    assert solve(noise + 3 * spread, 10.0) == pytest.approx(100 * far, rel=1e-6)


@INTRA
def test_an_unknown_option_of_an_estimator_is_refused(intra):
    with pytest.raises(ConfigError, match=r"method\.intra\.colour: unknown key"):
        harness.prepared_with(f"{{name: selffl, intra: {{name: {intra}, colour: red}}}}", GAUSSIAN)


@pytest.mark.parametrize("registry", [intra_estimators, inter_estimators])
def test_options_are_frozen_keyword_only_with_defaults_and_a_summary(registry):
    for name in registry.names():
        kind = registry.get(name).config_type
        assert kind.__dataclass_params__.frozen
        assert all(f.kw_only for f in dataclasses.fields(kind))
        kind()
        assert registry.get(name).summary
