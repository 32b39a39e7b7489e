"""Per-FedAvg: exact factors on quadratics, the true Hessian on digits, and FedAvg without it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from selffl_ray.algorithms.perfedavg import PerFedAvgConfig, meta_gradient
from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from selffl_ray.registry import algorithms
from selffl_ray.training import Step
from tests.algorithms import quadratics
from tests.algorithms.quadratics import RATE, SIZES, STEPS, descend
from tests.contract import harness
from tests.contract.test_algorithms import same_length, stack_of

SKEWED = "data={name: digits, partition: {name: dirichlet, alpha: 0.1}}"
BASE = {"variant": "fo", "inner_rate": 0.4, "adapt_steps": 1, "aggregation": "uniform"}


def method(options):
    return "{name: perfedavg, " + ", ".join(f"{k}: {v}" for k, v in options.items()) + "}"


def by_hand(finished, options):
    """The curvature is 1: a step multiplies w - y by 1 - rate (1 - alpha)^(1 or 2)."""
    alpha, y_MP, x_P = options["inner_rate"], quadratics.optima(finished), np.zeros(3)
    factor = (1 - alpha) ** {"fo": 1, "hf": 2}[options["variant"]]
    for record in finished.records:
        cohort = record.plan.cohort
        ends = [y_MP[m] + (1 - RATE * factor) ** STEPS * (x_P - y_MP[m]) for m in cohort]
        weights = np.ones(2) if options["aggregation"] == "uniform" else SIZES
        x_P = np.average(ends, axis=0, weights=weights[cohort])
    adapted = [descend(x_P, lambda w, y=y: w - y, options["adapt_steps"], alpha) for y in y_MP]
    return x_P, np.stack(adapted)


def check(options, rounds=3, participation=1.0):
    finished = quadratics.run(method(options), rounds, participation=participation)
    x_P, own_MP = by_hand(finished, options)
    np.testing.assert_allclose(quadratics.global_params(finished), x_P, atol=1e-10)
    np.testing.assert_allclose(quadratics.personal_params(finished), own_MP, atol=1e-10)
    return x_P, own_MP


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("variant", ["fo", "hf"])
def test_rounds_have_the_factors_of_the_curvature(variant, participation):
    check({**BASE, "variant": variant}, 4, participation)


@pytest.mark.parametrize(
    "other",
    [{"variant": "hf"}, {"inner_rate": 0.1}, {"adapt_steps": 3}, {"aggregation": "sample_size"}],
    ids=str,
)
def test_every_option_acts_as_worked_out(other):
    base, found = check(BASE), check({**BASE, **other})
    assert max(map(quadratics.change, found, base)) > 0.1


def real_step():
    """A step of real clients in float64, and models that have left the start."""
    prepared = harness.prepared_with(
        "fedavg", (*harness.DIGITS, "model={name: linear, dtype: float64}", "training.batch_size=4")
    )
    members = same_length(prepared)
    stack, _ = stack_of(prepared, members)
    step = Step(stack, "train", torch.ones(len(members), dtype=torch.int64))
    step.advance(0)
    rng = np.random.default_rng(0)
    w_CP = torch.from_numpy(rng.normal(scale=0.3, size=(len(members), stack.spec.num_params)))
    return stack, step, w_CP


def test_the_difference_stands_for_the_hessian_at_w_on_a_third_batch():
    """Against automatic differentiation, twice, of a softmax regression on real clients."""
    stack, step, w_CP = real_step()
    first = meta_gradient(PerFedAvgConfig(), None, w_CP, step)[1].clone()
    full = meta_gradient(PerFedAvgConfig(variant="hf"), None, w_CP, step)[1]
    batch, engine = step.batch("hessian"), stack.engine

    def loss(theta_CP):
        outputs = engine.model.apply(stack.spec.views(theta_CP), batch.x)
        return (engine.task.loss(outputs, batch.y) * batch.weight).sum()

    _, curved_CP = torch.autograd.functional.hvp(loss, w_CP, first)
    torch.testing.assert_close(full, first - 0.1 * curved_CP, atol=1e-6, rtol=1e-3)
    assert (full - first).norm() > 0.1 * first.norm()


def test_the_step_of_the_difference_matters_where_the_curvature_changes():
    _, step, w_CP = real_step()
    near, far = (
        meta_gradient(PerFedAvgConfig(variant="hf", hessian_step=d), None, w_CP, step)[1]
        for d in (1e-3, 3.0)
    )
    first = meta_gradient(PerFedAvgConfig(), None, w_CP, step)[1].clone()
    assert (near - far).norm() > 0.1 * (near - first).norm()


def test_the_variants_agree_where_the_loss_is_linear():
    """Without curvature the second-order term is 0: gradients that are the same everywhere."""

    class Slope(Step):
        def grad_at(self, theta_AP, batch=None):
            return torch.full_like(theta_AP, 0.7)

    stack, real, w_CP = real_step()
    step = Slope(stack, "train", real.num_steps_C)
    first, full = (
        meta_gradient(PerFedAvgConfig(variant=v, inner_rate=0.5), None, w_CP, step)[1]
        for v in ("fo", "hf")
    )
    assert torch.equal(first, full)


def test_the_batches_are_independent_and_the_second_is_that_of_fedavg():
    _, step, _ = real_step()
    inner, train, third = (step.batch(s).x for s in ("inner", None, "hessian"))
    for one, other in ((inner, train), (inner, third), (train, third)):
        # Not the same examples in another order either.
        assert not torch.allclose(one.sum(1), other.sum(1))


@pytest.mark.parametrize("variant", ["fo", "hf"])
def test_without_an_inner_rate_it_is_fedavg_bit_for_bit(variant):
    """Half of the clients a round, of unequal sizes."""
    options = {"variant": variant, "inner_rate": 0, "aggregation": "sample_size"}
    plain, meta = (
        harness.finish(harness.prepared_with(name)) for name in ("fedavg", method(options))
    )
    for one, other in zip(plain.records, meta.records, strict=True):
        assert torch.equal(one.server.params_P, other.server.params_P)
        assert one.metrics["train/loss"] == other.metrics["train/loss"]
    assert "this is FedAvg" in meta.prepared.algorithm.cautions[0]


@pytest.mark.parametrize(("variant", "cost"), [("fo", 2), ("hf", 4)])
def test_a_step_costs_two_or_four_gradients(variant, cost):
    finished = quadratics.run(method({**BASE, "variant": variant}), 2)
    assert finished.records[-1].gradient_steps == 2 * 2 * STEPS * cost


def test_a_new_client_adapts_like_any_other():
    finished = quadratics.run(method(BASE), 2)
    known = quadratics.personal_params(finished)
    np.testing.assert_array_equal(
        quadratics.personal_params(quadratics.as_new_clients(finished)), known
    )
    assert quadratics.change(known, quadratics.global_params(finished)) > 0.1


def test_adaptation_helps_on_digits():
    """One step is better than none, and twenty are better than one."""
    settings = ("training.num_rounds=3", "evaluation.every=3", SKEWED)
    one, twenty = (
        harness.finish(harness.prepared_with(method({"adapt_steps": n}), settings)).records[-1]
        for n in (1, 20)
    )
    scores = (
        one.metrics["test/global_accuracy_on_clients"],
        one.metrics["test/local_accuracy"],
        twenty.metrics["test/local_accuracy"],
    )
    assert scores[0] + 0.02 < scores[1] < scores[2] - 0.02


def test_idle_options_change_no_bit():
    entry = algorithms.get("perfedavg")
    training = load_config(None, []).training
    for config, changed in (
        (PerFedAvgConfig(), {"hessian_step": 0.5}),
        (PerFedAvgConfig(inner_rate=0.0), {"hessian_step": 0.5, "variant": "hf", "adapt_steps": 7}),
    ):
        assert set(entry.idle(config, training)) == set(changed)
        runs = [
            quadratics.run(
                method({f.name: getattr(c, f.name) for f in dataclasses.fields(c)[2:]}), 2
            )
            for c in (config, dataclasses.replace(config, **changed))
        ]
        np.testing.assert_array_equal(*map(quadratics.global_params, runs))
        np.testing.assert_array_equal(*map(quadratics.personal_params, runs))
    assert not entry.idle(PerFedAvgConfig(variant="hf"), training)


def test_no_adaptation_is_said():
    prepared = harness.prepared_with(method({"adapt_steps": 0}))
    assert "without adaptation" in prepared.algorithm.cautions[0]
    assert not harness.prepared_with("perfedavg").algorithm.cautions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("inner_rate: -0.1", "method.inner_rate must be >= 0, got -0.1"),
        ("hessian_step: 0", "method.hessian_step must be > 0, got 0"),
        ("adapt_steps: -1", "method.adapt_steps must be >= 0, got -1"),
        ("variant: so", "method.variant"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"method={{name: perfedavg, {options}}}"])
