"""Spread of the iterates within a round, rescaled to the sampling variance of the local optimum.

Stationary SGD with rate eta has variance eta g / (2 h batch), g the noise of one example's
gradient, while the local optimum has g / (h^2 n): times 2 batch / (eta h n).
Source: Mandt, Hoffman and Blei 2017, "Stochastic gradient descent as approximate Bayesian
inference".
"""

from __future__ import annotations

from typing import Any

import torch

from selffl_ray.estimators.inter_base import NoOptions
from selffl_ray.estimators.intra import trajectory
from selffl_ray.estimators.intra_base import Evidence, IntraContext, IntraEstimator, Observed
from selffl_ray.registry import register_intra_estimator


def variance(
    iterates_TP: Any, batch_size: int, learning_rate: float, curvature: float, num_examples: int
) -> float | None:
    """Rescaled variance of iterates (T, P); None for fewer than two."""
    plain = trajectory.variance(iterates_TP)
    return (
        None
        if plain is None
        else plain * _factor(batch_size, learning_rate, curvature, num_examples)
    )


def _factor(batch_size: Any, learning_rate: Any, curvature: float, num_examples: Any) -> Any:
    return 2.0 * batch_size / (learning_rate * curvature * num_examples)


@register_intra_estimator("trajectory_rescaled", NoOptions)
def trajectory_rescaled(config: NoOptions, context: IntraContext) -> IntraEstimator:
    """Spread within a round, rescaled from optimisation noise to sampling variance."""

    def estimate(memory: object, observed: Observed) -> Evidence:
        stack = observed.stack
        num_C = stack.train.num_C.double()
        whole = float(stack.training.batch_size)
        drawn = stack.training.sampling == "replacement"
        batch_C = torch.full_like(num_C, whole) if drawn else num_C.clamp(max=whole)
        factor_C = _factor(batch_C, observed.rate_C.double(), context.curvature, num_C)
        var_CG = trajectory.spread_over_tail(observed, context.groups)
        return Evidence(observed.upload_CP, var_CG * factor_C.unsqueeze(1))

    return IntraEstimator(estimate=estimate, watches=True, on_params=True)
