"""L2GD: rounds against the toss by toss algorithm on two quadratics, and its fixed point."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from selffl_ray.algorithms.l2gd import draw_round
from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from tests.algorithms import quadratics
from tests.algorithms.quadratics import RATE, STEPS, descend
from tests.contract import harness

BASE = {"pull": 0.8, "communication": 0.4}


def method(options):
    return "{name: l2gd, " + ", ".join(f"{k}: {v}" for k, v in options.items()) + "}"


def by_hand(finished, options):
    """Every toss as in the source, with the mean of the models as they are at that toss."""
    p, y_MP, x_MP = options["communication"], quadratics.optima(finished), np.zeros((2, 3))
    strength = RATE * options["pull"] * (1 - p) / p
    for round_index in range(len(finished.records)):
        num_pulls, num_steps = draw_round(0, round_index, p)
        for _ in range(num_pulls):
            x_MP = x_MP - strength * (x_MP - x_MP.mean(axis=0))
        for _ in range(num_steps):
            x_MP = x_MP - RATE * (x_MP - y_MP)
    mean_P = x_MP.mean(axis=0)
    return mean_P, x_MP - strength * (x_MP - mean_P)


def check(options, rounds=4):
    finished = quadratics.run(method(options), rounds)
    mean_P, own_MP = by_hand(finished, options)
    np.testing.assert_allclose(quadratics.global_params(finished), mean_P, atol=1e-10)
    np.testing.assert_allclose(quadratics.personal_params(finished), own_MP, atol=1e-10)
    return mean_P, own_MP


@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_rounds_are_the_tosses_of_the_source_taken_together(rounds):
    check(BASE, rounds)


@pytest.mark.parametrize("other", [{"pull": 0.1}, {"communication": 0.8}], ids=str)
def test_every_option_acts_as_worked_out(other):
    base, found = check(BASE), check({**BASE, **other})
    assert max(map(quadratics.change, found, base)) > 0.1


@pytest.mark.parametrize("pull", [0.5, 3.0])
def test_small_steps_come_to_the_minimum_of_the_penalized_sum(pull):
    """There x_m - mean = (y_m - mean y) / (1 + pull), around which the tosses only jitter."""
    options, settings = {"pull": pull, "communication": 0.5}, ["training.learning_rate=0.01"]
    finished = quadratics.run(method(options), 250, settings)
    y_MP, own_MP = quadratics.optima(finished), quadratics.personal_params(finished)
    away_P, optimum_P = (at[0] - at.mean(axis=0) for at in (own_MP, y_MP))
    assert quadratics.change(away_P, optimum_P / (1 + pull)) < 0.15


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.7])
def test_pulls_and_steps_are_the_rows_of_equal_tosses(probability):
    """Geometric, from 1: means 1 / (1 - p) and 1 / p, both to be expected within 4 errors."""
    drawn = np.array([draw_round(3, index, probability) for index in range(3000)])
    assert drawn.min() == 1
    for column, end in zip(drawn.T, (1 - probability, probability), strict=True):
        error = np.sqrt(1 - end) / end / np.sqrt(len(column))
        assert abs(column.mean() - 1 / end) < 4 * error
    assert not np.array_equal(drawn[:50], [draw_round(4, i, probability) for i in range(50)])


def test_all_clients_make_the_same_steps_and_the_training_s_number_on_average():
    """Also where steps are counted in epochs: then the mean over the clients."""
    for settings, mean in (
        ([], STEPS),
        (
            [
                "training.num_local_steps=null",
                "training.num_local_epochs=3",
                "training.batch_size=8",
            ],
            6,
        ),
    ):
        finished = quadratics.run("l2gd", 6, settings)
        steps = sum(draw_round(0, index, 1 / mean)[1] for index in range(6))
        assert finished.records[-1].gradient_steps == 2 * steps


def test_one_client_is_plain_sgd():
    """It is its own mean: only the steps are left."""
    settings = [
        "data={name: gaussian, num_clients: 1, num_examples: [8], dimension: 3, inter_var: 4.0}"
    ]
    finished = quadratics.run(method(BASE), 3, settings)
    rows = finished.prepared.store.read(finished.prepared.clients[0].train).y
    y_P = rows[:, 1, 0].mean(axis=0, dtype=np.float64)
    steps = sum(draw_round(0, index, BASE["communication"])[1] for index in range(3))
    expected = descend(np.zeros(3), lambda x: x - y_P, steps)
    np.testing.assert_allclose(quadratics.global_params(finished), expected, atol=1e-10)


def test_a_new_client_starts_at_the_mean():
    finished = quadratics.run(method(BASE), 4)
    mean_P, y_MP = quadratics.global_params(finished), quadratics.optima(finished)
    found = quadratics.personal_params(quadratics.as_new_clients(finished))
    strength = RATE * BASE["pull"] * (1 - BASE["communication"]) / BASE["communication"]
    for m in range(2):
        own_P = descend(mean_P, lambda x, m=m: x - y_MP[m])
        np.testing.assert_allclose(found[m], own_P - strength * (own_P - mean_P), atol=1e-10)


def test_if_clients_fail_the_rest_goes_on_with_the_mean_of_those_that_answered():
    """Who was missing keeps its model, and is pulled again when it is back."""
    prepared = quadratics.run(method(BASE), 4).prepared
    answered = [[0, 1], [0], [0, 1], [1]]
    plans = [
        dataclasses.replace(plan, cohort=np.array(cohort))
        for plan, cohort in zip(prepared.plans, answered, strict=True)
    ]
    finished = harness.finish(dataclasses.replace(prepared, plans=plans))
    y_MP, x_MP, mean_P = quadratics.optima(finished), np.zeros((2, 3)), np.zeros(3)
    p = BASE["communication"]
    strength = RATE * BASE["pull"] * (1 - p) / p
    for round_index, cohort in enumerate(answered):
        num_pulls, num_steps = draw_round(0, round_index, p)
        for m in cohort:
            start_P = mean_P + (1 - strength) ** num_pulls * (x_MP[m] - mean_P)
            x_MP[m] = descend(start_P, lambda x, m=m: x - y_MP[m], num_steps)
        mean_P = x_MP[cohort].mean(axis=0)
    np.testing.assert_allclose(quadratics.global_params(finished), mean_P, atol=1e-10)
    np.testing.assert_allclose(quadratics.states(finished).params_CP, x_MP, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("pull: 0", "method.pull must be > 0, got 0"),
        ("communication: 1", r"method.communication must lie in \(0, 1\), got 1.0; null makes"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"method={{name: l2gd, {options}}}"])


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        (
            "pull: 0.1",
            "participation_rate=0.5",
            "participation_rate must be 1 with method l2gd, go",
        ),
        (
            "pull: 0.1",
            "trouble.deadline=30",
            "training.trouble must keep nobody away with method l2gd",
        ),
        ("pull: 1.0", "num_local_steps=20", r"must be <= 1 .* got 0.3 \* 1.0 \* 19; lower pull"),
        ("pull: 0.1", "num_local_steps=1", "method.communication: one local step a round on avera"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(options, training, message):
    with pytest.raises(ConfigError, match=message):
        harness.prepared_with(f"{{name: l2gd, {options}}}", [f"training.{training}"])
