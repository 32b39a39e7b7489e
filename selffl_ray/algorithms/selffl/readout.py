"""How Self-FL turns a shrink factor into a model: early stop, learning rate, interpolation.

Shape letters: C clients of a stack, P parameters, G parameter groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selffl_ray import hierarchy
from selffl_ray.algorithms.selffl.config import SelfFLConfig
from selffl_ray.flat import Groups
from selffl_ray.training import Stack, Tail, local_sgd, observe_tail, start_tail, tail_mean

Floats = npt.NDArray[np.float64]


class Schedule(NamedTuple):
    """Steps (C,) int64 and learning rates (C,) float64 of a readout."""

    steps_C: npt.NDArray[np.int64]
    rate_C: Floats


class Readout(NamedTuple):
    """A realised shrink factor.

    params_CP: the models; reached_CP: where training ended, before any interpolation; tail: sums
    over the iterates; steps_C, rate_C: what was trained; loss_C: mean training loss.
    """

    params_CP: Tensor
    reached_CP: Tensor
    tail: Tail | None
    steps_C: Tensor
    rate_C: Tensor
    loss_C: Tensor


def schedule(
    config: SelfFLConfig, shrink_C: npt.ArrayLike, rate: float, fixed_steps: npt.ArrayLike
) -> Schedule:
    """Steps and rates that realise a scalar shrink factor a client.

    early_stop: equation (6), with ``rounding: ceil`` also (7), never above ``rate``;
    learning_rate: (7) with fixed_steps; interpolate: fixed_steps at ``rate``.
    """
    shrink = np.clip(np.asarray(shrink_C, dtype=np.float64), 0.0, 1.0)
    steps = np.broadcast_to(np.asarray(fixed_steps, dtype=np.int64), shrink.shape).copy()
    rates = np.full(shrink.shape, rate)
    curvature = config.assumed_curvature(rate)
    if config.personalization == "early_stop":
        steps = hierarchy.num_local_steps(
            shrink,
            rate,
            curvature,
            min_steps=config.min_steps,
            max_steps=config.max_steps,
            rounding=config.rounding,
        )
    exact = config.personalization == "learning_rate" or (
        config.personalization == "early_stop" and config.rounding == "ceil"
    )
    if exact:
        exact_rates = hierarchy.learning_rate(shrink, np.maximum(steps, 1), curvature)
        rates = np.minimum(rates, exact_rates)
    return Schedule(steps, rates)


def scalar_shrink(groups: Groups, shrink_CG: Tensor) -> Tensor:
    """One shrink factor a client: the mean over parameters, for steps and rates. (C,)."""
    sizes_G = torch.from_numpy(groups.sizes_G).double()
    return (shrink_CG.cpu() * sizes_G).sum(1) / sizes_G.sum()


def realise(
    config: SelfFLConfig,
    groups: Groups,
    stack: Stack,
    start_CP: Tensor,
    shrink_CG: Tensor,
    *,
    rate: float,
    fixed_steps: npt.ArrayLike,
    stream: str,
    squares: bool = False,
) -> Readout:
    """Train from the initial models and shrink back towards them as the configuration says.

    Args:
        fixed_steps: one for all or (C,), where the shrink factor does not set them.
        squares: keep sums of squares over the tail, for estimators that watch.
    """
    plan = schedule(config, scalar_shrink(groups, shrink_CG), rate, fixed_steps)
    steps_C, rate_C = torch.from_numpy(plan.steps_C), torch.from_numpy(plan.rate_C)
    averaged = config.tail_average
    watched = averaged or squares
    trained = local_sgd(
        stack,
        start=start_CP,
        steps_C=steps_C,
        rate_C=rate_C,
        stream=stream,
        observe=observe_tail if watched else None,
        seen=start_tail(start_CP, stack.num_clients, squares=squares) if watched else None,
    )
    steps_C = trained.num_steps_C
    ends_CP = tail_mean(trained.seen, steps_C) if averaged else trained.params_CP
    params_CP = ends_CP
    if config.personalization == "interpolate":
        shrink = groups.spread(shrink_CG).to(start_CP)
        params_CP = hierarchy.interpolate(start_CP, ends_CP, shrink)
    return Readout(params_CP, ends_CP, trained.seen, steps_C, rate_C, trained.loss_C)
