"""FedRep: a shared body and own heads, trained one after the other.

Source: Collins et al. 2021, "Exploiting shared representations for personalized federated
learning", Algorithm 1. Client: ``head_steps`` SGD steps of its own head with the body as received,
then ``body_steps`` of the body with that head. Server: the mean of the bodies. The personalized
model is the newest shared body with the client's own head.

Deviations: the two phases share FedAvg's number of steps by default (see ``phases.py``); the
published scripts take 11 to 15 local epochs against FedAvg's 1 to 5. The paper's heads are linear
and solved far, hence many head steps: ``head_steps`` 10 to 50 with ``body_steps`` 5 to 20 is that
regime, and its cost is counted. The published metric tunes every head for 10 more epochs at the
end: ``fine_tune`` does so, for this method and the others. For the global model, new clients and
bytes see ``partial.py``.

Options: ``head_layers`` (1), ``head_steps``, ``body_steps``, ``aggregation`` (``uniform`` as in the
paper, ``sample_size`` as FedAvg), ``fine_tune``, ``personal_model`` (``local``: the client's own
copy of the body instead of the newest), ``server``. All layers as head is local training;
none, with ``sample_size``, is FedAvg.

Cost: a gradient a step of either phase. Traffic: the body, both ways. State: the head. Metrics: the
common ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from selffl_ray.algorithms.averaging import WeighedConfig, mean_of_models
from selffl_ray.algorithms.base import Algorithm, Federation
from selffl_ray.algorithms.partial import PartialConfig, last_layers, partly_shared
from selffl_ray.algorithms.phases import Phase, PhasedConfig, alternate, check_phases, phases
from selffl_ray.registry import register_algorithm
from selffl_ray.training import Stack, Trained, local_sgd


@dataclass(frozen=True, kw_only=True)
class FedRepConfig(PhasedConfig, PartialConfig, WeighedConfig):
    """Options of ``method: fedrep``."""


@register_algorithm("fedrep", FedRepConfig)
def fedrep(config: FedRepConfig, federation: Federation) -> Algorithm:
    """Own heads under a shared body; the head is trained first, then the body."""
    head_P = last_layers(federation.spec, config.head_layers, "head_layers")

    def train(stack: Stack, start_CP: Tensor) -> Trained:
        def one(phase: Phase, start: Tensor, carry: Any) -> Trained:
            return local_sgd(
                stack,
                start=start,
                steps_C=phase.steps_C,
                stream=phase.stream,
                trainable=phase.trainable,
            )

        return alternate(phases(config, stack, head_P), start_CP, one)

    base = partly_shared(config, federation, head_P, train)
    return replace(
        base,
        reductions=(mean_of_models(config),),
        cautions=(*base.cautions, *check_phases(config, federation, head_P)),
    )
