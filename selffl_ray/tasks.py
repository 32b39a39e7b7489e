"""What is predicted and how a prediction is judged: classification, or regression with a truth.

Shape letters: C clients of a stack, B examples of a batch, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_EACH = 0
"""ATen's number for a loss without reduction."""
_NO_CLASS = -100
"""The class that ATen's loss leaves out; ours are >= 0."""

Role = Literal["global", "local"]
"""Which model is judged: the server's, or the one a client predicts with."""


@dataclass(frozen=True)
class DataShape:
    """What a model must accept and return.

    input_shape is that of one example; num_tokens is the size of the vocabulary if the inputs are
    token indices (int64) and None if they are float32 features; num_outputs is K.
    """

    input_shape: tuple[int, ...]
    num_outputs: int
    num_tokens: int | None = None


@dataclass(frozen=True)
class Task:
    """A loss to train on and a score to report, both one number an example.

    loss: (outputs_CBK, y_CB...) -> (C, B).
    score: (outputs_CBK, y_CB..., role) -> (C, B), whose mean over examples is the metric.
    score_name: the metric's name, as in ``test/global_<score_name>``.
    roles_differ: the global model is judged by another truth than the clients' models.
    loss_and_grad: (outputs_CBK, y_CB..., weight_CB) -> (C,) sums of weight * loss, and the gradient
        of their sum, (C, B, K), bit for bit as automatic differentiation gives them; weights have
        the outputs' type. None leaves it to automatic differentiation.
    """

    score_name: str
    higher_is_better: bool
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor, Role], Tensor]
    roles_differ: bool = False
    loss_and_grad: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def _cross_entropy(outputs_CBK: Tensor, y_CB: Tensor) -> Tensor:
    flat = F.cross_entropy(outputs_CBK.flatten(0, 1), y_CB.flatten(), reduction="none")
    return flat.view(y_CB.shape)


def _cross_entropy_and_grad(
    outputs_CBK: Tensor, y_CB: Tensor, weight_CB: Tensor
) -> tuple[Tensor, Tensor]:
    # The kernels that automatic differentiation calls, without its graph: 0.08 ms instead of 0.14
    # of a step of six rows, which takes 2 ms.
    aten = torch.ops.aten
    outputs, y = outputs_CBK.flatten(0, 1), y_CB.flatten()
    log_p = aten._log_softmax.default(outputs, 1, False)
    loss, total = aten.nll_loss_forward.default(log_p, y, None, _EACH, _NO_CLASS)
    grad = aten.nll_loss_backward.default(
        weight_CB.flatten(), log_p, y, None, _EACH, _NO_CLASS, total
    )
    grad = aten._log_softmax_backward_data.default(grad, log_p, 1, outputs.dtype)
    return (loss.view(y_CB.shape) * weight_CB).sum(1), grad.view(outputs_CBK.shape)


def _correct(outputs_CBK: Tensor, y_CB: Tensor, role: Role) -> Tensor:
    return (outputs_CBK.argmax(-1) == y_CB).to(outputs_CBK.dtype)


CLASSIFICATION = Task(
    "accuracy", True, _cross_entropy, _correct, loss_and_grad=_cross_entropy_and_grad
)
"""y: (C, B) int64 class indices; the score is 1 for a correct prediction."""


def _half_squared_error(outputs_CBK: Tensor, y_CBRTK: Tensor) -> Tensor:
    target, weight = y_CBRTK[..., 1, 0, :], y_CBRTK[..., 1, 1, :]
    return 0.5 * ((outputs_CBK - target).square() * weight).sum(-1)


def _squared_error(outputs_CBK: Tensor, y_CBRTK: Tensor, role: Role) -> Tensor:
    at = 1 if role == "local" else 0
    target, weight = y_CBRTK[..., at, 0, :], y_CBRTK[..., at, 1, :]
    return ((outputs_CBK - target).square() * weight).sum(-1)


REGRESSION = Task("mse", False, _half_squared_error, _squared_error, roles_differ=True)
"""y: (C, B, 2, 2, K). First the role (0: what the global model is judged by, 1: the client's own),
then target and weight of each output. Training uses the client's own with loss
1/2 sum_k weight_k (output_k - target_k)**2, whose curvature in the outputs is the weight."""
