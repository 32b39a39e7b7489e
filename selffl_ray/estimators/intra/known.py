"""The true variance and the true local optimum; data with a known truth only."""

from __future__ import annotations

import torch

from selffl_ray.errors import ConfigError
from selffl_ray.estimators.inter_base import NoOptions
from selffl_ray.estimators.intra_base import Evidence, IntraContext, IntraEstimator, Observed
from selffl_ray.registry import register_intra_estimator


@register_intra_estimator("known", NoOptions)
def known(config: NoOptions, context: IntraContext) -> IntraEstimator:
    """The data set's true variance of each local optimum (gaussian data only)."""
    if context.known_var is None:
        raise ConfigError(
            "method.intra: known needs data with known variances; use data.name gaussian, or "
            "another estimator"
        )
    if int(context.groups.sizes_G.sum()) != context.num_outputs:
        raise ConfigError(
            "method.intra: known needs a model whose parameters are the unknowns themselves; use "
            "model: {name: linear, bias: false}"
        )
    truth = context.known_var

    def estimate(memory: object, observed: Observed) -> Evidence:
        stack = observed.stack
        optima = []
        for row, count in enumerate(stack.train.num_C.tolist()):
            start = int(stack.train.start_C[row])
            # The client's own targets of a model that is a free vector: their mean is the optimum.
            optima.append(stack.train.y[start : start + count, 1, 0].double().mean(0))
        var_C = torch.tensor([truth[c] for c in stack.client_ids], dtype=torch.float64)
        vector_CP = torch.stack(optima).to(observed.global_P)
        return Evidence(vector_CP, var_C.unsqueeze(1).expand(-1, context.groups.num_groups))

    return IntraEstimator(estimate=estimate, on_params=True, exact=True)
