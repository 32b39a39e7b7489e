"""APFL: rounds worked out by hand on two quadratics; its ends, FedAvg and local training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selffl_ray.algorithms.apfl import APFLConfig
from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from selffl_ray.registry import algorithms
from tests.algorithms import quadratics
from tests.algorithms.quadratics import RATE, SIZES, STEPS
from tests.contract import harness

BASE = {
    "own_share": 0.5,
    "adaptive": "true",
    "share_rate": 1.0,
    "aggregation": "uniform",
    "personal_model": "global",
}


def method(options):
    return "{name: apfl, " + ", ".join(f"{k}: {v}" for k, v in options.items()) + "}"


def local_round(options, x, v, share, y):
    """One client's round: (w, v, share)."""
    w = x
    for index in range(STEPS):
        w = w - RATE * (w - y)
        slope = share * v + (1 - share) * w - y
        adapted = np.clip(share - options["share_rate"] * RATE * (v - w) @ slope, 0, 1)
        v = v - RATE * share * slope
        if options["adaptive"] == "true" and index == 0:
            share = adapted
    return w, v, share


def by_hand(finished, options):
    """The global model, the clients' shares and what they predict with."""
    y_MP, x_P = quadratics.optima(finished), np.zeros(3)
    v_MP, share_M, seen = np.zeros((2, 3)), np.full(2, options["own_share"]), set()
    w_MP = np.zeros((2, 3))
    for record in finished.records:
        cohort = record.plan.cohort.tolist()
        ends_MP = np.zeros((2, 3))
        for m in cohort:
            ends_MP[m], v_MP[m], share_M[m] = local_round(
                options, x_P, v_MP[m], share_M[m], y_MP[m]
            )
        weights = np.ones(2) if options["aggregation"] == "uniform" else SIZES
        x_P = np.average(ends_MP[cohort], axis=0, weights=weights[cohort])
        w_MP[cohort] = ends_MP[cohort]
        seen |= set(cohort)
    for m in {0, 1} - seen:
        w_MP[m], v_MP[m], share_M[m] = local_round(options, x_P, v_MP[m], share_M[m], y_MP[m])
    share_M1 = share_M[:, None]
    other = x_P if options["personal_model"] == "global" else w_MP
    return x_P, share_M, share_M1 * v_MP + (1 - share_M1) * other


def check(options, rounds=3, participation=1.0):
    finished = quadratics.run(method(options), rounds, participation=participation)
    x_P, share_M, own_MP = by_hand(finished, options)
    np.testing.assert_allclose(quadratics.global_params(finished), x_P, atol=1e-10)
    np.testing.assert_allclose(quadratics.personal_params(finished), own_MP, atol=1e-10)
    states = quadratics.states(finished)
    seen = sorted({m for record in finished.records for m in record.plan.cohort.tolist()})
    np.testing.assert_allclose(states.share_C1[:, 0], share_M[seen], atol=1e-10)
    return x_P, own_MP


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("adaptive", ["true", "false"])
@pytest.mark.parametrize("personal_model", ["global", "local"])
def test_rounds_are_those_worked_out_by_hand(personal_model, adaptive, participation):
    other = {"own_share": 0.7, "adaptive": adaptive, "personal_model": personal_model}
    check({**BASE, **other}, 4, participation)


@pytest.mark.parametrize(
    "other",
    [
        {"own_share": 0.9},
        {"adaptive": "false"},
        {"share_rate": 0.1},
        {"aggregation": "sample_size"},
        {"personal_model": "local"},
    ],
    ids=str,
)
def test_every_option_acts_as_worked_out(other):
    base, found = check(BASE), check({**BASE, **other})
    assert max(map(quadratics.change, found, base)) > 0.1


def test_the_share_follows_the_slope_of_the_loss_of_the_mixture():
    """Against a difference of the loss in the share, where no end stops it."""
    options = {**BASE, "share_rate": 0.02}
    first, second = (quadratics.run(method(options), rounds) for rounds in (3, 4))
    y_MP, before = quadratics.optima(first), quadratics.states(first)
    moved = quadratics.states(second).share_C1[:, 0] - before.share_C1[:, 0]
    for m in range(2):
        w = quadratics.global_params(first)
        w = w - RATE * (w - y_MP[m])

        def loss(share, w=w, m=m):
            mixture = share * before.params_CP[m] + (1 - share) * w
            return 0.5 * np.sum((mixture - y_MP[m]) ** 2)

        at = before.share_C1[m, 0]
        slope = (loss(at + 1e-4) - loss(at - 1e-4)) / 2e-4
        np.testing.assert_allclose(moved[m], -0.02 * RATE * slope, rtol=1e-4)


def test_the_share_stays_between_none_and_all():
    finished = quadratics.run(method({**BASE, "share_rate": 50.0}), 3)
    shares = quadratics.states(finished).share_C1
    assert set(np.unique(shares)) <= {0.0, 1.0}


def test_its_global_path_is_fedavg_bit_for_bit():
    """Whatever the share: half of the clients a round, of unequal sizes."""
    plain, mixed = (
        harness.finish(harness.prepared_with(name))
        for name in ("fedavg", method({"aggregation": "sample_size"}))
    )
    for one, other in zip(plain.records, mixed.records, strict=True):
        assert torch.equal(one.server.params_P, other.server.params_P)
        assert one.metrics["train/loss"] == other.metrics["train/loss"]
    assert (
        quadratics.change(quadratics.personal_params(mixed), quadratics.global_params(mixed)) > 0.01
    )


def test_a_fixed_share_of_nothing_predicts_with_the_global_model():
    finished = harness.finish(harness.prepared_with(method({"own_share": 0, "adaptive": "false"})))
    found = quadratics.personal_params(finished)
    np.testing.assert_array_equal(found, np.tile(quadratics.global_params(finished), (14, 1)))
    assert "FedAvg" in finished.prepared.algorithm.cautions[0]


def test_a_fixed_share_of_everything_is_local_training_bit_for_bit():
    """Half of the clients a round, of unequal sizes, some never seen: they adapt as in Local."""
    alone, mixed = (
        harness.finish(harness.prepared_with(name))
        for name in ("local", method({"own_share": 1, "adaptive": "false"}))
    )
    np.testing.assert_array_equal(*map(quadratics.personal_params, (alone, mixed)))
    assert "local training" in mixed.prepared.algorithm.cautions[0]


def test_a_new_client_trains_its_own_model_and_share_for_a_round():
    finished = quadratics.run(method(BASE), 3)
    x_P, y_MP = quadratics.global_params(finished), quadratics.optima(finished)
    found = quadratics.personal_params(quadratics.as_new_clients(finished))
    for m in range(2):
        _, v, share = local_round(BASE, x_P, np.zeros(3), BASE["own_share"], y_MP[m])
        np.testing.assert_allclose(found[m], share * v + (1 - share) * x_P, atol=1e-10)


def test_a_step_costs_two_gradients():
    finished = quadratics.run("apfl", 2)
    assert finished.records[-1].gradient_steps == 2 * 2 * STEPS * 2


def test_the_rate_of_a_share_that_stays_is_idle():
    training = load_config(None, []).training
    idle = algorithms.get("apfl").idle
    assert set(idle(APFLConfig(adaptive=False), training)) == {"share_rate"}
    assert not idle(APFLConfig(), training)
    runs = [
        quadratics.run(method({"adaptive": "false", "share_rate": rate}), 2) for rate in (1.0, 9.0)
    ]
    np.testing.assert_array_equal(*map(quadratics.personal_params, runs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("own_share: 1.5", r"method.own_share must lie in \[0, 1\], got 1.5"),
        (
            "share_rate: 0",
            "method.share_rate must be > 0, got 0.0; adaptive: false keeps the share",
        ),
        ("aggregation: median", "method.aggregation"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"method={{name: apfl, {options}}}"])


@pytest.mark.parametrize("setting", ["momentum=0.9", "weight_decay=0.1", "clip_norm=1.0"])
def test_what_would_act_on_one_of_two_models_is_refused_before_the_run(setting):
    field = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=f"training.{field} must be .* with method apfl"):
        harness.prepared_with("apfl", [f"training.{setting}"])
