"""Ditto: beside FedAvg, each client trains a model of its own that is pulled to the global one.

Source: Li et al. 2021, "Ditto: fair and robust federated learning through personalization",
Algorithm 1. In a round the client gets x and does two things with the same batches:

- y <- x; K times y <- y - eta g(y). The server takes the mean of the y: FedAvg, bit for bit.
- s times v <- v - rho eta (g(v) + lambda (v - x)). The anchor is the model received this round, not
  the client's y. v stays at the client and goes on from there when the client next takes part.

The personalized model is v, or with ``tail_average`` the mean of the second half of the iterates of
the client's last round. That mean is kept beside v for predictions only: training goes on from the
last iterate, so ``tail_average`` changes no v.

Fixed points on quadratics of curvature 1 with optima y_m: x = sum_m (n_m / n) y_m and
v_m = (y_m + lambda x) / (1 + lambda).

Deviations: all v start at the common start of the global model; lambda is one for all, not chosen
by client. A client that never took part, new ones among them, is evaluated with a v that starts
from the global model instead: a few steps from the common start would not say much.

Options: ``pull`` (lambda; 0.05 to 2), ``personal_steps`` (s; K by default), ``personal_rate`` (rho;
1 by default), ``tail_average``, ``server`` as in FedAvg. Cost: 2 gradients a step (K + s a round);
1 model down and up; state 1 model, 2 with ``tail_average``. Metrics: the common ones; the training
loss is that of the global track.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selffl_ray.algorithms.base import Algorithm, Empty, Federation, Local, Personal, at_no_cost
from selffl_ray.algorithms.fedavg import AveragingConfig, Global, fedavg
from selffl_ray.algorithms.fedprox import check_pull, pull_cautions
from selffl_ray.algorithms.local import Own
from selffl_ray.errors import ConfigError
from selffl_ray.flat import FlatParams
from selffl_ray.registry import register_algorithm
from selffl_ray.training import Stack, Trained, local_sgd, observe_tail, start_tail, tail_mean


@dataclass(frozen=True, kw_only=True)
class DittoConfig(AveragingConfig):
    """Options of ``method: ditto``."""

    pull: float = 0.1
    """Lambda, the strength of the pull of a client's own model to the global one, >= 0; usual
    values 0.05 to 2."""
    personal_steps: int | None = None
    """SGD steps of the own model a round, >= 1; the training's if not given."""
    personal_rate: float = 1.0
    """Learning rate of the own model over the training rate of the round, > 0."""
    tail_average: bool = False
    """Predict with the mean of the second half of the own model's iterates of a round."""

    def __post_init__(self) -> None:
        check_pull("pull", self.pull)
        if self.personal_steps is not None and self.personal_steps < 1:
            raise ConfigError(
                f"method.personal_steps must be >= 1, got {self.personal_steps}; null takes the "
                "training's steps"
            )
        if not 0 < self.personal_rate < math.inf:
            raise ConfigError(
                f"method.personal_rate must be > 0, got {self.personal_rate}; 1 is the training "
                "rate"
            )


class OwnAndTail(NamedTuple):
    """State: a client's own model, and the mean of its last iterates, each (C, P)."""

    params_CP: Tensor
    tail_CP: Tensor


@register_algorithm("ditto", DittoConfig, changeable=("pull", "personal_rate"))
def ditto(config: DittoConfig, federation: Federation) -> Algorithm:
    """FedAvg, and beside it an own model of each client that is pulled to the global one."""
    plain = fedavg(config, federation)

    def keep(trained: Trained) -> Own | OwnAndTail:
        if not config.tail_average:
            return Own(trained.params_CP)
        return OwnAndTail(trained.params_CP, tail_mean(trained.seen, trained.num_steps_C))

    def local_update(shared: Global, per_client: Any, state: Own, stack: Stack) -> Local:
        common = plain.local_update(shared, per_client, Empty(), stack)
        own = train_own(config, stack, state.params_CP, shared.params_P)
        return common._replace(state=keep(own), gradients_C=common.gradients_C + own.num_steps_C)

    def init_client(params_P: FlatParams, count: int) -> Own | OwnAndTail:
        rows_CP = params_P.expand(count, -1)
        return OwnAndTail(rows_CP, rows_CP) if config.tail_average else Own(rows_CP)

    def personalize(shared: Global, per_client: Any, state: Any, stack: Stack) -> Personal:
        params_CP = state.tail_CP if config.tail_average else state.params_CP
        return at_no_cost(params_CP)

    rate = config.personal_rate * federation.training.learning_rate
    void = "pull is 0: the clients' own models are those of local training"
    return replace(
        plain,
        local_update=local_update,
        init_client=init_client,
        personalize=personalize,
        adapt=lambda shared, per_client, state, stack: keep(
            train_own(config, stack, shared.params_P, shared.params_P)
        ),
        cautions=pull_cautions("pull", config.pull, rate) if config.pull else (void,),
    )


def train_own(config: DittoConfig, stack: Stack, start: Tensor, anchor_P: FlatParams) -> Trained:
    """The steps of the clients' own models, on the batches of the training.

    Args:
        start: (P,) for all, or (C, P); not changed.
    """
    steps_C = stack.num_steps_C
    if config.personal_steps is not None:
        steps_C = torch.full_like(steps_C, config.personal_steps)
    return local_sgd(
        stack,
        start=start,
        steps_C=steps_C,
        rate_C=config.personal_rate * stack.learning_rate,
        extra_grad=lambda theta_AP, active: (theta_AP - anchor_P).mul_(config.pull),
        observe=observe_tail if config.tail_average else None,
        seen=start_tail(start, stack.num_clients) if config.tail_average else None,
    )
