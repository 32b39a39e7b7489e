"""The server's half of Self-FL's uncertainties: from probes to weights and shrink factors.

All arrays are float64 NumPy; M clients that take part, G parameter groups. Normalised variances u
have a common scale of 1 (see ``hierarchy.normalise``); NaN is a client that was never estimated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray import hierarchy
from selffl_ray.algorithms.selffl.config import SelfFLConfig
from selffl_ray.estimators.inter_base import (
    Block,
    InterEstimator,
    block_from_rows,
    block_from_sums,
    floored,
)
from selffl_ray.flat import Groups

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

FLOOR = 1e-12
"""Smallest normalised inter + intra variance, where both would be 0."""


class Probe(NamedTuple):
    """What one probe brought, for its K participants.

    index: (K,) clients; num_examples: (K,); var_KG: raw intra variances, NaN unknown;
    mean_square_KG: mean square a coordinate of their vectors; mean_P: mean of the vectors over the
    K participants with unknown ones as 0; rows_KP: the vectors themselves, for estimators that
    need them.
    """

    client_index: Indices
    num_examples: Floats
    var_KG: Floats
    mean_square_KG: Floats
    mean_P: Floats
    rows_KP: Floats | None


class Estimates(NamedTuple):
    """Smoothed normalised variances (u), and the last raw ones for the tables."""

    inter_G: Floats
    intra_MG: Floats
    raw_inter_G: Floats
    raw_intra_MG: Floats


def no_estimates(num_clients: int, num_groups: int) -> Estimates:
    """Before the first probe."""
    return Estimates(
        np.full(num_groups, np.nan),
        np.full((num_clients, num_groups), np.nan),
        np.full(num_groups, np.nan),
        np.full((num_clients, num_groups), np.nan),
    )


def update_estimates(
    config: SelfFLConfig,
    inter: InterEstimator,
    groups: Groups,
    *,
    known_inter_var: float | None,
    exact_intra: bool,
    old: Estimates,
    probe: Probe,
) -> Estimates:
    """Estimates after a probe, group by group; a group without two known clients keeps its own.

    Args:
        known_inter_var: the true variance between clients, if it is to be used.
        exact_intra: the probe's variances are true ones.
    """
    new = Estimates(*(np.array(a) for a in old))
    new.raw_intra_MG[probe.client_index] = probe.var_KG
    edges = np.cumsum(groups.sizes_G)
    for g in range(groups.num_groups):
        known = ~np.isnan(probe.var_KG[:, g])
        if known.sum() < 2:
            continue
        if known_inter_var is not None:
            inter_var = known_inter_var
        else:
            columns = group_columns(groups, g, edges)
            inter_var = _inter_var(inter, groups, probe, known=known, group=g, columns=columns)
        intra_K = pooled(config.intra_pooling, probe.var_KG[:, g], probe.num_examples)
        new.raw_inter_G[g] = inter_var
        if exact_intra and known_inter_var is not None:
            # Both are the truth: a common scale and a memory could only blur it.
            new.inter_G[g], new.intra_MG[probe.client_index, g] = inter_var, intra_K
            continue
        previous = None if np.isnan(old.inter_G[g]) else (old.inter_G[g], old.intra_MG[:, g])
        full_M = np.zeros(len(old.intra_MG))
        full_M[probe.client_index] = intra_K
        present_M = np.zeros(len(full_M), bool)
        present_M[probe.client_index] = True
        smoothed = hierarchy.smooth(
            previous, inter_var, full_M, config.beta, present_M, beta_intra=config.beta_intra
        )
        assert smoothed is not None, "two participants are known"
        new.inter_G[g], new.intra_MG[:, g] = smoothed
    return new


def group_columns(groups: Groups, group: int, edges: Indices) -> Indices:
    """Places of one group's coordinates in the flat vector."""
    if len(groups.piece_sizes) == groups.num_groups:
        return np.arange(edges[group] - groups.sizes_G[group], edges[group])
    owner_P = np.repeat(np.asarray(groups.owners), np.asarray(groups.piece_sizes))
    return np.flatnonzero(owner_P == group)


def _inter_var(
    inter: InterEstimator,
    groups: Groups,
    probe: Probe,
    *,
    known: npt.NDArray[np.bool_],
    group: int,
    columns: Indices,
) -> float:
    """Raw variance between clients of one group, from its known participants.

    Vectors and variances are first brought to the scale of the mean variance, so that the floor on
    variances is relative: gradients of a large network are tiny.
    """
    intra_K = probe.var_KG[known, group]
    size = int(groups.sizes_G[group])
    scale = float(intra_K.mean()) or float(probe.mean_square_KG[known, group].mean()) or 1.0
    if probe.rows_KP is not None:
        block = block_from_rows(probe.rows_KP[np.ix_(known, columns)] / np.sqrt(scale))
    else:
        count, total = int(known.sum()), len(known)
        mean = probe.mean_P[columns] * (total / count)
        squares = float(probe.mean_square_KG[known, group].sum()) * size
        block = block_from_sums(count, size, squares / scale, float(mean @ mean) / scale)
    return inter.solve(Block(*block), floored(intra_K / scale)) * scale


def pooled(pooling: str, var_K: Floats, num_examples_K: Floats) -> Floats:
    """Intra variances of a probe's participants as they are used: (K,).

    Pooled: mean of n_k var_k over the known ones, over n. Own: as estimated; a participant without
    an estimate gets the largest of the others.

    Args:
        var_K: raw ones of one group, NaN unknown; at least one is known.
    """
    known = ~np.isnan(var_K)
    if pooling == "pooled":
        return np.asarray((num_examples_K[known] * var_K[known]).mean() / num_examples_K)
    return np.where(known, var_K, var_K[known].max())


def intra_for(
    config: SelfFLConfig, intra_M: Floats, num_examples_M: Floats, num_examples: Floats
) -> Floats:
    """Variance of clients that were never estimated, from those that were.

    Args:
        intra_M: (M,) with NaN for clients without one; num_examples_M: theirs.
        num_examples: of the clients asked about.
    """
    has = ~np.isnan(intra_M)
    if not has.any():
        return np.full(len(num_examples), np.nan)
    if config.intra_pooling == "pooled":
        return np.asarray((intra_M[has] * num_examples_M[has]).mean() / num_examples)
    return np.full(len(num_examples), intra_M[has].mean())


def aggregation_weights(
    config: SelfFLConfig,
    inter_var: float,
    intra_M: Floats,
    num_examples_M: Floats,
    *,
    age_M: Indices,
    usable_M: npt.NDArray[np.bool_],
) -> Floats:
    """Weights of the uploads of one group: (M,), sum 1, or all 0 if nobody has one.

    Args:
        intra_M: normalised variances, NaN unknown; before the first estimate all are.
        age_M: rounds since the last upload, negative for clients never seen.
        usable_M: clients whose upload can be used (de-shrinking has a limit).
    """
    seen_M = (age_M >= 0) & usable_M
    discount_M = hierarchy.discounts(np.maximum(age_M, 0), config.discount) * seen_M
    if not discount_M.any():
        return discount_M
    if config.aggregation == "sample_size":
        weights_M = discount_M * num_examples_M
    elif config.aggregation == "uniform" or np.isnan(inter_var):
        weights_M = discount_M
    else:
        filled_M = fill(config, intra_M, num_examples_M)
        floor = FLOOR if inter_var == 0 else 0.0
        finite_M = np.where(discount_M > 0, np.maximum(filled_M, floor), np.inf)
        weights_M = hierarchy.precision_weights(inter_var, finite_M) * discount_M
    return np.asarray(weights_M / weights_M.sum())


def fill(config: SelfFLConfig, intra_M: Floats, num_examples_M: Floats) -> Floats:
    """Variances with the gaps of clients that were never estimated filled in."""
    default_M = intra_for(config, intra_M, num_examples_M, num_examples_M)
    return np.where(np.isnan(intra_M), default_M, intra_M)


def shrink_factors(
    config: SelfFLConfig,
    inter_var: float,
    intra_M: Floats,
    num_examples_M: Floats,
    *,
    seen_M: npt.NDArray[np.bool_],
    new_num_examples: Floats,
) -> Floats:
    """Shrink factors of one group for all clients and then for new ones: (M + N,).

    B with ``init: loo``, lambda with ``init: global``; NaN before the first estimate. Undiscounted
    weights of the clients seen; a client that is not among them sees them all.
    """
    if np.isnan(inter_var):
        return np.full(len(intra_M) + len(new_num_examples), np.nan)
    filled_M = fill(config, intra_M, num_examples_M)
    new_N = intra_for(config, intra_M, num_examples_M, new_num_examples)
    all_intra = np.concatenate([filled_M, new_N])
    if config.init == "global":
        return hierarchy.shrinkage(inter_var, all_intra, kappa=config.kappa)
    weighed = np.concatenate([np.where(seen_M, filled_M, np.inf), np.full(len(new_N), np.inf)])
    prior = inter_var + hierarchy.leave_one_out_variances(inter_var, weighed)
    return hierarchy.posterior_weight(config.kappa * all_intra, prior)
