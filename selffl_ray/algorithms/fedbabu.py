"""FedBABU: the body is trained under a head that never leaves its random start.

Source: Oh et al. 2022, "FedBABU: toward enhanced representation for federated image
classification", Algorithm 1. Client: K times body <- body - eta g(body, head at the start). Server:
the mean of the bodies by number of examples. The personalized model is fine-tuned on the client's
training examples from the newest body and the start's head; the global model is these two as they
are.

Deviations: the head of the start comes from the experiment's seed or ``training.start_from`` and is
the same for all; no bytes are counted for it. With ``server: fedavgm`` and the like the head stays,
too. The paper tunes for 5 epochs; here it is a number of steps, forgotten after each evaluation.

Options: ``head_layers`` (1), ``part`` (what is tuned: ``all`` and ``head`` do about equally well in
the paper, ``body`` worse), ``fine_tune`` (``steps`` 20 to 200, ``rate``: a factor of the round's
learning rate), ``server``. A model whose layers are all head, as a linear one is by default, is not
trained at all before the fine-tuning; without a head this is FedAvg with fine-tuning. Both are said
as a caution.

Cost: a gradient a step (of the body only). Traffic: the body, both ways. State: none. Metrics: the
common ones; the fine-tuning counts as ``cost/personalization_steps``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from selffl_ray.algorithms.base import Algorithm, Empty, Federation, Local, Personal, Traffic
from selffl_ray.algorithms.fedavg import AveragingConfig, Global, Upload, average_with, fedavg
from selffl_ray.algorithms.fine_tuning import FineTuneConfig, fine_tune, tuning_cautions
from selffl_ray.algorithms.partial import last_layers
from selffl_ray.registry import register_algorithm, server_optimizers
from selffl_ray.training import Stack, TrainingConfig, local_sgd


@dataclass(frozen=True, kw_only=True)
class FedBABUConfig(AveragingConfig):
    """Options of ``method: fedbabu``."""

    head_layers: int = 1
    """Layers of the head, which the rounds do not train, counted from the output."""
    part: Literal["all", "head", "body"] = "all"
    """What the fine-tuning trains."""
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    """Steps on the client's own examples before it predicts."""


def idle(config: FedBABUConfig, training: TrainingConfig) -> dict[str, str]:
    """Options that change nothing beside the others, and why."""
    return {} if config.fine_tune.steps else {"part": "fine_tune.steps is 0"}


@register_algorithm("fedbabu", FedBABUConfig, idle=idle)
def fedbabu(config: FedBABUConfig, federation: Federation) -> Algorithm:
    """A shared body under one frozen random head; clients fine-tune."""
    head_P = last_layers(federation.spec, config.head_layers, "head_layers")
    body_P = ~head_P
    tuned_P = {"all": torch.ones_like(head_P), "head": head_P, "body": body_P}[config.part]
    size = int(body_P.sum())

    def local_update(shared: Global, per_client: Empty, state: Empty, stack: Stack) -> Local:
        mask_P = body_P.to(shared.params_P.device)
        trained = local_sgd(stack, start=shared.params_P, trainable=mask_P)
        upload = Upload(trained.params_CP)
        return Local(state, upload, Empty(), trained.loss_C, trained.num_steps_C)

    def personalize(shared: Global, per_client: Any, state: Empty, stack: Stack) -> Personal:
        mask_P = tuned_P.to(shared.params_P.device)
        return fine_tune(config.fine_tune, stack, shared.params_P, trainable=mask_P)

    cautions = []
    if not size:
        cautions.append(
            "every layer is head: the rounds train nothing, clients fine-tune the common start"
        )
    if size == len(body_P):
        cautions.append("there is no head: this is FedAvg with fine-tuning")
    if not config.fine_tune.steps or not bool(tuned_P.any()):
        cautions.append("nothing is fine-tuned: clients predict with the head of the start")
    return replace(
        fedavg(config, federation),
        local_update=local_update,
        aggregate=average_with(server_optimizers.make(config.server), body_P),
        personalize=personalize,
        adapt=lambda shared, per_client, state, stack: state,
        traffic=lambda plan: Traffic(size, size),
        cautions=(*cautions, *tuning_cautions(config.fine_tune, federation.training)),
    )
