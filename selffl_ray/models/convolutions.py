"""What the models with convolutions before dense layers share: their options' rules and layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from selffl_ray.errors import ConfigError
from selffl_ray.flat import ParamSpec
from selffl_ray.models.mlp import dense_spec

Shape = tuple[int, ...]


class Convolutions(Protocol):
    """Options of such a model."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of each convolution."""

    @property
    def hidden(self) -> tuple[int, ...]:
        """Units of the dense layers before the output."""


def check_convolutions(config: Convolutions) -> None:
    """Whether there are convolutions, and whether sizes are positive.

    Raises:
        ConfigError: naming the option.
    """
    for field, least in (("kernel", 1), ("stride", 1), ("pool", 1), ("padding", 0)):
        if getattr(config, field) < least:
            raise ConfigError(f"model.{field} must be >= {least}, got {getattr(config, field)}")
    if not config.channels or any(c < 1 for c in (*config.channels, *config.hidden)):
        raise ConfigError(
            "model.channels needs at least one positive number and model.hidden positive "
            f"ones, got {list(config.channels)} and {list(config.hidden)}"
        )


def conv_spec(weights: Sequence[Shape], biases: Sequence[Shape], widths: Shape) -> ParamSpec:
    """Layers ``conv0``, ..., ``hidden0``, ..., ``output``, weight and bias of each.

    Args:
        weights, biases: shapes of the convolutions; widths: of the dense layers, inputs first.
    """
    dense = dense_spec([*(f"hidden{i}" for i in range(len(widths) - 2)), "output"], widths)
    names = tuple(f"conv{i}.{part}" for i in range(len(weights)) for part in ("weight", "bias"))
    shapes = tuple(shape for pair in zip(weights, biases, strict=True) for shape in pair)
    return ParamSpec((*names, *dense.names), (*shapes, *dense.shapes))
