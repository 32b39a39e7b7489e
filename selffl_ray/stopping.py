"""When a run ends before its last round: a target, patience, time, or a budget of cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selffl_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When to end before ``num_rounds``; nothing set is never. Only validation metrics count."""

    metric: str = "val/local_accuracy"
    target: float | None = None
    """End once the metric is at least this good."""
    patience: int | None = None
    """End after this many evaluations without a better value."""
    seconds: float | None = None
    """End after the round in which this much time has passed."""
    gradient_steps: int | None = None
    """End after the round in which so many gradients were computed in all (readouts aside)."""
    bytes: int | None = None
    """End after the round in which the method has sent so many bytes in all, both ways."""
    virtual_s: float | None = None
    """End after the round in which so much simulated time has passed (see training.trouble)."""

    def __post_init__(self) -> None:
        if not self.metric.startswith("val/"):
            raise ConfigError(
                f"training.stop.metric must be a validation metric (val/...), got {self.metric!r}; "
                "stopping on test data would select on them"
            )
        for name in ("patience", "gradient_steps", "bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.stop.{name} must be >= 1, got {value}")
        for name in ("seconds", "virtual_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"training.stop.{name} must be > 0, got {value}")


def seconds_of(row: Mapping[str, Any]) -> float:
    """Time that a finished round took, its evaluation included."""
    return float(row["time/round_s"] + row.get("time/eval_s", 0.0))


def bytes_of(row: Mapping[str, Any]) -> float:
    """What a method would send over a network in a round, both ways."""
    return float(row["comm/bytes_down"] + row["comm/bytes_up"])


def virtual_of(row: Mapping[str, Any]) -> float:
    """Simulated time that a round took; 0 where none is simulated."""
    return float(row.get("time/virtual_s", 0.0))


class StopRule:
    """The ``training.stop`` part of a configuration, over the rounds of a run.

    Args:
        past: the rows of the rounds before, of a run that goes on.
        higher_is_better: of the task's score.
    """

    def __init__(
        self, config: StopConfig, past: Sequence[Mapping[str, Any]], *, higher_is_better: bool
    ) -> None:
        self._config = config
        lower = not higher_is_better or config.metric.endswith("loss")
        self._sign = -1 if lower else 1
        self._best = -np.inf
        self._since = 0
        self._bytes = 0.0
        self.virtual_s = 0.0
        self.enough = False
        seconds = 0.0
        for row in past:
            seconds += seconds_of(row)
            self.take(row, seconds)

    def take(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """Judge a round; ``enough`` says whether it was the last one, ``virtual_s`` adds up."""
        config, value = self._config, metrics.get(self._config.metric)
        if config.seconds is not None and seconds >= config.seconds:
            self.enough = True
        most = config.gradient_steps
        if most is not None and metrics["cost/gradient_steps"] >= most:
            self.enough = True
        self._bytes += bytes_of(metrics)
        if config.bytes is not None and self._bytes >= config.bytes:
            self.enough = True
        self.virtual_s += virtual_of(metrics)
        if config.virtual_s is not None and self.virtual_s >= config.virtual_s:
            self.enough = True
        if value is None:
            return
        if config.target is not None and self._sign * value >= self._sign * config.target:
            self.enough = True
        better = self._sign * value > self._best
        self._best = max(self._best, self._sign * value)
        self._since = 0 if better else self._since + 1
        if config.patience is not None and self._since >= config.patience:
            self.enough = True
