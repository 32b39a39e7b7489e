"""Paule-Mandel: the variance at which the weighted spread equals its expectation.

Source: Paule and Mandel 1982, "Consensus values and weighting factors", with d coordinates.
"""

from __future__ import annotations

from typing import Any

from selffl_ray.estimators.inter_base import (
    Block,
    Floats,
    InterEstimator,
    NoOptions,
    estimate_with,
    precision_spread,
    required_gram,
)
from selffl_ray.registry import register_inter_estimator


def solve(block: Block, intra_var_M: Floats) -> float:
    """Root t of sum_m |x_m - mu(t)|^2 / (intra_m + t) = d (M - 1), or 0."""
    # Imported here: hosts know every estimator, and only the server looks for roots.
    from scipy.optimize import brentq

    gram, expected = required_gram(block), block.dimension * (block.num_clients - 1)

    def excess(tau2: float) -> float:
        return precision_spread(gram, 1.0 / (intra_var_M + tau2))[0] - expected

    if excess(0.0) <= 0:
        return 0.0
    # Weighted spread <= spread / t, which is below its expectation from here on.
    upper = block.spread / expected
    while excess(upper) > 0:
        upper *= 2
    return float(brentq(excess, 0.0, upper, xtol=1e-300, rtol=1e-12))


@register_inter_estimator("pm", NoOptions)
def pm(config: NoOptions) -> InterEstimator:
    """Paule-Mandel: generalised-Q moment estimate."""
    return InterEstimator(solve=solve, needs_rows=True)


def estimate(vectors_MP: Any, intra_var_M: Any) -> float:
    """Variance between the rows of (M, P) beyond their noise; 0 for fewer than two."""
    return estimate_with(pm(NoOptions()), vectors_MP, intra_var_M)
