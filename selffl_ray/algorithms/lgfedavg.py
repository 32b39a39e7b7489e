"""LG-FedAvg: the early layers stay at the clients, the late ones are averaged.

Source: Liang et al. 2020, "Think locally, act globally: federated learning with local and global
representations", Algorithm 1. Client: all layers trained together from (own early layers, shared
late layers). Server: the mean of the late layers by number of examples. The personalized model is
the client's own early layers under the newest shared ones: FedPer turned round.

Deviations: the published script goes on from a trained FedAvg model and picks each client's best
round by test accuracy. Here training begins at the common start (``training.start_from`` gives it a
trained one, whose rounds then cost what they cost), and nothing is picked on test data.

Options: ``shared_layers`` (1; the paper's 1 or 2), ``fine_tune`` (of the own early layers),
``personal_model``, ``server``. All layers shared is FedAvg, none is local training; both are said
as a caution.

Cost: a gradient a step. Traffic: the late layers, both ways: usually the least of all methods.
State: the early layers. Metrics: the common ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from selffl_ray.algorithms.base import Algorithm, Federation
from selffl_ray.algorithms.partial import PartialConfig, last_layers, partly_shared
from selffl_ray.registry import register_algorithm
from selffl_ray.training import local_sgd


@dataclass(frozen=True, kw_only=True)
class LGFedAvgConfig(PartialConfig):
    """Options of ``method: lgfedavg``."""

    shared_layers: int = 1
    """Layers that are averaged, counted from the output; all earlier ones stay at the clients."""


@register_algorithm("lgfedavg", LGFedAvgConfig)
def lgfedavg(config: LGFedAvgConfig, federation: Federation) -> Algorithm:
    """Own early layers under shared last ones, trained together."""
    late_P = last_layers(federation.spec, config.shared_layers, "shared_layers")
    return partly_shared(
        config, federation, ~late_P, lambda stack, start_CP: local_sgd(stack, start=start_CP)
    )
