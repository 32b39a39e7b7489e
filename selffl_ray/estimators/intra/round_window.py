"""Variance of a client's last uploads over rounds: the published estimate as we read it.

sum_t |z_t - mean|^2 / (d (W - 1)) over the last W uploads; undefined for fewer than two. With
fixed local data it measures optimisation noise and calls clients that fit their few examples the
most certain; it is right only where every round brings fresh data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selffl_ray.errors import ConfigError
from selffl_ray.estimators.intra import trajectory
from selffl_ray.estimators.intra_base import Evidence, IntraContext, IntraEstimator, Observed
from selffl_ray.flat import Groups
from selffl_ray.registry import register_intra_estimator


@dataclass(frozen=True, kw_only=True)
class RoundWindowConfig:
    """Options of ``intra: {name: round_window}``."""

    window: int = 5
    """W: uploads that are remembered; each is a stored model a client."""

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ConfigError(f"method.intra.window must be >= 2, got {self.window}")


class Window(NamedTuple):
    """Last uploads, newest first: (C, W, P), and how many there are: (C,)."""

    uploads_CWP: Tensor
    count_C: Tensor


def variance(models_WP: Any) -> float | None:
    """Variance a coordinate of uploads (W, P); None for fewer than two."""
    return trajectory.variance(np.asarray(models_WP))


@register_intra_estimator("round_window", RoundWindowConfig)
def round_window(config: RoundWindowConfig, context: IntraContext) -> IntraEstimator:
    """Variance of the last uploads over rounds (the published estimate as we read it)."""

    def init_memory(num_clients: int, start_P: Tensor) -> Window:
        shape = (num_clients, config.window, len(start_P))
        zeros = torch.zeros(shape, dtype=start_P.dtype, device=start_P.device)
        return Window(zeros, torch.zeros(num_clients, dtype=torch.int64))

    def remember(memory: Window, observed: Observed) -> Window:
        newest = observed.upload_CP.unsqueeze(1)
        uploads = torch.cat([newest, memory.uploads_CWP[:, :-1]], dim=1)
        return Window(uploads, (memory.count_C + 1).clamp(max=config.window))

    def estimate(memory: Window, observed: Observed) -> Evidence:
        return Evidence(observed.upload_CP, _spread(memory, context.groups))

    return IntraEstimator(
        estimate=estimate, remember=remember, init_memory=init_memory, on_params=True
    )


def _spread(memory: Window, groups: Groups) -> Tensor:
    """(C, G) float64; NaN for clients with fewer than two uploads."""
    place_W = torch.arange(memory.uploads_CWP.shape[1])
    inside_CW = (place_W < memory.count_C.unsqueeze(1)).to(memory.uploads_CWP.device)
    count_C1 = memory.count_C.double().unsqueeze(1)
    weight = inside_CW.double().unsqueeze(2)
    # The newest upload is subtracted first: uploads are large, their differences small.
    away = (memory.uploads_CWP - memory.uploads_CWP[:, :1]).double() * weight
    mean_CP = away.sum(1) / count_C1.clamp(min=1).to(away.device)
    square_CP = ((away - mean_CP.unsqueeze(1)).square() * weight).sum(1)
    spread_CG = groups.sum(square_CP).cpu() / torch.from_numpy(groups.sizes_G)
    return torch.where(count_C1 > 1, spread_CG / (count_C1 - 1).clamp(min=1), torch.nan)
