"""What several averaging methods share: how the models are weighed, and what "plain SGD" means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selffl_ray.algorithms.base import Mean
from selffl_ray.algorithms.fedavg import AveragingConfig, uploaded
from selffl_ray.errors import ConfigError
from selffl_ray.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class WeighedConfig(AveragingConfig):
    """Options of averaging methods whose source takes the plain mean over the clients."""

    aggregation: Literal["uniform", "sample_size"] = "uniform"
    """Weights of the uploads: the same for all, or the clients' numbers of examples."""


def mean_of_models(config: WeighedConfig) -> Mean:
    """The mean of the trained models under the option ``aggregation``."""
    return Mean(uploaded, "uniform" if config.aggregation == "uniform" else "num_examples")


COUPLED = "its two coupled sequences of steps are plain SGD"
"""Why momentum and the like have no meaning in methods with an own model beside w."""


def require_plain_sgd(method: str, training: TrainingConfig, why: str = COUPLED) -> None:
    """Refuse training options under which a method's rule does not hold.

    Raises:
        ConfigError: momentum, weight decay or clipping is set.
    """
    plain = {"momentum": 0.0, "weight_decay": 0.0, "clip_norm": None}
    for name, off in plain.items():
        if getattr(training, name) != off:
            raise ConfigError(
                f"training.{name} must be {'null' if off is None else 0} with method {method}, got "
                f"{getattr(training, name)}: {why}; remove it or take another method"
            )
