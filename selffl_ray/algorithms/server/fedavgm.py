"""FedAvgM: momentum on the server.

Source: Hsu et al. 2019, "Measuring the effects of non-identical data distribution for federated
visual classification", section 4.3. m <- b m + D; x <- x + eta m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selffl_ray.algorithms.server.base import ServerOptimizer, check_memory, check_positive
from selffl_ray.flat import FlatParams
from selffl_ray.registry import register_server_optimizer


@dataclass(frozen=True, kw_only=True)
class FedAvgMConfig:
    """Options of ``server: {name: fedavgm}``."""

    learning_rate: float = 1.0
    """Server rate, > 0; with momentum b the mean moves 1 / (1 - b) times as far in the long run."""
    momentum: float = 0.9
    """Memory of the differences, in [0, 1); 0 and a rate of 1 are FedAvg's own rule."""

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_memory("momentum", self.momentum)


class Velocity(NamedTuple):
    """Sum of the past differences, fading: (P,)."""

    velocity_P: Tensor


@register_server_optimizer("fedavgm", FedAvgMConfig)
def fedavgm(config: FedAvgMConfig) -> ServerOptimizer:
    """Momentum over rounds."""

    def step(
        params_P: FlatParams, mean_P: FlatParams, memory: Velocity
    ) -> tuple[FlatParams, Velocity]:
        velocity_P = config.momentum * memory.velocity_P + (mean_P - params_P)
        return params_P + config.learning_rate * velocity_P, Velocity(velocity_P)

    return ServerOptimizer(init=lambda params_P: Velocity(torch.zeros_like(params_P)), step=step)
