"""Ditto: two tracks worked out by hand, its fixed point, and what it is without its pull."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from tests.algorithms import quadratics
from tests.algorithms.quadratics import RATE, SIZES, descend
from tests.contract import harness


def iterates(start_P, y_P, anchor_P, *, pull, rate, steps):
    """All iterates of an own model: v <- v - rate ((v - y) + pull (v - x))."""
    found = [np.array(start_P)]
    for _ in range(steps):
        v_P = found[-1]
        found.append(v_P - rate * (v_P - y_P + pull * (v_P - anchor_P)))
    return np.stack(found[1:])


def by_hand(finished, *, pull, steps=3, factor=1.0):
    """Global model after the last round; last iterates and tail means of the own models."""
    y_MP, x_P = quadratics.optima(finished), np.zeros(3)
    v_MP, tail_MP = np.zeros((2, 3)), np.full((2, 3), np.nan)
    for plan in finished.prepared.plans:
        rate = plan.learning_rate
        ends_MP = np.stack([descend(x_P, lambda t, y=y: t - y, rate=rate) for y in y_MP])
        for m in plan.cohort:
            path = iterates(v_MP[m], y_MP[m], x_P, pull=pull, rate=factor * rate, steps=steps)
            v_MP[m], tail_MP[m] = path[-1], path[steps // 2 :].mean(axis=0)
        share = SIZES[plan.cohort] / SIZES[plan.cohort].sum()
        x_P = share @ ends_MP[plan.cohort]
    return x_P, v_MP, tail_MP


OPTIONS = [
    ({"pull": 0.8}, {"pull": 0.8}),
    ({"pull": 0.8, "personal_steps": 7}, {"pull": 0.8, "steps": 7}),
    ({"pull": 0.8, "personal_rate": 0.3}, {"pull": 0.8, "factor": 0.3}),
    ({}, {"pull": 0.1}),
]


def method(options, tail=False):
    inside = [f"{key}: {value}" for key, value in options.items()]
    return "{" + ", ".join(["name: ditto", *inside, f"tail_average: {str(tail).lower()}"]) + "}"


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("options", "rule"), OPTIONS)
def test_both_tracks_are_those_worked_out_by_hand(options, rule, tail, participation):
    settings = ["training.schedule=linear"]
    finished = quadratics.run(method(options, tail), 8, settings, participation=participation)
    x_P, v_MP, tail_MP = by_hand(finished, **rule)
    assert not np.isnan(tail_MP).any(), "the example must let both clients take part"
    np.testing.assert_allclose(quadratics.global_params(finished), x_P, atol=1e-8)
    np.testing.assert_allclose(quadratics.states(finished).params_CP, v_MP, atol=1e-8)
    found = quadratics.personal_params(finished)
    np.testing.assert_allclose(found, tail_MP if tail else v_MP, atol=1e-8)


def test_the_fixed_point_lies_between_the_own_optimum_and_the_global_model():
    finished = quadratics.run("{name: ditto, pull: 0.6}", 60)
    y_MP = quadratics.optima(finished)
    x_P = SIZES / SIZES.sum() @ y_MP
    np.testing.assert_allclose(quadratics.global_params(finished), x_P, atol=1e-8)
    expected = (y_MP + 0.6 * x_P) / 1.6
    np.testing.assert_allclose(quadratics.personal_params(finished), expected, atol=1e-8)


def test_one_round_is_anchored_at_the_model_received_and_not_at_the_trained_one():
    """All starts are 0; an anchor at the client's y would shift v by 10 % and more."""
    finished = quadratics.run("{name: ditto, pull: 2.0}", 1)
    y_MP = quadratics.optima(finished)
    right = np.stack(
        [iterates(np.zeros(3), y, np.zeros(3), pull=2.0, rate=RATE, steps=3)[-1] for y in y_MP]
    )
    trained_MP = np.stack([descend(np.zeros(3), lambda t, y=y: t - y) for y in y_MP])
    wrong = np.stack(
        [
            iterates(np.zeros(3), y, end, pull=2.0, rate=RATE, steps=3)[-1]
            for y, end in zip(y_MP, trained_MP, strict=True)
        ]
    )
    assert np.linalg.norm(wrong - right) > 0.1 * np.linalg.norm(right)
    np.testing.assert_allclose(quadratics.personal_params(finished), right, atol=1e-8)


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("options", ["pull: 0.0", "pull: 2.0, personal_steps: 7"])
def test_the_global_track_is_fedavg_bit_for_bit(options, participation):
    settings = (*harness.DIGITS, f"training.participation_rate={participation}")
    ours = harness.finish(harness.prepared_with(f"{{name: ditto, {options}}}", settings))
    plain = harness.finish(harness.prepared_with("fedavg", settings))
    for one, other in zip(ours.records, plain.records, strict=True):
        assert torch.equal(one.server.params_P, other.server.params_P)
        assert one.metrics["train/loss"] == other.metrics["train/loss"]


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_without_a_pull_the_own_models_are_those_of_local_training_bit_for_bit(participation):
    settings = (*harness.DIGITS, f"training.participation_rate={participation}")
    ours = harness.finish(harness.prepared_with("{name: ditto, pull: 0}", settings))
    alone = harness.finish(harness.prepared_with("local", settings))
    found, expected = quadratics.states(ours), quadratics.states(alone)
    np.testing.assert_array_equal(found.params_CP, expected.params_CP)
    assert ours.prepared.algorithm.cautions == (
        "pull is 0: the clients' own models are those of local training",
    )


def test_the_tail_average_changes_predictions_and_no_training():
    plain, tail = (quadratics.run(method({"pull": 0.5}, on), 1) for on in (False, True))
    np.testing.assert_array_equal(
        quadratics.states(plain).params_CP, quadratics.states(tail).params_CP
    )
    last, mean = quadratics.personal_params(plain), quadratics.personal_params(tail)
    assert np.linalg.norm(last - mean) > 0.1 * np.linalg.norm(last)


@pytest.mark.parametrize(("option", "value"), [("pull", 1.0), ("personal_steps", 9)])
def test_the_own_models_depend_on_the_option(option, value):
    plain, other = (quadratics.run(method(o), 3) for o in ({}, {option: value}))
    last = quadratics.personal_params(plain)
    moved = np.linalg.norm(last - quadratics.personal_params(other))
    assert moved > 0.1 * np.linalg.norm(last)


def test_gradients_of_both_tracks_are_counted():
    steps = {}
    for name in ("fedavg", "ditto", "{name: ditto, personal_steps: 7}"):
        steps[name] = quadratics.run(name, 2).records[-1].metrics["cost/gradient_steps"]
    # 2 rounds of 2 clients with 3 steps of the global track.
    assert list(steps.values()) == [2 * 2 * 3, 2 * 2 * (3 + 3), 2 * 2 * (3 + 7)]


@pytest.mark.parametrize("tail", [False, True])
def test_a_client_that_never_took_part_starts_its_own_model_from_the_global_one(tail):
    finished = quadratics.run(method({"pull": 0.8}, tail), 1, participation=0.5)
    x_P, _, tail_MP = by_hand(finished, pull=0.8)
    (never,) = np.flatnonzero(np.isnan(tail_MP[:, 0]))
    y_P = quadratics.optima(finished)[never]
    path = iterates(x_P, y_P, x_P, pull=0.8, rate=RATE, steps=3)
    expected = path[1:].mean(axis=0) if tail else path[-1]
    np.testing.assert_allclose(quadratics.personal_params(finished)[never], expected, atol=1e-8)


def test_new_clients_are_adapted():
    settings = (*harness.DIGITS, "evaluation.new_clients=0.3", "training.num_local_steps=20")
    last = harness.finish(harness.prepared_with("ditto", settings)).records[-1].metrics
    assert last["new/local_accuracy"] > last["new/global_accuracy"] + 0.05


def test_a_pull_that_may_diverge_is_said():
    def cautions(options):
        return harness.prepared_with(f"{{name: ditto, {options}}}").algorithm.cautions

    (said,) = cautions("pull: 4.0")
    assert "method.pull 4.0 times the learning rate 0.3 is above 1" in said
    assert cautions("pull: 4.0, personal_rate: 0.5") == cautions("pull: 2.0") == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("pull: -1", "method.pull must be >= 0, got -1"),
        ("personal_steps: 0", "method.personal_steps must be >= 1, got 0; null takes"),
        ("personal_rate: 0", "method.personal_rate must be > 0, got 0"),
        ("personal_rate: .inf", "method.personal_rate must be > 0, got inf"),
        ("lambda: 1", "method.lambda: unknown key"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"method={{name: ditto, {options}}}"])
