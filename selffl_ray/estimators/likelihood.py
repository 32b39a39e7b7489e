"""Profile likelihood of the two-level Gaussian model in the variance between clients.

l(t) = -1/2 sum_m [d ln(s_m + t) + |x_m - mu(t)|^2 / (s_m + t)], s_m the intra-client variances;
restricted: minus (d / 2) ln sum_m 1 / (s_m + t). Its slope is closed-form because mu(t) maximises
l for every t, so maxima are found as roots of the slope, to full precision.
"""

from __future__ import annotations

import numpy as np

from selffl_ray.estimators.inter_base import Block, Floats, precision_spread, required_gram

GRID_POINTS = 240


def log_likelihood(block: Block, intra_M: Floats, tau2: float, *, restricted: bool) -> float:
    """l(t) up to a constant."""
    weight_M = 1.0 / (intra_M + tau2)
    spread, _ = precision_spread(required_gram(block), weight_M)
    value = -0.5 * (-block.dimension * np.log(weight_M).sum() + spread)
    if restricted:
        value -= 0.5 * block.dimension * np.log(weight_M.sum())
    return float(value)


def slope(block: Block, intra_M: Floats, tau2: float, *, restricted: bool) -> float:
    """dl/dt, multiplied by (mean s + t) so that it has no unit."""
    weight_M = 1.0 / (intra_M + tau2)
    _, square_M = precision_spread(required_gram(block), weight_M)
    value = -0.5 * (block.dimension * weight_M - square_M * weight_M**2).sum()
    if restricted:
        value += 0.5 * block.dimension * (weight_M**2).sum() / weight_M.sum()
    return float(value * (intra_M.mean() + tau2))


def maximise(block: Block, intra_M: Floats, *, restricted: bool) -> float:
    """Global maximum over t >= 0: a log grid finds every fall through 0 of the slope."""
    # Imported here: hosts know every estimator, and only the server looks for roots.
    from scipy.optimize import brentq

    def at(tau2: float) -> float:
        return slope(block, intra_M, tau2, restricted=restricted)

    # No maximum lies beyond the largest single squared distance a coordinate.
    upper = 10 * (block.spread / block.dimension + float(intra_M.max()))
    grid = np.concatenate([[0.0], np.geomspace(1e-9 * float(intra_M.min()), upper, GRID_POINTS)])
    slopes = [at(t) for t in grid]
    found = [0.0]
    for left, right, rise, fall in zip(grid, grid[1:], slopes, slopes[1:], strict=False):
        if rise > 0 >= fall:
            found.append(float(brentq(at, left, right, xtol=1e-300, rtol=1e-12)))
    return max(found, key=lambda t: log_likelihood(block, intra_M, t, restricted=restricted))
