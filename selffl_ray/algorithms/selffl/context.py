"""What both halves of Self-FL know, and the messages that they exchange.

Shape letters: C clients of a stack, P parameters, G parameter groups, M clients that take part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from selffl_ray.algorithms.base import Federation
from selffl_ray.algorithms.selffl.config import SelfFLConfig
from selffl_ray.errors import ConfigError
from selffl_ray.estimators.inter_base import InterEstimator
from selffl_ray.estimators.intra_base import IntraContext, IntraEstimator
from selffl_ray.flat import Groups
from selffl_ray.registry import inter_estimators, intra_estimators

MOST_ROWS = 512
"""Clients up to which single vectors may reach the server."""

MOST_NUMBERS = 50_000_000
"""Clients times parameter groups up to which each has a variance of its own."""


class Server(NamedTuple):
    """Server state.

    params_P: global model. others_P: its mean without the client that holds more than half of a
    group's weight. inter_G, intra_MG: smoothed normalised variances, NaN unknown; raw_*: the last
    raw ones. age_M: rounds since the last upload, -1 never. usable_MG: uploads that can be
    weighed. weight_MG: weights of the last aggregation.
    """

    params_P: Tensor
    others_P: Tensor
    inter_G: Tensor
    intra_MG: Tensor
    raw_inter_G: Tensor
    raw_intra_MG: Tensor
    age_M: Tensor
    usable_MG: Tensor
    weight_MG: Tensor


class Shared(NamedTuple):
    """Broadcast: the global model, and the mean without a dominating client."""

    params_P: Tensor
    others_P: Tensor


class PerClient(NamedTuple):
    """Of each client, (C, G): weight in the global model, and shrink factor (NaN unknown)."""

    weight_CG: Tensor
    shrink_CG: Tensor


class State(NamedTuple):
    """Kept by a client.

    upload_CP: what it last uploaded. personal_CP: its personalized model, (C, 0) if that is made
    anew each time. persistent_CP: the model behind it that goes on training (``map``), or (C, 0).
    memory: what the intra-client estimator remembers.
    """

    upload_CP: Tensor
    personal_CP: Tensor
    persistent_CP: Tensor
    memory: Any


class Payload(NamedTuple):
    """A probe's vectors (C, P) with unknown groups zeroed, or (C, 0) without a probe."""

    vector_CP: Tensor


class Report(NamedTuple):
    """Of each client, (C, G), after its update.

    var_CG: raw variance, NaN unknown or no probe. mean_square_CG: of the vector. usable_CG: whether
    the upload can be weighed.
    """

    var_CG: Tensor
    mean_square_CG: Tensor
    usable_CG: Tensor


@dataclass(frozen=True)
class Context:
    """Options, clients, parameter groups and the two estimators."""

    config: SelfFLConfig
    federation: Federation
    groups: Groups
    intra: IntraEstimator
    inter: InterEstimator

    @property
    def num_params(self) -> int:
        """P."""
        return self.federation.spec.num_params

    @property
    def keeps_personal(self) -> bool:
        """The personalized model is part of the client's state."""
        return self.config.upload == "personal" or self.config.personalization == "map"

    @property
    def known_inter_var(self) -> float | None:
        """The true variance between clients, if it is to be used."""
        known = self.federation.known
        return known.inter_var if self.inter.known and known is not None else None


def build_context(config: SelfFLConfig, federation: Federation) -> Context:
    """Estimators by name, with the limits that they set checked.

    Raises:
        ConfigError: an unknown estimator, ``known`` without known variances, or more clients than
            an estimator or a granularity can serve.
    """
    groups = federation.spec.groups(config.granularity)
    count = federation.num_clients
    inter: InterEstimator = inter_estimators.make(config.inter)
    if inter.needs_rows and count > MOST_ROWS:
        raise ConfigError(
            f"method.inter: {config.inter.name} needs every client's vector at the server, which "
            f"is refused above {MOST_ROWS} clients ({count} here); use moments"
        )
    if count * groups.num_groups > MOST_NUMBERS:
        raise ConfigError(
            f"method.granularity: {config.granularity} keeps {count} x {groups.num_groups} "
            f"variances, more than {MOST_NUMBERS}; use layer or model"
        )
    if inter.known and federation.known is None:
        raise ConfigError(
            "method.inter: known needs data with known variances; use data.name gaussian, or "
            "another estimator"
        )
    curvature = config.assumed_curvature(federation.training.learning_rate)
    intra = intra_estimators.make(
        config.intra,
        IntraContext(groups, curvature, federation.num_outputs, _known_var(federation)),
    )
    if intra.exact:
        # Pooling borrows strength for noisy estimates; the truth needs none.
        config = replace(config, intra_pooling="own")
    return Context(config, federation, groups, intra, inter)


def _known_var(federation: Federation) -> dict[str, float] | None:
    if federation.known is None:
        return None
    return dict(zip(federation.client_ids, federation.known.intra_var_M.tolist(), strict=True))
