"""Multi-layer perceptron with ReLU, one batched matrix product a layer for a whole stack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from selffl_ray.errors import ConfigError
from selffl_ray.flat import FlatParams, ParamSpec
from selffl_ray.models.base import Leaves, Model, PullBack, refuse_tokens
from selffl_ray.registry import register_model
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Options of ``model: {name: mlp}``."""

    hidden: tuple[int, ...] = (64,)
    """Units of each hidden layer."""

    def __post_init__(self) -> None:
        if any(units < 1 for units in self.hidden):
            raise ConfigError(f"model.hidden must hold positive numbers, got {list(self.hidden)}")


@register_model("mlp", MLPConfig)
def mlp(config: MLPConfig, shape: DataShape) -> Model:
    """Layers ``hidden0``, ``hidden1``, ..., ``output``; weights are stored (inputs, outputs).

    Start: weights N(0, 2 / inputs) before a ReLU and N(0, 1 / inputs) in the last layer, biases 0.
    Source: He et al. 2015, "Delving deep into rectifiers".
    """
    refuse_tokens("mlp", shape)
    widths = (math.prod(shape.input_shape), *config.hidden, shape.num_outputs)
    names = [*(f"hidden{i}" for i in range(len(config.hidden))), "output"]
    spec = dense_spec(names, widths)

    def apply(leaves: Leaves, x: Tensor) -> Tensor:
        return dense_stack(leaves, x.flatten(2))

    def forward(leaves: Leaves, x: Tensor) -> tuple[Tensor, PullBack]:
        return dense_forward(leaves, x.flatten(2))

    def init(rng: np.random.Generator) -> FlatParams:
        return spec.flatten(dense_init(rng, widths))

    # A product of one row or column takes another kernel by how its result lies in memory.
    has_own = min(widths) > 1
    return Model(spec, shape, apply, init, forward=forward if has_own else None)


def dense_spec(names: list[str], widths: tuple[int, ...]) -> ParamSpec:
    """Weight and bias of each dense layer, in order."""
    pairs = list(pairwise(widths))
    return ParamSpec(
        tuple(f"{name}.{part}" for name in names for part in ("weight", "bias")),
        tuple(shape for i, o in pairs for shape in ((i, o), (o,))),
    )


def dense_stack(leaves: Leaves, hidden: Tensor) -> Tensor:
    """Dense layers with ReLU between them: (C, B, inputs) -> (C, B, outputs)."""
    return dense_forward(leaves, hidden)[0]


def dense_forward(leaves: Leaves, x: Tensor) -> tuple[Tensor, PullBack]:
    """:func:`dense_stack` with a backward pass of its own: the same bits in less time.

    The products are those of automatic differentiation, but each is written straight to where the
    gradient shall stand.

    Args:
        x: (C, B, inputs).

    Returns:
        Outputs (C, B, K), and the way back.
    """
    weights, biases = leaves[0::2], leaves[1::2]
    inputs: list[Tensor] = []
    hidden = x
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if index:
            hidden = hidden.relu()
        inputs.append(hidden)
        hidden = torch.baddbmm(bias.unsqueeze(1), hidden, weight)

    def pull_back(grad: Tensor, out: Leaves) -> None:
        for index in reversed(range(len(weights))):
            torch.bmm(inputs[index].transpose(1, 2), grad, out=out[2 * index])
            torch.sum(grad, 1, out=out[2 * index + 1])
            if index:
                grad = grad.bmm(weights[index].transpose(1, 2))
                # What a ReLU stopped gets 0. Autograd's own kernel, 18 times as fast as `where`; it
                # stops what is <= 0, so NaN goes through.
                grad = torch.ops.aten.threshold_backward(grad, inputs[index], 0)

    return hidden, pull_back


def dense_init(rng: np.random.Generator, widths: tuple[int, ...]) -> list[Tensor]:
    """He weights, a quieter last layer, zero biases."""
    params = []
    for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
        gain = 1.0 if index == len(widths) - 2 else 2.0
        weight = rng.normal(scale=math.sqrt(gain / fan_in), size=(fan_in, fan_out))
        params += [torch.from_numpy(weight), torch.zeros(fan_out)]
    return params
