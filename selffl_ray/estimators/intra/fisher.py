"""Inverse diagonal Fisher information: mean_j 1 / (n F_j + damping), F_j = mean_i g_ij^2.

Damping is not optional in networks, where many coordinates have no gradient at all. Its vectors
are the de-shrunk uploads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selffl_ray.errors import ConfigError
from selffl_ray.estimators.intra_base import (
    Evidence,
    IntraContext,
    IntraEstimator,
    Observed,
    deshrunk_uploads,
    example_gradients,
)
from selffl_ray.registry import register_intra_estimator


@dataclass(frozen=True, kw_only=True)
class FisherConfig:
    """Options of ``intra: {name: fisher}``."""

    damping: float = 1.0
    """Added to n F_j, in the units of an inverse variance."""

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ConfigError(f"method.intra.damping must be > 0, got {self.damping}")


def variance(per_example_grads_NP: Any, damping: float) -> float:
    """Mean over coordinates of 1 / (n F_j + damping), from gradients (N, P)."""
    grads = np.asarray(per_example_grads_NP, dtype=np.float64)
    return float((1.0 / ((grads**2).sum(axis=0) + damping)).mean())


@register_intra_estimator("fisher", FisherConfig)
def fisher(config: FisherConfig, context: IntraContext) -> IntraEstimator:
    """Inverse diagonal Fisher information (not recommended in networks)."""
    return IntraEstimator(
        estimate=lambda memory, observed: _estimate(observed, context, config), on_params=True
    )


def _estimate(observed: Observed, context: IntraContext, config: FisherConfig) -> Evidence:
    stack, groups = observed.stack, context.groups
    rows = []
    for row in range(stack.num_clients):
        information_P = torch.zeros_like(observed.global_P, dtype=torch.float64)
        for grads_EP in example_gradients(stack, observed.global_P, row):
            information_P += grads_EP.double().square().sum(0)
        inverse_P = 1.0 / (information_P + config.damping)
        rows.append(groups.sum(inverse_P.unsqueeze(0))[0].cpu() / torch.from_numpy(groups.sizes_G))
    vector_CP, good_CG = deshrunk_uploads(observed, groups)
    return Evidence(vector_CP, torch.where(good_CG, torch.stack(rows), torch.nan))
