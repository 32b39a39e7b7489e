"""Plain variance minus the mean intra-client variance, at least 0. The default.

Linear, needs no iteration, and does not divide by noisy variances.
"""

from __future__ import annotations

from typing import Any

from selffl_ray.estimators.inter import empirical
from selffl_ray.estimators.inter_base import (
    Block,
    Floats,
    InterEstimator,
    NoOptions,
    estimate_with,
)
from selffl_ray.registry import register_inter_estimator


def solve(block: Block, intra_var_M: Floats) -> float:
    """max(0, empirical - mean intra_var)."""
    return max(0.0, empirical.solve(block, intra_var_M) - float(intra_var_M.mean()))


@register_inter_estimator("moments", NoOptions)
def moments(config: NoOptions) -> InterEstimator:
    """Method of moments: plain variance minus the mean intra variance (the default)."""
    return InterEstimator(solve=solve)


def estimate(vectors_MP: Any, intra_var_M: Any) -> float:
    """Variance between the rows of (M, P) beyond their noise; 0 for fewer than two."""
    return estimate_with(moments(NoOptions()), vectors_MP, intra_var_M)
