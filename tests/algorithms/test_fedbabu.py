"""FedBABU: the body under a head that stays where it started, then fine-tuning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selffl_ray.algorithms.fedbabu import FedBABUConfig, idle
from selffl_ray.errors import ConfigError
from tests.algorithms import quadratics
from tests.algorithms.quadratics import BEGIN, BODY, HEAD, MIX, TWO_PARTS, descend
from tests.contract import harness

PARTS = {"all": BODY | HEAD, "head": HEAD, "body": BODY}
UNTUNED = "{name: fedbabu, fine_tune: {steps: 0}}"


@pytest.fixture(autouse=True)
def _two_parts(monkeypatch):
    quadratics.add_two_parts(monkeypatch)


def of_body(theta, gradient):
    return descend(theta, lambda t: BODY * gradient(t))


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_rounds_by_hand(participation):
    finished = quadratics.run("fedbabu", 6, TWO_PARTS, participation=participation)
    nobody_owns = np.zeros(3, dtype=bool)
    expected, _ = quadratics.partly_by_hand(finished, nobody_owns, of_body)
    for index, params in enumerate(expected):
        found = quadratics.global_params(finished, index)
        np.testing.assert_allclose(found, params, atol=1e-8)
        np.testing.assert_array_equal(found[HEAD], BEGIN[HEAD])


@pytest.mark.parametrize("part", PARTS)
def test_clients_fine_tune_the_part_that_is_asked_for(part):
    method = f"{{name: fedbabu, part: {part}, fine_tune: {{steps: 9, rate: 0.5}}}}"
    finished = quadratics.run(method, 2, TWO_PARTS)
    start = quadratics.global_params(finished)
    expected = [
        descend(start, lambda t, y=y: PARTS[part] * quadratics.mixed_gradient(t, y), 9, 0.1)
        for y in quadratics.optima(finished)
    ]
    found = quadratics.personal_params(finished)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    assert np.abs(found - start)[:, PARTS[part]].min() > 0.01


def test_one_client_alone_ends_at_the_best_body_under_the_head_of_the_start():
    alone = ("data={name: gaussian, num_clients: 1, num_examples: [8], dimension: 3}",)
    finished = quadratics.run("fedbabu", 100, (*TWO_PARTS, *alone))
    rest = quadratics.optima(finished)[0] - MIX[:, HEAD] @ BEGIN[HEAD]
    best, *_ = np.linalg.lstsq(MIX[:, BODY], rest)
    np.testing.assert_allclose(quadratics.global_params(finished)[BODY], best, atol=1e-6)


@pytest.mark.parametrize("server", ["mean", "fedavgm", "fedadam", "fedyogi"])
def test_no_server_optimizer_moves_the_head(server):
    finished = harness.finish(harness.prepared_with(f"{{name: fedbabu, server: {server}}}"))
    spec, start = finished.prepared.federation.spec, finished.prepared.run_spec.start_params
    head_P = spec.mask(["output"])
    end = torch.from_numpy(quadratics.global_params(finished))
    assert torch.equal(end[head_P], torch.from_numpy(start)[head_P])
    assert not torch.isclose(end, torch.from_numpy(start))[spec.mask(["hidden0"])].all()


def test_nothing_is_kept_of_the_fine_tuning_and_all_of_it_is_counted():
    tuned, untuned = (
        harness.finish(harness.prepared_with(method)) for method in ("fedbabu", UNTUNED)
    )
    assert harness.digests(tuned) == harness.digests(untuned)
    metrics = [f.records[-1].metrics for f in (tuned, untuned)]
    clients = len(tuned.prepared.clients)
    assert [m["cost/personalization_steps"] for m in metrics] == [50 * clients, 0]
    assert metrics[0]["test/local_accuracy"] != metrics[1]["test/local_accuracy"]


def test_untuned_clients_and_new_ones_predict_with_the_global_model():
    finished = harness.finish(harness.prepared_with(UNTUNED))
    models = quadratics.personal_params(finished)
    config = finished.prepared.config
    assert idle(config.method.options, config.training) == {"part": "fine_tune.steps is 0"}
    assert not idle(FedBABUConfig(), config.training)
    np.testing.assert_array_equal(models, np.tile(quadratics.global_params(finished), (14, 1)))


@pytest.mark.parametrize(
    ("options", "caution"),
    [
        ("head_layers: 2", "every layer is head: the rounds train nothing, clients fine-tune"),
        ("head_layers: 0", "there is no head: this is FedAvg with fine-tuning"),
        ("fine_tune: {steps: 0}", "nothing is fine-tuned: clients predict with the head of the"),
        ("head_layers: 0, part: head", "nothing is fine-tuned: clients predict with the head of"),
    ],
)
def test_what_is_void_is_said(options, caution):
    cautions = harness.prepared_with(f"{{name: fedbabu, {options}}}").algorithm.cautions
    assert any(text.startswith(caution) for text in cautions)
    assert not harness.prepared_with("fedbabu").algorithm.cautions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("head_layers: 3", "method.head_layers must lie in 0 .. 2 .*got 3"),
        ("part: neck", "method.part must be 'all', 'head' or 'body', got 'neck'"),
        ("fine_tune: {rate: 0}", "method.fine_tune.rate must be > 0, got 0"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        harness.prepared_with(f"{{name: fedbabu, {options}}}")
