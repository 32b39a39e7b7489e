"""FedAvg with fine-tuning: clients predict with the global model after further steps of their own.

Sources: McMahan et al. 2017 for the rounds (``fedavg.py``); Yu, Bagdasaryan, Shmatikov 2020,
"Salvaging federated learning by local adaptation", section 3, for fine-tuning what they give.
Rounds: FedAvg's, bit for bit. Personalized model: v <- x; s times v <- v - rho eta g(v), on the
client's own training examples. Nothing of it is sent or kept.

Deviation: the rate is a factor rho on the round's training rate eta, so that a schedule holds for
both. The default is a small rate (0.1), the stronger choice under label skew; ``rate: 1.0`` with 5,
20 or 100 steps continues at the training rate.

Options: ``fine_tune`` with ``steps`` (5 to 200), ``rate`` (0.03 to 1), ``tail_average``;
``server`` as in FedAvg. Cost: 1 gradient a step and as many as ``fine_tune.steps`` for each
personalized model (``cost/personalization_steps``); 1 model down and up; no state.
Metrics: the common ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from selffl_ray.algorithms.base import Algorithm, Empty, Federation, Personal
from selffl_ray.algorithms.fedavg import AveragingConfig, Global, fedavg
from selffl_ray.algorithms.fine_tuning import FineTuneConfig, fine_tune, tuning_cautions
from selffl_ray.registry import register_algorithm
from selffl_ray.training import Stack


@dataclass(frozen=True, kw_only=True)
class FedAvgFTConfig(AveragingConfig):
    """Options of ``method: fedavg_ft``."""

    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    """Steps from the global model before a client predicts."""


@register_algorithm("fedavg_ft", FedAvgFTConfig)
def fedavg_ft(config: FedAvgFTConfig, federation: Federation) -> Algorithm:
    """FedAvg, and fine-tuning of the global model by each client before it predicts."""

    def personalize(shared: Global, per_client: Any, state: Empty, stack: Stack) -> Personal:
        return fine_tune(config.fine_tune, stack, shared.params_P)

    void = () if config.fine_tune.steps else ("fine_tune.steps is 0: this is FedAvg",)
    return replace(
        fedavg(config, federation),
        personalize=personalize,
        # There is no state to make ready, so new clients need no local update beforehand.
        adapt=lambda shared, per_client, state, stack: state,
        cautions=void + tuning_cautions(config.fine_tune, federation.training),
    )
