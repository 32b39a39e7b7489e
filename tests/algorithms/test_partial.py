"""Partly shared models: FedPer and LG-FedAvg, and what all methods of this kind have in common."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from selffl_ray import trees
from selffl_ray.algorithms.partial import join, last_layers
from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from selffl_ray.flat import ParamSpec
from tests.algorithms import quadratics
from tests.algorithms.quadratics import BEGIN, BODY, HEAD, MIX, TWO_PARTS, descend
from tests.contract import harness

ALL_OWN = [
    "{name: fedper, head_layers: 2}",
    "{name: lgfedavg, shared_layers: 0}",
    "{name: fedrep, head_layers: 2}",
]
GIVEN_STEPS = "{name: fedrep, head_layers: 2, head_steps: 1, body_steps: 3}"
ALL_SHARED = [
    "{name: fedper, head_layers: 0}",
    "{name: lgfedavg, shared_layers: 2}",
    "{name: fedrep, head_layers: 0, aggregation: sample_size}",
    "{name: fedbabu, head_layers: 0}",
]
EPOCHS = (*(s for s in harness.DIGITS if "steps" not in s), "training.num_local_epochs=1")


@pytest.fixture(autouse=True)
def _two_parts(monkeypatch):
    quadratics.add_two_parts(monkeypatch)


# -- the rounds, by hand ------------------------------------------------------------------------


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize(("method", "own"), [("fedper", HEAD), ("lgfedavg", BODY)])
def test_rounds_by_hand(method, own, participation):
    finished = quadratics.run(method, 6, TWO_PARTS, participation=participation)
    expected, personal = quadratics.partly_by_hand(finished, own, descend)
    for index, params in enumerate(expected):
        np.testing.assert_allclose(quadratics.global_params(finished, index), params, atol=1e-8)
    seen = np.unique(np.concatenate([r.plan.cohort for r in finished.records]))
    assert len(seen) == 2, "both clients must have trained for the comparison"
    np.testing.assert_allclose(quadratics.personal_params(finished), personal, atol=1e-8)
    assert np.abs(personal[0] - personal[1]).max() > 0.1


def test_own_and_shared_parts_settle_where_no_gradient_is_left():
    """FedPer with one step a round: each head at its own optimum, the body at the common one."""
    settings = (*TWO_PARTS, "training.num_local_steps=1", "training.learning_rate=0.4")
    finished = quadratics.run("fedper", 150, settings)
    y_MP, theta_MP = quadratics.optima(finished), quadratics.personal_params(finished)
    grad_MP = np.stack(
        [quadratics.mixed_gradient(t, y) for t, y in zip(theta_MP, y_MP, strict=True)]
    )
    np.testing.assert_allclose(grad_MP[:, HEAD], 0, atol=1e-6)
    np.testing.assert_allclose(quadratics.SHARES @ grad_MP[:, BODY], 0, atol=1e-6)
    assert np.abs(grad_MP[:, BODY]).max() > 0.1


# -- the identities -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [*itertools.product(ALL_OWN, (harness.DIGITS, EPOCHS)), (GIVEN_STEPS, harness.DIGITS)],
)
def test_all_layers_at_the_clients_is_local_training_bit_for_bit(method, settings):
    partly = harness.finish(harness.prepared_with(method, settings))
    alone = harness.finish(harness.prepared_with("local", settings))
    found, expected = quadratics.personal_params(partly), quadratics.personal_params(alone)
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(partly.records, alone.records, strict=True):
        assert one.gradient_steps == other.gradient_steps
        assert one.metrics["train/loss"] == pytest.approx(other.metrics["train/loss"], rel=1e-12)
        assert one.metrics["comm/bytes_up"] == 0


@pytest.mark.parametrize("settings", [harness.DIGITS, EPOCHS], ids=["steps", "epochs"])
@pytest.mark.parametrize("method", ALL_SHARED)
def test_all_layers_shared_is_fedavg_bit_for_bit(method, settings):
    partly = harness.finish(harness.prepared_with(method, settings))
    together = harness.finish(harness.prepared_with("fedavg", settings))
    assert harness.digests(partly) == harness.digests(together)
    assert any("FedAvg" in caution for caution in partly.prepared.algorithm.cautions)


@pytest.mark.parametrize("method", ["fedper", "fedrep", "fedbabu"])
def test_bytes_are_those_of_the_body(method):
    finished = harness.finish(harness.prepared_with(method))
    spec, metrics = finished.prepared.federation.spec, finished.records[0].metrics
    body = int(spec.mask(["hidden0"]).sum())
    assert body < 0.9 * spec.num_params
    assert metrics["comm/bytes_up"] == metrics["comm/bytes_down"] == 7 * 4 * body


def test_lgfedavg_sends_the_late_layers_only():
    finished = harness.finish(harness.prepared_with("lgfedavg"))
    head = int(finished.prepared.federation.spec.mask(["output"]).sum())
    assert finished.records[0].metrics["comm/bytes_up"] == 7 * 4 * head


# -- what they have in common -------------------------------------------------------------------


def test_the_server_optimizer_moves_the_shared_part_only():
    """The global model's own part stays the plain mean of what the clients have."""
    halved = "{name: fedper, server: {name: fedavgm, momentum: 0.0, learning_rate: 0.5}}"
    finished = quadratics.run(halved, 1, TWO_PARTS)
    (mean,), _ = quadratics.partly_by_hand(finished, HEAD, descend)
    expected = np.where(HEAD, mean, 0.5 * (BEGIN + mean))
    np.testing.assert_allclose(quadratics.global_params(finished), expected, atol=1e-8)
    assert np.abs(expected - mean).max() > 0.1


@pytest.mark.parametrize(("method", "own"), [("fedper", HEAD), ("lgfedavg", BODY)])
def test_fine_tuning_goes_on_with_the_own_part_only(method, own):
    finished = quadratics.run(method, 2, TWO_PARTS)
    tuned = f"{{name: {method}, fine_tune: {{steps: 7, rate: 0.5}}}}"
    more = quadratics.run(tuned, 2, TWO_PARTS)
    y_MP, before_MP = quadratics.optima(finished), quadratics.personal_params(finished)
    expected = [
        descend(t, lambda p, y=y: own * quadratics.mixed_gradient(p, y), 7, 0.1)
        for t, y in zip(before_MP, y_MP, strict=True)
    ]
    np.testing.assert_allclose(quadratics.personal_params(more), expected, atol=1e-8)
    assert harness.digests(finished) == harness.digests(more), "nothing of it is kept"
    assert np.abs(expected - before_MP).max() > 0.05


@pytest.mark.parametrize(
    ("method", "own"), [("fedper", HEAD), ("fedrep", HEAD), ("lgfedavg", BODY)]
)
def test_a_client_that_never_trained_fits_its_own_part_to_the_shared_one(method, own):
    """One participant in one round: the other client is the one that adapts."""
    finished = quadratics.run(method, 1, TWO_PARTS, participation=0.5)
    (trained,) = finished.records[0].plan.cohort
    other = 1 - int(trained)
    shared, y = quadratics.global_params(finished), quadratics.optima(finished)[other]
    start = np.where(own, BEGIN, shared)
    expected = descend(start, lambda t: own * quadratics.mixed_gradient(t, y))
    np.testing.assert_allclose(quadratics.personal_params(finished)[other], expected, atol=1e-8)
    assert np.abs(expected - start)[own].min() > 0.01


def test_states_hold_the_own_part_and_alias_nothing():
    prepared = harness.prepared_with("fedper")
    state = prepared.algorithm.init_client(torch.from_numpy(prepared.run_spec.start_params), 3)
    head = int(prepared.federation.spec.mask(["output"]).sum())
    assert [tuple(leaf.shape) for _, leaf in trees.leaves(state)] == [(3, head)]
    whole = join(
        prepared.federation.spec.mask(["output"]),
        state.params_CH,
        torch.zeros(prepared.federation.spec.num_params),
    )
    whole += 1
    assert torch.equal(
        state.params_CH[0],
        torch.from_numpy(prepared.run_spec.start_params)[prepared.federation.spec.mask(["output"])],
    )


def test_the_last_layers_are_counted_from_the_output():
    names = ("a.weight", "a.bias", "b.weight", "c.weight", "c.bias")
    spec = ParamSpec(names, ((2,), (1,), (2,), (1,), (1,)))
    for count, expected in enumerate(["0000000", "0000011", "0001111", "1111111"]):
        mask = last_layers(spec, count, "head_layers").int().tolist()
        assert "".join(map(str, mask)) == expected


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "{name: fedper, head_layers: 3}",
            r"method.head_layers must lie in 0 .. 2 .*hidden0, outp",
        ),
        ("{name: fedper, head_layers: -1}", "method.head_layers must lie in 0 .. 2 .*got -1"),
        ("{name: lgfedavg, shared_layers: 5}", "method.shared_layers must lie in 0 .. 2 .*got 5"),
        ("{name: fedper, fine_tune: {steps: -1}}", "method.fine_tune.steps must be >= 0, got -1"),
    ],
)
def test_a_wrong_option_is_named(method, message):
    with pytest.raises(ConfigError, match=message):
        harness.prepared_with(method)


def test_fine_tuning_is_off_unless_asked_for():
    assert load_config(None, ["method=fedper"]).method.options.fine_tune is None
    asked = load_config(None, ["method=fedper", "method.fine_tune.steps=9"]).method.options
    assert asked.fine_tune.steps == 9
    finished = quadratics.run("fedper", 1, (*TWO_PARTS, "evaluation.every=1"))
    assert finished.records[-1].metrics["cost/personalization_steps"] == 0


def test_the_mixture_of_the_test_model_is_not_a_plain_one():
    """Head and body are coupled: training one moves the gradient of the other."""
    hessian = MIX.T @ MIX
    assert np.abs(hessian[np.ix_(BODY, HEAD)]).min() > 0.1
