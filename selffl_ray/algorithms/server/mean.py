"""The mean is the next global model: FedAvg's own rule, and the default."""

from __future__ import annotations

from dataclasses import dataclass

from selffl_ray.algorithms.base import Empty
from selffl_ray.algorithms.server.base import ServerOptimizer
from selffl_ray.registry import register_server_optimizer


@dataclass(frozen=True, kw_only=True)
class MeanConfig:
    """``server: mean`` has no options."""


@register_server_optimizer("mean", MeanConfig)
def mean(config: MeanConfig) -> ServerOptimizer:
    """The mean becomes the global model (the default)."""
    return ServerOptimizer(
        init=lambda params_P: Empty(),
        step=lambda params_P, mean_P, memory: (mean_P, memory),
    )
