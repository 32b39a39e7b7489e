"""FedAvg: local SGD from the global model, averaged by number of examples.

Source: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
data", Algorithm 1. y <- x; K times y <- y - eta g(y); x <- sum_i (n_i / n) y_i over the clients
that answered. The personalized model is the global one.

Options: none. Metrics: the common ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from selffl_ray.algorithms.base import (
    NOTHING,
    Algorithm,
    Empty,
    Federation,
    Local,
    Mean,
    Record,
    Reports,
    Sums,
    Traffic,
)
from selffl_ray.flat import FlatParams
from selffl_ray.participation import RoundPlan
from selffl_ray.registry import register_algorithm
from selffl_ray.training import Stack, local_sgd


@dataclass(frozen=True, kw_only=True)
class FedAvgConfig:
    """``method: fedavg`` has no options."""


class Global(NamedTuple):
    """Server state and broadcast: the global model (P,)."""

    params_P: Tensor


class Upload(NamedTuple):
    """Payload: trained models (C, P)."""

    params_CP: Tensor


@register_algorithm("fedavg", FedAvgConfig)
def fedavg(config: FedAvgConfig, federation: Federation) -> Algorithm:
    """Local SGD from the global model, averaged by number of examples."""
    size = federation.spec.num_params

    def local_update(shared: Global, per_client: Empty, state: Empty, stack: Stack) -> Local:
        trained = local_sgd(stack, start=shared.params_P)
        upload = Upload(trained.params_CP)
        return Local(state, upload, Empty(), trained.loss_C, trained.num_steps_C)

    return Algorithm(
        init=Global,
        broadcast=share_params,
        local_update=local_update,
        reductions=(Mean(uploaded),),
        aggregate=take_the_mean,
        traffic=lambda plan: Traffic(size, size),
    )


def share_params(server: Any, plan: RoundPlan) -> tuple[Global, Empty]:
    """Everybody gets the global model."""
    return Global(server[0]), Empty()


def uploaded(payload: Upload) -> Tensor:
    """The trained models."""
    return payload.params_CP


def take_the_mean(server: Global, sums: Sums, reports: Reports) -> tuple[Global, Record]:
    """The first reduction becomes the global model."""
    mean_P: FlatParams = sums[0].to(server.params_P.dtype)
    return Global(mean_P), NOTHING
