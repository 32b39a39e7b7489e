"""FedPer: the last layers stay at the clients; the whole model is trained together.

Source: Arivazhagan et al. 2019, "Federated learning with personalization layers", Algorithms 1
and 2. Client: theta = (shared body, own head); K times theta <- theta - eta g(theta). Server: the
mean of the bodies by number of examples. The personalized model is the newest shared body with the
client's own head.

Deviations: the paper starts every client's head at its own random values; here all start from one
model, as the other methods do. For the global model, new clients and bytes see ``partial.py``.

Options: ``head_layers`` (1; up to the last few layers), ``fine_tune``, ``personal_model``,
``server``. All layers as head is local training, none is FedAvg; both are said as a caution.

Cost: a gradient a step. Traffic: the body, both ways. State: the head. Metrics: the common ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from selffl_ray.algorithms.base import Algorithm, Federation
from selffl_ray.algorithms.partial import PartialConfig, last_layers, partly_shared
from selffl_ray.registry import register_algorithm
from selffl_ray.training import local_sgd


@dataclass(frozen=True, kw_only=True)
class FedPerConfig(PartialConfig):
    """Options of ``method: fedper``."""

    head_layers: int = 1
    """Layers that stay at the clients, counted from the output."""


@register_algorithm("fedper", FedPerConfig)
def fedper(config: FedPerConfig, federation: Federation) -> Algorithm:
    """Own last layers under a shared body, trained together."""
    head_P = last_layers(federation.spec, config.head_layers, "head_layers")
    return partly_shared(
        config, federation, head_P, lambda stack, start_CP: local_sgd(stack, start=start_CP)
    )
