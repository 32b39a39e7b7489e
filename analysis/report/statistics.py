"""Intervals over seeds, paired differences, and what "within the interval" means.

Every interval is a two-sided 95 % t interval over seeds. A difference is taken within a seed, on
the same data and partition, so what a seed does to both methods cancels. Nothing is corrected for
the number of comparisons except where the word Holm stands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from selffl_ray.seeding import generator

LEVEL = 0.95
NOISE = 1e-12
"""Differences below this are rounding errors of equal numbers."""
NUM_BOOTSTRAP = 4000
MOST_EXACT = 50
"""Most clients for which the signed-rank test is exact."""

Floats = npt.NDArray[np.float64]
Values = Mapping[Any, float]
"""A number for every pair key (seed, data, partition)."""


class Interval(NamedTuple):
    """Mean of ``num`` values and the half-width of its t interval; None with one value."""

    mean: float
    half: float | None
    num: int

    @property
    def low(self) -> float | None:
        """Lower end."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end."""
        return None if self.half is None else self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and 0 lies outside of it."""
        return self.half is not None and abs(self.mean) > self.half


@functools.cache
def _quantile(freedom: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and half-width t(0.975, n - 1) s / sqrt(n), s over n - 1; at least one value."""
    assert values, "a mean needs a value"
    mean, num = float(np.mean(values)), len(values)
    if num < 2:
        return Interval(mean, None, num)
    return Interval(mean, _quantile(num - 1) * float(np.std(values, ddof=1)) / math.sqrt(num), num)


def paired_differences(own: Values, other: Values) -> dict[Any, float]:
    """Own minus other for every key that both have; rounding errors of equal numbers are 0."""
    raw = {key: own[key] - other[key] for key in own if key in other}
    return {key: 0.0 if abs(d) < NOISE else d for key, d in raw.items()}


def paired(own: Values, other: Values) -> Interval | None:
    """The interval of own minus other over the keys that both have; None if there is none."""
    found = paired_differences(own, other)
    return t_interval(list(found.values())) if found else None


class Ranking(NamedTuple):
    """Which rows of a column are bold.

    best: index of the best row; None if nothing was measured.
    bold: the best and all that are within the interval; all False if no row could be compared.
    unpaired: rows that share fewer than two keys with the best, so nothing is said about them.
    """

    best: int | None
    bold: tuple[bool, ...]
    unpaired: tuple[int, ...]


def rank(rows: Sequence[Values], better: int) -> Ranking:
    """Bold: the row with the best mean, and every row that is not shown to be worse.

    The best is sought among the rows with the most keys, so that a row with one lucky seed cannot
    be it. Another row is bold if the interval of its paired difference to the best reaches 0 from
    the worse side; where all rows have the same seeds that is: if the interval includes 0. At least
    two common keys are needed: one gives no interval, and no interval means not bold. The best
    itself is bold only if it was compared with somebody.

    Args:
        rows: a number for every pair key, of each row; empty where it was not measured.
        better: 1 if higher is better, -1 if lower is.
    """
    most = max((len(values) for values in rows), default=0)
    if most == 0:
        return Ranking(None, (False,) * len(rows), ())
    candidates = [at for at, values in enumerate(rows) if len(values) == most]
    best = max(candidates, key=lambda at: better * float(np.mean(list(rows[at].values()))))
    bold, unpaired = [False] * len(rows), []
    for at, values in enumerate(rows):
        if at == best or not values:
            continue
        found = paired(values, rows[best])
        if found is None or found.half is None:
            unpaired.append(at)
        else:
            bold[best] = True
            bold[at] = better * found.mean + found.half >= 0
    return Ranking(best, tuple(bold), tuple(unpaired))


def bootstrap_interval(differences: Sequence[Floats]) -> tuple[float, float] | None:
    """95 % percentile interval of the mean difference over clients, seeds and clients resampled.

    Hierarchical: seeds are drawn with replacement, and within each the clients. With few seeds it
    is too narrow, which is why the t interval stands beside it.

    Args:
        differences: for every seed one number a client.

    Returns:
        None with fewer than two seeds.
    """
    if len(differences) < 2:
        return None
    rng = generator(0, "report/bootstrap")
    num = len(differences)
    picked = rng.integers(num, size=(NUM_BOOTSTRAP, num))
    means = np.empty((NUM_BOOTSTRAP, num))
    for seed, values in enumerate(differences):
        here = picked == seed
        clients = rng.integers(len(values), size=(int(here.sum()), len(values)))
        means[here] = values[clients].mean(1)
    low, high = np.quantile(means.mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class SignedRanks(NamedTuple):
    """Wilcoxon's signed-rank test: p-value, and the rank-biserial correlation as effect size.

    The effect is (sum of ranks in favour - sum against) / all, in [-1, 1].
    """

    p_value: float
    effect: float


def signed_ranks(differences: Floats) -> SignedRanks | None:
    """The test on one difference a client, equal ones left out; None if no client differs.

    Exact up to ``MOST_EXACT`` clients, ties by mid-ranks; the normal approximation beyond.
    """
    own = differences[np.abs(differences) >= NOISE]
    if not len(own):
        return None
    ranks = stats.rankdata(np.abs(own))
    effect = float((ranks * np.sign(own)).sum() / ranks.sum())
    if len(own) > MOST_EXACT:
        return SignedRanks(float(stats.wilcoxon(own, method="asymptotic").pvalue), effect)
    return SignedRanks(_exact_p(ranks, float(ranks[own > 0].sum())), effect)


def _exact_p(ranks: Floats, favour: float) -> float:
    """Two-sided p: share of all 2^n signs whose rank sum is at least as far from its mean.

    scipy enumerates the signs where there are ties, which takes seconds for a dozen clients; here
    the distribution is built rank by rank, on twice the ranks, which are whole.
    """
    twice = np.rint(2 * ranks).astype(np.int64)
    share = np.ones(1)
    for step in twice:
        share = 0.5 * (np.pad(share, (0, step)) + np.pad(share, (step, 0)))
    far = np.abs(2 * np.arange(len(share)) - twice.sum()) >= abs(4 * favour - twice.sum()) - NOISE
    return min(1.0, float(share[far].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, at in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[at]))
        adjusted[at] = running
    return adjusted
