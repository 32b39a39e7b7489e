"""Outputs and gradients of the rows of a stack, with the same bits at any height of the stack.

Where a client is placed decides how many rows stand beside it. Its numbers must not: every shape
that a row's arithmetic sees may depend on that row and on run-wide constants only. Batched matrix
products keep that promise for most shapes, some kernels only from two rows on, some not at all.
Instead of trusting a list, :class:`RowEngine` tries each new shape once, with made-up numbers, at
the heights 1, 2, 4 and 5, and then runs that shape as it must be run.

Shape letters: C clients of a stack, P parameters, B examples of a batch, K outputs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selffl_ray.models.base import Model
from selffl_ray.numerics import be_exact
from selffl_ray.seeding import generator
from selffl_ray.tasks import Task


class Height(enum.Enum):
    """How a shape must be run so that a row's bits do not depend on its neighbours."""

    ANY = "any height"
    PAIR = "at least two rows: a single one gets a copy of itself beside it"
    ONE = "one row at a time"


class _Loss(NamedTuple):
    """A number for every row, (C,), from the outputs; and with the gradient of their sum."""

    value: Callable[[Tensor], Tensor]
    with_grad: Callable[[Tensor], tuple[Tensor, Tensor]]


class RowEngine:
    """Applies one model to stacks on one device.

    On a CPU, rows have the same bits at any height. On a GPU stacks run as they come: libraries
    choose kernels by size there, and equality holds within rounding only. An engine for a GPU
    switches TF32 off and deterministic kernels on in its process.
    """

    def __init__(self, model: Model, task: Task, device: torch.device) -> None:
        self.model = model
        self.task = task
        self.device = device
        if device.type != "cpu":
            be_exact()
        self._forward = model.forward
        self._heights: dict[tuple[int, ...], Height] = {}

    def outputs(self, theta_CP: Tensor, x_CB: Tensor) -> Tensor:
        """Outputs of every row on its own inputs: (C, B, K), without a graph.

        A single row of parameters, (1, P) against (C, B, ...), serves all rows of inputs.
        """
        rows = x_CB.shape[0]
        theta = theta_CP.expand(rows, -1)
        with torch.no_grad():
            parts = [
                self.model.apply(self.model.spec.views(theta[pick]), x_CB[pick])
                for pick in self._picks(x_CB.shape[1:], rows)
            ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]

    def loss_and_grad(
        self,
        theta_CP: Tensor,
        x_CB: Tensor,
        y_CB: Tensor,
        weight_CB: Tensor,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss and its gradient for every row.

        Args:
            weight_CB: (C, B) weight of each example, 0 for padding; a row's sum is 1 for a mean.
            out: (C, P) to write the gradient into.

        Returns:
            loss_C, sum over the batch of weight * loss; grad_CP. The sum of the rows' losses is
            differentiated once: rows share no parameter, so row c of the gradient is row c's own.
        """
        rows = theta_CP.shape[0]
        grad_CP = theta_CP.new_empty(theta_CP.shape) if out is None else out
        losses = []
        for pick in self._picks(x_CB.shape[1:], rows):
            examples = (self.task, y_CB[pick], weight_CB[pick])
            loss = _Loss(partial(_weighed, *examples), partial(_weighed_and_grad, *examples))
            place = grad_CP[pick if isinstance(pick, slice) else slice(0, rows)]
            theta = theta_CP[pick]
            # The copy beside a single row has no place in what was asked for.
            room = place if len(place) == len(theta) else torch.empty_like(theta)
            loss_C = self._differentiate(theta, x_CB[pick], loss, room)
            if room is not place:
                place.copy_(room[: len(place)])
            losses.append(loss_C[:rows])
        return (losses[0] if len(losses) == 1 else torch.cat(losses)), grad_CP

    @torch.enable_grad()
    def _differentiate(self, theta_CP: Tensor, x_CB: Tensor, loss: _Loss, out_CP: Tensor) -> Tensor:
        """The loss of every row, (C,); the gradient of their sum goes into ``out_CP``."""
        spec, forward = self.model.spec, self._forward
        if forward is None:
            leaves = tuple(view.detach().requires_grad_() for view in spec.views(theta_CP))
            loss_C = loss.value(self.model.apply(leaves, x_CB))
            grads = torch.autograd.grad(loss_C.sum(), leaves, materialize_grads=True)
            for view, grad in zip(spec.views(out_CP), grads, strict=True):
                view.copy_(grad)
            return loss_C.detach()
        with torch.no_grad():
            outputs, pull_back = forward(spec.views(theta_CP), x_CB)
        loss_C, grad_CBK = loss.with_grad(outputs)
        with torch.no_grad():
            pull_back(grad_CBK, spec.views(out_CP))
        return loss_C

    def _picks(self, batch_shape: Sequence[int], rows: int) -> list[slice | Tensor]:
        """Rows that are run together, one entry after the other."""
        height = self._height(tuple(batch_shape))
        if height is Height.ONE and rows > 1:
            return [slice(row, row + 1) for row in range(rows)]
        if height is Height.PAIR and rows == 1:
            return [torch.zeros(2, dtype=torch.int64, device=self.device)]
        return [slice(None)]

    def _height(self, batch_shape: tuple[int, ...]) -> Height:
        if self.device.type != "cpu":
            return Height.ANY
        if not self.model.stacks_on_cpu:
            return Height.ONE
        if batch_shape not in self._heights:
            self._heights[batch_shape] = self._try_heights(batch_shape)
        return self._heights[batch_shape]

    def _try_heights(self, batch_shape: tuple[int, ...]) -> Height:
        """Compare rows alone, beside a copy, and among several, on made-up numbers.

        The last row is compared too, at an odd and at an even height: elementwise functions such as
        tanh take whole vectors of numbers, and the rest at the end by another formula.
        """
        rng = generator(0, "row heights")
        spec, shape = self.model.spec, self.model.shape
        theta_CP = torch.from_numpy(rng.normal(scale=0.1, size=(5, spec.num_params)))
        theta_CP = theta_CP.to(spec.dtype)
        x_CB = _made_up_inputs(rng, (5, *batch_shape), shape.num_tokens)
        pull_CBK = torch.from_numpy(rng.normal(size=(5, batch_shape[0], shape.num_outputs)))

        def rows(pick: list[int]) -> list[Tensor]:
            seen: list[Tensor] = []

            def pull(outputs: Tensor) -> Tensor:
                seen.append(outputs.detach())
                return (outputs * pull_CBK[pick].to(outputs.dtype)).sum((1, 2))

            grad_CP = torch.empty_like(theta_CP[pick])
            loss = _Loss(pull, partial(_with_grad, pull))
            self._differentiate(theta_CP[pick], x_CB[pick], loss, grad_CP)
            return [*seen, grad_CP]

        alone, pair, four, five = rows([0]), rows([0, 4]), rows([4, 3, 1, 0]), rows([0, 1, 2, 3, 4])

        def same(one: list[Tensor], at: int, other: list[Tensor], there: int) -> bool:
            return all(torch.equal(a[at], b[there]) for a, b in zip(one, other, strict=True))

        first = same(pair, 0, five, 0) and same(pair, 0, four, 3)
        if not (first and same(pair, 1, five, 4) and same(pair, 1, four, 0)):
            return Height.ONE
        return Height.ANY if same(alone, 0, pair, 0) else Height.PAIR


def _weighed(task: Task, y_CB: Tensor, weight_CB: Tensor, outputs_CBK: Tensor) -> Tensor:
    """Weighted sum of the examples' losses: (C,)."""
    return (task.loss(outputs_CBK, y_CB) * weight_CB).sum(1)


def _weighed_and_grad(
    task: Task, y_CB: Tensor, weight_CB: Tensor, outputs_CBK: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and the gradient of the sum over rows with respect to the outputs: (C, B, K)."""
    if task.loss_and_grad is not None:
        return task.loss_and_grad(outputs_CBK, y_CB, weight_CB)
    return _with_grad(partial(_weighed, task, y_CB, weight_CB), outputs_CBK)


def _with_grad(loss: Callable[[Tensor], Tensor], outputs_CBK: Tensor) -> tuple[Tensor, Tensor]:
    """By automatic differentiation, which has to be on; the outputs become a leaf of its graph."""
    loss_C = loss(outputs_CBK.requires_grad_())
    (grad_CBK,) = torch.autograd.grad(loss_C.sum(), outputs_CBK)
    return loss_C.detach(), grad_CBK


def _made_up_inputs(
    rng: np.random.Generator, shape: tuple[int, ...], num_tokens: int | None
) -> Tensor:
    if num_tokens is not None:
        return torch.from_numpy(rng.integers(num_tokens, size=shape))
    return torch.from_numpy(rng.normal(size=shape)).to(torch.float32)
