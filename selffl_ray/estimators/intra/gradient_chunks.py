"""Sampling variance of the mean gradient from chunks of the local data. The default.

J disjoint chunks cover the data, p_j their shares, C_j their mean gradients at the global model:
sum_j p_j |C_j - mean|^2 / ((J - 1) d h^2). One pass over the local data, no per-example gradients.
Falls as 1 / n, unlike variances over training time, which see optimisation noise only.
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
    chunk_gradients,
)
from selffl_ray.flat import in_blocks
from selffl_ray.registry import register_intra_estimator


@dataclass(frozen=True, kw_only=True)
class GradientChunksConfig:
    """Options of ``intra: {name: gradient_chunks}``."""

    num_chunks: int = 8
    """J; clients with fewer examples have a chunk for each, and with one example no estimate."""

    def __post_init__(self) -> None:
        if self.num_chunks < 2:
            raise ConfigError(f"method.intra.num_chunks must be >= 2, got {self.num_chunks}")


def variance(chunk_grads_JP: Any, sizes_J: Any = None, curvature: float = 1.0) -> float:
    """Variance a coordinate of the local optimum, from chunk gradients (J, P); NaN for one chunk.

    Args:
        sizes_J: examples of each chunk; equal by default.
    """
    grads = np.asarray(chunk_grads_JP, dtype=np.float64)
    if len(grads) < 2:
        return float("nan")
    share_J = np.ones(len(grads)) if sizes_J is None else np.asarray(sizes_J, dtype=np.float64)
    share_J = share_J / share_J.sum()
    away = grads - share_J @ grads
    spread = float((share_J[:, None] * away**2).sum())
    return float(spread / ((len(grads) - 1) * grads.shape[1] * curvature**2))


@register_intra_estimator("gradient_chunks", GradientChunksConfig)
def gradient_chunks(config: GradientChunksConfig, context: IntraContext) -> IntraEstimator:
    """Variance of the mean gradient between chunks of the local data (the default)."""
    return IntraEstimator(
        estimate=lambda memory, observed: estimate_chunks(observed, context, config.num_chunks)
    )


def estimate_chunks(observed: Observed, context: IntraContext, num_chunks: int) -> Evidence:
    """Mean gradient at the global model, and its variance from the chunks, on gradient scale.

    The scale keeps h = 1: curvature cancels between this and the spread of the same vectors.
    """
    stack, groups = observed.stack, context.groups
    mean_CP = torch.zeros((stack.num_clients, stack.spec.num_params), dtype=torch.float64).to(
        observed.global_P.device
    )
    square_CG = torch.zeros((stack.num_clients, groups.num_groups), dtype=torch.float64)
    chunks_C1 = torch.ones((stack.num_clients, 1), dtype=torch.float64)
    for part in chunk_gradients(stack, observed.global_P, num_chunks):
        start = 0
        for grad_BP in in_blocks(part.grad_AP):
            block = slice(start, start := start + len(grad_BP))
            rows, share_B1 = part.rows[block], part.share_A[block].unsqueeze(1)
            exact_BP = grad_BP.to(torch.float64, copy=True)
            square_CG.index_add_(0, rows, groups.mean_square(exact_BP).cpu() * share_B1)
            weighted_BP = exact_BP.mul_(share_B1.to(mean_CP.device))
            mean_CP.index_add_(0, rows.to(mean_CP.device), weighted_BP)
        chunks_C1[part.rows] = float(part.num_chunks)
    spread_CG = (square_CG - groups.mean_square(mean_CP).cpu()).clamp(min=0.0)
    var_CG = torch.where(chunks_C1 > 1, spread_CG / (chunks_C1 - 1).clamp(min=1), torch.nan)
    return Evidence(mean_CP.to(observed.global_P.dtype), var_CG)
