"""DerSimonian-Laird: a moment estimate from vectors weighted by 1 / intra_var.

Source: DerSimonian and Laird 1986, "Meta-analysis in clinical trials", with d coordinates in place
of one. Small intra variances that are small by accident get too much weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

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
    """max(0, (Q - d (M - 1)) / (d (sum a - sum a^2 / sum a))), a = 1 / intra_var."""
    a_M = 1.0 / intra_var_M
    q, _ = precision_spread(required_gram(block), a_M)
    # sum a - sum a^2 / sum a as a sum over pairs: the difference cancels if one a is much larger.
    pairs_MM = np.outer(a_M, a_M)
    np.fill_diagonal(pairs_MM, 0.0)
    scale = block.dimension * pairs_MM.sum() / a_M.sum()
    return float(max(0.0, (q - block.dimension * (block.num_clients - 1)) / scale))


@register_inter_estimator("dl", NoOptions)
def dl(config: NoOptions) -> InterEstimator:
    """DerSimonian-Laird moment estimate."""
    return InterEstimator(solve=solve, needs_rows=True)


def estimate(vectors_MP: Any, intra_var_M: Any) -> float:
    """Variance between the rows of (M, P) beyond their noise; 0 for fewer than two."""
    return estimate_with(dl(NoOptions()), vectors_MP, intra_var_M)
