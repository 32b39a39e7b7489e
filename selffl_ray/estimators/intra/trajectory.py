"""Variance of the SGD iterates within a round, over its last half.

Measures optimisation noise, about eta / (2 h batch) times the gradient noise, which does not know
the number of examples; nearly flat in n.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from selffl_ray.estimators.inter_base import NoOptions
from selffl_ray.estimators.intra_base import Evidence, IntraContext, IntraEstimator, Observed
from selffl_ray.flat import Groups
from selffl_ray.registry import register_intra_estimator
from selffl_ray.training import tail_counts


def variance(iterates_TP: Any) -> float | None:
    """sum_t |z_t - mean|^2 / (d (T - 1)) of iterates (T, P); None for fewer than two."""
    iterates = np.asarray(iterates_TP, dtype=np.float64)
    if len(iterates) < 2:
        return None
    spread = float(((iterates - iterates.mean(axis=0)) ** 2).sum())
    return float(spread / (iterates.shape[1] * (len(iterates) - 1)))


@register_intra_estimator("trajectory", NoOptions)
def trajectory(config: NoOptions, context: IntraContext) -> IntraEstimator:
    """Spread of the parameters over the last half of a round's steps."""
    return IntraEstimator(
        estimate=lambda memory, observed: Evidence(
            observed.upload_CP, spread_over_tail(observed, context.groups)
        ),
        watches=True,
        on_params=True,
    )


def spread_over_tail(observed: Observed, groups: Groups) -> Tensor:
    """Variance over the last half of the steps: (C, G) float64, NaN for fewer than two iterates."""
    tail = observed.tail
    assert tail is not None, "the estimator watches"
    assert tail.square_CP is not None, "with squares"
    count_C1 = tail_counts(observed.steps_C).double().unsqueeze(1)
    sizes_G = torch.from_numpy(groups.sizes_G)
    square_CG = groups.sum(tail.square_CP).cpu() / sizes_G
    mean_CP = tail.sum_CP.double() / count_C1.clamp(min=1).to(tail.sum_CP.device)
    spread_CG = square_CG - count_C1 * groups.mean_square(mean_CP).cpu()
    var_CG = spread_CG.clamp(min=0.0) / (count_C1 - 1).clamp(min=1)
    return torch.where(count_C1 > 1, var_CG, torch.nan)
