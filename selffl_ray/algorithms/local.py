"""Local training only: every client trains by itself and never sends anything.

The reference that personalization must beat. The global model, for comparison only, is the uniform
mean of the models of all clients that have trained; it is not sent to anybody.

Options: none. Metrics: the common ones; bytes are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selffl_ray.algorithms.base import (
    NOTHING,
    Algorithm,
    Empty,
    Federation,
    Local,
    Personal,
    Record,
    Reports,
    Sums,
    Total,
    Traffic,
    Weights,
    at_no_cost,
)
from selffl_ray.algorithms.fedavg import share_params
from selffl_ray.flat import FlatParams
from selffl_ray.registry import register_algorithm
from selffl_ray.training import Stack, local_sgd


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """``method: local`` has no options."""


class Server(NamedTuple):
    """The mean of the clients' models (P,), and who has trained: (M,) bool."""

    mean_P: Tensor
    seen_M: Tensor


class Own(NamedTuple):
    """State: each client's own model (C, P)."""

    params_CP: Tensor


@register_algorithm("local", LocalConfig)
def local(config: LocalConfig, federation: Federation) -> Algorithm:
    """Every client trains alone; nothing is shared."""

    def init(params_P: FlatParams) -> Server:
        return Server(params_P, torch.zeros(federation.num_clients, dtype=torch.bool))

    def local_update(shared: object, per_client: Empty, state: Own, stack: Stack) -> Local:
        trained = local_sgd(stack, start=state.params_CP)
        own = Own(trained.params_CP)
        return Local(own, Empty(), Empty(), trained.loss_C, trained.num_steps_C)

    def weigh(server: Server, reports: Reports, sums: Sums) -> tuple[Server, Weights]:
        seen_M = server.seen_M.clone()
        seen_M[torch.from_numpy(reports.client_index)] = True
        index = np.flatnonzero(seen_M.numpy())
        weights = Weights(index, np.full(len(index), 1.0 / len(index)))
        return Server(server.mean_P, seen_M), weights

    def aggregate(server: Server, sums: Sums, reports: Reports) -> tuple[Server, Record]:
        return Server(sums[0].to(server.mean_P.dtype), server.seen_M), NOTHING

    return Algorithm(
        init=init,
        broadcast=share_params,
        local_update=local_update,
        reductions=(Total(lambda state: state.params_CP, weigh, of="state"),),
        aggregate=aggregate,
        init_client=own_start,
        personalize=predict_with_own,
        traffic=lambda plan: Traffic(0, 0),
    )


def own_start(params_P: FlatParams, num_clients: int) -> Own:
    """Every client's own model starts at the common start."""
    return Own(params_P.expand(num_clients, -1))


def predict_with_own(shared: Any, per_client: Any, state: Own, stack: Stack) -> Personal:
    """The client predicts with its own model as it is."""
    return at_no_cost(state.params_CP)
