"""What the methods share that keep a part of each client's model at the client.

The own part is a row of coordinates (C, H) of the model's (P,); the rest is averaged. For the
tables the server also averages the own parts of the clients that answered: the global model is the
shared part, which the server optimizer moves, with that plain mean. Nobody is sent the mean, and
bytes count the shared part only.

A client that has never trained begins from the common start. To be scored it trains its own part
under the shared one, which stays as it is, for as many steps as a round has.

Shape letters: C clients of a stack, P parameters, H coordinates of the own part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from selffl_ray.algorithms.base import (
    Algorithm,
    Empty,
    Federation,
    Local,
    Personal,
    Record,
    Reports,
    Sums,
    Traffic,
    at_no_cost,
)
from selffl_ray.algorithms.fedavg import (
    AveragingConfig,
    Global,
    Server,
    Upload,
    average_with,
    fedavg,
)
from selffl_ray.algorithms.fine_tuning import FineTuneConfig, fine_tune, tuning_cautions
from selffl_ray.errors import ConfigError
from selffl_ray.flat import FlatParams, ParamSpec
from selffl_ray.registry import server_optimizers
from selffl_ray.training import Stack, Trained, local_sgd


@dataclass(frozen=True, kw_only=True)
class PartialConfig(AveragingConfig):
    """Options of every method that keeps a part of the model at the clients."""

    fine_tune: FineTuneConfig | None = None
    """Further steps on the own part before a client predicts; null is none."""
    personal_model: Literal["global", "local"] = "global"
    """What a client's own part predicts with: the newest shared part, or the client's own copy of
    it after its last local update."""


class OwnPart(NamedTuple):
    """State: the coordinates that a client keeps to itself (C, H)."""

    params_CH: Tensor


class OwnPartAndModel(NamedTuple):
    """State: the same, and the whole model after the client's last local update (C, P)."""

    params_CH: Tensor
    local_CP: Tensor


def last_layers(spec: ParamSpec, count: int, option: str) -> Tensor:
    """(P,) bool: the coordinates of the last ``count`` layers.

    Raises:
        ConfigError: fewer than none, or more than the model has; ``option`` is named.
    """
    if not 0 <= count <= len(spec.layers):
        raise ConfigError(
            f"method.{option} must lie in 0 .. {len(spec.layers)} (the model's layers: "
            f"{', '.join(spec.layers)}), got {count}"
        )
    return spec.mask(spec.layers[len(spec.layers) - count :])


def join(own_P: Tensor, own_CH: Tensor, shared_P: FlatParams) -> Tensor:
    """Whole models (C, P): the clients' own coordinates where ``own_P``, the shared ones else."""
    whole_CP = shared_P.expand(len(own_CH), -1).clone()
    whole_CP[:, own_P] = own_CH
    return whole_CP


def partly_shared(
    config: PartialConfig,
    federation: Federation,
    own_P: Tensor,
    train: Callable[[Stack, Tensor], Trained],
) -> Algorithm:
    """An averaging method in which each client keeps its own part of the model.

    Args:
        own_P: (P,) bool, the coordinates that stay at the client.
        train: (stack, start (C, P)) -> trained rows of whole models.
    """
    num_shared = int((~own_P).sum())
    own_P = own_P.clone()
    keeps_model = config.personal_model == "local"

    def whole(shared: Global, state: Any) -> Tensor:
        return join(own_P, state.params_CH, shared.params_P)

    def kept(params_CP: Tensor) -> OwnPart | OwnPartAndModel:
        own_CH = params_CP[:, own_P]
        return OwnPartAndModel(own_CH, params_CP.clone()) if keeps_model else OwnPart(own_CH)

    def local_update(shared: Global, per_client: Empty, state: Any, stack: Stack) -> Local:
        trained = train(stack, whole(shared, state))
        upload = Upload(trained.params_CP)
        own = kept(trained.params_CP)
        return Local(own, upload, Empty(), trained.loss_C, trained.num_steps_C)

    def adapt(shared: Global, per_client: Empty, state: Any, stack: Stack) -> Any:
        start_CP = whole(shared, state)
        trained = local_sgd(stack, start=start_CP, trainable=own_P.to(start_CP.device))
        return kept(trained.params_CP)

    def personalize(shared: Global, per_client: Any, state: Any, stack: Stack) -> Personal:
        start_CP = state.local_CP if keeps_model else whole(shared, state)
        if config.fine_tune is None:
            return at_no_cost(start_CP)
        mask_P = own_P.to(start_CP.device)
        return fine_tune(config.fine_tune, stack, start_CP, trainable=mask_P)

    return replace(
        fedavg(config, federation),
        local_update=local_update,
        aggregate=_aggregate(config, own_P),
        init_client=lambda params_P, count: kept(params_P.expand(count, -1)),
        personalize=personalize,
        adapt=adapt,
        traffic=lambda plan: Traffic(num_shared, num_shared),
        cautions=_cautions(own_P) + tuning_cautions(config.fine_tune, federation.training),
    )


def _aggregate(
    config: PartialConfig, own_P: Tensor
) -> Callable[[Server, Sums, Reports], tuple[Server, Record]]:
    """A step of the server optimizer of the shared part; the plain mean of the own parts."""
    step = average_with(server_optimizers.make(config.server), ~own_P)

    def aggregate(server: Server, sums: Sums, reports: Reports) -> tuple[Server, Record]:
        stepped, record = step(server, sums, reports)
        mean_P = sums[0].to(stepped.params_P.dtype)
        return Server(mean_P.where(own_P, stepped.params_P), stepped.memory), record

    return aggregate


def _cautions(own_P: Tensor) -> tuple[str, ...]:
    if bool(own_P.all()):
        return ("every layer stays at the clients: nothing is shared, this is local training",)
    if not bool(own_P.any()):
        return ("every layer is shared: no client keeps anything to itself, as in FedAvg",)
    return ()
