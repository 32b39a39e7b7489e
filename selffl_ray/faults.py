"""What to do when clients do not answer: a decision as data; the driver carries it out.

The policy, by what happened:

raised      the round is asked for again with the same streams, then it goes on without the client
memory      the same; when that does not help, the client's host is replaced by a fresh one, once a
            round, before the round goes on without the client
diverged    never asked again, for the same streams would diverge again: left out of the round
shape       likewise
died        a host that ended, or whose node did: replaced; client state was lost with it, so all go
            back to the last checkpoint, and the rounds are replayed with the same bits
silent      a host that did not answer within ``client_timeout_s``: ended, then as ``died``
driver      the driver actor ended: another one goes on from the last checkpoint; that of a trial of
            a sweep likewise
slow        nothing; it took more than half of ``client_timeout_s``, which is worth knowing

All of it stands in the tables, see ``events.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from selffl_ray.errors import ConfigError
from selffl_ray.events import Outcome
from selffl_ray.messages import ClientFailure, FailureKind
from selffl_ray.participation import share_of

RETRIED: frozenset[FailureKind] = frozenset({"raised", "memory"})
"""Failures that asking again may mend."""
SLOW_SHARE = 0.5
"""Share of ``client_timeout_s`` above which a host counts as slow."""


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """The ``faults`` part of an experiment."""

    min_participants: float = 0.5
    """Smallest share of a round's cohort that must answer, in (0, 1]."""
    max_retries: int = 2
    """Times that a round is asked for again, that lost hosts are replaced in it, and that a driver
    actor that died is started again."""
    client_timeout_s: float = 600.0
    """Longest wait for an answer in a round. A host that starts and reads its data may take 5
    minutes, however short this is."""

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
class Replace:
    """Replace the hosts of these clients by fresh ones, and replay what was lost with them."""

    client_index: tuple[int, ...]


@dataclass(frozen=True)
class Abort:
    """End the run; why, in words."""

    reason: str


Decision = Proceed | Retry | Replace | Abort


def decide(
    config: FaultsConfig,
    asked: int,
    failures: Sequence[ClientFailure],
    attempt: int,
    renewed: Collection[int] = (),
) -> Decision:
    """What follows from an attempt at a round.

    Failures that asking again can mend are asked for again, up to ``max_retries`` times. Hosts that
    still run out of memory are replaced, each once. Then the round proceeds if enough of the cohort
    answered, and the run is aborted otherwise.

    Args:
        asked: clients of the cohort; attempt: from 0; renewed: clients whose hosts were replaced in
            this round already.
    """
    again = tuple(f.client_index for f in failures if f.kind in RETRIED)
    if again and attempt < config.max_retries:
        return Retry(again)
    starved = tuple(
        f.client_index for f in failures if f.kind == "memory" and f.client_index not in renewed
    )
    if starved and config.max_retries:
        return Replace(starved)
    # Less a little: 0.55 of 100 is 55.00000000000001.
    needed = max(1, share_of(config.min_participants, asked))
    answered = asked - len(failures)
    if answered >= needed:
        return Proceed()
    return Abort(
        f"only {answered} of {asked} clients answered (faults.min_participants asks for {needed})"
    )


def outcome_of(decision: Decision, client_index: int) -> Outcome:
    """What a decision means for a client that failed."""
    if isinstance(decision, Retry | Replace) and client_index in decision.client_index:
        return "retried" if isinstance(decision, Retry) else "replaced"
    return "aborted" if isinstance(decision, Abort) else "left out"
