"""Who takes part in each round: drawn once for the whole run, the same for every method.

Methods that are compared must not differ in luck, so the plan depends on the seed and on the
participation options only, never on what a method does. Simulated trouble (``trouble.py``) is part
of it: who was asked and in vain stands in the plan, and the method meets the others only.

Shape letters: M all clients, A clients asked in a round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.errors import ConfigError
from selffl_ray.flat import digest
from selffl_ray.seeding import generator
from selffl_ray.training_config import TrainingConfig
from selffl_ray.trouble import Luck, TroubleConfig, draw_luck

MOST_ROUNDS = 10**6

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NO_LIMIT = np.iinfo(np.int64).max
"""More local steps than any method takes."""

ANSWERED, PARTIAL, LATE, DROPPED = "answered", "partial", "late", "dropped"
"""What became of a client that was asked; the first two count."""


class Outcome(NamedTuple):
    """What simulated trouble made of a round.

    num_available: clients that could be asked; asked: (A,) indices, ascending; outcome: (A,) words
    as above; steps: (A,) local steps that are handed in; ends_s: (A,) virtual seconds after which
    each would have been done, NaN for those that dropped out; virtual_s: length of the round.
    """

    num_available: int
    asked: Indices
    outcome: npt.NDArray[np.str_]
    steps: Indices
    ends_s: Floats
    virtual_s: float

    def count(self, *outcomes: str) -> int:
        """Clients with one of these outcomes."""
        return int(np.isin(self.outcome, outcomes).sum())


@dataclass(frozen=True)
class RoundPlan:
    """What is fixed about a round before it starts.

    cohort: indices of the clients whose updates are wanted, ascending: those that are asked, less
    those that simulated trouble keeps away; learning_rate: after the schedule; trouble: what it
    did, if it is simulated.
    """

    round_index: int
    cohort: Indices
    learning_rate: float
    trouble: Outcome | None = None

    @property
    def num_asked(self) -> int:
        """Clients that were sent the model."""
        return len(self.cohort if self.trouble is None else self.trouble.asked)

    def most_steps(self, members: Sequence[int]) -> tuple[int, ...] | None:
        """Local steps after which members of the cohort must stop; None if nobody must.

        Only those that hand in partial work must: a method may give others more than the training's
        own steps, and what they do must not depend on somebody else's fate.
        """
        if self.trouble is None or not self.trouble.count(PARTIAL):
            return None
        at = np.searchsorted(self.trouble.asked, members)
        is_partial_A = self.trouble.outcome[at] == PARTIAL
        return tuple(np.where(is_partial_A, self.trouble.steps[at], NO_LIMIT).tolist())


def plan_rounds(
    seed: int, training: TrainingConfig, num_examples: Mapping[str, int]
) -> list[RoundPlan]:
    """The plan of every round: participation_rate of the clients, at least one, no repeats.

    Args:
        num_examples: training examples of each client by its name, in the order of the indices.

    Raises:
        ConfigError: too many rounds, or simulated trouble leaves none with anybody in it.
        DataError: its trace cannot be used.
    """
    if training.num_rounds > MOST_ROUNDS:
        raise ConfigError(
            f"training.num_rounds must be at most {MOST_ROUNDS}, since each is planned before the "
            f"first begins, got {training.num_rounds}"
        )
    if training.simulates:
        return _troubled(seed, training, num_examples)
    everybody = np.arange(len(num_examples), dtype=np.int64)
    size = wanted(training, len(everybody))
    return [
        RoundPlan(index, draw_cohort(seed, index, everybody, size), training.rate(index))
        for index in range(training.num_rounds)
    ]


def wanted(training: TrainingConfig, num_clients: int) -> int:
    """Clients wanted in a round if all can be asked, >= 1."""
    return max(1, round(training.participation_rate * num_clients))


def draw_cohort(seed: int, round_index: int, available: Indices, size: int) -> Indices:
    """So many of the available clients (all, if there are fewer), ascending."""
    rng = generator(seed, "participation", round_index)
    drawn = rng.choice(available, size=min(size, len(available)), replace=False)
    return np.sort(drawn).astype(np.int64)


def _troubled(
    seed: int, training: TrainingConfig, num_examples: Mapping[str, int]
) -> list[RoundPlan]:
    config, ids = training.trouble, list(num_examples)
    luck = draw_luck(config, seed, ids, training.num_rounds)
    steps_M = np.asarray([training.steps(n) for n in num_examples.values()], np.int64)
    size = wanted(training, len(ids))
    plans = []
    for index in range(training.num_rounds):
        available = np.flatnonzero(luck.there_MR[:, index]).astype(np.int64)
        asked = draw_cohort(seed, index, available, share_of(config.over_selection, size))
        needed = share_of(config.wait_for, min(size, len(available)))
        found = close_round(config, _round_of(luck, asked, index), steps_M[asked], needed)
        outcome = Outcome(len(available), asked, *found)
        counted = np.isin(outcome.outcome, (ANSWERED, PARTIAL))
        plans.append(RoundPlan(index, asked[counted], training.rate(index), outcome))
    if not any(len(plan.cohort) for plan in plans):
        raise ConfigError(_nobody(plans))
    return plans


def share_of(share: float, count: int) -> int:
    """A share of some clients, rounded up."""
    # Less a little: 0.55 of 100 is 55.00000000000001.
    return math.ceil(share * count - 1e-9)


class Fate(NamedTuple):
    """What befalls the clients asked in a round, (A,) each; see :class:`Luck`."""

    drops: npt.NDArray[np.bool_]
    step_s: Floats
    lot: Floats


def _round_of(luck: Luck, asked: Indices, index: int) -> Fate:
    return Fate(
        luck.drops_MR[asked, index], luck.step_s_MR[asked, index], luck.lot_MR[asked, index]
    )


def close_round(
    config: TroubleConfig, fate: Fate, steps_A: Indices, needed: int
) -> tuple[npt.NDArray[np.str_], Indices, Floats, float]:
    """Who counts, and how long a round takes; the last four fields of an :class:`Outcome`.

    Args:
        steps_A: local steps of each client, all of them; needed: answers that end the round.
    """
    deadline = math.inf if config.deadline is None else config.deadline
    whole_A = steps_A * fate.step_s
    done_A = np.zeros_like(steps_A)
    if config.late == "partial":
        # Not more than all: where whole_A is within rounding of the deadline.
        done_A = np.minimum(np.floor(deadline / fate.step_s), steps_A).astype(np.int64)
    done_A = np.where(whole_A <= deadline, steps_A, done_A)
    able_A = ~fate.drops & (done_A > 0)
    order = np.lexsort((fate.lot, whole_A))
    first = order[able_A[order]][:needed]
    counts_A = np.zeros(len(steps_A), bool)
    counts_A[first] = True
    outcome_A = np.select(
        [fate.drops, counts_A & (done_A == steps_A), counts_A], [DROPPED, ANSWERED, PARTIAL], LATE
    )
    waits = len(first) < needed and bool((~fate.drops & ~counts_A).any())
    # Where nobody could be asked, or all that were have gone, the server waits for the deadline.
    if waits or not len(first):
        virtual_s = deadline if math.isfinite(deadline) else 0.0
    else:
        virtual_s = float(np.minimum(whole_A[first], deadline).max())
    ends_A = np.where(fate.drops, np.nan, whole_A)
    return outcome_A, np.where(counts_A, done_A, 0), ends_A, virtual_s


def _nobody(plans: Sequence[RoundPlan]) -> str:
    """Why no round has anybody in it, and what to do."""
    outcomes = [plan.trouble for plan in plans if plan.trouble is not None]
    if not any(len(found.asked) for found in outcomes):
        return (
            f"training.trouble: no client can be asked in any of the {len(plans)} rounds; give a "
            "trace or an availability that has some"
        )
    ends = np.concatenate([found.ends_s for found in outcomes])
    if np.isnan(ends).all():
        return (
            f"training.trouble.dropout: everybody drops out of all {len(plans)} rounds; lower "
            "probability"
        )
    return (
        f"training.trouble.deadline: nobody is done in time in any of the {len(plans)} rounds, the "
        f"fastest takes {np.nanmin(ends):.4g} virtual seconds; raise deadline, or use late: partial"
    )


def trouble_cautions(training: TrainingConfig, plans: Sequence[RoundPlan]) -> tuple[str, ...]:
    """What simulated trouble makes void or costs, a sentence each; said before the run starts."""
    config = training.trouble
    outcomes = [plan.trouble for plan in plans if plan.trouble is not None]
    found = []
    if empty := sum(not len(plan.cohort) for plan in plans):
        found.append(
            f"nobody answers in {empty} of {len(plans)} rounds: they change nothing and count as "
            "rounds"
        )
    ends = np.concatenate([o.ends_s for o in outcomes]) if outcomes else np.empty(0)
    if config.deadline is not None and not (ends > config.deadline).any():
        found.append(
            f"training.trouble.deadline ({config.deadline:g}) is never passed: the slowest client "
            f"takes {np.nanmax(ends):.4g} virtual seconds; lower it, or leave it out"
        )
    early = config.over_selection > 1 or config.wait_for < 1
    early = early and config.dropout.probability == 0
    if early and len(np.unique(ends[~np.isnan(ends)])) <= 1:
        found.append(
            "all clients are equally fast, so over_selection and wait_for keep the first ones by "
            "lot; set training.trouble.stragglers.spread"
        )
    if config.trace is not None:
        there = max((at for at, o in enumerate(outcomes) if o.num_available), default=0)
        if there + 1 < len(plans):
            found.append(
                f"training.trouble.trace has nobody after round {there} of {len(plans)}; make it "
                "longer, or training.num_rounds shorter"
            )
    return tuple(found)


def plan_digest(plans: Sequence[RoundPlan]) -> str:
    """Names who takes part in which round with how many steps."""
    parts: list[str | int] = []
    for plan in plans:
        steps = () if plan.trouble is None else plan.trouble.steps.tolist()
        parts += [plan.round_index, *plan.cohort.tolist(), "steps", *steps]
    return digest([], parts)
