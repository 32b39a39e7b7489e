"""Plain variance of the clients' vectors: sum_m |x_m - mean|^2 / (d (M - 1)).

Its expectation is inter_var + mean intra_var: it takes noise for difference between clients.
"""

from __future__ import annotations

from typing import Any

from selffl_ray.estimators.inter_base import (
    Block,
    Floats,
    InterEstimator,
    NoOptions,
    estimate_with,
)
from selffl_ray.registry import register_inter_estimator


def solve(block: Block, intra_var_M: Floats) -> float:
    """The plain variance; the intra-client variances are not used."""
    return block.spread / (block.dimension * (block.num_clients - 1))


@register_inter_estimator("empirical", NoOptions)
def empirical(config: NoOptions) -> InterEstimator:
    """Plain variance between clients, noise included (biased by the mean intra variance)."""
    return InterEstimator(solve=solve)


def estimate(vectors_MP: Any, intra_var_M: Any) -> float:
    """Variance between the rows of (M, P); 0 for fewer than two."""
    return estimate_with(empirical(NoOptions()), vectors_MP, intra_var_M)
