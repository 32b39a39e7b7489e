"""L2GD: local models that are pulled towards their mean at random times (loopless local descent).

Source: Hanzely and Richtarik 2020, "Federated learning of a mixture of global and local models",
Algorithm 1 and section 5. It minimizes sum_i f_i(x_i) + (pull / 2) sum_i |x_i - mean(x)|^2 by
tosses of one coin for all clients, with p the ``communication``:

- with probability 1 - p: x_i <- x_i - e g(x_i), where e is the training rate of the round (the
  source writes e = a / (N (1 - p)) with its own rate a);
- with probability p: x_i <- x_i - t (x_i - mean(x)) with t = e pull (1 - p) / p.

Pulls that follow one another leave the mean as it is, so clients communicate once in a row of them.
A round here is one such communication: A >= 1 pulls to the mean of the last round's models, then
L >= 1 local steps, A and L geometric with means 1 / (1 - p) and 1 / p, the same for all clients
and drawn from the seed. In the first round all models are equal and the pulls do nothing. The
training's number of local steps is made on average: ``communication`` is 1 over it by default (its
mean over the clients if it is counted in epochs).

The global model is the plain mean. The client predicts with its model after one pull to the newest
mean, the iterate that follows. A client that never took part starts at the mean and makes the
training's local steps. Deviations: mini-batch gradients (the source's L2SGD without variance
reduction); momentum, if set, starts anew in each round.

Every client must take part in every round: the mean is that of all models. If clients fail, the
rest goes on with the mean of those that answered, and who was missing is pulled once fewer.

Usual values: pull 0.1 to 1 (large ones personalize less), communication 0.05 to 0.5. A t above 1
would carry models beyond the mean and is refused. Cost: 1 gradient a step, a random number of
steps a round; one model each way; one model of state. Metrics: the common ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from selffl_ray.algorithms.base import (
    Algorithm,
    Empty,
    Federation,
    Local,
    Mean,
    Personal,
    at_no_cost,
)
from selffl_ray.algorithms.fedavg import AveragingConfig, Global, Upload, fedavg, uploaded
from selffl_ray.algorithms.local import Own, own_start
from selffl_ray.errors import ConfigError
from selffl_ray.registry import register_algorithm
from selffl_ray.seeding import generator
from selffl_ray.training import Stack, local_sgd


@dataclass(frozen=True, kw_only=True)
class L2GDConfig:
    """Options of ``method: l2gd``."""

    pull: float = 0.1
    """Weight of the distance to the mean (lambda), > 0; usual values 0.1 to 1."""
    communication: float | None = None
    """Probability of a pull against a local step (p), in (0, 1); 1 / num_local_steps if not
    given."""

    def __post_init__(self) -> None:
        if not 0 < self.pull < math.inf:
            raise ConfigError(f"method.pull must be > 0, got {self.pull}")
        if self.communication is not None and not 0 < self.communication < 1:
            raise ConfigError(
                f"method.communication must lie in (0, 1), got {self.communication}; null makes "
                "the training's local steps on average"
            )


@register_algorithm("l2gd", L2GDConfig)
def l2gd(config: L2GDConfig, federation: Federation) -> Algorithm:
    """Local models, pulled towards their mean at random times; needs every client."""
    probability = _probability(config, federation)
    strength = _strength(config, federation, probability)

    def pulled(state: Own, shared: Global, stack: Stack, times: int) -> Tensor:
        share = 1 - (1 - stack.learning_rate * strength) ** times
        return state.params_CP + share * (shared.params_P - state.params_CP)

    def local_update(shared: Global, per_client: Empty, state: Own, stack: Stack) -> Local:
        num_pulls, num_steps = draw_round(stack.seed, stack.round_index, probability)
        trained = local_sgd(
            stack,
            start=pulled(state, shared, stack, num_pulls),
            steps_C=torch.full((stack.num_clients,), num_steps),
        )
        own, upload = Own(trained.params_CP), Upload(trained.params_CP)
        return Local(own, upload, Empty(), trained.loss_C, trained.num_steps_C)

    def personalize(shared: Global, per_client: Empty, state: Own, stack: Stack) -> Personal:
        after_CP = pulled(state, shared, stack, 1)
        return at_no_cost(after_CP)

    return replace(
        fedavg(AveragingConfig(), federation),
        local_update=local_update,
        reductions=(Mean(uploaded, "uniform"),),
        init_client=own_start,
        personalize=personalize,
        adapt=lambda shared, per_client, state, stack: Own(
            local_sgd(stack, start=shared.params_P).params_CP
        ),
    )


def draw_round(seed: int, round_index: int, probability: float) -> tuple[int, int]:
    """Pulls and local steps of a round, >= 1 each: rows of equal tosses of the coin."""
    rng = generator(seed, "l2gd/steps", round_index)
    return int(rng.geometric(1 - probability)), int(rng.geometric(probability))


def _probability(config: L2GDConfig, federation: Federation) -> float:
    """That of a pull."""
    if config.communication is not None:
        return config.communication
    steps = [federation.training.steps(int(n)) for n in federation.num_examples_M]
    if np.mean(steps) <= 1:
        raise ConfigError(
            "method.communication: one local step a round on average leaves no toss for a pull; "
            "set it in (0, 1), for example 0.5, or take more local steps"
        )
    return float(1 / np.mean(steps))


def _strength(config: L2GDConfig, federation: Federation, probability: float) -> float:
    """Share of the way to the mean that a pull goes, over the training rate."""
    training = federation.training
    if training.participation_rate != 1:
        raise ConfigError(
            f"training.participation_rate must be 1 with method l2gd, got "
            f"{training.participation_rate}: each pull needs the mean of all models"
        )
    if training.trouble.keeps_away:
        raise ConfigError(
            "training.trouble must keep nobody away with method l2gd; set stragglers only"
        )
    odds = (1 - probability) / probability
    if training.learning_rate * config.pull * odds > 1:
        raise ConfigError(
            "training.learning_rate * method.pull * (1 - p) / p must be <= 1 with p = "
            f"method.communication, got {training.learning_rate} * {config.pull} * {odds:g}; "
            "lower pull or learning_rate, or set communication higher"
        )
    return config.pull * odds
