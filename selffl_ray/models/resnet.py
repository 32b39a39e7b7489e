"""Residual network for small images: a convolution, stages of two-convolution blocks, a mean.

He et al. 2016, "Deep residual learning for image recognition", section 4.2: with ``blocks`` n it
has 6n + 2 layers, 20 as it stands. Two deviations. GroupNorm stands in place of BatchNorm: a
client's batch statistics are neither parameters nor shared, and with skewed labels they cost
accuracy (Hsieh et al. 2020, "The non-IID data quagmire of decentralized machine learning", section
5). And where a block changes its shape, a 1x1 convolution with a norm is the shortcut (their option
B), not zeros.

A module of torch, lifted to stacks (``selffl_ray.models.base.lift``); on a CPU rows go one by one,
which is faster there. A batch of 32 images of 28x28 takes about 6 GFLOP forward and backward.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from selffl_ray.errors import ConfigError
from selffl_ray.models.base import Model, lift, refuse_tokens
from selffl_ray.registry import register_model
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Options of ``model: {name: resnet}``."""

    channels: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage; every stage but the first halves the sides of the image."""
    blocks: int = 3
    """Blocks of each stage, two convolutions each."""
    groups: int = 8
    """Groups of channels that are normalised together; divides all channels."""

    def __post_init__(self) -> None:
        if not self.channels or any(c < 1 for c in self.channels):
            raise ConfigError(
                f"model.channels needs at least one positive number, got {list(self.channels)}"
            )
        if self.blocks < 1:
            raise ConfigError(f"model.blocks must be >= 1, got {self.blocks}")
        if self.groups < 1 or any(c % self.groups for c in self.channels):
            raise ConfigError(
                f"model.groups must divide each of model.channels {list(self.channels)}, got "
                f"{self.groups}"
            )


@register_model("resnet", ResNetConfig)
def resnet(config: ResNetConfig, shape: DataShape) -> Model:
    """Layers ``stem``, ``stem_norm``, ``stages.0.0.conv1``, ..., ``output``."""
    refuse_tokens("resnet", shape)
    if len(shape.input_shape) != 3:
        raise ConfigError(
            f"model.name resnet needs images (channels, height, width), but the examples have "
            f"shape {shape.input_shape}; use mlp, cnn1d or linear"
        )
    lifted = lift(lambda: ResNet(config, shape), shape)
    return dataclasses.replace(lifted, stacks_on_cpu=False)


class ResNet(nn.Module):
    """The network of one client: (B, channels, height, width) -> (B, K)."""

    def __init__(self, config: ResNetConfig, shape: DataShape) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.stem = _convolution(shape.input_shape[0], first, 3)
        self.stem_norm = nn.GroupNorm(config.groups, first)
        widths = [first, *config.channels]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    _Block(before, width, 2 if stage else 1, config.groups),
                    *(_Block(width, width, 1, config.groups) for _ in range(config.blocks - 1)),
                )
                for stage, (before, width) in enumerate(pairwise(widths))
            )
        )
        self.output = nn.Linear(last, shape.num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of a batch."""
        hidden = self.stages(F.relu(self.stem_norm(self.stem(x))))
        outputs: Tensor = self.output(hidden.mean((2, 3)))
        return outputs


class _Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, before: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = _convolution(before, width, 3, stride)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = _convolution(width, width, 3)
        self.norm2 = nn.GroupNorm(groups, width)
        self.shortcut: nn.Sequential | None = None
        if stride > 1 or before != width:
            self.shortcut = nn.Sequential(
                _convolution(before, width, 1, stride), nn.GroupNorm(groups, width)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + (x if self.shortcut is None else self.shortcut(x)))


def _convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Without a bias, which the norm behind it would take out; the start is He et al. 2015's."""
    layer = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
