"""The clients' half of Self-FL: initial model, training, probe, and personalized models."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selffl_ray.algorithms.base import Local, Personal, at_no_cost
from selffl_ray.algorithms.selffl.config import SelfFLConfig
from selffl_ray.algorithms.selffl.context import (
    Context,
    Payload,
    PerClient,
    Report,
    Shared,
    State,
)
from selffl_ray.algorithms.selffl.readout import realise
from selffl_ray.estimators.intra_base import Evidence, Observed
from selffl_ray.flat import FlatParams
from selffl_ray.training import (
    Stack,
    Tail,
    Trained,
    local_sgd,
    observe_tail,
    start_tail,
    tail_mean,
)

MOST_SHRINKAGE = 0.9
"""De-shrinking multiplies noise by 1 / (1 - S); beyond this the upload is left out."""

MOST_PULL = 0.95
"""Shrink factor at which the pull of ``map`` stops growing."""


def init_client(context: Context, params_P: FlatParams, num_clients: int) -> State:
    """State of clients that never took part: the start of the global model, nothing remembered."""
    start_CP = params_P.expand(num_clients, -1)
    nothing_C0 = start_CP[:, :0]
    persists = context.config.personalization == "map"
    return State(
        start_CP,
        start_CP if context.keeps_personal else nothing_C0,
        start_CP if persists else nothing_C0,
        context.intra.init_memory(num_clients, params_P),
    )


def probe_vector(payload: Payload) -> Tensor:
    """What the inter-client estimator reads."""
    return payload.vector_CP


def last_upload(state: State) -> Tensor:
    """What the server's weighted sum is made of."""
    return state.upload_CP


def keep_state(shared: Any, per_client: Any, state: State, stack: Stack) -> State:
    """A readout needs nothing of a new client but its data."""
    return state


def initial_models(context: Context, shared: Shared, per_client: PerClient, state: State) -> Tensor:
    """Where each client starts: the mean of the others' uploads, or the global model. (C, P).

    theta_{-m} = (theta - q x) / (1 - q) from the global model, the client's weight and its own last
    upload; for q > 1/2 the server sent that mean itself. A client without weight starts from theta.
    """
    count = len(per_client.weight_CG)
    global_CP = shared.params_P.expand(count, -1)
    if context.config.init == "global":
        return global_CP
    q = context.groups.spread(per_client.weight_CG).to(global_CP)
    safe_q = torch.where(q <= 0.5, q, 0.0)
    others_CP = (global_CP - safe_q * state.upload_CP).div_(1 - safe_q)
    return torch.where(q <= 0.5, others_CP, shared.others_P.expand(count, -1))


class _Round(NamedTuple):
    """A local training: what is uploaded, what it retains of its start, and the personal model."""

    upload_CP: Tensor
    retained_CG: Tensor
    usable_CG: Tensor
    personal_CP: Tensor
    tail: Tail | None
    steps_C: Tensor
    rate_C: Tensor
    loss_C: Tensor


def local_update(
    context: Context, shared: Shared, per_client: PerClient, state: State, stack: Stack
) -> Local:
    """One round of a stack: train, remember, and on a probe round estimate."""
    config = context.config
    start_CP = initial_models(context, shared, per_client, state)
    # Shrink factors are known for all clients or for none, so this does not depend on the stack.
    ready = not bool(torch.isnan(per_client.shrink_CG).any())
    train = _personal_round if config.upload == "personal" and ready else _common_tap
    done = train(context, stack, start_CP, per_client)
    observed = Observed(
        stack,
        shared.params_P,
        start_CP,
        done.upload_CP,
        done.tail,
        done.steps_C,
        done.rate_C,
        done.retained_CG,
    )
    memory = context.intra.remember(state.memory, observed)
    gradients_C = done.steps_C
    payload, report = _no_probe(context, stack.num_clients, done)
    if config.probes(stack.round_index):
        evidence = context.intra.estimate(memory, observed)
        payload, report = _probe(context, shared, done, evidence)
        batch = stack.training.batch_size
        gradients_C = gradients_C + torch.ceil(stack.train.num_C / batch).long()
    personal_CP, persistent_CP = done.personal_CP, state.persistent_CP
    if config.personalization == "map":
        track = _map_track(config, shared, per_client, state, stack)
        personal_CP = tail_mean(track.seen, track.num_steps_C)
        personal_CP = personal_CP if config.tail_average else track.params_CP
        persistent_CP, gradients_C = track.params_CP, gradients_C + track.num_steps_C
    upload_CP = done.upload_CP
    if config.aggregation == "deshrunk":
        upload_CP = _deshrunk(context, start_CP, done)
    new = State(upload_CP, personal_CP, persistent_CP, memory)
    return Local(new, payload, report, done.loss_C, gradients_C)


def _common_tap(context: Context, stack: Stack, start_CP: Tensor, per_client: PerClient) -> _Round:
    """The same number of steps for all: uploads whose spread can be compared."""
    watched = context.intra.watches
    trained = local_sgd(
        stack,
        start=start_CP,
        observe=observe_tail if watched else None,
        seen=start_tail(start_CP, stack.num_clients, squares=True) if watched else None,
    )
    rate = stack.learning_rate
    curvature = context.config.assumed_curvature(rate)
    retained_C = (1.0 - min(rate * curvature, 1.0)) ** trained.num_steps_C.double()
    retained_CG = retained_C.unsqueeze(1).expand(-1, context.groups.num_groups)
    keeps = context.config.upload == "personal"
    return _Round(
        trained.params_CP,
        retained_CG,
        retained_CG <= MOST_SHRINKAGE,
        trained.params_CP if keeps else start_CP[:, :0],
        trained.seen,
        trained.num_steps_C,
        torch.full((stack.num_clients,), rate, dtype=torch.float64),
        trained.loss_C,
    )


def _personal_round(
    context: Context, stack: Stack, start_CP: Tensor, per_client: PerClient
) -> _Round:
    """One trajectory a round: the personalized model is what is uploaded."""
    config = context.config
    done = realise(
        config,
        context.groups,
        stack,
        start_CP,
        per_client.shrink_CG,
        rate=stack.learning_rate,
        fixed_steps=stack.num_steps_C.numpy(),
        stream="train",
        squares=context.intra.watches,
    )
    shrink_CG = per_client.shrink_CG
    usable_CG = shrink_CG <= MOST_SHRINKAGE
    return _Round(
        done.params_CP,
        shrink_CG,
        usable_CG,
        done.params_CP,
        done.tail,
        done.steps_C,
        done.rate_C,
        done.loss_C,
    )


def _deshrunk(context: Context, start_CP: Tensor, done: _Round) -> Tensor:
    """Uploads with early stopping undone where that is possible."""
    keep_CG = torch.where(done.usable_CG, 1.0 - done.retained_CG, 1.0)
    keep = context.groups.spread(keep_CG).to(start_CP)
    return start_CP + (done.upload_CP - start_CP) / keep


def _usable(context: Context, done: _Round) -> Tensor:
    if context.config.aggregation == "deshrunk":
        return done.usable_CG
    return torch.ones_like(done.usable_CG)


def _no_probe(context: Context, count: int, done: _Round) -> tuple[Payload, Report]:
    unknown_CG = torch.full((count, context.groups.num_groups), math.nan, dtype=torch.float64)
    return Payload(done.upload_CP[:, :0]), Report(unknown_CG, unknown_CG, _usable(context, done))


def _probe(
    context: Context, shared: Shared, done: _Round, evidence: Evidence
) -> tuple[Payload, Report]:
    """Vectors with unknown groups zeroed: they must not count in the mean."""
    vector_CP = evidence.vector_CP
    if context.intra.on_params:
        vector_CP = vector_CP - shared.params_P
    known_CG = ~torch.isnan(evidence.var_CG)
    known = context.groups.spread(known_CG.double()).to(vector_CP.device) > 0
    vector_CP = torch.where(known, vector_CP, 0.0)
    square_CG = context.groups.mean_square(vector_CP).cpu()
    return Payload(vector_CP), Report(evidence.var_CG, square_CG, _usable(context, done))


def _map_track(
    config: SelfFLConfig, shared: Shared, per_client: PerClient, state: State, stack: Stack
) -> Trained:
    """Train the persistent personal models on the log-posterior: loss plus a pull to the global.

    The pull h S / (1 - S) is taken as an implicit step, theta <- (theta' + c theta_G) / (1 + c)
    with c = rate * h S / (1 - S): the explicit one diverges where S is near 1.
    """
    shrink_C = torch.nan_to_num(per_client.shrink_CG, nan=0.0).mean(1).clamp(max=MOST_PULL)
    pull_C = stack.learning_rate * config.map_curvature * shrink_C / (1 - shrink_C)
    pull_C1 = pull_C.unsqueeze(1).to(state.persistent_CP)
    return local_sgd(
        stack,
        start=state.persistent_CP,
        stream="personal",
        after_step=lambda theta_CP: (theta_CP + pull_C1 * shared.params_P) / (1 + pull_C1),
        observe=observe_tail,
        seen=start_tail(shared.params_P, stack.num_clients),
    )


def personalize(
    context: Context, shared: Shared, per_client: PerClient, state: State, stack: Stack
) -> Personal:
    """The model each client predicts with: kept, or read out anew from its initial model.

    Without any estimate yet nothing is known about shrinkage, and the readout shrinks nothing.
    """
    if context.keeps_personal:
        return at_no_cost(state.personal_CP)
    config = context.config
    done = realise(
        config,
        context.groups,
        stack,
        initial_models(context, shared, per_client, state),
        torch.nan_to_num(per_client.shrink_CG, nan=0.0),
        rate=stack.learning_rate * config.readout_rate,
        fixed_steps=config.readout_steps,
        stream="readout",
    )
    return Personal(done.params_CP, done.steps_C)
