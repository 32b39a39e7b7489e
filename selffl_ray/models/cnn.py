"""Convolutional network: convolutions with ReLU and max-pooling, then dense layers.

The defaults are the network usual in federated averaging on 28x28 images (McMahan et al. 2017, in
the form without padding): 32 and 64 channels of 5x5, 2x2 pooling after each, 512 hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selffl_ray.errors import ConfigError
from selffl_ray.flat import FlatParams
from selffl_ray.models.base import Leaves, Model, PullBack, refuse_tokens
from selffl_ray.models.convolutions import check_convolutions, conv_spec
from selffl_ray.models.mlp import dense_forward, dense_init, dense_stack
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

    layer = _ConvLayer(config)

    def apply(leaves: Leaves, x: Tensor) -> Tensor:
        rows, batch = x.shape[:2]
        hidden = _as_channels(x)
        for index in range(0, 2 * len(convs), 2):
            kernel = _kernel(leaves[index])
            hidden = layer.convolve(hidden, kernel, leaves[index + 1]).relu()
            if config.pool > 1:
                hidden = F.max_pool2d(hidden, config.pool)
        flat = hidden.reshape(batch, rows, -1).transpose(0, 1)
        return dense_stack(leaves[2 * len(convs) :], flat)

    def init(rng: np.random.Generator) -> FlatParams:
        params: list[Tensor] = []
        for weight in convs:
            scale = math.sqrt(2.0 / math.prod(weight[1:]))
            drawn = torch.from_numpy(rng.normal(scale=scale, size=weight))
            params += [drawn, torch.zeros(weight[0])]
        return spec.flatten(params + dense_init(rng, widths))

    # Of a single channel or unit, which kernel is taken depends on how a result lies in memory.
    has_own = min(*widths, *config.channels) > 1
    forward = partial(_forward, layer) if has_own else None
    return Model(spec, shape, apply, init, stacks_on_cpu=False, forward=forward)


def _forward(layer: _ConvLayer, leaves: Leaves, x: Tensor) -> tuple[Tensor, PullBack]:
    """What ``apply`` gives, and the way back through all layers."""
    rows, batch = x.shape[:2]
    num = 2 * len(layer.config.channels)
    hidden = _as_channels(x)
    backs = []
    for index in range(0, num, 2):
        hidden, back = layer.forward(hidden, leaves[index], leaves[index + 1])
        backs.append(back)
    shape = hidden.shape
    flat = hidden.reshape(batch, rows, -1).transpose(0, 1)
    outputs, dense_back = dense_forward(leaves[num:], flat)

    def pull_back(grad: Tensor, out: Leaves) -> None:
        grad = dense_back(grad, out[num:]).bmm(leaves[num].transpose(1, 2))
        grad = grad.transpose(0, 1).reshape(shape)
        for index in reversed(range(0, num, 2)):
            grad = backs[index // 2](grad, out[index], out[index + 1], index > 0)

    return outputs, pull_back


def _as_channels(x: Tensor) -> Tensor:
    """(C, B, channels, ...) to (B, C * channels, ...), channels last in memory."""
    return x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _kernel(weight: Tensor) -> Tensor:
    """(C, out, in, k, k) to (C * out, in, k, k), channels last in memory."""
    return weight.flatten(0, 1).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class _ConvLayer:
    """Convolution, ReLU and pooling of a stack."""

    config: CNNConfig

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """One grouped convolution: (B, C * in, ...) to (B, C * out, ...), biases (C, out)."""
        return F.conv2d(
            x,
            kernel,
            bias.flatten(),
            stride=self.config.stride,
            padding=self.config.padding,
            groups=len(bias),
        )

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, _ConvBack]:
        """The layer's outputs, and the way back: the same bits as automatic differentiation.

        The ReLU comes after the pooling, which gives the same numbers from a quarter of the work,
        and the pooling compares whole slices: torch's takes longer than the convolution before it.
        """
        config = self.config
        kernel = _kernel(weight)
        summed = self.convolve(x, kernel, bias)
        pooled, wins = _max_pool(summed, config.pool)
        hidden = pooled.relu_()

        def back(grad: Tensor, weight_out: Tensor, bias_out: Tensor, wanted: bool) -> Tensor:
            grad = grad.contiguous(memory_format=torch.channels_last)
            grad = torch.ops.aten.threshold_backward(grad, hidden, 0)
            grad = _spread(grad, wins, config.pool, summed)
            grad_x: Tensor
            grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad,
                x,
                kernel,
                [bias.numel()],
                [config.stride] * 2,
                [config.padding] * 2,
                [1, 1],
                False,
                [0, 0],
                len(weight),
                [wanted, True, True],
            )
            weight_out.copy_(grad_weight.view_as(weight_out))
            bias_out.copy_(grad_bias.view_as(bias_out))
            return grad_x if wanted else grad

        return hidden, back


_ConvBack = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(gradient of a layer's outputs, where to write those of weight and bias, whether the one of the
inputs is wanted) to the latter; what it gives else is of no use."""


def _slices(x: Tensor, pool: int) -> list[Tensor]:
    """The numbers of each window, by their place in it: views of (B, channels, sides / pool)."""
    height, width = (side // pool * pool for side in x.shape[2:])
    cut = x[:, :, :height, :width]
    return [cut[:, :, row::pool, column::pool] for row in range(pool) for column in range(pool)]


def _max_pool(x: Tensor, pool: int) -> tuple[Tensor, list[Tensor]]:
    """The largest number of each window, and for each place but the first who wins it.

    These are whole integers: all bits set where the number at that place is larger than those at
    all places before it. The last such place is the winner's; of equal (finite) ones it is the
    first, as torch has it. They are sign bits of differences: comparisons take twice as long.
    """
    first, *others = _slices(x, pool)
    largest = first.clone()
    wins = []
    for candidate in others:
        wins.append(torch.sub(largest, candidate).view(torch.int32).bitwise_right_shift_(31))
        torch.maximum(largest, candidate, out=largest)
    return largest, wins


def _spread(grad: Tensor, wins: list[Tensor], pool: int, like: Tensor) -> Tensor:
    """The way back through :func:`_max_pool`: all of a gradient goes to its window's winner.

    ``grad`` and ``wins`` are used up.
    """
    out = torch.empty_like(like)
    if any(side % pool for side in like.shape[2:]):
        out.zero_()
    first, *others = (place.view(torch.int32) for place in _slices(out, pool))
    # Bits, not products: what does not win gets 0, and never -0 or NaN.
    rest = grad.view(torch.int32)
    for place, win in zip(reversed(others), reversed(wins), strict=True):
        won = win.bitwise_and_(rest)
        place.copy_(won)
        rest.bitwise_xor_(won)
    first.copy_(rest)
    return out


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
