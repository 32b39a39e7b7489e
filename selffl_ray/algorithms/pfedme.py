"""pFedMe: every client descends the Moreau envelope of its loss, and predicts with the minimizer.

Source: Dinh et al. 2020, "Personalized federated learning with Moreau envelopes", Algorithm 1.
A client starts at w <- x. For each of the training's local steps it draws one batch and

- solves theta ~ argmin f(theta) + (pull / 2) |theta - w|^2 by ``inner_steps`` gradient steps on
  this batch, theta <- theta - a (g(theta) + pull (theta - w)), from where theta was left;
- moves w <- w - outer_rate pull (w - theta), a gradient step on the envelope.

It sends w. The server takes x <- (1 - server_rate) x + server_rate mean(w). The client predicts
with its last theta, which it keeps; a client that never took part runs one such round first.

The source gives a as a number. Here a is ``inner_factor`` times the training rate of the round. Its
default, 1 / (1 + training rate * pull), keeps the inner steps stable wherever plain SGD at the
training rate is: a (L + pull) < 2 follows from rate * L < 2. With ``inner_factor: 1`` the training
rate is the source's own a. The outer rate is absolute, and the training schedule does not touch it.
Where a round's first solve starts is left open by the source: here at the global model, or with
``warm_start: own`` at the theta that the client kept. The source's mean is uniform
(``aggregation``).

Usual values: pull 10 to 30 (small ones personalize more), inner_steps 3 to 5, outer_rate * pull
0.05 to 0.9, server_rate 1 to 2. An outer_rate * pull of 1 puts w on theta and loses the envelope:
it is refused, as is pull * a >= 2, at which the inner steps diverge. Momentum, weight decay and
clipping are refused. Cost: inner_steps gradients a step; one model each way; one model of state.
Metrics: the common ones; the training loss is that of theta at its last inner gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from selffl_ray.algorithms.averaging import WeighedConfig, mean_of_models, require_plain_sgd
from selffl_ray.algorithms.base import Algorithm, Empty, Federation, Local
from selffl_ray.algorithms.fedavg import Global, Upload, fedavg
from selffl_ray.algorithms.local import Own, own_start, predict_with_own
from selffl_ray.algorithms.server.fedavgm import FedAvgMConfig
from selffl_ray.errors import ConfigError
from selffl_ray.registry import Component, register_algorithm
from selffl_ray.training import Stack, Step, local_sgd


@dataclass(frozen=True, kw_only=True)
class PFedMeConfig(WeighedConfig):
    """Options of ``method: pfedme``."""

    pull: float = 15.0
    """Weight of pull / 2 |theta - w|^2 (lambda), > 0; usual values 10 to 30."""
    inner_steps: int = 5
    """Gradient steps of a solve, >= 1; usual values 3 to 5."""
    inner_factor: float | None = None
    """Rate of these steps over the training rate of the round, > 0; 1 / (1 + training rate * pull)
    if not given."""
    outer_rate: float = 0.05
    """Rate of w, absolute (eta), > 0 and with outer_rate * pull < 1."""
    server_rate: float = 1.0
    """Share of the way from the global model to the mean (beta), in (0, 2]; above 1 extrapolates
    and needs a smaller outer_rate."""
    warm_start: Literal["global", "own"] = "global"
    """Where a round's first solve starts: the global model, or theta of the client's last round."""

    def __post_init__(self) -> None:
        for name in ("pull", "outer_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"method.{name} must be > 0, got {getattr(self, name)}")
        if self.inner_steps < 1:
            raise ConfigError(f"method.inner_steps must be >= 1, got {self.inner_steps}")
        if self.inner_factor is not None and not 0 < self.inner_factor < math.inf:
            raise ConfigError(f"method.inner_factor must be > 0, got {self.inner_factor}")
        if self.outer_rate * self.pull >= 1:
            raise ConfigError(
                f"method.outer_rate * pull must be < 1, got {self.outer_rate} * {self.pull}; "
                f"take an outer_rate below {1 / self.pull:g}"
            )
        if not 0 < self.server_rate <= 2:
            raise ConfigError(f"method.server_rate must lie in (0, 2], got {self.server_rate}")
        if self.server_rate != 1 and self.server.name != "mean":
            raise ConfigError(
                f"method.server_rate ({self.server_rate}) is for server: mean; with "
                f"{self.server.name} set method.server.learning_rate"
            )

    def alpha(self, rate: float) -> float:
        """Rate of the inner steps at a training rate."""
        factor = self.inner_factor if self.inner_factor is not None else 1 / (1 + rate * self.pull)
        return factor * rate


@register_algorithm("pfedme", PFedMeConfig)
def pfedme(config: PFedMeConfig, federation: Federation) -> Algorithm:
    """Local descent on Moreau envelopes; the client predicts with the proximal point."""
    require_plain_sgd("pfedme", federation.training)
    alpha = config.alpha(federation.training.learning_rate)
    if alpha * config.pull >= 2:
        raise ConfigError(
            f"method.inner_factor * training.learning_rate * method.pull must be < 2, got "
            f"{config.inner_factor} * {federation.training.learning_rate} * {config.pull}; lower "
            "one, or leave inner_factor out"
        )
    if config.server_rate != 1:
        momentum = FedAvgMConfig(learning_rate=config.server_rate, momentum=0.0)
        config = replace(config, server_rate=1.0, server=Component("fedavgm", momentum))

    def local_update(shared: Global, per_client: Empty, state: Own, stack: Stack) -> Local:
        start = state.params_CP if config.warm_start == "own" else shared.params_P
        trained = local_sgd(
            stack,
            start=shared.params_P,
            rate_C=config.outer_rate,
            direction=partial(_solve, config, config.alpha(stack.learning_rate)),
            carry=start.expand(stack.num_clients, -1).clone(),
        )
        own, gradients_C = Own(trained.carry), config.inner_steps * trained.num_steps_C
        return Local(own, Upload(trained.params_CP), Empty(), trained.loss_C, gradients_C)

    return replace(
        fedavg(config, federation),
        local_update=local_update,
        reductions=(mean_of_models(config),),
        init_client=own_start,
        personalize=predict_with_own,
    )


def _solve(
    config: PFedMeConfig, alpha: float, theta_CP: Tensor, w_CP: Tensor, step: Step
) -> tuple[Tensor, Tensor]:
    """Theta after its steps on the batch (C, P), and the gradient of the envelope at w (A, P)."""
    # In place: to read and write whole models costs as much as a gradient.
    batch, w_AP, theta_AP = step.batch(), w_CP[step.pick], theta_CP[step.pick]
    for _ in range(config.inner_steps):
        grad_AP = step.grad_at(theta_AP, batch)
        grad_AP.add_(theta_AP, alpha=config.pull).sub_(w_AP, alpha=config.pull)
        theta_AP.sub_(grad_AP, alpha=alpha)
    theta_CP[step.pick] = theta_AP
    return theta_CP, (w_AP - theta_AP).mul_(config.pull)
