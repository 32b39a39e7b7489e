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
from collections.abc import Sequence

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
        spec, rows = self.model.spec, theta_CP.shape[0]
        grad_CP = theta_CP.new_empty(theta_CP.shape) if out is None else out
        losses = []
        for pick in self._picks(x_CB.shape[1:], rows):
            leaves = tuple(v.detach().requires_grad_() for v in spec.views(theta_CP[pick]))
            loss_CB = self.task.loss(self.model.apply(leaves, x_CB[pick]), y_CB[pick])
            loss_C = (loss_CB * weight_CB[pick]).sum(1)
            grads = torch.autograd.grad(loss_C.sum(), leaves, materialize_grads=True)
            place = pick if isinstance(pick, slice) else slice(0, rows)
            for view, grad in zip(spec.views(grad_CP[place]), grads, strict=True):
                view.copy_(grad[: view.shape[0]])
            losses.append(loss_C.detach()[:rows])
        return (losses[0] if len(losses) == 1 else torch.cat(losses)), grad_CP

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

    @torch.enable_grad()
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
            leaves = tuple(v.detach().requires_grad_() for v in spec.views(theta_CP[pick]))
            outputs = self.model.apply(leaves, x_CB[pick])
            pull = (outputs * pull_CBK[pick].to(outputs.dtype)).sum()
            grads = torch.autograd.grad(pull, leaves, materialize_grads=True)
            return [outputs.detach(), *grads]

        alone, pair, four, five = rows([0]), rows([0, 4]), rows([4, 3, 1, 0]), rows([0, 1, 2, 3, 4])

        def same(one: list[Tensor], at: int, other: list[Tensor], there: int) -> bool:
            return all(torch.equal(a[at], b[there]) for a, b in zip(one, other, strict=True))

        first = same(pair, 0, five, 0) and same(pair, 0, four, 3)
        if not (first and same(pair, 1, five, 4) and same(pair, 1, four, 0)):
            return Height.ONE
        return Height.ANY if same(alone, 0, pair, 0) else Height.PAIR


def _made_up_inputs(
    rng: np.random.Generator, shape: tuple[int, ...], num_tokens: int | None
) -> Tensor:
    if num_tokens is not None:
        return torch.from_numpy(rng.integers(num_tokens, size=shape))
    return torch.from_numpy(rng.normal(size=shape)).to(torch.float32)
