"""FedAvg and the server optimizers: one claim a rule, worked out by hand on two quadratics."""

from __future__ import annotations

import numpy as np
import pytest

from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from selffl_ray.registry import server_optimizers
from tests.algorithms import quadratics
from tests.algorithms.quadratics import SHARES, descend


def rounds_by_hand(finished, rule, rounds):
    """The global models after each round when ``rule`` takes (round, x, D) to the next x."""
    y_MP, at_P, found = quadratics.optima(finished), np.zeros(3), []
    for index in range(rounds):
        ends = [descend(at_P, lambda theta, y=y: theta - y) for y in y_MP]
        at_P = rule(index, at_P, SHARES @ np.stack(ends) - at_P)
        found.append(at_P)
    return found


def check(method, rule, rounds=3):
    finished = quadratics.run(method, rounds)
    for index, expected in enumerate(rounds_by_hand(finished, rule, rounds)):
        found = quadratics.global_params(finished, index)
        np.testing.assert_allclose(found, expected, atol=1e-8)


def test_fedavg_takes_the_mean_by_number_of_examples():
    check("fedavg", lambda index, x, moved: x + moved)


def test_fedavgm_adds_up_the_differences():
    velocity = [np.zeros(3)]

    def rule(index, x, moved):
        velocity[0] = 0.8 * velocity[0] + moved
        return x + 0.5 * velocity[0]

    check("{name: fedavg, server: {name: fedavgm, momentum: 0.8, learning_rate: 0.5}}", rule)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_rules_divide_by_the_root_of_the_mean_square(name):
    first, second = [np.zeros(3)], [np.full(3, 0.1**2)]

    def rule(index, x, moved):
        first[0] = 0.6 * first[0] + 0.4 * moved
        square, old = moved**2, second[0]
        fall = {"fedadam": old - square, "fedyogi": square * np.sign(old - square)}[name]
        second[0] = old - 0.2 * fall
        return x + 0.05 * first[0] / (np.sqrt(second[0]) + 0.1)

    options = "learning_rate: 0.05, momentum: 0.6, second_momentum: 0.8, floor: 0.1"
    check(f"{{name: fedavg, server: {{name: {name}, {options}}}}}", rule)


def test_yogi_forgets_a_large_step_more_slowly_than_adam():
    """After one large difference and small ones, Adam's mean square falls, Yogi's hardly."""
    left = {}
    for name in ("fedadam", "fedyogi"):
        finished = quadratics.run(
            f"{{name: fedavg, server: {{name: {name}, learning_rate: 0.3}}}}",
            40,
            ["training.schedule=step"],
        )
        left[name] = finished.records[-1].server.memory.second_P.max()
    assert left["fedyogi"] > 1.1 * left["fedadam"]


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_momentum_of_nothing_at_rate_one_is_fedavg(participation):
    runs = [
        quadratics.run(method, 5, participation=participation)
        for method in (
            "fedavg",
            "{name: fedavg, server: {name: fedavgm, momentum: 0.0, learning_rate: 1.0}}",
        )
    ]
    plain, momentum = (quadratics.global_params(r) for r in runs)
    np.testing.assert_allclose(plain, momentum, atol=1e-12)


def test_momentum_is_remembered_over_a_checkpoint():
    """The memory is a part of the server's state, so what is saved holds it."""
    finished = quadratics.run("{name: fedavg, server: fedavgm}", 2)
    assert np.abs(finished.records[-1].server.memory.velocity_P.numpy()).max() > 0.1


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("{name: fedavgm, momentum: 1.0}", r"method.server.momentum must lie in \[0, 1\), got 1.0"),
        ("{name: fedavgm, learning_rate: 0}", "method.server.learning_rate must be > 0, got 0"),
        ("{name: fedadam, floor: 0}", "method.server.floor must be > 0, got 0"),
        ("{name: fedyogi, second_momentum: -1}", "method.server.second_momentum must lie in"),
        ("fedadm", "unknown server optimizer 'fedadm' .did you mean 'fedadam'"),
        ("{name: mean, momentum: 0.5}", "method.server.momentum: unknown key"),
    ],
)
def test_a_wrong_option_is_named(server, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"method={{name: fedavg, server: {server}}}"])


def test_all_rules_are_there():
    assert server_optimizers.names() == ["fedadam", "fedavgm", "fedyogi", "mean"]
