"""What a server optimizer is: pure functions over the global model and its own memory.

The difference of the clients' mean to the global model is taken as the step that one SGD iteration
of rate 1 on the server would make (a pseudo-gradient with its sign turned): D = mean - x.
Source: Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selffl_ray.errors import ConfigError
from selffl_ray.flat import FlatParams


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """init: global model -> memory. step: (global model, mean, memory) -> (global model, memory).

    The model and the mean are (P,) in the model's precision; the memory is a NamedTuple of tensors.
    """

    init: Callable[[FlatParams], Any]
    step: Callable[[FlatParams, FlatParams, Any], tuple[FlatParams, Any]]


class Moments(NamedTuple):
    """Running mean of the differences and of their squares: (P,) each."""

    first_P: Tensor
    second_P: Tensor


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """Options of the adaptive server optimizers."""

    learning_rate: float = 0.03
    """Server rate, > 0; usual values 0.003 to 0.3: about how far a coordinate moves a round."""
    momentum: float = 0.9
    """Memory of the mean difference, in [0, 1)."""
    second_momentum: float = 0.99
    """Memory of the mean squared difference, in [0, 1)."""
    floor: float = 1e-3
    """Added to the root of the mean square (tau), > 0: the degree of adaptivity."""

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_memory("momentum", self.momentum)
        check_memory("second_momentum", self.second_momentum)
        check_positive("floor", self.floor)


def adaptive(config: AdaptiveConfig, second: Callable[[Tensor, Tensor], Tensor]) -> ServerOptimizer:
    """X <- x + eta m / (sqrt(v) + tau) with m <- b1 m + (1 - b1) D, without bias correction.

    Args:
        second: (v, D^2) -> the next v, each (P,).
    """

    def init(params_P: FlatParams) -> Moments:
        # v starts at tau^2, the smallest start that the source allows: the first steps are finite.
        return Moments(torch.zeros_like(params_P), torch.full_like(params_P, config.floor**2))

    def step(
        params_P: FlatParams, mean_P: FlatParams, memory: Moments
    ) -> tuple[FlatParams, Moments]:
        moved_P = mean_P - params_P
        first_P = config.momentum * memory.first_P + (1 - config.momentum) * moved_P
        second_P = second(memory.second_P, moved_P.square())
        step_P = first_P / (second_P.sqrt() + config.floor)
        return params_P + config.learning_rate * step_P, Moments(first_P, second_P)

    return ServerOptimizer(init=init, step=step)


def check_positive(name: str, value: float) -> None:
    """Refuse an option that is not a finite number above 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"method.server.{name} must be > 0, got {value}")


def check_memory(name: str, value: float) -> None:
    """Refuse a memory outside of [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"method.server.{name} must lie in [0, 1), got {value}")
