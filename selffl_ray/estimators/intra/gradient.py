"""Sampling variance of the mean gradient from per-example gradients (sandwich with H = h I).

sum_i |g_i - mean|^2 / (n (n - 1) d h^2): the limit of ``gradient_chunks`` with a chunk an example.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from selffl_ray.estimators.inter_base import NoOptions
from selffl_ray.estimators.intra_base import (
    Evidence,
    IntraContext,
    IntraEstimator,
    Observed,
    example_gradients,
)
from selffl_ray.registry import register_intra_estimator


def variance(per_example_grads_NP: Any, curvature: float = 1.0) -> float:
    """Variance a coordinate of the local optimum, from gradients (N, P); NaN for one example."""
    grads = np.asarray(per_example_grads_NP, dtype=np.float64)
    count, dimension = grads.shape
    if count < 2:
        return float("nan")
    spread = float(((grads - grads.mean(axis=0)) ** 2).sum())
    return float(spread / (count * (count - 1) * dimension * curvature**2))


@register_intra_estimator("gradient", NoOptions)
def gradient(config: NoOptions, context: IntraContext) -> IntraEstimator:
    """Variance of the mean gradient from per-example gradients."""
    return IntraEstimator(estimate=lambda memory, observed: _estimate(observed, context))


def _estimate(observed: Observed, context: IntraContext) -> Evidence:
    stack, groups = observed.stack, context.groups
    means, variances = [], []
    for row, count in enumerate(stack.train.num_C.tolist()):
        total_P = torch.zeros_like(observed.global_P, dtype=torch.float64)
        square_G = torch.zeros(groups.num_groups, dtype=torch.float64)
        for grads_EP in example_gradients(stack, observed.global_P, row):
            total_P += grads_EP.double().sum(0)
            square_G += groups.mean_square(grads_EP).sum(0).cpu()
        mean_P = total_P / count
        spread_G = square_G / count - groups.mean_square(mean_P.unsqueeze(0))[0].cpu()
        unknown = torch.full_like(spread_G, torch.nan)
        variances.append(spread_G.clamp(min=0.0) / (count - 1) if count > 1 else unknown)
        means.append(mean_P.to(observed.global_P.dtype))
    return Evidence(torch.stack(means), torch.stack(variances))
