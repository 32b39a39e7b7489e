"""Convolutional network over time: for motion, log-mel bands and other signals of a few channels.

The last axis of an example is time, what stands before it are the channels of a moment: windows of
the watch data are 6 channels by 100 measurements, log-mel inputs 40 bands by 30 frames. Weights are
shared over time, so a movement is recognised wherever it lies in the window (Zeng et al. 2014,
"Convolutional neural networks for human activity recognition using mobile sensors").

Shape letters: C clients of a stack, B examples, T moments, E channels of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selffl_ray.errors import ConfigError
from selffl_ray.flat import FlatParams
from selffl_ray.models.base import Leaves, Model, channels_by_time, refuse_tokens
from selffl_ray.models.convolutions import check_convolutions, conv_spec
from selffl_ray.models.mlp import dense_init, dense_stack
from selffl_ray.registry import register_model
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class CNN1DConfig:
    """Options of ``model: {name: cnn1d}``."""

    channels: tuple[int, ...] = (32, 64)
    """Output channels of each convolution."""
    kernel: int = 5
    """Moments that a window of a convolution covers."""
    stride: int = 1
    padding: int = 0
    """Moments of zeros before the first and after the last, at every convolution."""
    pool: int = 2
    """Moments that max-pooling after each convolution makes one; 1 is none."""
    readout: Literal["flatten", "mean", "max"] = "flatten"
    """What the dense layers see of the last convolution: every moment, or over time the mean or
    the maximum of each channel."""
    hidden: tuple[int, ...] = (64,)
    """Units of the dense layers before the output."""

    def __post_init__(self) -> None:
        check_convolutions(self)


@register_model("cnn1d", CNN1DConfig)
def cnn1d(config: CNN1DConfig, shape: DataShape) -> Model:
    """Layers ``conv0``, ..., ``hidden0``, ..., ``output``.

    A convolution is one batched matrix product over the windows of a stack; its weights are stored
    (channel by place in the window, outputs). Start: N(0, 2 / inputs), dense layers as in ``mlp``.
    """
    refuse_tokens("cnn1d", shape)
    features, convs = _conv_shapes(config, shape)
    widths = (features, *config.hidden, shape.num_outputs)
    spec = conv_spec(convs, [w[1:] for w in convs], widths)

    def apply(leaves: Leaves, x: Tensor) -> Tensor:
        hidden_CBTE = x.flatten(2, -2).transpose(2, 3)
        for index in range(0, 2 * len(convs), 2):
            padded = F.pad(hidden_CBTE, (0, 0, config.padding, config.padding))
            found = conv_over_time(padded, leaves[index], leaves[index + 1], stride=config.stride)
            hidden_CBTE = _max_pool(found.relu(), config.pool)
        return dense_stack(leaves[2 * len(convs) :], _read_out(config.readout, hidden_CBTE))

    def init(rng: np.random.Generator) -> FlatParams:
        params: list[Tensor] = []
        for inputs, outputs in convs:
            drawn = rng.normal(scale=math.sqrt(2.0 / inputs), size=(inputs, outputs))
            params += [torch.from_numpy(drawn), torch.zeros(outputs)]
        return spec.flatten(params + dense_init(rng, widths))

    return Model(spec, shape, apply, init)


def conv_over_time(x_CBTE: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1) -> Tensor:
    """Each row's own convolution over time, without padding.

    Args:
        weight: (C, E * kernel, outputs), a channel's places in the window side by side.
        bias: (C, outputs).

    Returns:
        (C, B, windows, outputs).
    """
    kernel = weight.shape[1] // x_CBTE.shape[3]
    windows = x_CBTE.unfold(2, kernel, stride).flatten(3)
    rows, batch, count, inputs = windows.shape
    flat = windows.reshape(rows, batch * count, inputs)
    return torch.baddbmm(bias.unsqueeze(1), flat, weight).view(rows, batch, count, -1)


def _max_pool(x_CBTE: Tensor, size: int) -> Tensor:
    """The maximum of ``size`` moments side by side; a rest at the end is left out."""
    rows, batch, moments, channels = x_CBTE.shape
    count = moments // size
    whole = x_CBTE[:, :, : count * size]
    return whole.reshape(rows, batch, count, size, channels).amax(3)


def _read_out(how: str, x_CBTE: Tensor) -> Tensor:
    if how == "flatten":
        return x_CBTE.flatten(2)
    return x_CBTE.mean(2) if how == "mean" else x_CBTE.amax(2)


def _conv_shapes(config: CNN1DConfig, shape: DataShape) -> tuple[int, list[tuple[int, int]]]:
    """Features that the dense layers get, and (inputs, outputs) of each convolution."""
    channels, moments = channels_by_time("cnn1d", shape)
    weights: list[tuple[int, int]] = []
    for index, out in enumerate(config.channels):
        weights.append((config.kernel * channels, out))
        windows = (moments + 2 * config.padding - config.kernel) // config.stride + 1
        moments, channels = windows // config.pool, out
        if moments < 1:
            raise ConfigError(
                f"model.channels: nothing is left of {shape.input_shape[-1]} moments after "
                f"convolution {index} (kernel {config.kernel}, stride {config.stride}, pool "
                f"{config.pool}); use fewer or smaller ones, or padding"
            )
    return (channels * moments if config.readout == "flatten" else channels), weights
