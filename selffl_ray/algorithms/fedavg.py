"""FedAvg: local SGD from the global model, averaged by number of examples.

Source: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
data", Algorithm 1. y <- x; K times y <- y - eta g(y); x <- sum_i (n_i / n) y_i over the clients
that answered. The personalized model is the global one.

Options: ``server`` replaces the last step by a server optimizer (``fedavgm``, ``fedadam``,
``fedyogi``); every method that averages models has this option. Metrics: the common ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

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
from selffl_ray.algorithms.server.base import ServerOptimizer
from selffl_ray.flat import FlatParams
from selffl_ray.participation import RoundPlan
from selffl_ray.registry import Component, register_algorithm, server_optimizers
from selffl_ray.training import Stack, local_sgd


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """Options of every method whose server averages models."""

    server: Annotated[Component, server_optimizers] = Component("mean")
    """What becomes of the mean: mean, fedavgm, fedadam or fedyogi, with their own options."""


@dataclass(frozen=True, kw_only=True)
class FedAvgConfig(AveragingConfig):
    """Options of ``method: fedavg``."""


class Server(NamedTuple):
    """The global model (P,), and the memory of the server optimizer."""

    params_P: Tensor
    memory: Any


class Global(NamedTuple):
    """Broadcast: the global model (P,)."""

    params_P: Tensor


class Upload(NamedTuple):
    """Payload: trained models (C, P)."""

    params_CP: Tensor


@register_algorithm("fedavg", FedAvgConfig)
def fedavg(config: AveragingConfig, federation: Federation) -> Algorithm:
    """Local SGD from the global model, averaged by number of examples."""
    size = federation.spec.num_params
    optimizer: ServerOptimizer = server_optimizers.make(config.server)

    def local_update(shared: Global, per_client: Empty, state: Empty, stack: Stack) -> Local:
        trained = local_sgd(stack, start=shared.params_P)
        upload = Upload(trained.params_CP)
        return Local(state, upload, Empty(), trained.loss_C, trained.num_steps_C)

    return Algorithm(
        init=lambda params_P: Server(params_P, optimizer.init(params_P)),
        broadcast=share_params,
        local_update=local_update,
        reductions=(Mean(uploaded),),
        aggregate=average_with(optimizer),
        traffic=lambda plan: Traffic(size, size),
    )


def share_params(server: Any, plan: RoundPlan) -> tuple[Global, Empty]:
    """Everybody gets the global model."""
    return Global(server[0]), Empty()


def uploaded(payload: Upload) -> Tensor:
    """The trained models."""
    return payload.params_CP


def average_with(
    optimizer: ServerOptimizer, trainable: Tensor | None = None
) -> Callable[[Server, Sums, Reports], tuple[Server, Record]]:
    """The aggregation that makes a step of a server optimizer of the first reduction.

    Args:
        trainable: (P,) bool; the other coordinates of the global model never change. All by
            default.
    """

    def aggregate(server: Server, sums: Sums, reports: Reports) -> tuple[Server, Record]:
        mean_P: FlatParams = sums[0].to(server.params_P.dtype)
        if trainable is not None:
            mean_P = mean_P.where(trainable, server.params_P)
        params_P, memory = optimizer.step(server.params_P, mean_P, server.memory)
        return Server(params_P, memory), NOTHING

    return aggregate
