"""Simulated trouble: clients that are away, drop out or are slow. Nothing sleeps, time is virtual.

Who is there, who drops out and how fast everybody is are drawn once for the whole run, from streams
named by seed, purpose and client. They depend on no method and no placement, so methods that are
compared meet the same trouble.

A round, in this order:

1. Clients are there by the law ``availability`` and, if a ``trace`` is given, by it too.
2. Of these as many are asked as ``participation_rate`` wants of all clients (fewer if fewer are
   there), times ``over_selection``.
3. A client that was asked drops out with its probability. Its connection ends, so nobody waits.
4. A client's local steps take ``seconds_per_step`` each, times its factor: log-normal with median
   1, ``spread`` between clients and ``jitter`` between the rounds of one client.
5. The round ends when the share ``wait_for`` of the wanted clients has answered, or all that did
   not drop out, or at the ``deadline``. Equal times are put in order by lot. Whoever is not done by
   then is late and does not count; with ``late: partial`` a client that is not done at the deadline
   hands in the steps that it has done, if it has done one.

What drops out or is late changes no state, neither the server's nor the client's: to the method it
was not asked. A round that nobody answers leaves everything as it is.

Partial work cuts every loop of local steps of a method at the same number, one whose length the
method has planned by itself (Self-FL's early stop) too; what a client predicts with is read out
with all of its steps, since that is not part of a round.

Virtual time counts the round's local steps by the training options: what a method computes beside
them, or leaves out, does not change it, or trouble would differ between methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.availability.trace import traced
from selffl_ray.errors import ConfigError
from selffl_ray.registry import Component, availabilities
from selffl_ray.seeding import client_draws

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

ALWAYS = Component("always")
MOST_SPREAD = 5.0
"""One standard deviation is a factor of 148 then."""


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """Clients that are asked and do not answer."""

    probability: float = 0.0
    """Mean probability of a client in a round, in [0, 1)."""
    concentration: float | None = None
    """Clients differ: each keeps a probability of its own, drawn from Beta(c p, c (1 - p)) with
    p the mean, > 0; small values have reliable clients and hopeless ones. null: all alike."""

    def __post_init__(self) -> None:
        where = "training.trouble.dropout"
        if not 0 <= self.probability < 1:
            raise ConfigError(
                f"{where}.probability must lie in [0, 1), got {self.probability}; at 1 nobody ever "
                "answers"
            )
        if self.concentration is None:
            return
        if not 0 < self.concentration < math.inf:
            raise ConfigError(
                f"{where}.concentration must be > 0, got {self.concentration}; null has all "
                "clients alike"
            )
        if self.probability == 0:
            raise ConfigError(
                f"{where}.concentration ({self.concentration}) has no effect while probability is "
                "0; set probability, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class StragglersConfig:
    """How long a local step takes."""

    seconds_per_step: float = 1.0
    """Virtual seconds of the median client, > 0."""
    spread: float = 0.0
    """Standard deviation of the logarithm of a client's own factor, in [0, 5]; usual values 0.3
    to 1.5."""
    jitter: float = 0.0
    """The same of a factor drawn anew in each round, in [0, 5]."""

    def __post_init__(self) -> None:
        where = "training.trouble.stragglers"
        if not 0 < self.seconds_per_step < math.inf:
            raise ConfigError(
                f"{where}.seconds_per_step must be > 0, got {self.seconds_per_step}; 1 measures "
                "time in steps of the median client"
            )
        for name in ("spread", "jitter"):
            if not 0 <= getattr(self, name) <= MOST_SPREAD:
                raise ConfigError(
                    f"{where}.{name} must lie in [0, {MOST_SPREAD:g}], got {getattr(self, name)}; "
                    "1 makes one client in six e times slower than the median"
                )


@dataclass(frozen=True, kw_only=True)
class TroubleConfig:
    """The ``training.trouble`` part: what is simulated. The defaults are no trouble."""

    availability: Annotated[Component, availabilities] = ALWAYS
    """When clients can be asked: always, markov or diurnal, with their own options."""
    trace: str | None = None
    """CSV or Parquet file with the columns client_id, first_round, last_round: the rounds in which
    a client can be asked, beside what ``availability`` says."""
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    stragglers: StragglersConfig = field(default_factory=StragglersConfig)
    over_selection: float = 1.0
    """Clients asked over clients wanted, >= 1; the first ones that answer count."""
    wait_for: float = 1.0
    """Share of the wanted clients whose answers end a round, in (0, 1]."""
    deadline: float | None = None
    """Virtual seconds after which a round ends; null waits for everybody."""
    late: Literal["drop", "partial"] = "drop"
    """Clients that are not done at the deadline do not count, or hand in the steps done by then."""

    def __post_init__(self) -> None:
        where = "training.trouble"
        if not 1 <= self.over_selection < math.inf:
            raise ConfigError(
                f"{where}.over_selection must be >= 1, got {self.over_selection}; 1.3 asks 30 % "
                "more clients than are wanted"
            )
        if not 0 < self.wait_for <= 1:
            raise ConfigError(
                f"{where}.wait_for must lie in (0, 1], got {self.wait_for}; 1 waits for all"
            )
        if self.deadline is not None and not 0 < self.deadline < math.inf:
            raise ConfigError(
                f"{where}.deadline must be > 0, got {self.deadline}; null waits for everybody"
            )
        if self.late != "drop" and self.deadline is None:
            raise ConfigError(
                f"{where}.late: {self.late} has no effect without a deadline; give {where}.deadline"
            )

    def check_rate(self, participation_rate: float) -> None:
        """Refuse what contradicts a participation rate.

        Raises:
            ConfigError: more clients are to be asked than there are.
        """
        if self.over_selection > 1 and participation_rate == 1:
            raise ConfigError(
                f"training.trouble.over_selection ({self.over_selection}) has nobody left to ask "
                "while training.participation_rate is 1; lower participation_rate, or use wait_for"
            )

    @property
    def is_none(self) -> bool:
        """Whether nothing is simulated."""
        plain = self.availability.name == ALWAYS.name
        return plain and replace(self, availability=ALWAYS) == TroubleConfig()

    @property
    def keeps_away(self) -> bool:
        """Whether a client may miss a round, or some of its steps."""
        timeless = replace(self, stragglers=StragglersConfig())
        return not timeless.is_none


class Luck(NamedTuple):
    """What befalls every client in every round: (M, R) each.

    there: it can be asked; drops: it would not answer; step_s: virtual seconds of a local step;
    lot: orders equal times.
    """

    there_MR: Bools
    drops_MR: Bools
    step_s_MR: Floats
    lot_MR: Floats


def draw_luck(config: TroubleConfig, seed: int, client_ids: Sequence[str], num_rounds: int) -> Luck:
    """All draws of a run.

    Raises:
        DataError: the trace cannot be used.
    """
    there_MR = availabilities.make(config.availability, seed, client_ids, num_rounds)
    if config.trace is not None:
        there_MR = there_MR & traced(Path(config.trace), client_ids, num_rounds)

    def uniform(purpose: str) -> Floats:
        return client_draws(seed, purpose, client_ids, lambda rng: rng.random(num_rounds))

    def normal(purpose: str, count: int) -> Floats:
        return client_draws(seed, purpose, client_ids, lambda rng: rng.standard_normal(count))

    slow = config.stragglers
    log_MR = slow.spread * normal("trouble/speed", 1)
    log_MR = log_MR + slow.jitter * normal("trouble/jitter", num_rounds)
    return Luck(
        there_MR,
        uniform("trouble/dropout") < dropout_rates(config.dropout, seed, client_ids)[:, None],
        slow.seconds_per_step * np.exp(log_MR),
        uniform("trouble/lot"),
    )


def dropout_rates(config: DropoutConfig, seed: int, client_ids: Sequence[str]) -> Floats:
    """Each client's probability of dropping out of a round: (M,)."""
    mean, concentration = config.probability, config.concentration
    if concentration is None:
        return np.full(len(client_ids), mean)
    a, b = concentration * mean, concentration * (1 - mean)
    own_M1 = client_draws(
        seed, "trouble/dropout_rate", client_ids, lambda rng: rng.beta(a, b, size=1)
    )
    return own_M1[:, 0]
