"""FedProx: rounds worked out by hand, its fixed point, and when it is FedAvg."""

from __future__ import annotations

import numpy as np
import pytest

from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from tests.algorithms import quadratics
from tests.algorithms.quadratics import RATE, SIZES, descend
from tests.contract import harness

LOCAL = "{{name: fedprox, mu: {}, personal_model: local}}"


def ends_by_hand(x_P, y_MP, mu, rate):
    """Each client's model after its steps with gradient (theta - y) + mu (theta - x)."""
    return np.stack([descend(x_P, lambda t, y=y: t - y + mu * (t - x_P), rate=rate) for y in y_MP])


def rounds_by_hand(finished, mu):
    """The global model after each round, and what each client last trained (NaN: never)."""
    y_MP, x_P, found = quadratics.optima(finished), np.zeros(3), []
    own_MP = np.full_like(y_MP, np.nan)
    for plan in finished.prepared.plans:
        ends_MP = ends_by_hand(x_P, y_MP, mu, plan.learning_rate)
        share = SIZES[plan.cohort] / SIZES[plan.cohort].sum()
        own_MP[plan.cohort] = ends_MP[plan.cohort]
        x_P = share @ ends_MP[plan.cohort]
        found.append(x_P)
    return found, own_MP


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_rounds_are_those_worked_out_by_hand(participation, schedule):
    settings = [f"training.schedule={schedule}"]
    finished = quadratics.run(LOCAL.format(2.0), 8, settings, participation=participation)
    expected, own_MP = rounds_by_hand(finished, 2.0)
    for index, x_P in enumerate(expected):
        np.testing.assert_allclose(quadratics.global_params(finished, index), x_P, atol=1e-8)
    assert not np.isnan(own_MP).any(), "the example must let both clients take part"
    np.testing.assert_allclose(quadratics.personal_params(finished), own_MP, atol=1e-8)


def test_a_client_that_never_took_part_predicts_after_one_local_update():
    finished = quadratics.run(LOCAL.format(2.0), 1, participation=0.5)
    _, own_MP = rounds_by_hand(finished, 2.0)
    (never,) = np.flatnonzero(np.isnan(own_MP[:, 0]))
    x_P, y_MP = quadratics.global_params(finished), quadratics.optima(finished)
    expected = ends_by_hand(x_P, y_MP, 2.0, RATE)[never]
    np.testing.assert_allclose(quadratics.personal_params(finished)[never], expected, atol=1e-8)


def test_local_models_end_between_their_optimum_and_the_global_model():
    """Solved to the end, the local problem has the solution (y_m + mu x) / (1 + mu)."""
    settings = ["training.num_local_steps=70"]
    finished = quadratics.run(LOCAL.format(0.5), 15, settings)
    x_P, y_MP = quadratics.global_params(finished), quadratics.optima(finished)
    np.testing.assert_allclose(x_P, SIZES / SIZES.sum() @ y_MP, atol=1e-8)
    found = quadratics.personal_params(finished)
    np.testing.assert_allclose(found, (y_MP + 0.5 * x_P) / 1.5, atol=1e-8)


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize(
    ("method", "training"),
    [
        ("{name: fedprox, mu: 0}", "training.num_local_steps=4"),
        ("{name: fedprox, mu: 0, personal_model: local}", "training.num_local_epochs=1"),
        ("{name: fedprox, mu: 1.0}", "training.num_local_steps=1"),
        (
            "{name: fedprox, mu: 0, server: fedavgm}",
            "training.num_local_steps=4",
        ),
    ],
)
def test_without_a_pull_or_with_one_step_it_is_fedavg_bit_for_bit(method, training, participation):
    settings = [s for s in harness.DIGITS if "num_local" not in s]
    settings += [training, f"training.participation_rate={participation}"]
    plain = "{name: fedavg, server: fedavgm}" if "server" in method else "fedavg"
    prepared = harness.prepared_with(method, settings)
    found = harness.digests(harness.finish(prepared))
    assert found == harness.digests(harness.finish(harness.prepared_with(plain, settings)))
    assert any("FedAvg" in caution for caution in prepared.algorithm.cautions)


@pytest.mark.parametrize("method", ["fedavg", "{name: fedprox, mu: 0}", "ditto", "scaffold"])
def test_a_federation_of_one_client_is_plain_descent(method):
    one = "data={name: gaussian, num_clients: 1, num_examples: [24], dimension: 3, inter_var: 4.0}"
    finished = quadratics.run(method, 4, [one])
    (y_P,) = quadratics.optima(finished)
    expected = descend(np.zeros(3), lambda t: t - y_P, 4 * quadratics.STEPS)
    np.testing.assert_allclose(quadratics.global_params(finished), expected, atol=1e-7)


def test_every_option_changes_what_comes_out():
    runs = {
        name: quadratics.run(f"{{name: fedprox, {options}}}", 3)
        for name, options in {
            "plain": "mu: 1.0",
            "mu": "mu: 0.1",
            "personal_model": "mu: 1.0, personal_model: local",
            "server": "mu: 1.0, server: fedavgm",
        }.items()
    }
    models = {name: quadratics.global_params(run) for name, run in runs.items()}
    size = np.linalg.norm(models["plain"])
    assert np.linalg.norm(models["mu"] - models["plain"]) > 0.1 * size
    assert np.linalg.norm(models["server"] - models["plain"]) > 0.1 * size
    np.testing.assert_array_equal(models["personal_model"], models["plain"])
    own = quadratics.personal_params(runs["personal_model"])
    assert np.linalg.norm(own - quadratics.personal_params(runs["plain"])) > 0.1 * size


def test_the_pull_keeps_clients_near_the_global_model_on_digits():
    def distance(mu):
        finished = harness.finish(harness.prepared_with(LOCAL.format(mu)))
        prepared, last = finished.prepared, finished.records[-1]
        x_P = finished.records[-2].server.params_P
        own = finished.pool.personal_models(
            last.plan, prepared.algorithm.broadcast(last.server, last.plan)
        )
        assert len(own) == len(last.plan.cohort)
        return np.mean([np.linalg.norm(v - x_P.numpy()) for v in own.values()])

    assert distance(3.0) < 0.9 * distance(0.0)


def test_new_clients_are_adapted():
    settings = (*harness.DIGITS, "evaluation.new_clients=0.3", "training.num_local_steps=20")
    last = harness.finish(harness.prepared_with(LOCAL.format(0.1), settings)).records[-1].metrics
    assert last["new/local_accuracy"] > last["new/global_accuracy"] + 0.05


@pytest.mark.parametrize(
    ("mu", "said"),
    [(0, "mu is 0"), (10.0, "method.mu 10.0 times the learning rate 0.3"), (3.0, "")],
)
def test_what_is_void_or_may_diverge_is_said(mu, said):
    cautions = harness.prepared_with(f"{{name: fedprox, mu: {mu}}}").algorithm.cautions
    assert [said in caution for caution in cautions] == ([True] if said else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("mu: -0.1", "method.mu must be >= 0, got -0.1; usual values are"),
        ("mu: .inf", "method.mu must be >= 0, got inf"),
        ("personal_model: own", "method.personal_model"),
        ("muu: 1", "method.muu: unknown key .did you mean 'mu'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"method={{name: fedprox, {options}}}"])
