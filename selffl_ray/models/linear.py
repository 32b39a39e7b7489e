"""Linear model: logistic regression, or with one constant input a free vector of parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from selffl_ray.flat import FlatParams, ParamSpec
from selffl_ray.models.base import Leaves, Model, refuse_tokens
from selffl_ray.registry import register_model
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Options of ``model: {name: linear}``."""

    bias: bool = True
    """Add a free constant to every output."""

    dtype: Literal["float32", "float64"] = "float32"
    """``float64`` for checks against closed forms."""


@register_model("linear", LinearConfig)
def linear(config: LinearConfig, shape: DataShape) -> Model:
    """Outputs = x W (+ b), weights stored (inputs, outputs). Starts at 0: the problem is convex."""
    refuse_tokens("linear", shape)
    inputs = math.prod(shape.input_shape)
    names: tuple[str, ...] = ("output.weight", "output.bias")
    shapes: tuple[tuple[int, ...], ...] = ((inputs, shape.num_outputs), (shape.num_outputs,))
    if not config.bias:
        names, shapes = names[:1], shapes[:1]
    spec = ParamSpec(names, shapes, getattr(torch, config.dtype))

    def apply(leaves: Leaves, x: Tensor) -> Tensor:
        flat = x.flatten(2).to(leaves[0].dtype)
        if config.bias:
            return torch.baddbmm(leaves[1].unsqueeze(1), flat, leaves[0])
        return torch.bmm(flat, leaves[0])

    def init(rng: np.random.Generator) -> FlatParams:
        return torch.zeros(spec.num_params, dtype=spec.dtype)

    return Model(spec, shape, apply, init)
