"""FedAdam: Adam on the server.

Source: Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2.
v <- b2 v + (1 - b2) D^2.
"""

from __future__ import annotations

from selffl_ray.algorithms.server.base import AdaptiveConfig, ServerOptimizer, adaptive
from selffl_ray.registry import register_server_optimizer


@register_server_optimizer("fedadam", AdaptiveConfig)
def fedadam(config: AdaptiveConfig) -> ServerOptimizer:
    """Adam over rounds."""
    memory = config.second_momentum
    return adaptive(config, lambda v_P, square_P: memory * v_P + (1 - memory) * square_P)
