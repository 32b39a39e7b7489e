"""Text network: embedding, one convolution over time, pooling, dense layers.

With ``pool: mean`` or ``max`` it classifies texts (Kim 2014, "Convolutional neural networks for
sentence classification", with one width); with ``last`` it predicts the next token from the last
``kernel`` ones (Bengio et al. 2003, "A neural probabilistic language model"). There is no
recurrence: a stack is a few batched matrix products.

Token 0 is padding. Its vector is 0 and never trained, and a window that starts at padding does not
count, so outputs do not depend on how far a text was padded, in front or behind.

Shape letters: C clients of a stack, B examples, L tokens, V vocabulary, E of an embedding, W width
of the convolution, H its outputs.
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
from selffl_ray.flat import FlatParams, ParamSpec
from selffl_ray.models.base import Leaves, Model
from selffl_ray.models.cnn1d import conv_over_time
from selffl_ray.models.mlp import dense_init, dense_spec, dense_stack
from selffl_ray.registry import register_model
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class TextCNNConfig:
    """Options of ``model: {name: textcnn}``."""

    embedding: int = 16
    """Coordinates of a token's vector."""
    kernel: int = 3
    """Tokens that a window of the convolution covers."""
    channels: int = 64
    """Outputs of the convolution."""
    pool: Literal["mean", "max", "last"] = "mean"
    """Of the windows of a text: their mean, their maximum, or the last window only."""
    hidden: tuple[int, ...] = ()
    """Units of the dense layers before the output."""

    def __post_init__(self) -> None:
        for field in ("embedding", "kernel", "channels"):
            if getattr(self, field) < 1:
                raise ConfigError(f"model.{field} must be >= 1, got {getattr(self, field)}")
        if any(units < 1 for units in self.hidden):
            raise ConfigError(f"model.hidden must hold positive numbers, got {list(self.hidden)}")


@register_model("textcnn", TextCNNConfig)
def textcnn(config: TextCNNConfig, shape: DataShape) -> Model:
    """Layers ``embedding``, ``conv``, ``hidden0``, ..., ``output``, for token inputs.

    Start: embeddings N(0, 1), the convolution N(0, 2 / inputs), dense layers as in ``mlp``.
    """
    num_tokens = _vocabulary(config, shape)
    inputs = config.kernel * config.embedding
    widths = (config.channels, *config.hidden, shape.num_outputs)
    dense = dense_spec([*(f"hidden{i}" for i in range(len(config.hidden))), "output"], widths)
    spec = ParamSpec(
        ("embedding.weight", "conv.weight", "conv.bias", *dense.names),
        ((num_tokens, config.embedding), (inputs, config.channels), (config.channels,),
         *dense.shapes),
    )  # fmt: skip

    def apply(leaves: Leaves, x: Tensor) -> Tensor:
        last = config.pool == "last"
        tokens_CBL = x[..., -config.kernel :] if last else F.pad(x, (0, config.kernel - 1))
        vectors_CBLE = _look_up(leaves[0], tokens_CBL)
        found_CBLH = conv_over_time(vectors_CBLE, leaves[1], leaves[2]).relu()
        pooled = found_CBLH[:, :, 0] if last else _pool(config.pool, found_CBLH, x != 0)
        return dense_stack(leaves[3:], pooled)

    def init(rng: np.random.Generator) -> FlatParams:
        vectors = rng.standard_normal((num_tokens, config.embedding))
        weight = rng.normal(scale=math.sqrt(2.0 / inputs), size=(inputs, config.channels))
        first = [torch.from_numpy(vectors), torch.from_numpy(weight), torch.zeros(config.channels)]
        return spec.flatten(first + dense_init(rng, widths))

    return Model(spec, shape, apply, init)


def _vocabulary(config: TextCNNConfig, shape: DataShape) -> int:
    if shape.num_tokens is None or len(shape.input_shape) != 1:
        raise ConfigError(
            "model.name textcnn needs a row of tokens, but the examples are features of shape "
            f"{shape.input_shape}; use mlp, cnn or linear"
        )
    if config.pool == "last" and shape.input_shape[0] < config.kernel:
        raise ConfigError(
            f"model.kernel: the last {config.kernel} tokens are asked for, but the examples have "
            f"{shape.input_shape[0]}; lower it"
        )
    return shape.num_tokens


def _look_up(weight_CVE: Tensor, tokens_CBL: Tensor) -> Tensor:
    """Vectors of the tokens, each row in its own table; 0 for padding."""
    rows, size = weight_CVE.shape[:2]
    first = size * torch.arange(rows, device=tokens_CBL.device).view(-1, 1, 1)
    vectors = F.embedding(tokens_CBL + first, weight_CVE.flatten(0, 1))
    return vectors * (tokens_CBL != 0).unsqueeze(-1)


def _pool(how: str, found_CBLH: Tensor, counts_CBL: Tensor) -> Tensor:
    """Over the windows that count; 0 if a text has none."""
    kept = found_CBLH * counts_CBL.unsqueeze(-1)
    if how == "max":
        return kept.amax(2)  # after a ReLU, so that 0 of a window that does not count is no more
    return kept.sum(2) / counts_CBL.sum(2, keepdim=True).clamp(min=1)
