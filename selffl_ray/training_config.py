"""How every client trains, whatever the method: the ``training`` part of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from selffl_ray.errors import ConfigError
from selffl_ray.stopping import StopConfig
from selffl_ray.trouble import TroubleConfig

Schedule = Literal["constant", "linear", "cosine", "step"]

CHANGEABLE = (
    "learning_rate",
    "num_local_steps",
    "num_local_epochs",
    "batch_size",
    "momentum",
    "weight_decay",
    "clip_norm",
)
"""Options that may change between rounds: each round's local training begins afresh."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How every client trains, whatever the method."""

    num_rounds: int = 30
    participation_rate: float = 1.0
    """Share of the clients asked in a round, in (0, 1]; at least one is."""
    batch_size: int = 20
    learning_rate: float = 0.3
    num_local_steps: int | None = None
    """SGD steps a round; 20 if neither this nor num_local_epochs is given."""
    num_local_epochs: int | None = None
    """Passes over the client's own data a round, instead of a number of steps."""
    sampling: Literal["epoch", "replacement"] = "epoch"
    """Batches cut from a fresh permutation each epoch (the last one may be short), or drawn with
    replacement (always full)."""
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Largest Euclidean norm of a client's gradient; null is no clipping."""
    schedule: Schedule = "constant"
    """Learning rate over rounds: constant, falling linearly or as a half cosine to 0, or a tenth
    after half and again after three quarters of the rounds."""
    start_from: str | None = None
    """safetensors file with the start of the global model, as the run's models/ folder has it."""
    stop: StopConfig = field(default_factory=StopConfig)
    trouble: TroubleConfig = field(default_factory=TroubleConfig)
    """Clients that are away, drop out or are slow, for studies; none by default."""

    def __post_init__(self) -> None:
        for name in ("num_rounds", "batch_size", "num_local_steps", "num_local_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.{name} must be >= 1, got {value}")
        if self.num_local_steps is not None and self.num_local_epochs is not None:
            raise ConfigError(
                f"training.num_local_steps ({self.num_local_steps}) and num_local_epochs "
                f"({self.num_local_epochs}) exclude each other; keep one"
            )
        if self.num_local_steps is None and self.num_local_epochs is None:
            object.__setattr__(self, "num_local_steps", 20)
        if not 0 < self.participation_rate <= 1:
            raise ConfigError(
                f"training.participation_rate must lie in (0, 1], got {self.participation_rate}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                f"training.learning_rate must be > 0, got {self.learning_rate}; usual values are "
                "0.01 to 0.3"
            )
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"training.momentum must lie in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"training.weight_decay must be >= 0, got {self.weight_decay}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ConfigError(
                f"training.clip_norm must be > 0, got {self.clip_norm}; null switches it off"
            )

        self.trouble.check_rate(self.participation_rate)

    @property
    def simulates(self) -> bool:
        """Whether trouble or virtual time is simulated, and stands in the tables."""
        return not self.trouble.is_none or self.stop.virtual_s is not None

    @property
    def everybody_trains(self) -> bool:
        """Whether every client takes part in every round (faults aside)."""
        return self.participation_rate == 1 and not self.trouble.keeps_away

    def rate(self, round_index: int) -> float:
        """Learning rate of a round under the schedule."""
        done = round_index / self.num_rounds
        factor = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
            "step": 0.1 ** ((done >= 0.5) + (done >= 0.75)),
        }[self.schedule]
        return self.learning_rate * factor

    def steps(self, num_examples: int) -> int:
        """Local steps a round of a client with that many training examples."""
        if self.num_local_epochs is None:
            assert self.num_local_steps is not None
            return self.num_local_steps
        return self.num_local_epochs * math.ceil(num_examples / self.batch_size)

    def batch_length(self, num_examples: int) -> int:
        """Rows of a client's padded batch: a constant of the client, whatever its neighbours.

        The batch size, or for a client that never fills one the next power of two.
        """
        if self.sampling == "replacement" or num_examples >= self.batch_size:
            return self.batch_size
        return min(self.batch_size, 1 << max(0, num_examples - 1).bit_length())
