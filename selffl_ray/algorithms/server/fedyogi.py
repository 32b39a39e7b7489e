"""FedYogi: Yogi on the server, whose mean square falls more slowly than Adam's.

Source: Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2.
v <- v - (1 - b2) D^2 sign(v - D^2).
"""

from __future__ import annotations

from selffl_ray.algorithms.server.base import AdaptiveConfig, ServerOptimizer, adaptive
from selffl_ray.registry import register_server_optimizer


@register_server_optimizer("fedyogi", AdaptiveConfig)
def fedyogi(config: AdaptiveConfig) -> ServerOptimizer:
    """Yogi over rounds."""
    share = 1 - config.second_momentum
    return adaptive(config, lambda v_P, square_P: v_P - share * square_P * (v_P - square_P).sign())
