"""pFedMe on two quadratics, whose proximal points and envelopes are known."""

from __future__ import annotations

import numpy as np
import pytest

from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from tests.algorithms import quadratics
from tests.algorithms.quadratics import RATE, SIZES, STEPS
from tests.contract import harness

BASE = {
    "pull": 2.0,
    "inner_steps": 2,
    "inner_factor": 0.5,
    "outer_rate": 0.3,
    "server_rate": 1.0,
    "warm_start": "global",
    "aggregation": "uniform",
}
OTHERS = (
    {"pull": 0.5},
    {"inner_steps": 4},
    {"inner_factor": 1.0},
    {"inner_factor": None},
    {"outer_rate": 0.1},
    {"server_rate": 1.5},
    {"warm_start": "own"},
    {"aggregation": "sample_size"},
)


def method(options):
    shown = {k: "null" if v is None else v for k, v in options.items()}
    return "{name: pfedme, " + ", ".join(f"{k}: {v}" for k, v in shown.items()) + "}"


def local_round(options, start, theta, y):
    """One client's round: (w, theta)."""
    pull, alpha = (
        options["pull"],
        (options["inner_factor"] or 1 / (1 + RATE * options["pull"])) * RATE,
    )
    w = start
    for _ in range(STEPS):
        for _ in range(options["inner_steps"]):
            theta = theta - alpha * ((theta - y) + pull * (theta - w))
        w = w - options["outer_rate"] * pull * (w - theta)
    return w, theta


def by_hand(finished, options):
    """The global model and what each client predicts with."""
    y_MP, x_P = quadratics.optima(finished), np.zeros(3)
    theta_MP, seen = np.zeros((2, 3)), set()

    def trained(m):
        first = theta_MP[m] if options["warm_start"] == "own" else x_P
        return local_round(options, x_P, first, y_MP[m])

    for record in finished.records:
        cohort = record.plan.cohort.tolist()
        ends = {m: trained(m) for m in cohort}
        for m in cohort:
            theta_MP[m] = ends[m][1]
        weights = np.ones(2) if options["aggregation"] == "uniform" else SIZES
        mean_P = np.average([ends[m][0] for m in cohort], axis=0, weights=weights[cohort])
        x_P = (1 - options["server_rate"]) * x_P + options["server_rate"] * mean_P
        seen |= set(cohort)
    for m in {0, 1} - seen:
        theta_MP[m] = trained(m)[1]
    return x_P, theta_MP


def check(options, rounds=3, participation=1.0):
    finished = quadratics.run(method(options), rounds, participation=participation)
    x_P, theta_MP = by_hand(finished, options)
    np.testing.assert_allclose(quadratics.global_params(finished), x_P, atol=1e-10)
    np.testing.assert_allclose(quadratics.personal_params(finished), theta_MP, atol=1e-10)
    return x_P, theta_MP


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("warm_start", ["global", "own"])
def test_rounds_are_those_worked_out_by_hand(participation, warm_start):
    check({**BASE, "warm_start": warm_start}, 4, participation)


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: str(*other.items()))
def test_every_option_acts_as_worked_out(other):
    base, found = check(BASE), check({**BASE, **other})
    assert max(map(quadratics.change, found, base)) > 0.1


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_many_inner_steps_make_the_step_on_the_moreau_envelope(participation):
    """W+ = w - eta lambda (w - prox(w)), and a client predicts with a proximal point."""
    options = {**BASE, "inner_factor": 1.6, "inner_steps": 9}
    finished = quadratics.run(method(options), 3, participation=participation)
    pull, eta, y_MP = options["pull"], options["outer_rate"], quadratics.optima(finished)
    x_P, own_MP = np.zeros(3), np.full((2, 3), np.nan)
    for record in finished.records:
        ends = []
        for m in record.plan.cohort:
            w = x_P
            for _ in range(STEPS):
                own_MP[m] = (y_MP[m] + pull * w) / (1 + pull)
                w = w - eta * pull * (w - own_MP[m])
            ends.append(w)
        x_P = np.mean(ends, axis=0)
    np.testing.assert_allclose(quadratics.global_params(finished), x_P, atol=1e-10)
    seen = ~np.isnan(own_MP[:, 0])
    np.testing.assert_allclose(quadratics.personal_params(finished)[seen], own_MP[seen], atol=1e-10)


def test_the_fixed_point_is_the_minimum_of_the_mean_envelope():
    """Both envelopes have one curvature, so it lies at the plain mean of the optima."""
    finished = quadratics.run(method({**BASE, "inner_factor": 1.6, "inner_steps": 8}), 30)
    y_MP = quadratics.optima(finished)
    np.testing.assert_allclose(quadratics.global_params(finished), y_MP.mean(axis=0), atol=1e-6)


def test_a_new_client_predicts_with_the_theta_of_a_first_round():
    finished = quadratics.run(method(BASE), 3)
    x_P, y_MP = quadratics.global_params(finished), quadratics.optima(finished)
    found = quadratics.personal_params(quadratics.as_new_clients(finished))
    for m in range(2):
        np.testing.assert_allclose(found[m], local_round(BASE, x_P, x_P, y_MP[m])[1], atol=1e-10)


def test_a_step_costs_its_inner_steps_and_the_state_is_no_upload():
    finished = quadratics.run(method({**BASE, "inner_steps": 4}), 2)
    assert finished.records[-1].gradient_steps == 2 * 2 * STEPS * 4
    uploads = quadratics.global_params(finished)
    assert quadratics.change(quadratics.states(finished).params_CP[0], uploads) > 0.1


def test_the_default_inner_factor_is_stable_at_any_pull():
    for pull in (0.1, 15.0, 1000.0):
        options = {"pull": pull, "outer_rate": 0.5 / pull, "inner_steps": 30}
        finished = quadratics.run(method(options), 3, ["training.learning_rate=1.9"])
        y_MP = quadratics.optima(finished)
        assert np.abs(quadratics.personal_params(finished)).max() < 2 * np.abs(y_MP).max()


def test_the_variant_of_ten_outer_and_five_inner_steps_can_be_written():
    options = "pull: 2.0, inner_steps: 5, inner_factor: 1.0, outer_rate: 0.1, warm_start: own"
    settings = ("training.num_local_steps=10", "training.num_rounds=2", "evaluation.every=2")
    name = f"{{name: pfedme, {options}, aggregation: sample_size}}"
    finished = harness.finish(harness.prepared_with(name, settings))
    assert finished.records[-1].gradient_steps == 2 * 14 * 10 * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("pull: 0", "method.pull must be > 0, got 0"),
        ("outer_rate: -1", "method.outer_rate must be > 0, got -1"),
        ("inner_steps: 0", "method.inner_steps must be >= 1, got 0"),
        ("inner_factor: 0", "method.inner_factor must be > 0, got 0"),
        ("server_rate: 0", r"method.server_rate must lie in \(0, 2\], got 0"),
        ("pull: 10, outer_rate: 0.1", r"outer_rate \* pull must be < 1, got 0.1 \* 10.*below 0.1"),
        (
            "server_rate: 1.5, server: fedadam",
            r"server_rate \(1.5\) is for server: mean; with feda",
        ),
        ("aggregation: median", "method.aggregation"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"method={{name: pfedme, {options}}}"])


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        (
            "inner_factor: 1.0, pull: 10, outer_rate: 0.05",
            "learning_rate=0.2",
            "must be < 2, got 1.0",
        ),
        ("pull: 5", "momentum=0.9", "training.momentum must be 0 with method pfedme, got 0.9"),
        ("pull: 5", "weight_decay=0.1", "training.weight_decay must be 0 with method pfedme"),
        ("pull: 5", "clip_norm=1.0", "training.clip_norm must be null with method pfedme"),
    ],
)
def test_what_diverges_or_would_act_by_halves_is_refused_before_the_run(options, training, message):
    with pytest.raises(ConfigError, match=message):
        harness.prepared_with(f"{{name: pfedme, {options}}}", [f"training.{training}"])
