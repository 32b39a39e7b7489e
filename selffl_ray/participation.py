"""Who is asked in each round: drawn once for the whole run, the same for every method.

Methods that are compared must not differ in luck, so the plan depends on the seed and on the
participation options only, never on what a method does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from selffl_ray.errors import ConfigError
from selffl_ray.seeding import generator
from selffl_ray.training import TrainingConfig

MOST_ROUNDS = 10**6

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RoundPlan:
    """What is fixed about a round before it starts.

    cohort: indices of the clients asked, ascending; learning_rate: after the schedule.
    """

    round_index: int
    cohort: Indices
    learning_rate: float


def plan_rounds(seed: int, training: TrainingConfig, num_clients: int) -> list[RoundPlan]:
    """The plan of every round: participation_rate of the clients, at least one, no repeats."""
    if training.num_rounds > MOST_ROUNDS:
        raise ConfigError(
            f"training.num_rounds must be at most {MOST_ROUNDS}, since each is planned before the "
            f"first begins, got {training.num_rounds}"
        )
    size = max(1, round(training.participation_rate * num_clients))
    plans = []
    for index in range(training.num_rounds):
        rng = generator(seed, "participation", index)
        drawn = rng.choice(num_clients, size=size, replace=False)
        plans.append(RoundPlan(index, np.sort(drawn).astype(np.int64), training.rate(index)))
    return plans
