"""Hierarchical bootstrap of a paired difference: seeds are resampled, then the clients of each.

Shape letters: C clients, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from analysis.report.statistics import LEVEL, NUM_BOOTSTRAP, Floats
from selffl_ray.seeding import generator

MOST_CELLS = 2_000_000
"""Most scores that are resampled at once: 16 MB an array."""

Statistic = Callable[[Floats, Floats], Floats]
"""Scores (R, C) and weights (R, C) to a number for every resample (R,)."""


class ClientPair(NamedTuple):
    """One seed: what two methods score on the same clients, and the clients' weights, each (C,)."""

    own_C: Floats
    other_C: Floats
    weights_C: Floats


def weighted_mean(scores_RC: Floats, weights_RC: Floats) -> Floats:
    """Mean over clients, weighted by examples: the score on the union of their examples."""
    found: Floats = (scores_RC * weights_RC).sum(1) / weights_RC.sum(1)
    return found


def worst_tenth(better: int) -> Statistic:
    """Unweighted mean of the ceil(0.1 C) worst clients, as in ``local_<score>_worst10``.

    Args:
        better: 1 if a higher score is better, -1 if a lower one is.
    """

    def statistic(scores_RC: Floats, weights_RC: Floats) -> Floats:
        count = math.ceil(0.1 * scores_RC.shape[1])
        found: Floats = better * np.sort(better * scores_RC, axis=1)[:, :count].mean(1)
        return found

    return statistic


def bootstrap_means(seeds: Sequence[ClientPair], statistic: Statistic, scene: int) -> Floats:
    """Resampled means over seeds of the statistic of own minus that of other, (NUM_BOOTSTRAP,).

    Both methods get the same resampled clients, so that what is hard for both cancels.

    Args:
        seeds: at least one; with one seed only its clients are resampled.
        scene: number of the scene: scenes have streams of their own, so that the means of several
            can be averaged as independent ones.
    """
    rng = generator(0, "compare/bootstrap", scene)
    num = len(seeds)
    picked = rng.integers(num, size=(NUM_BOOTSTRAP, num))
    means = np.empty((NUM_BOOTSTRAP, num))
    for seed, pair in enumerate(seeds):
        here = picked == seed
        means[here] = _resampled(rng, pair, statistic, int(here.sum()))
    found: Floats = means.mean(1)
    return found


def _resampled(
    rng: np.random.Generator, pair: ClientPair, statistic: Statistic, count: int
) -> Floats:
    num = len(pair.own_C)
    found = np.empty(count)
    at_once = max(1, MOST_CELLS // num)
    for first in range(0, count, at_once):
        here = slice(first, min(first + at_once, count))
        clients = rng.integers(num, size=(here.stop - first, num))
        weights = pair.weights_C[clients]
        found[here] = statistic(pair.own_C[clients], weights)
        found[here] -= statistic(pair.other_C[clients], weights)
    return found


def percentile_interval(means: Floats) -> tuple[float, float]:
    """The 95 % percentile interval of resampled means."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
