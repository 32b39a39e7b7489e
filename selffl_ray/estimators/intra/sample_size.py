"""Variance proportional to 1 / n: no measurement at all, the null hypothesis of the others.

Its vectors are the de-shrunk uploads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selffl_ray.errors import ConfigError
from selffl_ray.estimators.intra_base import (
    Evidence,
    IntraContext,
    IntraEstimator,
    Observed,
    deshrunk_uploads,
)
from selffl_ray.registry import register_intra_estimator


@dataclass(frozen=True, kw_only=True)
class SampleSizeConfig:
    """Options of ``intra: {name: sample_size}``."""

    scale: float = 1.0
    """Variance of one example, in the units of the parameters squared."""

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ConfigError(f"method.intra.scale must be >= 0, got {self.scale}")


def variance(num_examples: float, scale: float) -> float:
    """Scale / num_examples."""
    return scale / num_examples


@register_intra_estimator("sample_size", SampleSizeConfig)
def sample_size(config: SampleSizeConfig, context: IntraContext) -> IntraEstimator:
    """A constant over the number of examples."""

    def estimate(memory: object, observed: Observed) -> Evidence:
        vector_CP, good_CG = deshrunk_uploads(observed, context.groups)
        per_client = [variance(n, config.scale) for n in observed.stack.train.num_C.tolist()]
        var_C1 = torch.tensor(per_client, dtype=torch.float64).unsqueeze(1)
        return Evidence(vector_CP, torch.where(good_CG, var_C1, torch.nan))

    return IntraEstimator(estimate=estimate, on_params=True)
