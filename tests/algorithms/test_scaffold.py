"""SCAFFOLD: rounds by hand, exactness where FedAvg drifts, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selffl_ray.config import load_config
from selffl_ray.datasets import gaussian
from selffl_ray.errors import ConfigError
from tests.algorithms import quadratics
from tests.algorithms.quadratics import descend
from tests.contract import harness

CURVATURES = np.array([0.3, 1.0, 1.5, 2.5])
CURVED = (
    "data={name: gaussian, num_clients: 4, num_examples: [16, 16, 16, 16], dimension: 3, "
    "inter_var: 4.0, noise_var: 2.125}"
)
"""Four quadratics 1/2 h_m |theta - y_m|^2 of the same size; the noise names a store of its own."""

EPOCHS = (
    "data={name: gaussian, num_clients: 2, num_examples: [8, 24], dimension: 3, inter_var: 4.0, "
    "noise_var: 0.0}",
    "training.num_local_steps=null",
    "training.num_local_epochs=1",
    "training.batch_size=8",
)
"""Two clients of 1 and 3 steps; all examples of one are alike, so every batch gives theta - y_m."""


@pytest.fixture
def curved(monkeypatch):
    """Settings of four clients whose losses have different curvatures."""
    drawn = gaussian._drawn

    def with_curvature(config, client, seed):
        train, truth = drawn(config, client, seed)
        train[..., 1, :] *= CURVATURES[client]
        return train, truth

    monkeypatch.setattr(gaussian, "_drawn", with_curvature)
    return (CURVED,)


def by_hand(finished, *, server_rate=1.0, steps_M=(3, 3), curvature_M=(1.0, 1.0)):
    """The server's model and control after each round, and the clients' controls at the end."""
    y_MP = quadratics.optima(finished)
    x_P, c_P, c_MP, found = np.zeros(3), np.zeros(3), np.zeros_like(y_MP), []
    for plan in finished.prepared.plans:
        delta, change = [], []
        for m in plan.cohort:
            end_P = descend(
                x_P,
                lambda t, m=m, c_P=c_P: curvature_M[m] * (t - y_MP[m]) - c_MP[m] + c_P,
                steps_M[m],
                plan.learning_rate,
            )
            next_P = c_MP[m] - c_P + (x_P - end_P) / (steps_M[m] * plan.learning_rate)
            delta.append(end_P - x_P)
            change.append(next_P - c_MP[m])
            c_MP[m] = next_P
        x_P = x_P + server_rate * np.mean(delta, axis=0)
        c_P = c_P + len(plan.cohort) / len(y_MP) * np.mean(change, axis=0)
        found.append((x_P, c_P))
    return found, c_MP


def check(finished, **rule):
    expected, c_MP = by_hand(finished, **rule)
    for record, (x_P, c_P) in zip(finished.records, expected, strict=True):
        np.testing.assert_allclose(record.server.params_P.numpy(), x_P, atol=1e-7)
        np.testing.assert_allclose(record.server.control_P.numpy(), c_P, atol=1e-6)
    found = quadratics.states(finished).control_CP
    seen = np.unique(np.concatenate([plan.cohort for plan in finished.prepared.plans]))
    np.testing.assert_allclose(found, c_MP[seen], atol=1e-6)


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("server_rate", [1.0, 0.6])
def test_rounds_are_those_worked_out_by_hand(participation, schedule, server_rate):
    finished = quadratics.run(
        f"{{name: scaffold, server_rate: {server_rate}}}",
        8,
        [f"training.schedule={schedule}"],
        participation=participation,
    )
    check(finished, server_rate=server_rate)


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_each_client_counts_its_own_steps(participation):
    finished = quadratics.run("scaffold", 8, EPOCHS, participation=participation)
    check(finished, steps_M=(1, 3))


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_the_servers_control_stays_the_mean_of_all_clients_controls(participation):
    settings = (*harness.DIGITS, f"training.participation_rate={participation}")
    finished = harness.finish(harness.prepared_with("scaffold", settings))
    found, count = quadratics.states(finished).control_CP, len(finished.prepared.clients)
    control_P = finished.records[-1].server.control_P.numpy()
    # Clients that never took part still have a control of 0.
    np.testing.assert_allclose(found.sum(axis=0) / count, control_P, atol=1e-6)
    assert np.abs(control_P).max() > 1e-3


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_it_is_exact_where_curvatures_differ_and_fedavg_is_not(curved, participation):
    """Minimiser of the plain mean of 1/2 h_m |theta - y_m|^2: sum h_m y_m / sum h_m."""
    settings = (*curved, "training.learning_rate=0.3", "training.num_local_steps=5")
    finished = quadratics.run("scaffold", 150, settings, participation=participation)
    y_MP = quadratics.optima(finished)
    optimum = CURVATURES @ y_MP / CURVATURES.sum()
    np.testing.assert_allclose(quadratics.global_params(finished), optimum, atol=1e-7)
    controls = CURVATURES[:, None] * (optimum - y_MP)
    np.testing.assert_allclose(quadratics.states(finished).control_CP, controls, atol=1e-6)
    if participation == 1:
        # FedAvg rests where the mean of the moves vanishes: weights 1 - (1 - eta h)^K, not h.
        drifted = quadratics.global_params(quadratics.run("fedavg", 30, settings))
        pulled = 1 - (1 - 0.3 * CURVATURES) ** 5
        np.testing.assert_allclose(drifted, pulled @ y_MP / pulled.sum(), atol=1e-7)
        assert np.linalg.norm(drifted - optimum) > 0.1 * np.linalg.norm(optimum)


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_it_is_exact_where_numbers_of_steps_differ_and_fedavg_is_not(participation):
    finished = quadratics.run("scaffold", 100, EPOCHS, participation=participation)
    y_MP = quadratics.optima(finished)
    np.testing.assert_allclose(quadratics.global_params(finished), y_MP.mean(axis=0), atol=1e-7)
    if participation == 1:
        # FedAvg minimises neither the mean by examples, its aim, nor the plain one.
        drifted = quadratics.global_params(quadratics.run("fedavg", 40, EPOCHS))
        for weights in (quadratics.SHARES, np.array([0.5, 0.5])):
            assert np.linalg.norm(drifted - weights @ y_MP) > 0.1 * np.linalg.norm(
                y_MP[0] - y_MP[1]
            )


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("server_rate", [1.0, 0.5])
def test_the_first_round_is_that_of_unweighted_fedavg(participation, server_rate):
    """On digits, with clients of unequal sizes: the local steps are FedAvg's bit for bit."""
    settings = (*harness.DIGITS, f"training.participation_rate={participation}")
    plain = harness.prepared_with("fedavg", settings)
    host, plan = harness.open_pool(plain).transport._hosts[0], plain.plans[0]
    server = harness.start(plain)
    shared, _ = plain.algorithm.broadcast(server, plan)
    ends = [
        plain.algorithm.local_update(shared, (), (), host._stack([m], plan)).payload.params_CP[0]
        for m in plan.cohort.tolist()
    ]
    moved_P = torch.stack(ends).mean(0) - shared.params_P
    method = f"{{name: scaffold, server_rate: {server_rate}}}"
    ours = harness.finish(harness.prepared_with(method, settings)).records[0]
    found = ours.server.params_P
    torch.testing.assert_close(found, shared.params_P + server_rate * moved_P, atol=1e-6, rtol=0)
    assert len({len(plain.clients[m].train) for m in plan.cohort.tolist()}) > 1


def test_both_directions_carry_a_model_and_a_control():
    bytes_sent = {}
    for name in ("fedavg", "scaffold"):
        metrics = quadratics.run(name, 2).records[-1].metrics
        bytes_sent[name] = np.array([v for k, v in metrics.items() if "bytes" in k])
    assert len(bytes_sent["fedavg"])
    assert (bytes_sent["scaffold"] == 2 * bytes_sent["fedavg"]).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.momentum=0.9", "training.momentum must be 0 .*got 0.9: its controls"),
        ("training.weight_decay=0.01", "training.weight_decay must be 0 .*got 0.01: its controls"),
        ("training.clip_norm=5.0", "training.clip_norm must be null .*got 5.0: its controls"),
    ],
)
def test_training_that_is_not_plain_sgd_is_refused_before_the_run(setting, message):
    with pytest.raises(ConfigError, match=message):
        harness.prepared_with("scaffold", (*harness.DIGITS, setting))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("server_rate: 0", "method.server_rate must be > 0, got 0.0; 1 takes the mean model"),
        ("server_rate: .nan", "method.server_rate must be > 0, got nan"),
        ("server: fedavgm", "method.server: unknown key .did you mean 'server_rate'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"method={{name: scaffold, {options}}}"])
