"""pFedVEM: each client's head is a Gaussian, and the server trusts confident heads more.

Source: Zhu et al. 2023, "Confidence-aware personalized federated learning via variational
expectation maximization", Algorithm 1. The head of client i has the approximate posterior
q_i = N(mu_i, diag(sigma_i^2)) under the prior N(mu, rho_i^2 I) around the shared head mu.

Client, with n_i examples, body b, mean loss f_i, and E over draws of the head from q_i:
1. rho_i^2 <- average over coordinates of (sigma_i^2 + (mu_i - mu)^2): the prior's best variance.
2. Head phase: SGD on E f_i(b, h) + KL(q_i, prior) / n_i in mu_i and log sigma_i, b as received.
3. Body phase: SGD on E f_i(b, h) in b, with q_i fixed.
Server: mu <- sum_i mu_i rho_i^-2 / sum_i rho_i^-2 over the participants; body: the mean by number
of examples. The personalized model is (body, mu_i), the global model (body, mu).

How the expectations are drawn and the steps taken: see ``gaussian_head.py``.

Deviations: the published code takes momentum SGD on sums over all examples, a softplus for sigma,
and several times FedAvg's passes over the data; here the training options hold and the phases share
FedAvg's steps (``phases.py``). A client that takes part for the first time starts at the shared
head, not at the common start: without data the posterior is the prior. ``weight_decay``,
``momentum`` and clipping act on means and body, never on sigma.

Known weakness: a client whose head comes close to the shared one has a small rho_i, counts more,
and so draws the shared head still closer. With few or very alike clients the prior becomes narrow
and the heads stiff; a larger ``start_std`` delays this.

Options: ``draws`` (2 to 8; the paper 5, independent), ``start_std`` (0.1 to 1), ``head_layers``,
``head_steps``, ``body_steps``, ``server`` (moves the shared body and mu as one model).

Cost: ``draws`` gradients a step of either phase. Traffic: a model both ways and one number up.
State: mean and deviation of the head. Metrics: the common ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selffl_ray.algorithms.base import (
    Algorithm,
    Empty,
    Federation,
    Local,
    Mean,
    Personal,
    Record,
    Reports,
    Sums,
    Total,
    Traffic,
    Weights,
    at_no_cost,
)
from selffl_ray.algorithms.fedavg import Global, Server, Upload, average_with, fedavg, uploaded
from selffl_ray.algorithms.gaussian_head import Draws, Prior, trainer
from selffl_ray.algorithms.partial import join, last_layers
from selffl_ray.algorithms.phases import Phase, PhasedConfig, alternate, check_phases, phases
from selffl_ray.errors import ConfigError
from selffl_ray.flat import FlatParams
from selffl_ray.registry import register_algorithm, server_optimizers
from selffl_ray.training import Stack


@dataclass(frozen=True, kw_only=True)
class PFedVEMConfig(PhasedConfig):
    """Options of ``method: pfedvem``."""

    draws: int = 2
    """Heads drawn for each gradient, >= 1; an odd number leaves the last one without partner."""
    start_std: float = 0.3
    """Standard deviation of every coordinate of a head before it is trained, > 0. It is also how
    far the first round lets heads go from the common start; usual values 0.1 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise ConfigError(f"method.draws must be >= 1, got {self.draws}")
        if not 0 < self.start_std < math.inf:
            raise ConfigError(f"method.start_std must be > 0, got {self.start_std}")
        if self.head_layers < 1:
            raise ConfigError(
                f"method.head_layers must be >= 1, got {self.head_layers}; without a head this is "
                "method: fedavg"
            )


class Posterior(NamedTuple):
    """State: mean and log standard deviation of the heads (C, H), and who has trained (C,)."""

    mean_CH: Tensor
    log_std_CH: Tensor
    seen_C: Tensor


class Report(NamedTuple):
    """rho_i^2, the variance of the prior of a head's coordinate: (C,) float64."""

    prior_var_C: Tensor


@register_algorithm("pfedvem", PFedVEMConfig)
def pfedvem(config: PFedVEMConfig, federation: Federation) -> Algorithm:
    """Gaussian heads, averaged by their confidence, on a shared body."""
    head_P = last_layers(federation.spec, config.head_layers, "head_layers")
    size, log_std = federation.spec.num_params, math.log(config.start_std)

    def init_client(params_P: FlatParams, count: int) -> Posterior:
        mean_CH = params_P[head_P].expand(count, -1)
        seen_C = torch.zeros(count, dtype=torch.bool, device=params_P.device)
        return Posterior(mean_CH, torch.full_like(mean_CH, log_std), seen_C)

    def train(shared: Global, state: Posterior, stack: Stack, plan: list[Phase]) -> Local:
        prior, mean_CH = _prior(shared.params_P[head_P], state)
        start_CP = join(head_P, mean_CH, shared.params_P)
        draws = Draws(config.draws, head_P, stack)
        trained = alternate(plan, start_CP, trainer(stack, draws, prior), state.log_std_CH)
        seen_C = torch.ones_like(state.seen_C)
        after = Posterior(trained.params_CP[:, head_P], trained.carry, seen_C)
        upload, report = Upload(trained.params_CP), Report(prior.var_C.cpu())
        return Local(after, upload, report, trained.loss_C, trained.num_steps_C * config.draws)

    def local_update(shared: Global, per_client: Empty, state: Posterior, stack: Stack) -> Local:
        return train(shared, state, stack, phases(config, stack, head_P))

    def adapt(shared: Global, per_client: Empty, state: Posterior, stack: Stack) -> Any:
        mask_P = head_P.to(stack.engine.device)
        return train(shared, state, stack, [Phase(mask_P, stack.num_steps_C, "train", True)]).state

    def personalize(shared: Global, per_client: Any, state: Posterior, stack: Stack) -> Personal:
        return at_no_cost(join(head_P, state.mean_CH, shared.params_P))

    return replace(
        fedavg(config, federation),
        local_update=local_update,
        reductions=(Mean(uploaded), Total(lambda payload: payload.params_CP[:, head_P], _weigh)),
        aggregate=_aggregate(config, head_P),
        init_client=init_client,
        personalize=personalize,
        adapt=adapt,
        traffic=lambda plan: Traffic(size, size + 1),
        cautions=check_phases(config, federation, head_P),
    )


def _prior(shared_H: Tensor, state: Posterior) -> tuple[Prior, Tensor]:
    """The prior of each row's head, and the mean that the row starts from (C, H)."""
    seen_C1 = state.seen_C.to(shared_H.device).unsqueeze(1)
    mean_CH = state.mean_CH.where(seen_C1, shared_H)
    spread_CH = (2 * state.log_std_CH.double()).exp() + (mean_CH - shared_H).double().square()
    return Prior(shared_H, spread_CH.mean(1)), mean_CH


def _weigh(server: Server, reports: Reports, sums: Sums) -> tuple[Server, Weights]:
    """A head counts by the precision of its prior."""
    precision_K = 1 / reports.rows.prior_var_C.numpy()
    return server, Weights(reports.client_index, precision_K / precision_K.sum())


def _aggregate(
    config: PFedVEMConfig, head_P: Tensor
) -> Callable[[Server, Sums, Reports], tuple[Server, Record]]:
    """A step of the server optimizer towards the bodies' mean with the heads' weighted mean."""
    step = average_with(server_optimizers.make(config.server))

    def aggregate(server: Server, sums: Sums, reports: Reports) -> tuple[Server, Record]:
        mean_P = sums[0].clone()
        mean_P[head_P] = sums[1]
        return step(server, (mean_P,), reports)

    return aggregate
