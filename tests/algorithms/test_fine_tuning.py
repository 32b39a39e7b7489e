"""Fine-tuning, and FedAvg with it: closed forms on quadratics, and properties on digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selffl_ray.algorithms.fine_tuning import FineTuneConfig, fine_tune
from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from selffl_ray.training import local_sgd
from tests.algorithms import quadratics
from tests.algorithms.quadratics import RATE
from tests.contract import harness


def tuned_by_hand(finished, steps, rate, *, tail=False):
    """From the global model x, s steps of gradient v - y_m: v_j = y_m + (1 - rate)^j (x - y_m)."""
    x_P, y_MP = quadratics.global_params(finished), quadratics.optima(finished)
    taken = range(steps // 2 + 1, steps + 1) if tail else [steps]
    left = np.mean([(1 - rate) ** j for j in taken]) if steps else 1.0
    return y_MP + left * (x_P - y_MP)


BATCHES = (*harness.DIGITS, "training.batch_size=4")
"""Several batches an epoch for most clients, so that their order matters."""


def digits_stack(members):
    """Real clients of one batch length, as their host stacks them; and the common start."""
    prepared = harness.prepared_with("fedavg", BATCHES)
    host = harness.open_pool(prepared).transport._hosts[0]
    start_P = torch.from_numpy(prepared.run_spec.start_params.copy())
    return host._stack(members, prepared.plans[0]), start_P


def alike(count):
    """Clients with more than two batches, which may share a stack."""
    prepared = harness.prepared_with("fedavg", BATCHES)
    found = [i for i, client in enumerate(prepared.clients) if len(client.train) > 8]
    assert len(found) >= count
    return found[:count]


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize(("steps", "rate"), [(5, 1.0), (20, 1.0), (100, 1.0), (50, 0.1), (7, 0.3)])
def test_a_client_goes_from_the_global_model_towards_its_own_optimum(steps, rate, participation):
    method = f"{{name: fedavg_ft, fine_tune: {{steps: {steps}, rate: {rate}}}}}"
    finished = quadratics.run(method, 2, participation=participation)
    expected = tuned_by_hand(finished, steps, rate * RATE)
    np.testing.assert_allclose(quadratics.personal_params(finished), expected, atol=1e-6)


def test_the_defaults_are_fifty_small_steps():
    finished = quadratics.run("fedavg_ft", 2)
    expected = tuned_by_hand(finished, 50, 0.1 * RATE)
    np.testing.assert_allclose(quadratics.personal_params(finished), expected, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 5, 6])
def test_the_tail_average_is_the_mean_of_the_second_half_of_the_iterates(steps):
    method = f"{{name: fedavg_ft, fine_tune: {{steps: {steps}, rate: 0.5, tail_average: true}}}}"
    finished = quadratics.run(method, 2)
    found = quadratics.personal_params(finished)
    np.testing.assert_allclose(
        found, tuned_by_hand(finished, steps, 0.5 * RATE, tail=True), atol=1e-6
    )
    if steps > 1:
        last = tuned_by_hand(finished, steps, 0.5 * RATE)
        moved = np.linalg.norm(last - quadratics.global_params(finished))
        assert np.linalg.norm(found - last) > 0.1 * moved


def test_the_rate_follows_the_schedule():
    method = "{name: fedavg_ft, fine_tune: {steps: 5, rate: 1.0}}"
    finished = quadratics.run(method, 4, ["training.schedule=step"])
    found = quadratics.personal_params(finished)
    # A tenth after half of the rounds and again after three quarters.
    expected = tuned_by_hand(finished, 5, RATE / 100)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_the_rounds_are_those_of_fedavg_bit_for_bit(participation):
    settings = (*harness.DIGITS, f"training.participation_rate={participation}")
    plain = harness.finish(harness.prepared_with("fedavg", settings))
    tuned = harness.finish(harness.prepared_with("fedavg_ft", settings))
    assert harness.digests(plain) == harness.digests(tuned)
    last, other = tuned.records[-1].metrics, plain.records[-1].metrics
    assert last["test/global_accuracy"] == other["test/global_accuracy"]
    # 14 clients of 50 steps each.
    assert last["cost/personalization_steps"] == 14 * 50
    assert other["cost/personalization_steps"] == 0


def test_known_and_new_clients_gain_from_it():
    skewed = "data.partition={name: dirichlet, num_clients: 12, alpha: 0.1}"
    usual = [setting for setting in harness.DIGITS if "partition" not in setting]
    settings = (*usual, skewed, "evaluation.new_clients=0.3")
    method = "{name: fedavg_ft, fine_tune: {rate: 1.0}}"
    last = harness.finish(harness.prepared_with(method, settings)).records[-1].metrics
    assert last["test/local_accuracy"] > last["test/global_accuracy"] + 0.05
    assert last["new/local_accuracy"] > last["new/global_accuracy"] + 0.05


@pytest.mark.parametrize("tail", [False, True])
def test_no_steps_give_the_start_as_a_copy_and_cost_nothing(tail):
    stack, start_P = digits_stack(alike(3))
    config = FineTuneConfig(steps=0, tail_average=tail)
    for start in (start_P, start_P.expand(3, -1).clone()):
        found = fine_tune(config, stack, start)
        assert torch.equal(found.params_CP, start_P.expand(3, -1))
        assert found.gradients_C.tolist() == [0, 0, 0]
        assert found.params_CP.data_ptr() != start.data_ptr()


@pytest.mark.parametrize("tail", [False, True])
def test_frozen_coordinates_keep_their_bits_and_the_others_move(tail):
    stack, start_P = digits_stack(alike(2))
    before_P, free_P = start_P.clone(), torch.zeros(len(start_P), dtype=torch.bool)
    free_P[::3] = True
    config = FineTuneConfig(steps=6, tail_average=tail)
    found = fine_tune(config, stack, start_P, trainable=free_P).params_CP
    assert torch.equal(found[:, ~free_P], start_P[~free_P].expand(2, -1))
    assert (found[:, free_P] != start_P[free_P]).float().mean() > 0.5
    assert torch.equal(start_P, before_P)


@pytest.mark.parametrize("tail", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(tail):
    members = alike(4)
    config = FineTuneConfig(steps=9, rate=0.5, tail_average=tail)
    stack, start_P = digits_stack(members)
    together = fine_tune(config, stack, start_P).params_CP
    for row, member in enumerate(members):
        alone = fine_tune(config, digits_stack([member])[0], start_P).params_CP
        assert torch.equal(together[row], alone[0])


def test_batches_are_those_of_readouts_and_not_those_of_the_training():
    stack, start_P = digits_stack(alike(2))
    found = fine_tune(FineTuneConfig(steps=4, rate=1.0), stack, start_P).params_CP
    steps_C = torch.tensor([4, 4])
    readout = local_sgd(stack, start=start_P, steps_C=steps_C, stream="readout").params_CP
    training = local_sgd(stack, start=start_P, steps_C=steps_C).params_CP
    assert torch.equal(found, readout)
    moved = (training - start_P).norm(dim=1)
    assert ((found - training).norm(dim=1) > 0.1 * moved).all()


def test_no_steps_are_said_to_be_fedavg():
    def cautions(steps):
        method = f"{{name: fedavg_ft, fine_tune: {{steps: {steps}}}}}"
        return harness.prepared_with(method).algorithm.cautions

    assert cautions(0) == ("fine_tune.steps is 0: this is FedAvg",)
    assert cautions(1) == ()


@pytest.mark.parametrize(
    "method",
    ["fedavg_ft", "fedbabu", "{name: fedper, fine_tune: {steps: 5}}"],
)
def test_a_schedule_that_takes_the_rate_away_is_said(method):
    def cautions(schedule):
        settings = ("training.num_rounds=10", f"training.schedule={schedule}")
        return harness.prepared_with(method, settings).algorithm.cautions

    assert cautions("constant") == ()
    (text,) = cautions("step")
    # A hundredth of the rate 0.3 after three quarters of the rounds, and a tenth of that.
    assert "after the last round its rate is 0.0003" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("fine_tune: {steps: -1}", "method.fine_tune.steps must be >= 0, got -1"),
        ("fine_tune: {rate: 0}", "method.fine_tune.rate must be > 0, got 0"),
        ("fine_tune: {rate: .nan}", "method.fine_tune.rate must be > 0, got nan"),
        ("fine_tune: {step: 5}", "method.fine_tune.step: unknown key .did you mean 'steps'"),
        ("server: fedadm", "unknown server optimizer 'fedadm'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"method={{name: fedavg_ft, {options}}}"])
