"""What to do when clients do not answer: a decision as data; the driver carries it out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from selffl_ray.errors import ConfigError
from selffl_ray.messages import ClientFailure


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """The ``faults`` part of an experiment."""

    min_participants: float = 0.5
    """Smallest share of a round's cohort that must answer, in (0, 1]."""
    max_retries: int = 2
    """Times that a round is asked for again, and that lost hosts are replaced in it."""
    client_timeout_s: float = 600.0
    """Longest wait for any answer."""

    def __post_init__(self) -> None:
        if not 0 < self.min_participants <= 1:
            raise ConfigError(
                f"faults.min_participants must lie in (0, 1], got {self.min_participants}"
            )
        if self.max_retries < 0:
            raise ConfigError(f"faults.max_retries must be >= 0, got {self.max_retries}")
        if not self.client_timeout_s > 0:
            raise ConfigError(f"faults.client_timeout_s must be > 0, got {self.client_timeout_s}")


@dataclass(frozen=True)
class Proceed:
    """Go on with those who answered."""


@dataclass(frozen=True)
class Retry:
    """Ask these clients again, for the same round with the same streams."""

    client_index: tuple[int, ...]


@dataclass(frozen=True)
class Abort:
    """End the run; why, in words."""

    reason: str


Decision = Proceed | Retry | Abort


def decide(
    config: FaultsConfig,
    asked: int,
    failures: Sequence[ClientFailure],
    attempt: int,
    client_ids: Sequence[str] = (),
) -> Decision:
    """What follows from an attempt at a round.

    Failures that asking again can mend are asked for again, up to ``max_retries`` times. Then the
    round proceeds if enough of the cohort answered, and the run is aborted otherwise.

    Args:
        asked: clients of the cohort; attempt: from 0; client_ids: names by index, for people.
    """
    again = tuple(f.client_index for f in failures if f.retry)
    if again and attempt < config.max_retries:
        return Retry(again)
    # Less a little: 0.55 of 100 is 55.00000000000001.
    needed = max(1, math.ceil(config.min_participants * asked - 1e-9))
    answered = asked - len(failures)
    if answered >= needed:
        return Proceed()
    return Abort(
        f"only {answered} of {asked} clients answered (faults.min_participants asks for {needed}); "
        f"first failure: {named(failures[0], client_ids)}"
    )


def named(failure: ClientFailure, client_ids: Sequence[str]) -> str:
    """A failure in words: which client, where and why."""
    index = failure.client_index
    who = f"client {client_ids[index]!r}" if client_ids else f"client index {index}"
    return f"{who}, {failure.stage}: {failure.cause}"
