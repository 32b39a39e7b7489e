"""Variance from two trainings on disjoint halves of the local data: |a - b|^2 / (4 d).

Each half has twice the variance of the whole, so the difference has four times. Unbiased in the
Gaussian model, noisy, and it costs two extra trainings a probe.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from selffl_ray.estimators.inter_base import NoOptions
from selffl_ray.estimators.intra_base import Evidence, IntraContext, IntraEstimator, Observed
from selffl_ray.registry import register_intra_estimator
from selffl_ray.seeding import generator
from selffl_ray.training import Rows, Stack, local_sgd


def variance(params_a_P: Any, params_b_P: Any) -> float:
    """|a - b|^2 / (4 d)."""
    away = np.asarray(params_a_P, dtype=np.float64) - np.asarray(params_b_P, dtype=np.float64)
    return float((away**2).mean() / 4)


@register_intra_estimator("split_half", NoOptions)
def split_half(config: NoOptions, context: IntraContext) -> IntraEstimator:
    """Difference of two trainings on disjoint halves of the local data."""

    def estimate(memory: object, observed: Observed) -> Evidence:
        ends = []
        for half in (0, 1):
            trained = local_sgd(
                _half(observed.stack, half),
                start=observed.start_CP,
                steps_C=observed.steps_C,
                rate_C=observed.rate_C,
                stream=f"half-{half}",
            )
            ends.append(trained.params_CP)
        var_CG = context.groups.mean_square(ends[0] - ends[1]).cpu() / 4
        enough_C1 = (observed.stack.train.num_C > 1).unsqueeze(1)
        return Evidence(observed.upload_CP, torch.where(enough_C1, var_CG, torch.nan))

    return IntraEstimator(estimate=estimate, on_params=True)


def _half(stack: Stack, half: int) -> Stack:
    """The stack with one random half of each client's examples; a single example is both."""
    places, sizes = [], []
    for row, client_id in enumerate(stack.client_ids):
        count = int(stack.train.num_C[row])
        order = generator(stack.seed, "halves", stack.round_index, client_id).permutation(count)
        part = order if count == 1 else np.array_split(order, 2)[half]
        places.append(part + int(stack.train.start_C[row]))
        sizes.append(len(part))
    at = torch.from_numpy(np.concatenate(places)).to(stack.train.x.device)
    num_C = torch.tensor(sizes)
    start_C = torch.cumsum(num_C, 0) - num_C
    rows = Rows(stack.train.x[at], stack.train.y[at], start_C.to(at.device), num_C.to(at.device))
    return replace(stack, train=rows)
