"""SCAFFOLD: control variates take the drift of unlike clients out of the local steps.

Source: Karimireddy et al. 2020, "SCAFFOLD: stochastic controlled averaging for federated learning",
Algorithm 1 with option II. The server holds x and c, client i holds c_i; all controls start at 0.

- client: y <- x; K times y <- y - eta (g(y) - c_i + c);
  c_i+ = c_i - c + (x - y) / (K eta), the mean of the gradients along the way; sends y - x and
  c_i+ - c_i; keeps c_i+.
- server: x <- x + eta_g mean_S (y - x); c <- c + (s / N) mean_S (c_i+ - c_i), for the s clients
  whose updates were accepted, of N clients in all. Both means are plain, so x goes to the minimiser
  of the plain mean of the clients' losses, and c stays the mean of all c_i.

K is the number of steps of that client and eta the rate of that round: both may differ. In the
first round all controls are 0, and the local steps are FedAvg's. The personalized model is the
global one.

Deviations: none. Momentum, weight decay and clipping are refused: with them (x - y) / (K eta) is no
mean of gradients of the loss any more. There is no choice of server optimizer; the rule is its own.

Options: ``server_rate`` (eta_g; 1, in theory up to the root of the number of participants). Cost:
1 gradient a step; a model and a control, of a model's size each, down and up; state 1 control.
Metrics: the common ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selffl_ray.algorithms.averaging import require_plain_sgd
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
from selffl_ray.errors import ConfigError
from selffl_ray.participation import RoundPlan
from selffl_ray.registry import register_algorithm
from selffl_ray.training import Stack, local_sgd


@dataclass(frozen=True, kw_only=True)
class ScaffoldConfig:
    """Options of ``method: scaffold``."""

    server_rate: float = 1.0
    """How far the global model goes along the mean of the clients' moves, > 0; usually 1."""

    def __post_init__(self) -> None:
        if not 0 < self.server_rate < math.inf:
            raise ConfigError(
                f"method.server_rate must be > 0, got {self.server_rate}; 1 takes the mean model"
            )


class Server(NamedTuple):
    """The global model and the server's control, (P,) each. It is broadcast as it is."""

    params_P: Tensor
    control_P: Tensor


class Control(NamedTuple):
    """State: each client's control (C, P)."""

    control_CP: Tensor


class Moves(NamedTuple):
    """Payload: how far the model and the control went, (C, P) each."""

    delta_CP: Tensor
    control_CP: Tensor


CONTROLS = "its controls are mean gradients of plain SGD"


@register_algorithm("scaffold", ScaffoldConfig)
def scaffold(config: ScaffoldConfig, federation: Federation) -> Algorithm:
    """Averaging with control variates against the drift of unlike clients."""
    require_plain_sgd("scaffold", federation.training, CONTROLS)
    size = federation.spec.num_params

    def broadcast(server: Server, plan: RoundPlan) -> tuple[Server, Empty]:
        return server, Empty()

    def aggregate(server: Server, sums: Sums, reports: Reports) -> tuple[Server, Record]:
        delta_P, control_P = (mean_P.to(server.params_P.dtype) for mean_P in sums)
        share = len(reports.client_index) / federation.num_clients
        params_P = server.params_P + config.server_rate * delta_P
        return Server(params_P, server.control_P + share * control_P), NOTHING

    return Algorithm(
        init=lambda params_P: Server(params_P, torch.zeros_like(params_P)),
        broadcast=broadcast,
        local_update=local_update,
        reductions=(
            Mean(lambda moves: moves.delta_CP, by="uniform"),
            Mean(lambda moves: moves.control_CP, by="uniform"),
        ),
        aggregate=aggregate,
        init_client=lambda params_P, count: Control(torch.zeros_like(params_P).expand(count, -1)),
        traffic=lambda plan: Traffic(2 * size, 2 * size),
    )


def local_update(shared: Server, per_client: Empty, state: Control, stack: Stack) -> Local:
    """Corrected local steps, and the next control of each client."""
    correction_CP = shared.control_P - state.control_CP
    trained = local_sgd(
        stack, start=shared.params_P, extra_grad=lambda theta_AP, active: correction_CP[active]
    )
    delta_CP = trained.params_CP - shared.params_P
    path_C1 = trained.num_steps_C.to(delta_CP).unsqueeze(1) * stack.learning_rate
    # c_i+ - c_i of option II.
    change_CP = -shared.control_P - delta_CP / path_C1
    control = Control(state.control_CP + change_CP)
    moves = Moves(delta_CP, change_CP)
    return Local(control, moves, Empty(), trained.loss_C, trained.num_steps_C)
