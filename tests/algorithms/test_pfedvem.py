"""pFedVEM: its rounds by hand with the draws it makes, the exact posterior, and its two limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from selffl_ray.errors import ConfigError
from selffl_ray.seeding import generator
from tests.algorithms import quadratics
from tests.algorithms.quadratics import (
    BEGIN,
    BODY,
    HEAD,
    MIX,
    RATE,
    SHARES,
    SIZES,
    TWO_PARTS,
)
from tests.contract import harness


@pytest.fixture(autouse=True)
def _two_parts(monkeypatch):
    quadratics.add_two_parts(monkeypatch)


class ByHand:
    """The method on the two clients, drawn head by drawn head, for any linear map to outputs."""

    def __init__(self, finished, mix, head, begin, *, draws, start_std, steps):
        self.mix, self.head, self.draws, self.steps = mix, head, draws, steps
        self.prepared = finished.prepared
        self.y_MP = quadratics.optima(finished)
        self.at = begin.copy()
        size = int(head.sum())
        self.mean_MH = np.tile(begin[head], (2, 1))
        self.log_std_MH = np.full((2, size), math.log(start_std))
        self.seen_M = np.zeros(2, dtype=bool)
        self.found = []
        for record in finished.records:
            self.round(record.plan.round_index, record.plan.cohort)
            self.found.append(self.at)

    def gradients(self, rng, m, theta):
        """Mean gradient, and mean of eps times the head's, over the draws."""
        half = rng.standard_normal((math.ceil(self.draws / 2), int(self.head.sum())))
        grads, slopes = [], []
        for eps in np.concatenate([half, -half])[: self.draws]:
            drawn = theta.copy()
            drawn[self.head] += np.exp(self.log_std_MH[m]) * eps
            grads.append(self.mix.T @ (self.mix @ drawn - self.y_MP[m]))
            slopes.append(eps * grads[-1][self.head])
        return np.mean(grads, 0), np.mean(slopes, 0)

    def round(self, index, cohort):
        shared, ends, prior_vars = self.at[self.head], [], []
        head_steps, body_steps = self.steps
        for m in cohort:
            rng = generator(0, "pfedvem/draws", index, self.prepared.clients[m].client_id)
            theta, num = self.at.copy(), SIZES[m]
            if self.seen_M[m]:
                theta[self.head] = self.mean_MH[m]
            var = np.mean(np.exp(self.log_std_MH[m]) ** 2 + (theta[self.head] - shared) ** 2)
            pull = RATE / (num * var)
            for _ in range(head_steps):
                grad, slope = self.gradients(rng, m, theta)
                std = np.exp(self.log_std_MH[m])
                change = RATE * (std * slope + (std**2 / var - 1) / num)
                self.log_std_MH[m] -= np.clip(change, -math.log(2), math.log(2))
                moved = theta[self.head] - RATE * grad[self.head]
                theta[self.head] = (moved + pull * shared) / (1 + pull)
            for _ in range(body_steps):
                grad, _ = self.gradients(rng, m, theta)
                theta[~self.head] -= RATE * grad[~self.head]
            self.mean_MH[m], self.seen_M[m] = theta[self.head], True
            ends.append(theta)
            prior_vars.append(var)
        weight = SIZES[cohort] / SIZES[cohort].sum()
        precision = 1 / np.array(prior_vars)
        self.at = weight @ np.stack(ends)
        self.at[self.head] = precision / precision.sum() @ np.stack(ends)[:, self.head]


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("draws", [1, 2, 5])
def test_rounds_by_hand(draws, participation):
    check(f"draws: {draws}", HEAD, draws=draws, steps=(2, 1), participation=participation)


@pytest.mark.parametrize(
    ("options", "head", "steps"),
    [
        ("head_steps: 1, body_steps: 3", HEAD, (1, 3)),
        # Both layers: there is no body, and its steps go to the head.
        ("head_layers: 2", np.full(3, True), (3, 0)),
    ],
)
def test_the_parts_and_their_steps_are_as_given(options, head, steps):
    check(f"draws: 2, {options}", head, draws=2, steps=steps)


def check(options, head, *, draws, steps, participation=1.0):
    method = f"{{name: pfedvem, {options}, start_std: 0.4}}"
    finished = quadratics.run(method, 6, TWO_PARTS, participation=participation)
    hand = ByHand(finished, MIX, head, BEGIN, draws=draws, start_std=0.4, steps=steps)
    for index, expected in enumerate(hand.found):
        np.testing.assert_allclose(quadratics.global_params(finished, index), expected, atol=1e-7)
    state = quadratics.states(finished)
    np.testing.assert_allclose(state.mean_CH, hand.mean_MH, atol=1e-7)
    np.testing.assert_allclose(state.log_std_CH, hand.log_std_MH, atol=1e-7)
    personal = np.tile(hand.at, (2, 1))
    personal[:, head] = hand.mean_MH
    np.testing.assert_allclose(quadratics.personal_params(finished), personal, atol=1e-7)


def test_a_head_that_agrees_with_the_shared_one_counts_more():
    """The weights, from the reports' definition, for a model that is all head."""
    finished = quadratics.run("{name: pfedvem, start_std: 0.4}", 6)
    everything = np.ones(3, dtype=bool)
    hand = ByHand(
        finished, np.eye(3), everything, np.zeros(3), draws=2, start_std=0.4, steps=(3, 0)
    )
    np.testing.assert_allclose(quadratics.global_params(finished), hand.at, atol=1e-7)
    plain = [w @ hand.mean_MH for w in (SHARES, np.full(2, 0.5))]
    assert min(np.abs(hand.at - p).max() for p in plain) > 0.1 * np.abs(hand.at).max()


@pytest.mark.parametrize("num", [8, 16])
def test_many_steps_end_at_the_exact_posterior(num):
    """For 1/2 |theta - y|^2: precision n + 1 / rho^2, mean weighted by it around the start 0.

    Pairs of draws leave no noise in the means. The variances fluctuate around theirs by about a
    fifth, and are compared over 200 coordinates.
    """
    settings = (
        f"data={{name: gaussian, num_clients: 20, num_examples: [{num}], dimension: 10}}",
        "training.num_local_steps=250",
    )
    finished = quadratics.run("{name: pfedvem, start_std: 0.5}", 1, settings)
    state, y_MP = quadratics.states(finished), quadratics.optima(finished)
    precision = num + 1 / 0.5**2
    np.testing.assert_allclose(state.mean_CH, num * y_MP / precision, atol=1e-7)
    var_MH = np.exp(2 * state.log_std_CH)
    assert var_MH.mean() == pytest.approx(1 / precision, rel=0.08)
    assert np.abs(var_MH * precision - 1).max() < 1.5


def test_under_a_flat_prior_heads_are_trained_as_by_local_training():
    flat = quadratics.run("{name: pfedvem, start_std: 1000.0}", 1)
    alone = quadratics.run("local", 1)
    found, expected = (quadratics.personal_params(r) for r in (flat, alone))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Equal confidence: the shared head is the plain mean.
    np.testing.assert_allclose(quadratics.global_params(flat), expected.mean(0), rtol=1e-6)


def test_heads_that_are_certain_at_the_start_stay_at_the_shared_one():
    certain = quadratics.run("{name: pfedvem, start_std: 1e-6}", 3, TWO_PARTS)
    np.testing.assert_allclose(quadratics.personal_params(certain)[:, HEAD], BEGIN[2], atol=1e-5)
    # The body is then trained as FedBABU trains it, with the steps of its phase.
    frozen = quadratics.run("fedbabu", 3, (*TWO_PARTS, "training.num_local_steps=1"))
    one, other = (quadratics.global_params(r) for r in (certain, frozen))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(one - BEGIN)[BODY].min() > 0.05


def test_no_step_makes_a_deviation_vanish():
    """From 1000, one step of plain SGD would end at exp(-100000)."""
    wide = quadratics.run("{name: pfedvem, start_std: 1000.0}", 30)
    std = np.exp(quadratics.states(wide).log_std_CH)
    assert 0.02 < std.min() < std.max() < 1


def test_every_draw_is_a_gradient_and_a_report_is_a_number():
    finished = harness.finish(harness.prepared_with("{name: pfedvem, draws: 3}"))
    plain = harness.finish(harness.prepared_with("fedavg"))
    one, other = (f.records[-1] for f in (finished, plain))
    assert one.gradient_steps == 3 * other.gradient_steps
    assert one.metrics["comm/bytes_down"] == other.metrics["comm/bytes_down"]
    assert one.metrics["comm/bytes_up"] == other.metrics["comm/bytes_up"] + 7 * 4
    assert one.metrics["cost/personalization_steps"] == 0


def test_a_client_that_never_trained_starts_from_the_shared_head():
    """One participant a round: the other is pulled to the newest shared head, not to the start."""
    finished = quadratics.run("{name: pfedvem, start_std: 1e-4}", 4, participation=0.5)
    moved = quadratics.run("{name: pfedvem, start_std: 1000.0}", 1, participation=0.5)
    assert {int(i) for r in finished.records for i in r.plan.cohort} == {0}
    np.testing.assert_allclose(
        quadratics.personal_params(finished)[1], quadratics.global_params(finished), atol=1e-3
    )
    y = quadratics.optima(moved)[1]
    start = quadratics.global_params(moved)
    expected = quadratics.descend(start, lambda t: t - y)
    np.testing.assert_allclose(quadratics.personal_params(moved)[1], expected, rtol=1e-5)
    assert np.abs(start).max() > 0.1


def test_short_rounds_are_told_of():
    cautions = harness.prepared_with("pfedvem", ("training.num_local_steps=2",)).algorithm.cautions
    assert not cautions
    with pytest.raises(ConfigError, match=r"head_steps .2. leaves the body none of a round's 2"):
        harness.prepared_with("{name: pfedvem, head_steps: 2}", ("training.num_local_steps=2",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("draws: 0", "method.draws must be >= 1, got 0"),
        ("start_std: 0", "method.start_std must be > 0, got 0"),
        ("head_layers: 0", "method.head_layers must be >= 1, got 0; without a head this is"),
        ("head_layers: 3", "method.head_layers must lie in 0 .. 2 .*got 3"),
        ("body_steps: 0", "method.body_steps must be >= 1, got 0"),
        ("fine_tune: {steps: 3}", "method.fine_tune: unknown key"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        harness.prepared_with(f"{{name: pfedvem, {options}}}")
