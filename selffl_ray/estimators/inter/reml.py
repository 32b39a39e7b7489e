"""Restricted maximum likelihood: ``ml`` with the uncertainty of the mean taken into account.

Source: Viechtbauer 2005, "Bias and efficiency of meta-analytic variance estimators in the
random-effects model", with d coordinates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from selffl_ray.estimators.inter_base import (
    Block,
    Floats,
    InterEstimator,
    NoOptions,
    block_from_rows,
    estimate_with,
    floored,
    precision_spread,
    required_gram,
)
from selffl_ray.estimators.likelihood import maximise
from selffl_ray.registry import register_inter_estimator


def solve(block: Block, intra_var_M: Floats) -> float:
    """Global maximum over t >= 0 of the restricted likelihood."""
    return maximise(block, intra_var_M, restricted=True)


@register_inter_estimator("reml", NoOptions)
def reml(config: NoOptions) -> InterEstimator:
    """Restricted maximum likelihood."""
    return InterEstimator(solve=solve, needs_rows=True)


def estimate(vectors_MP: Any, intra_var_M: Any) -> float:
    """Variance between the rows of (M, P) beyond their noise; 0 for fewer than two."""
    return estimate_with(reml(NoOptions()), vectors_MP, intra_var_M)


def em_step(tau2: float, vectors_MP: Any, intra_var_M: Any, reml: bool = True) -> float:
    """One step of the EM iteration whose fixed point is REML, or ML with ``reml=False``.

    k_m = t / (t + intra_m), G = mu(t): t <- mean_m [k_m^2 |x_m - G|^2 / d + k_m intra_m
    + k_m^2 / sum w], the last term for REML only.
    """
    block, intra_M = block_from_rows(vectors_MP), floored(intra_var_M)
    if tau2 <= 0:
        return 0.0
    weight_M = 1.0 / (intra_M + tau2)
    keep_M = tau2 * weight_M
    _, square_M = precision_spread(required_gram(block), weight_M)
    terms_M = keep_M**2 * square_M / block.dimension + keep_M * intra_M
    if reml:
        terms_M = terms_M + keep_M**2 / weight_M.sum()
    return float(np.mean(terms_M))
