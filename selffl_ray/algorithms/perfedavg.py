"""Per-FedAvg: a global model from which one gradient step on own data makes a good model.

Source: Fallah et al. 2020, "Personalized federated learning with theoretical guarantees: a
model-agnostic meta-learning approach", Algorithm 1 and section 5. Each local step draws independent
batches D1, D2 (and D3) and makes, with a the ``inner_rate`` and b the training rate of the round,

- u = w - a g(w; D1);
- ``fo``: w <- w - b g(u; D2), without second derivatives;
- ``hf``: w <- w - b (h - a (g(w + d h; D3) - g(w - d h; D3)) / (2 d)) with h = g(u; D2), where the
  difference over d = ``hessian_step`` stands for the Hessian at w times h.

The server takes the plain mean. The client predicts with the global model after ``adapt_steps``
steps at rate a on its own training examples (batches of the stream ``readout``); nothing of that is
kept. D2 is the stream of FedAvg: without an inner rate and with weights by sample size this is
FedAvg. The source evaluates one adaptation step; more are common.

Usual values: inner_rate 0.001 to 0.1, absolute, untouched by the training schedule; adapt_steps 1
to 20; hessian_step 1e-3. Momentum, weight decay and clipping act on w and in the adaptation, not in
u. Cost: 2 (fo) or 4 (hf) gradients a step; one model each way; no state. Metrics: the common ones;
the training loss is that of u on D2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from selffl_ray.algorithms.averaging import WeighedConfig, mean_of_models
from selffl_ray.algorithms.base import Algorithm, Empty, Federation, Local, Personal
from selffl_ray.algorithms.fedavg import Global, Upload, fedavg
from selffl_ray.errors import ConfigError
from selffl_ray.registry import register_algorithm
from selffl_ray.training import Stack, Step, TrainingConfig, local_sgd

GRADIENTS = {"fo": 2, "hf": 4}
"""Mini-batch gradients a step."""


@dataclass(frozen=True, kw_only=True)
class PerFedAvgConfig(WeighedConfig):
    """Options of ``method: perfedavg``."""

    variant: Literal["fo", "hf"] = "fo"
    """First-order, or Hessian-free with a finite difference for the second-order term."""
    inner_rate: float = 0.1
    """Rate of the inner and of the adaptation steps, absolute, >= 0; usual values 0.001 to 0.1."""
    hessian_step: float = 1e-3
    """Step of the finite difference along the gradient, > 0."""
    adapt_steps: int = 1
    """Steps from the global model to a client's own one, >= 0; usual values 1 to 20."""

    def __post_init__(self) -> None:
        if not 0 <= self.inner_rate < math.inf:
            raise ConfigError(f"method.inner_rate must be >= 0, got {self.inner_rate}")
        if not 0 < self.hessian_step < math.inf:
            raise ConfigError(f"method.hessian_step must be > 0, got {self.hessian_step}")
        if self.adapt_steps < 0:
            raise ConfigError(f"method.adapt_steps must be >= 0, got {self.adapt_steps}")


def idle(config: PerFedAvgConfig, training: TrainingConfig) -> Mapping[str, str]:
    """Options that change nothing beside the others, and why."""
    if config.inner_rate == 0:
        return {
            "variant": "inner_rate is 0",
            "hessian_step": "inner_rate is 0",
            "adapt_steps": "inner_rate is 0",
        }
    return {"hessian_step": "variant: fo takes no difference"} if config.variant == "fo" else {}


@register_algorithm("perfedavg", PerFedAvgConfig, idle=idle)
def perfedavg(config: PerFedAvgConfig, federation: Federation) -> Algorithm:
    """A global model that one step on own data makes good; first-order or Hessian-free."""

    def local_update(shared: Global, per_client: Empty, state: Empty, stack: Stack) -> Local:
        trained = local_sgd(stack, start=shared.params_P, direction=partial(meta_gradient, config))
        cost_C = GRADIENTS[config.variant] * trained.num_steps_C
        return Local(state, Upload(trained.params_CP), Empty(), trained.loss_C, cost_C)

    def personalize(shared: Global, per_client: Empty, state: Empty, stack: Stack) -> Personal:
        steps_C = torch.full((stack.num_clients,), config.adapt_steps, dtype=torch.int64)
        adapted = local_sgd(
            stack,
            start=shared.params_P,
            steps_C=steps_C,
            rate_C=config.inner_rate,
            stream="readout",
        )
        return Personal(adapted.params_CP, steps_C)

    cautions = []
    if config.inner_rate == 0:
        cautions.append(
            "inner_rate 0 makes no inner step: this is FedAvg at a multiple of its cost"
        )
    elif config.adapt_steps == 0:
        cautions.append("adapt_steps 0: clients predict with the global model, without adaptation")
    return replace(
        fedavg(config, federation),
        local_update=local_update,
        reductions=(mean_of_models(config),),
        personalize=personalize,
        # There is no state to prepare: a client that was never seen adapts like any other.
        adapt=lambda shared, per_client, state, stack: state,
        cautions=tuple(cautions),
    )


def meta_gradient(
    config: PerFedAvgConfig, carry: None, w_CP: Tensor, step: Step
) -> tuple[None, Tensor]:
    """Gradient in w of the loss after an inner step: (A, P), overwritten by the next gradient."""
    w_AP = w_CP[step.pick]
    u_AP = w_AP - step.grad_at(w_AP, step.batch("inner")).mul_(config.inner_rate)
    grad_AP = step.grad_at(u_AP)
    if config.variant == "fo":
        return carry, grad_AP
    loss_A, batch, along_AP = step.loss_A, step.batch("hessian"), grad_AP.clone()
    ahead_AP = step.grad_at(w_AP + config.hessian_step * along_AP, batch).clone()
    behind_AP = step.grad_at(w_AP - config.hessian_step * along_AP, batch)
    # The loss of the step is that of u, not of the points of the difference.
    step.loss_A = loss_A
    factor = config.inner_rate / (2 * config.hessian_step)
    return carry, along_AP - (ahead_AP - behind_AP).mul_(factor)
