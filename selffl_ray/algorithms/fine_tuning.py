"""Fine-tuning: further local steps that turn a client's start into its personalized model.

What is trained here is scored and forgotten: nothing of it is sent or kept. The batches come from
the stream ``readout``, as those of Self-FL's readouts do, so that they differ in no luck.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selffl_ray.algorithms.base import Personal
from selffl_ray.errors import ConfigError
from selffl_ray.training import (
    Stack,
    TrainingConfig,
    local_sgd,
    observe_tail,
    start_tail,
    tail_mean,
)


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """The ``fine_tune`` part of a method: steps on the client's own training examples."""

    steps: int = 50
    """SGD steps, >= 0; 0 is none. Usual values 5 to 200."""
    rate: float = 0.1
    """Learning rate over the training rate of the round, after its schedule, > 0; usual values
    0.03 to 1."""
    tail_average: bool = False
    """Take the mean of the second half of the iterates for the last one."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"method.fine_tune.steps must be >= 0, got {self.steps}")
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"method.fine_tune.rate must be > 0, got {self.rate}")


def tuning_cautions(config: FineTuneConfig | None, training: TrainingConfig) -> tuple[str, ...]:
    """What to say where the schedule of the training lets fine-tuning do next to nothing."""
    if config is None or not config.steps or training.schedule == "constant":
        return ()
    last = config.rate * training.rate(training.num_rounds - 1)
    return (
        f"training.schedule {training.schedule} holds for fine-tuning too: after the last round "
        f"its rate is {last:.2g}; raise fine_tune.rate if that is too little",
    )


def fine_tune(
    config: FineTuneConfig, stack: Stack, start: Tensor, *, trainable: Tensor | None = None
) -> Personal:
    """Models after ``config.steps`` steps from the start, and their cost.

    Args:
        start: (P,) for all, or (C, P); not changed.
        trainable: (P,) bool; other coordinates keep their values. All by default.
    """
    count = stack.num_clients
    steps_C = torch.full((count,), config.steps, dtype=torch.int64)
    trained = local_sgd(
        stack,
        start=start,
        steps_C=steps_C,
        rate_C=config.rate * stack.learning_rate,
        stream="readout",
        trainable=trainable,
        observe=observe_tail if config.tail_average else None,
        seen=start_tail(start, count) if config.tail_average else None,
    )
    if config.tail_average:
        return Personal(tail_mean(trained.seen, steps_C).expand(count, -1), steps_C)
    return Personal(trained.params_CP, steps_C)
