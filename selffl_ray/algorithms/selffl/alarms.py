"""Alarms about the two uncertainties: pure functions that judge one probe.

floor: an estimate is cut off at 0. The variance between clients is estimated as exactly 0 and
earlier probes left little of it; or a client counts as certain.

ratio: variances are so unequal that the method degenerates. A few clients have all the weight, or
nobody shares anything.

no_information: the intra-client estimator does not say who is uncertain. Too few variances are
known; or they hardly differ though the numbers of examples do; or clients with *fewer* examples are
called the more certain ones, as variances over time do where clients fit their few examples.

Judged are means over parameters, so that a granularity changes the alarms little and single
parameters raise none. Shape letters: K participants of the probe, G parameter groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.algorithms.base import Alarm
from selffl_ray.algorithms.selffl.estimates import pooled
from selffl_ray.estimators.inter_base import FLOOR

Floats = npt.NDArray[np.float64]

SMALL_SHARE = 0.05
"""Smoothed share of the inter-client variance in the total, up to which 0 is what is used: the
shrink factor of a typical client is at least 0.95. A single 0 among other estimates is chance."""

MOST_RATIO = 1e4
"""Of the largest to the smallest intra-client variance, and of inter- to intra-client variance.

Variances go with 1 / n: sizes from 10 to 10,000 examples explain a factor of 1,000, and a further
ten is left for how hard the data are. An inter-client variance of 1e4 times the intra-client one is
a shrink factor of 1e-4: local training under another name."""

UNEQUAL_SIZES = 2.0
"""Largest over smallest number of examples from which variances can be held against sizes."""

FEWEST_CORRELATED = 5
"""Participants from which a correlation is judged."""

SIGNIFICANCE = 0.05
"""One-sided level of the correlation: small federations have negative ones by chance."""

FLAT = 0.1
"""Log range of the variances over that of the sizes, below which the variances are called equal."""


class Probed(NamedTuple):
    """A probe, as the alarms see it.

    num_examples_K: for training; var_KG: raw intra-client variances, NaN unknown; inter_G: raw
    inter-client variance; smoothed_G: the normalised one in use, a share in [0, 1]; sizes_G:
    coordinates; pooling: ``intra_pooling``; first: no probe was used before; known_inter,
    known_intra: true variances, which nobody estimated.
    """

    num_examples_K: Floats
    var_KG: Floats
    inter_G: Floats
    smoothed_G: Floats
    sizes_G: Floats
    pooling: str
    first: bool = False
    known_inter: bool = False
    known_intra: bool = False

    @property
    def judged_G(self) -> npt.NDArray[np.bool_]:
        """Groups that the probe estimated: two variances are known."""
        return np.asarray((~np.isnan(self.var_KG)).sum(axis=0) >= 2)

    @property
    def var_K(self) -> Floats:
        """Mean over the parameters of the groups that were estimated; NaN for unknown ones."""
        var_KG, weight_KG = self.var_KG[:, self.judged_G], self.sizes_G[self.judged_G]
        known_KG = ~np.isnan(var_KG)
        total_K = np.where(known_KG, var_KG * weight_KG, 0.0).sum(axis=1)
        count_K = (known_KG * weight_KG).sum(axis=1)
        return np.where(count_K > 0, total_K / np.maximum(count_K, 1.0), np.nan)

    def share(self, group_G: npt.NDArray[np.bool_]) -> float:
        """Share of the estimated parameters that lie in some groups."""
        sizes_G = self.sizes_G * self.judged_G
        return float(sizes_G @ group_G / sizes_G.sum())


def alarms(probe: Probed) -> tuple[Alarm, ...]:
    """All three, raised or not; their metrics are 1 and 0."""
    judges = {"floor": floor, "ratio": ratio, "no_information": no_information}
    return tuple(Alarm(f"uncertainty/alarm_{name}", f(probe)) for name, f in judges.items())


def floor(probe: Probed) -> str | None:
    """What is cut off at its floor, and what to do; None if nothing is."""
    if not probe.judged_G.any():
        return None
    # At an untrained model gradients are alike whatever the clients: a first 0 says little.
    if not (probe.known_inter or probe.first):
        at_zero = probe.share((probe.inter_G == 0) & (probe.smoothed_G <= SMALL_SHARE))
        if at_zero >= 0.5:
            return (
                "the inter-client variance is estimated as 0, so clients count as alike and "
                "personalized models hardly leave their start; right for clients with the same "
                "distribution, otherwise try another method.inter or method.intra"
            )
    certain_KG = probe.var_KG <= FLOOR * _typical(probe.var_KG)
    certain = sum(probe.share(row_G) >= 0.5 for row_G in certain_KG)
    if certain and not probe.known_intra:
        return (
            f"{certain} of {len(certain_KG)} participants have an intra-client variance of "
            "practically 0 and count as certain; take another method.intra, or method.inter: "
            "moments with method.intra_pooling: pooled, which do not rely on single variances"
        )
    return None


def ratio(probe: Probed) -> str | None:
    """Which ratio exceeds its bound, and what to do; None if none does."""
    var_K = probe.var_K
    if not probe.judged_G.any():
        return None
    # As they are used: pooled ones differ by their sizes only. What is at the floor is its alarm.
    used_K = pooled(probe.pooling, var_K, probe.num_examples_K)
    above_K = used_K[used_K > FLOOR * used_K.mean()]
    if len(above_K) and not above_K.max() <= MOST_RATIO * above_K.min():
        return (
            f"intra-client variances of the participants differ by a factor of "
            f"{above_K.max() / above_K.min():.1e}, so a few clients' variances decide everything; "
            "use method.intra_pooling: pooled, another method.intra, or leave out the clients with "
            "the fewest examples"
        )
    weight_G = probe.sizes_G * probe.judged_G
    inter, intra = float(np.nansum(weight_G * probe.inter_G) / weight_G.sum()), used_K.mean()
    if not inter <= MOST_RATIO * intra:
        return (
            f"the inter-client variance is {inter:.1e} and the mean intra-client one {intra:.1e}, "
            "so clients share next to nothing; lower training.learning_rate if the loss grows, "
            "otherwise take another method.intra: this one misses what differs between clients"
        )
    return None


def no_information(probe: Probed) -> str | None:
    """Why the intra-client variances do not tell who is uncertain; None if they may."""
    if probe.known_intra:
        return None
    var_K, num_K = probe.var_K, probe.num_examples_K
    known_K = ~np.isnan(var_K)
    if known_K.sum() < 2:
        return (
            f"fewer than 2 of {len(known_K)} participants have a known intra-client variance, so "
            "the probe changed nothing; if this goes on, use method.intra: gradient_chunks, more "
            "participants or more examples a client"
        )
    why = _against_sizes(var_K[known_K], num_K[known_K])
    if why is None:
        return None
    return (
        f"{why}: the estimator does not see how certain clients are; use method.intra: "
        "gradient_chunks"
    )


def _against_sizes(var_K: Floats, num_K: Floats) -> str | None:
    """What is wrong with variances that should go with 1 / n; None if nothing is."""
    if num_K.max() < UNEQUAL_SIZES * num_K.min():
        return None
    log_K = np.log(np.maximum(var_K, FLOOR * var_K.mean() or FLOOR))
    if np.ptp(log_K) <= FLAT * np.ptp(np.log(num_K)):
        return (
            f"intra-client variances differ by {np.expm1(np.ptp(log_K)):.1%} while clients have "
            f"{num_K.min():g} to {num_K.max():g} training examples"
        )
    if len(var_K) < FEWEST_CORRELATED:
        return None
    found = correlation(log_K, -np.log(num_K))
    if found.p_less >= SIGNIFICANCE:
        return None
    return (
        "clients with fewer examples have the smaller intra-client variances (correlation of log "
        f"variance with log 1/n {found.r:.2f}, {len(var_K)} clients)"
    )


class Correlation(NamedTuple):
    """Pearson's r, and the probability of one as low or lower if there is none."""

    r: float
    p_less: float


def correlation(x_K: Floats, y_K: Floats) -> Correlation:
    """Pearson's correlation of K >= 3 pairs, one-sided, as ``scipy.stats.pearsonr`` tests it."""
    # Imported here, and not scipy.stats: half a second more and 35 MB, for one distribution.
    from scipy.special import betainc

    r = float(np.corrcoef(x_K, y_K)[0, 1])
    # Of independent normal pairs (1 + r) / 2 is distributed as Beta(K/2 - 1, K/2 - 1).
    shape = len(x_K) / 2 - 1
    return Correlation(r, float(betainc(shape, shape, np.clip((1 + r) / 2, 0.0, 1.0))))


def _typical(var_KG: Floats) -> Floats:
    """Mean over the known participants of each group: what a floor is relative to. (G,)."""
    known_KG = ~np.isnan(var_KG)
    total_G = np.where(known_KG, var_KG, 0.0).sum(axis=0)
    return np.asarray(total_G / np.maximum(known_KG.sum(axis=0), 1))
