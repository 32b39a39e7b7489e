"""Maximum likelihood of the two-level model in the variance between clients.

Biased downwards with few clients, because the mean is estimated too: see ``reml``.
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
from selffl_ray.estimators.likelihood import maximise
from selffl_ray.registry import register_inter_estimator


def solve(block: Block, intra_var_M: Floats) -> float:
    """Global maximum over t >= 0 of the profile likelihood."""
    return maximise(block, intra_var_M, restricted=False)


@register_inter_estimator("ml", NoOptions)
def ml(config: NoOptions) -> InterEstimator:
    """Maximum likelihood (low-biased for few clients)."""
    return InterEstimator(solve=solve, needs_rows=True)


def estimate(vectors_MP: Any, intra_var_M: Any) -> float:
    """Variance between the rows of (M, P) beyond their noise; 0 for fewer than two."""
    return estimate_with(ml(NoOptions()), vectors_MP, intra_var_M)
