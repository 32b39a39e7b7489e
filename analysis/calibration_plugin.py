"""An intra-client estimator for the study of the collapse, loaded by ``plugins:``.

It makes the mistake that the method specification forbids (5.4): true variances, on the scale of
the local optima, beside uploads that early stopping has shrunk.
"""

from __future__ import annotations

import torch

from selffl_ray.errors import ConfigError
from selffl_ray.estimators.inter_base import NoOptions
from selffl_ray.estimators.intra_base import Evidence, IntraContext, IntraEstimator, Observed
from selffl_ray.registry import register_intra_estimator


@register_intra_estimator("known_beside_uploads", NoOptions)
def known_beside_uploads(config: NoOptions, context: IntraContext) -> IntraEstimator:
    """True variances beside the uploads as they are (two scales; for the collapse study only)."""

    def estimate(memory: object, observed: Observed) -> Evidence:
        truth = context.known_var
        if truth is None:
            raise ConfigError(
                "method.intra: known_beside_uploads needs data with known variances; use "
                "data.name gaussian, or another estimator"
            )
        ids = observed.stack.client_ids
        var_C1 = torch.tensor([[truth[c]] for c in ids], dtype=torch.float64)
        return Evidence(observed.upload_CP, var_C1.expand(-1, context.groups.num_groups))

    return IntraEstimator(estimate=estimate, on_params=True)
