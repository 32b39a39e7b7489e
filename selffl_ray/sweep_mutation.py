"""Who of a population is replaced by a copy of whom, and what changes in the copy.

Ray's own PopulationBasedTraining draws from Python's global generator, leaves the range of a value
when it multiplies, and loses its state when a sweep goes on. Here a decision follows from the
values, ``search_seed``, the round and the place in the population alone: the machine, and which
trial came first, do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from selffl_ray.errors import ConfigError
from selffl_ray.search_space import Dimension, Raw, Settings, read_dimension
from selffl_ray.seeding import generator
from selffl_ray.sweep import SweepConfig
from selffl_ray.sweep_scheduler import SchedulerConfig


def mutations(scheduler: SchedulerConfig) -> list[Dimension]:
    """What may change in a copy, in the order of the file.

    Raises:
        ConfigError: not in the form of a space, or with a condition.
    """
    found = []
    for key, entry in scheduler.mutate.items():
        where = f"scheduler.mutate: {key}"
        dimension = read_dimension(key, entry, where)
        if dimension.when:
            raise ConfigError(f"{where}: when has no place here; every member's value may change")
        found.append(dimension)
    return found


def legs(scheduler: SchedulerConfig, num_rounds: int) -> list[int | None]:
    """After how many rounds members are held and compared, then None: the end of the runs."""
    every = scheduler.every or num_rounds
    return [*range(every, num_rounds, every), None]


def replaced(scheduler: SchedulerConfig, count: int) -> int:
    """How many of so many members are replaced if none has failed, and how many may be copied."""
    return min(math.ceil(scheduler.quantile * count), count // 2)


def chosen_places(
    values: Sequence[float | None], sign: int, count: int
) -> tuple[list[int], list[int]]:
    """Places of the members that are replaced, and of those that may be copied.

    Args:
        values: of the metric, by place; None of a member that failed.
        sign: 1 if more is better, -1 if less is.
        count: of each, at most half of the members.

    Returns:
        the failed and the worst, at least ``count``; the best, best first, none of them among the
        replaced. Of equal members the later place is the worse.
    """
    alive = [place for place, value in enumerate(values) if value is not None]
    alive.sort(key=lambda place: (-sign * (values[place] or 0.0), place))
    failed = [place for place, value in enumerate(values) if value is None]
    best = alive[:count]
    worst = [*failed, *reversed(alive[count:])]
    return sorted(worst[: max(count, len(failed))]) if best else [], best


def changed_settings(
    dimensions: Sequence[Dimension],
    settings: Settings,
    scheduler: SchedulerConfig,
    rng: np.random.Generator,
) -> Raw:
    """The settings of a copy: those of ``dimensions`` drawn anew or moved, the others as before."""
    new = dict(settings)
    for dimension in dimensions:
        anew = rng.random() < scheduler.resample or dimension.kind == "choice"
        new[dimension.key] = (
            dimension.draw(rng)
            if anew
            else _moved(dimension, settings[dimension.key], scheduler.factors, rng)
        )
    return new


def _moved(
    dimension: Dimension, value: Any, factors: Sequence[float], rng: np.random.Generator
) -> Any:
    """A neighbour in the list, or the value times a factor; at an end it stays there."""
    if dimension.kind == "grid":
        at = dimension.values.index(value) + int(rng.choice([-1, 1]))
        return dimension.values[min(max(at, 0), len(dimension.values) - 1)]
    factor = float(rng.choice(list(factors)))
    low, high = dimension.ends()
    if dimension.kind == "randint":
        # A step of one at least, or small numbers would never move.
        step = math.ceil(value * factor) if factor > 1 else math.floor(value * factor)
        return min(max(step, low), high)
    return float(min(max(value * factor, low), high))


class Copy(NamedTuple):
    """A decision: the member at a place is ended, and goes on as a copy of another."""

    place: int
    source: int
    settings: Raw


def decide(
    members: Sequence[Settings], values: Sequence[float | None], sweep: SweepConfig, done: int
) -> list[Copy]:
    """Who is replaced by a copy of whom, with which settings; from ``search_seed`` alone.

    Args:
        members: settings by place; values: of the metric, None of a member that failed.
        done: rounds done.
    """
    scheduler, sign = sweep.scheduler, 1 if sweep.mode == "max" else -1
    worst, best = chosen_places(values, sign, replaced(scheduler, len(members)))
    dimensions = mutations(scheduler)
    copies = []
    for place in worst:
        rng = generator(sweep.search_seed, "population", done, str(place))
        source = best[int(rng.integers(len(best)))]
        new = changed_settings(dimensions, members[source], scheduler, rng)
        copies.append(Copy(place, source, new))
    return copies
