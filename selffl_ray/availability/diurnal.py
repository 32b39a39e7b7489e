"""Clients that are there by day: the probability is a sine of the round, with a client's own phase.

P(client m is there in round r) = mean + amplitude sin(2 pi (r / period + phase_m)), drawn anew for
each round; phase_m is uniform over a share ``phase_spread`` of a day: 0 has all clients in one time
zone, 1 spreads them around the world, so that the number that is there hardly moves.
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
class DiurnalConfig:
    """Options of ``availability: diurnal``."""

    period: float = 24.0
    """Rounds of a day, >= 2."""
    mean: float = 0.5
    """Probability of being there over a whole day, in (0, 1)."""
    amplitude: float = 0.4
    """How far it rises and falls, > 0; at most what leaves it within [0, 1]."""
    phase_spread: float = 0.25
    """Share of a day over which the clients' days are shifted, in [0, 1]."""

    def __post_init__(self) -> None:
        most = min(self.mean, 1 - self.mean)
        rules = (
            ("period", 2 <= self.period < math.inf, ">= 2 rounds"),
            ("mean", 0 < self.mean < 1, "in (0, 1)"),
            # A little more: 1 - 0.6 is 0.4 and 1 - 0.9 is not 0.1.
            ("amplitude", 0 < self.amplitude <= most + 1e-9, f"> 0 and <= {most:.6g} at this mean"),
            ("phase_spread", 0 <= self.phase_spread <= 1, "in [0, 1]"),
        )
        for name, good, rule in rules:
            if not good:
                raise ConfigError(
                    f"training.trouble.availability.{name} must be {rule}, got "
                    f"{getattr(self, name)}"
                )


def probability(config: DiurnalConfig, phase: npt.ArrayLike, rounds: npt.ArrayLike) -> np.ndarray:
    """Probability of being there at a phase (in days), in [0, 1]."""
    turn = 2 * np.pi * (np.asarray(rounds) / config.period + np.asarray(phase))
    return np.asarray(np.clip(config.mean + config.amplitude * np.sin(turn), 0.0, 1.0))


@register_availability("diurnal", DiurnalConfig)
def diurnal(
    config: DiurnalConfig, seed: int, client_ids: Sequence[str], num_rounds: int
) -> npt.NDArray[np.bool_]:
    """Clients are there by day, each with a phase of its own."""
    phase_M1 = client_draws(seed, "trouble/phase", client_ids, lambda rng: rng.random(1))
    u_MR = client_draws(
        seed, "trouble/availability", client_ids, lambda rng: rng.random(num_rounds)
    )
    p_MR = probability(config, config.phase_spread * phase_M1, np.arange(num_rounds))
    return np.asarray(u_MR < p_MR)
