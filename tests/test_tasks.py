"""Losses and scores of the two tasks against a hand's arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selffl_ray.tasks import CLASSIFICATION, REGRESSION


def test_classification_is_cross_entropy_and_the_share_of_right_answers():
    # One client with two examples, another with two: logits of three classes.
    outputs = torch.tensor(
        [[[0.0, math.log(2), 0.0], [0.0, 0.0, 0.0]], [[5.0, 0.0, 1.0], [math.log(6), 0.0, 0.0]]]
    )
    y = torch.tensor([[1, 0], [2, 0]])
    loss = CLASSIFICATION.loss(outputs, y)
    far = math.log(math.exp(5) + 1 + math.e) - 1
    expected = torch.tensor([[math.log(2), math.log(3)], [far, math.log(8 / 6)]])
    torch.testing.assert_close(loss, expected)
    for role in ("global", "local"):
        score = CLASSIFICATION.score(outputs, y, role)
        assert score.tolist() == [[1.0, 1.0], [0.0, 1.0]]
        assert score.dtype == outputs.dtype
    assert CLASSIFICATION.score_name == "accuracy"
    assert CLASSIFICATION.higher_is_better
    assert not CLASSIFICATION.roles_differ


@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 40), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-3, 1.0, 50.0, 1e30]),
    broken=st.sampled_from([None, math.nan, math.inf, -math.inf]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_gradient_of_the_weighted_cross_entropy_has_the_bits_of_autograd(
    shape, dtype, scale, broken, seed
):
    num_clients, length, num_classes = shape
    rng = np.random.default_rng(seed)
    outputs = torch.from_numpy(rng.normal(scale=scale, size=shape)).to(dtype)
    if broken is not None:
        outputs[0, 0, num_classes // 2] = broken
    y = torch.from_numpy(rng.integers(num_classes, size=shape[:2]))
    # As of a batch of which the last examples are padding: a step's slice of the plan of all steps.
    weight = torch.full((num_clients, 3, length), 1 / length, dtype=dtype)[:, 1]
    weight[:, length // 2 + 1 :] = 0.0
    loss_C, grad = CLASSIFICATION.loss_and_grad(outputs, y, weight)
    assert not grad.requires_grad
    leaf = outputs.clone().requires_grad_()
    expected_C = (CLASSIFICATION.loss(leaf, y) * weight).sum(1)
    (expected,) = torch.autograd.grad(expected_C.sum(), leaf)
    # Bytes: NaN too, and the sign of zero.
    assert loss_C.numpy().tobytes() == expected_C.detach().numpy().tobytes()
    assert grad.numpy().tobytes() == expected.numpy().tobytes()


def regression_example() -> tuple[Tensor, Tensor]:
    """Outputs (1, 2, 2) and targets (1, 2, role, target or weight, 2)."""
    outputs = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]], dtype=torch.float64)
    by_global = [[[0.0, 0.0], [1.0, 10.0]], [[3.0, 1.0], [0.5, 0.0]]]
    by_client = [[[4.0, 2.5], [2.0, 4.0]], [[1.0, 1.0], [3.0, 0.25]]]
    y = torch.tensor([by_global, by_client], dtype=torch.float64).transpose(0, 1)
    return outputs, y.unsqueeze(0)


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        # 1 * 1 + 10 * 4; 0.5 * 9 + 0 * 4
        ("global", [41.0, 4.5]),
        # 2 * 9 + 4 * 0.25; 3 * 1 + 0.25 * 4
        ("local", [19.0, 4.0]),
    ],
)
def test_regression_is_judged_by_weighted_squares_against_the_truth_of_its_role(role, expected):
    outputs, y = regression_example()
    assert REGRESSION.score(outputs, y, role).tolist() == [expected]


def test_regression_trains_on_half_the_clients_own_weighted_squares():
    outputs, y = regression_example()
    assert REGRESSION.loss(outputs, y).tolist() == [[9.5, 2.0]]
    assert REGRESSION.score_name == "mse"
    assert not REGRESSION.higher_is_better
    assert REGRESSION.roles_differ


def test_the_curvature_of_the_regression_loss_is_the_weight():
    outputs, y = regression_example()
    outputs.requires_grad_()
    (grad,) = torch.autograd.grad(REGRESSION.loss(outputs, y).sum(), outputs, create_graph=True)
    torch.testing.assert_close(grad, y[..., 1, 1, :] * (outputs - y[..., 1, 0, :]))
    (curvature,) = torch.autograd.grad(grad.sum(), outputs)
    torch.testing.assert_close(curvature, y[..., 1, 1, :])
