"""Convolutional network: convolutions with ReLU and max-pooling, then dense layers.

The defaults are the network usual in federated averaging on 28x28 images (McMahan et al. 2017, in
the form without padding): 32 and 64 channels of 5x5, 2x2 pooling after each, 512 hidden units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selffl_ray.errors import ConfigError
from selffl_ray.flat import FlatParams
from selffl_ray.models.base import Leaves, Model, refuse_tokens
from selffl_ray.models.convolutions import check_convolutions, conv_spec
from selffl_ray.models.mlp import dense_init, dense_stack
from selffl_ray.registry import register_model
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class CNNConfig:
    """Options of ``model: {name: cnn}``."""

    channels: tuple[int, ...] = (32, 64)
    """Output channels of each convolution."""
    kernel: int = 5
    """Side of the square kernels."""
    stride: int = 1
    padding: int = 0
    pool: int = 2
    """Side of the max-pooling after each convolution; 1 is none."""
    hidden: tuple[int, ...] = (512,)
    """Units of the dense layers before the output."""

    def __post_init__(self) -> None:
        check_convolutions(self)


@register_model("cnn", CNNConfig)
def cnn(config: CNNConfig, shape: DataShape) -> Model:
    """Layers ``conv0``, ..., ``hidden0``, ..., ``output``.

    A stack is one grouped convolution. On a CPU rows go one by one, which is faster there.
    """
    refuse_tokens("cnn", shape)
    features, convs = _conv_shapes(config, shape)
    widths = (features, *config.hidden, shape.num_outputs)
    spec = conv_spec(convs, [w[:1] for w in convs], widths)

    def apply(leaves: Leaves, x: Tensor) -> Tensor:
        rows, batch = x.shape[:2]
        hidden = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        for index in range(0, 2 * len(convs), 2):
            weight, bias = leaves[index].flatten(0, 1), leaves[index + 1].flatten()
            weight = weight.contiguous(memory_format=torch.channels_last)
            hidden = F.conv2d(
                hidden, weight, bias, stride=config.stride, padding=config.padding, groups=rows
            )
            # The ReLU comes last: the same numbers, from a quarter of the work.
            hidden = _max_pool(hidden, config.pool).relu()
        flat = hidden.reshape(batch, rows, -1).transpose(0, 1)
        return dense_stack(leaves[2 * len(convs) :], flat)

    def init(rng: np.random.Generator) -> FlatParams:
        params: list[Tensor] = []
        for weight in convs:
            scale = math.sqrt(2.0 / math.prod(weight[1:]))
            drawn = torch.from_numpy(rng.normal(scale=scale, size=weight))
            params += [drawn, torch.zeros(weight[0])]
        return spec.flatten(params + dense_init(rng, widths))

    return Model(spec, shape, apply, init, stacks_on_cpu=False)


def _max_pool(x: Tensor, pool: int) -> Tensor:
    """``F.max_pool2d``, on a CPU with channels last inside."""
    if pool == 1:
        return x
    if x.device.type != "cpu":
        return F.max_pool2d(x, pool)
    pooled: Tensor = _MaxPool.apply(x, pool)  # type: ignore[no-untyped-call]
    return pooled


class _MaxPool(torch.autograd.Function):
    """torch's pooling takes 12 times as long where channels do not come last in memory.

    So they lie behind a convolution of one input channel, whatever its input was said to be.
    Outputs and gradients get the layout that torch would have given them, for on it depends which
    kernels the convolutions take, and so their last bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: int) -> Tensor:
        last = x.contiguous(memory_format=torch.channels_last)
        pooled, places = torch.ops.aten.max_pool2d_with_indices(last, [pool, pool])
        ctx.save_for_backward(last, places)
        ctx.pool = pool
        was_last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if was_last else torch.contiguous_format
        laid: Tensor = pooled.contiguous(memory_format=ctx.layout)
        return laid

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        last, places = ctx.saved_tensors
        size = [ctx.pool, ctx.pool]
        spread: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            grad.contiguous(memory_format=torch.channels_last),
            *(last, size, size, [0, 0], [1, 1], False, places),
        )
        return spread.contiguous(memory_format=ctx.layout), None


def _conv_shapes(config: CNNConfig, shape: DataShape) -> tuple[int, list[tuple[int, ...]]]:
    """Features after the last convolution, and the weight shape of each."""
    if len(shape.input_shape) != 3:
        raise ConfigError(
            f"model.name cnn needs images (channels, height, width), but the examples have shape "
            f"{shape.input_shape}; use mlp or linear"
        )
    channels, *sides = shape.input_shape
    weights: list[tuple[int, ...]] = []
    for index, out in enumerate(config.channels):
        weights.append((out, channels, config.kernel, config.kernel))
        sides = [(s + 2 * config.padding - config.kernel) // config.stride + 1 for s in sides]
        sides = [s // config.pool for s in sides]
        if min(sides) < 1:
            raise ConfigError(
                f"model.channels: nothing is left of {shape.input_shape} images after convolution "
                f"{index} (kernel {config.kernel}, stride {config.stride}, pool {config.pool}); "
                "use fewer or smaller ones, or padding"
            )
        channels = out
    return channels * math.prod(sides), weights
