"""FedRep: its phases by hand, what they cost, and where many steps lead."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selffl_ray.algorithms.fedrep import FedRepConfig
from selffl_ray.algorithms.phases import PhasedConfig, phases
from selffl_ray.errors import ConfigError
from selffl_ray.training import plan_batches
from tests.algorithms import quadratics
from tests.algorithms.quadratics import BODY, HEAD, MIX, TWO_PARTS, descend
from tests.contract import harness


@pytest.fixture(autouse=True)
def _two_parts(monkeypatch):
    quadratics.add_two_parts(monkeypatch)


def phases_of(head_steps, body_steps):
    """The client's part of a round, as :func:`quadratics.partly_by_hand` takes it."""

    def train(theta, gradient):
        theta = descend(theta, lambda t: HEAD * gradient(t), head_steps)
        return descend(theta, lambda t: BODY * gradient(t), body_steps)

    return train


def check(method, steps, *, by_size=False, participation=1.0):
    finished = quadratics.run(method, 6, TWO_PARTS, participation=participation)
    expected, personal = quadratics.partly_by_hand(
        finished, HEAD, phases_of(*steps), by_size=by_size
    )
    for index, params in enumerate(expected):
        np.testing.assert_allclose(quadratics.global_params(finished, index), params, atol=1e-8)
    np.testing.assert_allclose(quadratics.personal_params(finished), personal, atol=1e-8)
    participants = sum(len(r.plan.cohort) for r in finished.records)
    assert finished.records[-1].gradient_steps == sum(steps) * participants


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_the_phases_share_the_steps_of_a_round(participation):
    """Three steps a round: two of the head, one of the body, as many gradients as FedAvg's."""
    check("fedrep", (2, 1), participation=participation)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("head_steps: 1", (1, 2)),
        ("body_steps: 2", (1, 2)),
        ("head_steps: 5, body_steps: 4", (5, 4)),
        ("head_steps: 5, body_steps: 20", (5, 20)),
    ],
)
def test_given_steps_are_taken_and_a_missing_number_is_the_rest(options, steps):
    check(f"{{name: fedrep, {options}}}", steps)


def test_a_client_may_predict_with_its_own_copy_of_the_body():
    """The last of its own local updates, before any averaging."""
    method = "{name: fedrep, personal_model: local}"
    before, after = (quadratics.run(method, rounds, TWO_PARTS) for rounds in (3, 4))
    (*_, at), heads = quadratics.partly_by_hand(before, HEAD, phases_of(2, 1), by_size=False)
    found = quadratics.personal_params(after)
    for m, y in enumerate(quadratics.optima(after)):
        start = np.where(HEAD, heads[m], at)
        gradient = lambda t, y=y: quadratics.mixed_gradient(t, y)  # noqa: E731
        np.testing.assert_allclose(found[m], phases_of(2, 1)(start, gradient), atol=1e-8)
    shared = quadratics.personal_params(quadratics.run("fedrep", 4, TWO_PARTS))
    assert quadratics.change(found, shared) > 0.1
    new = quadratics.personal_params(quadratics.as_new_clients(after))
    np.testing.assert_array_equal(
        new[:, BODY], np.tile(quadratics.global_params(after)[BODY], (2, 1))
    )


def test_bodies_may_count_by_their_examples():
    check("{name: fedrep, aggregation: sample_size}", (2, 1), by_size=True)
    runs = [
        quadratics.run(f"{{name: fedrep, aggregation: {how}}}", 1, TWO_PARTS)
        for how in ("uniform", "sample_size")
    ]
    one, other = (quadratics.global_params(r) for r in runs)
    assert np.abs(one - other).max() > 0.1 * np.abs(one).max()


def test_many_head_steps_end_at_the_best_head_of_the_body_as_received():
    """Collins et al.'s argmin: h = a_h (y - A_b b) / |a_h|^2, with a_h the head's column."""
    finished = quadratics.run("{name: fedrep, head_steps: 100, body_steps: 1}", 1, TWO_PARTS)
    rest_MK = quadratics.optima(finished) - MIX[:, BODY] @ quadratics.BEGIN[BODY]
    column_K = MIX[:, HEAD][:, 0]
    expected = rest_MK @ column_K / (column_K @ column_K)
    heads = quadratics.personal_params(finished)[:, HEAD][:, 0]
    np.testing.assert_allclose(heads, expected, atol=1e-8)


def test_one_client_alone_descends_by_blocks_to_its_optimum():
    alone = ("data={name: gaussian, num_clients: 1, num_examples: [8], dimension: 3}",)
    finished = quadratics.run("fedrep", 100, (*TWO_PARTS, *alone, "training.num_local_steps=6"))
    (y,) = quadratics.optima(finished)
    expected = np.linalg.solve(MIX, y)
    np.testing.assert_allclose(quadratics.personal_params(finished)[0], expected, atol=1e-6)


def test_without_numbers_the_phases_share_all_and_the_head_has_the_odd_step():
    steps = torch.tensor([1, 2, 7, 20])
    head, body = FedRepConfig().split(steps)
    assert head.tolist() == [1, 1, 4, 10]
    assert body.tolist() == [0, 1, 3, 10]
    assert torch.equal(head + body, steps)


def test_a_round_in_epochs_is_shared_client_by_client():
    settings = (*(s for s in harness.DIGITS if "steps" not in s), "training.num_local_epochs=3")
    steps = [
        harness.finish(harness.prepared_with(method, settings)).records[-1].gradient_steps
        for method in ("fedrep", "fedavg")
    ]
    assert steps[0] == steps[1]


def test_the_two_phases_see_different_batches():
    """With equal ones the second phase would be trained on what the head has just fitted."""
    prepared = harness.prepared_with("{name: fedrep, head_steps: 4, body_steps: 4}")
    host = harness.open_pool(prepared).transport._hosts[0]
    stack = host._stack([0], prepared.plans[0])
    head_P = prepared.federation.spec.mask(["output"])
    plan = phases(FedRepConfig(head_steps=4, body_steps=4), stack, head_P)
    first, second = (plan_batches(stack, p.stream, p.steps_C).index_CSB for p in plan)
    assert plan[0].stream == "train"
    assert not torch.equal(first, second)


def test_clients_whose_round_is_too_short_are_told_of():
    settings = (
        "data={name: gaussian, num_clients: 2, num_examples: [8, 200], dimension: 3}",
        "model=two_parts",
        "training.num_local_epochs=1",
        "training.batch_size=64",
    )
    cautions = harness.prepared_with("fedrep", settings).algorithm.cautions
    assert cautions == ("the rounds of 1 of 2 clients are too short for a step of the body",)
    assert not harness.prepared_with("fedrep").algorithm.cautions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("head_steps: 0", "method.head_steps must be >= 1, got 0; null takes"),
        ("body_steps: -2", "method.body_steps must be >= 1, got -2; null takes"),
        ("head_steps: 4", r"method.head_steps \(4\) leaves the body none of a round's 4 steps"),
        (
            "body_steps: 9",
            r"method.body_steps \(9\) leaves the head none of .* give method.head_st",
        ),
        ("head_layers: 3", "method.head_layers must lie in 0 .. 2"),
        ("aggregation: mean", "method.aggregation must be 'uniform' or 'sample_size', got 'mean'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        harness.prepared_with(f"{{name: fedrep, {options}}}")


def test_the_options_of_both_parents_are_there():
    assert issubclass(FedRepConfig, PhasedConfig)
    assert FedRepConfig().fine_tune is None
