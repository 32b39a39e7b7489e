"""Clients that come and go: a two-state chain each.

A client that is there goes away with probability 1 / mean_up before the next round, and one that is
away comes back with probability 1 / mean_down: stays are geometric with these means. The chain
starts in its stationary law, so that in every round a client is there with probability
mean_up / (mean_up + mean_down).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from selffl_ray.errors import ConfigError
from selffl_ray.registry import register_availability
from selffl_ray.seeding import client_draws


@dataclass(frozen=True, kw_only=True)
class MarkovConfig:
    """Options of ``availability: markov``."""

    mean_up: float = 8.0
    """Rounds that a client stays on average, >= 1."""
    mean_down: float = 2.0
    """Rounds that it is away on average, >= 1."""

    def __post_init__(self) -> None:
        for name in ("mean_up", "mean_down"):
            value = getattr(self, name)
            if not 1 <= value < math.inf:
                raise ConfigError(
                    f"training.trouble.availability.{name} must be >= 1 rounds, got {value}; a "
                    "stay shorter than a round cannot be seen"
                )


@register_availability("markov", MarkovConfig)
def markov(
    config: MarkovConfig, seed: int, client_ids: Sequence[str], num_rounds: int
) -> npt.NDArray[np.bool_]:
    """Clients come and go; stays and absences are geometric."""
    u_MR = client_draws(
        seed, "trouble/availability", client_ids, lambda rng: rng.random(num_rounds)
    )
    there_MR = np.empty(u_MR.shape, bool)
    there_MR[:, 0] = u_MR[:, 0] < config.mean_up / (config.mean_up + config.mean_down)
    for now in range(1, num_rounds):
        stays_M = u_MR[:, now] >= 1 / config.mean_up
        returns_M = u_MR[:, now] < 1 / config.mean_down
        there_MR[:, now] = np.where(there_MR[:, now - 1], stays_M, returns_M)
    return there_MR
