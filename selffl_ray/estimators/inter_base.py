"""What the inter-client estimators share: the sums that they read of the clients' vectors.

Shape letters: M clients, P coordinates of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.errors import VarianceError

Floats = npt.NDArray[np.float64]

FLOOR = 1e-12
"""Smallest intra-client variance that is used: some formulas divide by it."""


class Block(NamedTuple):
    """Vectors of one parameter group, reduced to what the formulas need.

    dimension: coordinates d; spread: sum_m |x_m - mean|^2; gram_MM: inner products of the vectors
    about their plain mean, or None where only the spread was collected.
    """

    num_clients: int
    dimension: int
    spread: float
    gram_MM: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class InterEstimator:
    """solve: (block, intra_var_M) -> variance between clients a coordinate, >= 0.

    needs_rows: the Gram matrix is read, so every participant's vector must reach the server;
    known: the variance is the data set's true one and nothing is solved.
    """

    solve: Callable[[Block, Floats], float]
    needs_rows: bool = False
    known: bool = False


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """An estimator without options."""


def block_from_rows(vectors_MP: Any) -> Block:
    """Block of all rows, in float64."""
    rows = np.asarray(vectors_MP, dtype=np.float64).reshape(len(vectors_MP), -1)
    centred = rows - rows.mean(axis=0)
    gram = centred @ centred.T
    return Block(len(rows), rows.shape[1], float(np.trace(gram)), gram)


def block_from_sums(
    num_clients: int, dimension: int, square_norms: float, mean_square_norm: float
) -> Block:
    """Block from sum_m |x_m|^2 and |mean of x|^2; rounding below 0 is cut off."""
    spread = max(0.0, square_norms - num_clients * mean_square_norm)
    return Block(num_clients, dimension, spread)


def floored(intra_var_M: npt.ArrayLike) -> Floats:
    """Intra-client variances, at least 1e-12.

    Raises:
        VarianceError: a negative or NaN one.
    """
    intra_M = np.asarray(intra_var_M, dtype=np.float64)
    if not (intra_M >= 0).all():
        raise VarianceError(f"intra_var must be >= 0 for every client, got {intra_M}")
    return np.maximum(intra_M, FLOOR)


def estimate_with(estimator: InterEstimator, vectors_MP: Any, intra_var_M: Any) -> float:
    """The estimate for one block of vectors; 0 for fewer than two clients."""
    count, num_variances = len(vectors_MP), len(np.atleast_1d(intra_var_M))
    if count != num_variances:
        raise VarianceError(f"{count} vectors but {num_variances} variances")
    if count < 2:
        return 0.0
    return estimator.solve(block_from_rows(vectors_MP), floored(intra_var_M))


def precision_spread(gram_MM: Floats, weight_M: Floats) -> tuple[float, Floats]:
    """sum_m weight |x_m - mu|^2 and every |x_m - mu|^2, mu the mean with those weights.

    Distances come from the Gram matrix alone, by way of those between pairs, D: |x_m - mu|^2 =
    (D q)_m - q'Dq / 2. Where one client has nearly all the weight, its distance from mu is far
    below the rounding error of G_mm - 2 (G q)_m + q'Gq.
    """
    norm_M = np.diagonal(gram_MM)
    between_MM = norm_M[:, None] + norm_M - 2 * gram_MM
    total = weight_M.sum()
    share_M = weight_M / total
    towards_M = between_MM @ share_M
    half = 0.5 * (share_M @ towards_M)
    return float(total * half), np.maximum(towards_M - half, 0.0)


def required_gram(block: Block) -> Floats:
    """The block's Gram matrix."""
    assert block.gram_MM is not None, "needs_rows is set, so the rows were collected"
    return block.gram_MM
