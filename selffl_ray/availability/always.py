"""Every client can be asked in every round: the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from selffl_ray.registry import register_availability


@dataclass(frozen=True, kw_only=True)
class AlwaysConfig:
    """``availability: always`` has no options."""


@register_availability("always", AlwaysConfig)
def always(
    config: AlwaysConfig, seed: int, client_ids: Sequence[str], num_rounds: int
) -> npt.NDArray[np.bool_]:
    """Every client can be asked in every round (the default)."""
    return np.ones((len(client_ids), num_rounds), bool)
