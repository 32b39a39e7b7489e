"""APFL: every client predicts with a mixture of an own model and the global one.

Source: Deng et al. 2020, "Adaptive personalized federated learning", Algorithm 1 and section 4.
Each local step takes one batch for both models, with e the training rate of the round:

- w <- w - e g(w), FedAvg's own step from the global model;
- m = s v + (1 - s) w, a mixture of parameters with the client's share s in [0, 1];
- v <- v - e s g(m), where the factor s is the chain rule's;
- at the first step of a round, if ``adaptive``, s <- clip(s - share_rate e <v - w, g(m)>, 0, 1)
  with v, w and m as above: the gradient of the same loss in s.

The client sends w and keeps v and s. The server takes the plain mean (``aggregation``). The client
predicts with s v + (1 - s) x, where x is the newest global model: w is one client's passing
iterate, the source's own theory mixes with the shared model. ``personal_model: local`` takes the
client's last w for x. A client that never took part trains
its v and s for one round first.

Deviations: w moves before m is formed, as in the authors' program, where the algorithm of the
publication has both move at once; that program adds a decay 0.02 s to the gradient in s, here there
is none. Mixing logits instead of parameters is another method and not offered.

Usual values: own_share 0.25 to 0.75, adaptive on. A fixed share of 0 is FedAvg, of 1 local
training. Momentum, weight decay and clipping are refused. Cost: 2 gradients a step; one model each
way; one model and a number of state. Metrics: the common ones; the training loss is that of w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selffl_ray.algorithms.averaging import WeighedConfig, mean_of_models, require_plain_sgd
from selffl_ray.algorithms.base import Algorithm, Empty, Federation, Local, Personal, at_no_cost
from selffl_ray.algorithms.fedavg import Global, Upload, fedavg
from selffl_ray.errors import ConfigError
from selffl_ray.flat import FlatParams
from selffl_ray.registry import register_algorithm
from selffl_ray.training import Stack, Step, TrainingConfig, local_sgd, subtract


@dataclass(frozen=True, kw_only=True)
class APFLConfig(WeighedConfig):
    """Options of ``method: apfl``."""

    own_share: float = 0.5
    """Share of the own model in the mixture (alpha), in [0, 1]; where it starts if adaptive."""
    adaptive: bool = True
    """Each client adapts its share, once a round."""
    share_rate: float = 1.0
    """Rate of the share over the training rate of the round, > 0; usual values 0.1 to 10."""
    personal_model: Literal["global", "local"] = "global"
    """What the own model is mixed with to predict: the newest global model, or the client's own w
    after its last local update."""

    def __post_init__(self) -> None:
        if not 0 <= self.own_share <= 1:
            raise ConfigError(f"method.own_share must lie in [0, 1], got {self.own_share}")
        if not 0 < self.share_rate < math.inf:
            raise ConfigError(
                f"method.share_rate must be > 0, got {self.share_rate}; adaptive: false keeps the "
                "share"
            )


class Mixture(NamedTuple):
    """State: each client's own model (C, P), and its share in the mixture (C, 1)."""

    params_CP: Tensor
    share_C1: Tensor


class MixtureAndLocal(NamedTuple):
    """State: the same, and the client's w after its last local update (C, P)."""

    params_CP: Tensor
    share_C1: Tensor
    local_CP: Tensor


def idle(config: APFLConfig, training: TrainingConfig) -> Mapping[str, str]:
    """Options that change nothing beside the others, and why."""
    return {} if config.adaptive else {"share_rate": "adaptive is off"}


@register_algorithm("apfl", APFLConfig, idle=idle)
def apfl(config: APFLConfig, federation: Federation) -> Algorithm:
    """A mixture of an own and the global model, in a share that adapts."""
    require_plain_sgd("apfl", federation.training)
    keeps_local = config.personal_model == "local"

    def kept(own: Mixture, local_CP: Tensor) -> Mixture | MixtureAndLocal:
        return MixtureAndLocal(*own, local_CP.clone()) if keeps_local else own

    def init_client(params_P: FlatParams, num_clients: int) -> Mixture | MixtureAndLocal:
        rows_CP = params_P.expand(num_clients, -1)
        share_C1 = params_P.new_full((num_clients, 1), config.own_share)
        return kept(Mixture(rows_CP, share_C1), rows_CP)

    def local_update(shared: Global, per_client: Empty, state: Any, stack: Stack) -> Local:
        rate = stack.learning_rate

        def train_own(own: Mixture, w_CP: Tensor, step: Step) -> Mixture:
            # In place: to read and write whole models costs as much as a gradient.
            own_AP, w_AP, share_A1 = (t[step.pick] for t in (own.params_CP, w_CP, own.share_C1))
            grad_AP, rate_A1 = step.grad_at(torch.lerp(w_AP, own_AP, share_A1)), rate * share_A1
            if config.adaptive and step.index == 0:
                slope_A1 = ((own_AP - w_AP) * grad_AP).sum(1, keepdim=True)
                moved_A1 = (share_A1 - config.share_rate * rate * slope_A1).clamp(0, 1)
                own.share_C1[step.pick] = moved_A1
            subtract(own.params_CP, (step.pick, slice(None)), grad_AP.mul_(rate_A1))
            return own

        before = Mixture(state.params_CP.clone(), state.share_C1.clone())
        trained = local_sgd(stack, start=shared.params_P, observe=train_own, seen=before)
        own, upload = kept(trained.seen, trained.params_CP), Upload(trained.params_CP)
        return Local(own, upload, Empty(), trained.loss_C, 2 * trained.num_steps_C)

    def personalize(shared: Global, per_client: Empty, state: Any, stack: Stack) -> Personal:
        return at_no_cost(_mix(state, state.local_CP if keeps_local else shared.params_P))

    return replace(
        fedavg(config, federation),
        local_update=local_update,
        reductions=(mean_of_models(config),),
        init_client=init_client,
        personalize=personalize,
        cautions=_cautions(config),
    )


def _mix(own: Mixture | MixtureAndLocal, other: Tensor) -> Tensor:
    """Share * own model + (1 - share) * the other, (C, P) or (P,): (C, P)."""
    # One pass over the parameters, and exact at both ends of the share.
    return torch.lerp(other.expand_as(own.params_CP), own.params_CP, own.share_C1)


def _cautions(config: APFLConfig) -> tuple[str, ...]:
    if config.adaptive or 0 < config.own_share < 1:
        return ()
    same = "local training"
    if config.own_share == 0:
        same = (
            "FedAvg" if config.personal_model == "global" else "FedAvg's clients after their steps"
        )
    return (f"a fixed own_share of {config.own_share} makes the personal models those of {same}",)
