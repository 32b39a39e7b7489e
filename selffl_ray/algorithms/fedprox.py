"""FedProx: FedAvg whose local steps are pulled back to the global model.

Source: Li et al. 2020, "Federated optimization in heterogeneous networks", Algorithm 2: each client
minimises F_m(y) + mu/2 |y - x|^2 inexactly. Here: y <- x; K times y <- y - eta (g(y) + mu (y - x));
x <- sum_i (n_i / n) y_i over the clients that answered. The personalized model is the global one,
or with ``personal_model: local`` what the client's own last local update left.

Deviations: the source draws clients with probability n_i / n and takes the plain mean; here all
clients are drawn alike, so their models are weighted by n_i. All clients do all of their steps,
except with ``training.trouble.late: partial``, which is the source's partial work of stragglers.
``personal_model: local`` is not in the source.

A client with ``personal_model: local`` that never took part, new ones among them, predicts after
one local update from the global model.

Options: ``mu`` (0.001 to 1), ``personal_model``, ``server`` as in FedAvg. Cost: 1 gradient a step;
1 model down and up; state none, 1 model with ``personal_model: local``. Metrics: the common ones;
the training loss is without the pull.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from selffl_ray.algorithms.base import Algorithm, Empty, Federation, Local
from selffl_ray.algorithms.fedavg import AveragingConfig, Global, Upload, fedavg
from selffl_ray.algorithms.local import Own, own_start, predict_with_own
from selffl_ray.errors import ConfigError
from selffl_ray.registry import register_algorithm
from selffl_ray.training import Stack, local_sgd


@dataclass(frozen=True, kw_only=True)
class FedProxConfig(AveragingConfig):
    """Options of ``method: fedprox``."""

    mu: float = 0.1
    """Strength of the pull to the global model, >= 0; usual values 0.001 to 1."""
    personal_model: Literal["global", "local"] = "global"
    """What a client predicts with: the global model, or its own after its last local update."""

    def __post_init__(self) -> None:
        check_pull("mu", self.mu)


@register_algorithm("fedprox", FedProxConfig, changeable=("mu",))
def fedprox(config: FedProxConfig, federation: Federation) -> Algorithm:
    """FedAvg with a pull towards the global model in every local step."""
    keeps_own = config.personal_model == "local"

    def local_update(shared: Global, per_client: Any, state: Any, stack: Stack) -> Local:
        def pull(theta_AP: Tensor, active: slice | Tensor) -> Tensor:
            return (theta_AP - shared.params_P).mul_(config.mu)

        trained = local_sgd(stack, start=shared.params_P, extra_grad=pull)
        own = Own(trained.params_CP.clone()) if keeps_own else state
        upload = Upload(trained.params_CP)
        return Local(own, upload, Empty(), trained.loss_C, trained.num_steps_C)

    cautions = pull_cautions("mu", config.mu, federation.training.learning_rate)
    if config.mu == 0:
        cautions = ("mu is 0: nothing pulls, the rounds are FedAvg's",)
    elif max(federation.training.steps(int(n)) for n in federation.num_examples_M) == 1:
        cautions = ("one local step starts where the pull is 0: the rounds are FedAvg's",)
    plain = replace(fedavg(config, federation), local_update=local_update, cautions=cautions)
    if not keeps_own:
        return plain
    return replace(plain, init_client=own_start, personalize=predict_with_own)


def check_pull(name: str, value: float) -> None:
    """Refuse a pull that is not a finite number from 0."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"method.{name} must be >= 0, got {value}; usual values are 0.001 to 2")


def pull_cautions(name: str, value: float, learning_rate: float) -> tuple[str, ...]:
    """What to say of a pull whose steps at that rate go past the point that they are pulled to."""
    if value * learning_rate <= 1:
        return ()
    return (
        f"method.{name} {value} times the learning rate {learning_rate} is above 1: each step goes "
        "past the point that it is pulled to and may diverge; lower one of the two",
    )
