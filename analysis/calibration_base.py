"""What the parts of the calibration share: figures with errors, and the plugged-in posterior.

Shape letters: M clients, P coordinates, R replicates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from selffl_ray import hierarchy
from selffl_ray.registry import inter_estimators, intra_estimators

Floats = npt.NDArray[np.float64]

INTER = tuple(name for name in inter_estimators.names() if name != "known")
INTRA = tuple(name for name in intra_estimators.names() if name != "known")
"""The package's estimators, without those that are told the truth. Read once: the study of the
collapse adds one of its own to the registry."""
NOMINAL = 0.9
"""Coverage that the posterior intervals claim."""
HALF_WIDTH = float(norm.ppf(0.5 + NOMINAL / 2))
"""Half of such an interval, in posterior standard deviations."""


class Figure(NamedTuple):
    """One number of the results, a row of the CSV file.

    part: inter, intra, regression or collapse; estimator: a name of the registry, or a reference
    rule; variant: what differs within a part; num_clients, inter_var, num_examples: the setting,
    NaN where it has none or all are taken together; error: Monte Carlo standard error, NaN for a
    number without chance; specification: the same number in the method specification, NaN if it has
    none; tolerance: allowed difference from it.
    """

    part: str
    estimator: str
    variant: str
    quantity: str
    value: float
    error: float = math.nan
    num_clients: float = math.nan
    inter_var: float = math.nan
    num_examples: float = math.nan
    specification: float = math.nan
    tolerance: float = math.nan


class Measured(NamedTuple):
    """A number from replicates and its Monte Carlo standard error."""

    value: float
    error: float


def mean(values_R: npt.ArrayLike) -> Measured:
    """Mean over replicates."""
    values = np.asarray(values_R, dtype=np.float64)
    return Measured(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


def root_mean_square(errors_R: npt.ArrayLike) -> Measured:
    """Root of the mean square; its error to first order."""
    return root(np.square(np.asarray(errors_R, dtype=np.float64)))


def root(squares_R: npt.ArrayLike) -> Measured:
    """Root of a mean of squares; its error to first order (0 for a root of 0)."""
    square = mean(squares_R)
    value = math.sqrt(square.value)
    return Measured(value, square.error / (2 * value) if value > 0 else 0.0)


def ratio(above_R: npt.ArrayLike, below_R: npt.ArrayLike) -> Measured:
    """Ratio of two means over the same replicates; its error to first order."""
    above, below = np.asarray(above_R, np.float64), np.asarray(below_R, np.float64)
    value = float(above.mean() / below.mean())
    rest = mean(above - value * below)
    return Measured(value, rest.error / float(below.mean()))


class Posterior(NamedTuple):
    """Mean (M, P) and variance a coordinate (M,) of the clients' parameters."""

    mean_MP: Floats
    var_M: Floats


def plug_in(optima_MP: Floats, inter_var: float, intra_M: npt.ArrayLike) -> Posterior:
    """Equation (2) of the specification with these variances, by way of the equal (3).

    The mean is ``hierarchy.personal_posterior``'s, as one interpolation from the global mean for
    all clients instead of a leave-one-out mean for each: there are tens of thousands of these.
    """
    intra = np.asarray(intra_M, dtype=np.float64)
    global_P = hierarchy.precision_weights(inter_var, intra) @ optima_MP
    shrink_M1 = hierarchy.shrinkage(inter_var, intra)[:, None]
    var_M = intra * (1 - hierarchy.shrinkage_loo(inter_var, intra))
    return Posterior(hierarchy.interpolate(global_P, optima_MP, shrink_M1), var_M)


def square_errors(posterior: Posterior, theta_MP: Floats) -> Floats:
    """Mean square a coordinate of the posterior mean's error, (M,)."""
    return np.asarray(np.square(posterior.mean_MP - theta_MP).mean(axis=1))


def coverage(posterior: Posterior, theta_MP: Floats) -> Floats:
    """Share of each client's coordinates inside the central 90 % posterior interval, (M,)."""
    half_M1 = HALF_WIDTH * np.sqrt(posterior.var_M)[:, None]
    return np.asarray((np.abs(posterior.mean_MP - theta_MP) <= half_M1).mean(axis=1))
