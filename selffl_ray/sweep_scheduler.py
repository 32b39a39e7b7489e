"""The ``scheduler`` part of a sweep file: how trials are ended early, or copied and changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selffl_ray.errors import ConfigError

Name = Literal["none", "asha", "pbt"]

OWN: Mapping[Name, tuple[str, ...]] = {
    "asha": ("grace", "reduction"),
    "pbt": ("every", "mutate", "quantile", "resample", "factors"),
}
"""Which options act with which scheduler."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How trials are ended early.

    ``pbt``: population-based training (Jaderberg et al. 2017, "Population based training of neural
    networks"), synchronous. The space's configurations are the population. After every ``every``
    rounds the worst are ended, and copies of the best, in their exact state, go on in their place
    with changed options. What comes out is a schedule, not a configuration: use it to explore. What
    would break the comparison or the copies is refused (``sweep_population.check_population``).
    """

    name: Name = "none"
    grace: int | None = None
    """asha: rounds that every trial gets; a quarter of all by default."""
    reduction: int = 3
    """asha: one in so many goes on at each rung."""
    every: int | None = None
    """pbt: rounds between comparisons; each must be one that is evaluated."""
    mutate: dict[str, Any] = field(default_factory=dict)
    """pbt: what changes in a copy, in the form of a space (a list, ``choice``, ``uniform``,
    ``loguniform`` or ``randint``). The space sets where each key starts."""
    quantile: float = 0.25
    """pbt: share that is ended, and share that is copied, in (0, 0.5]; one trial at least."""
    resample: float = 0.25
    """pbt: probability that a value is drawn anew; else it moves to a neighbour in the list, or is
    multiplied by one of ``factors`` and kept in its range. Values of ``choice`` have no order and
    are always drawn anew."""
    factors: tuple[float, ...] = (0.8, 1.25)
    """pbt: what values are multiplied by."""

    def __post_init__(self) -> None:
        self._check_own()
        if self.grace is not None and self.grace < 1:
            raise ConfigError(f"scheduler.grace must be >= 1 round, got {self.grace}")
        if self.reduction < 2:
            raise ConfigError(f"scheduler.reduction must be >= 2, got {self.reduction}")
        if self.name == "pbt":
            self._check_pbt()

    def first_rung(self, num_rounds: int) -> int:
        """asha: rounds that every trial gets."""
        return self.grace or max(1, num_rounds // 4)

    def _check_own(self) -> None:
        default = {f.name: f for f in dataclasses.fields(self)}
        for owner, names in OWN.items():
            given = [n for n in names if getattr(self, n) != _default(default[n])]
            if owner != self.name and given:
                raise ConfigError(
                    f"scheduler: {' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))} "
                    f"act with name: {owner} only, and {given[0]} is given"
                )

    def _check_pbt(self) -> None:
        if self.every is None or not self.mutate:
            raise ConfigError(
                "scheduler: pbt needs every and mutate, as in {name: pbt, every: 10, mutate: "
                "{training.learning_rate: {loguniform: [0.01, 1]}}}"
            )
        if self.every < 1:
            raise ConfigError(f"scheduler.every must be >= 1 round, got {self.every}")
        if not 0 < self.quantile <= 0.5:
            raise ConfigError(f"scheduler.quantile must lie in (0, 0.5], got {self.quantile}")
        if not 0 <= self.resample <= 1:
            raise ConfigError(f"scheduler.resample must lie in [0, 1], got {self.resample}")
        if not self.factors or not all(0 < f < math.inf for f in self.factors):
            raise ConfigError(
                f"scheduler.factors must be numbers > 0, as in [0.8, 1.25], got "
                f"{list(self.factors)}"
            )


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default
