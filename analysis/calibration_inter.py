"""Calibration of the inter-client estimators: simulated clients, intra variances known.

The M intra variances are evenly spaced in the logarithm over a factor 30 and have mean 1 (the
specification says log-uniform; its figures fit less well with drawn ones). Each replicate draws
theta_m ~ N(0, inter_var I) and y_m ~ N(theta_m, intra_m I) with d coordinates, estimates inter_var
from y, and plugs the estimate into the posterior of each client's parameters. With d = 1 the intra
variances that are told are those of 5 draws instead of the true ones. All estimators see the same
draws. Setting and figures: method specification, 5.2.

Shape letters: M clients, P coordinates, R replicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis import calibration_base as base
from analysis.calibration_base import Figure, Floats
from selffl_ray.estimators.inter_base import Block, block_from_rows, floored
from selffl_ray.registry import Component, inter_estimators
from selffl_ray.seeding import generator

BAYES = "true variance"
"""The Bayes rule: the true inter_var plugged in."""
EQUAL = "equal intra"
"""A reference rule: the true inter_var, and every client's intra variance taken for their mean."""
FACTOR = 30.0
"""Range of the intra variances."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A simulation.

    noisy_window: W, if the estimators are told variances of W draws instead of the true ones.
    """

    inter_var: float
    num_clients: int = 20
    dimension: int = 20
    noisy_window: int | None = None

    @property
    def variant(self) -> str:
        """Short description of what the estimators are told."""
        told = "known" if self.noisy_window is None else f"from {self.noisy_window} draws"
        return f"d={self.dimension}, intra {told}"


SETTINGS = (
    *(Setting(inter_var=v) for v in (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 4.0)),
    *(Setting(inter_var=v, num_clients=5) for v in (0.0, 0.1, 1.0, 4.0)),
    *(Setting(inter_var=v, dimension=1, noisy_window=5) for v in (1.0, 4.0)),
)

AT = (0.0, 0.1, 1.0, 4.0)
RMSE = {
    "empirical": (1.01, 1.00, 1.01, 1.03),
    "moments": (0.076, 0.091, 0.162, 0.383),
    "dl": (0.022, 0.035, 0.116, 0.370),
    "pm": (0.025, 0.040, 0.123, 0.357),
    "ml": (0.006, 0.041, 0.135, 0.421),
    "reml": (0.016, 0.032, 0.114, 0.342),
}
RISK_AT = (0.03, 0.3, 3.0)
RISK = {
    "empirical": (4.8, 1.48, 1.015),
    "moments": (1.12, 1.03, 1.002),
    "dl": (1.02, 1.005, 1.002),
    "reml": (1.02, 1.004, 1.002),
    EQUAL: (1.75, 1.31, 1.16),
}
BIAS = {
    **{("empirical", 20, 20, v): 1.0 for v in AT},
    ("ml", 20, 20, 4.0): -0.27,
    ("ml", 5, 20, 4.0): -0.24 * 4,
    ("ml", 5, 20, 1.0): -0.32,
    ("dl", 20, 1, 1.0): 0.17,
}
"""By estimator, M, d and inter_var."""


class Problem(NamedTuple):
    """One draw. told_M: what the estimators take for the intra variances."""

    theta_MP: Floats
    optima_MP: Floats
    intra_M: Floats
    told_M: Floats


class Outcomes(NamedTuple):
    """Of one rule in each replicate, (R,): its variance, mean square error, share covered."""

    estimate_R: Floats
    square_R: Floats
    covered_R: Floats


def problems(setting: Setting, replicates: int, seed: int) -> Iterator[Problem]:
    """Independent draws; every setting has streams of its own."""
    label = f"{setting.num_clients} {setting.variant} {setting.inter_var}"
    shape = (setting.num_clients, setting.dimension)
    intra_M = np.geomspace(1, FACTOR, setting.num_clients)
    intra_M = intra_M / intra_M.mean()
    for replicate in range(replicates):
        rng = generator(seed, "calibration/inter", replicate, label)
        theta_MP = math.sqrt(setting.inter_var) * rng.standard_normal(shape)
        optima_MP = theta_MP + np.sqrt(intra_M)[:, None] * rng.standard_normal(shape)
        told_M = intra_M
        if setting.noisy_window is not None:
            freedom = setting.noisy_window - 1
            told_M = intra_M * rng.chisquare(freedom, setting.num_clients) / freedom
        yield Problem(theta_MP, optima_MP, intra_M, told_M)


def simulate(
    setting: Setting, replicates: int, seed: int, estimators: Sequence[str]
) -> dict[str, Outcomes]:
    """Outcomes of the estimators and of the two reference rules, on the same draws."""
    made = {name: inter_estimators.make(Component(name)) for name in estimators}
    found: dict[str, list[tuple[float, float, float]]] = {n: [] for n in (*made, BAYES, EQUAL)}
    truth = setting.inter_var
    for problem in problems(setting, replicates, seed):
        block: Block = block_from_rows(problem.optima_MP)
        told_M = floored(problem.told_M)
        rules = {name: (made[name].solve(block, told_M), told_M) for name in made}
        rules[BAYES] = (truth, problem.intra_M)
        rules[EQUAL] = (truth, np.full_like(told_M, problem.intra_M.mean()))
        for name, (inter_var, intra_M) in rules.items():
            posterior = base.plug_in(problem.optima_MP, inter_var, intra_M)
            square = float(base.square_errors(posterior, problem.theta_MP).mean())
            covered = float(base.coverage(posterior, problem.theta_MP).mean())
            found[name].append((inter_var, square, covered))
    return {name: Outcomes(*np.asarray(rows).T) for name, rows in found.items()}


def figures(replicates: int, seed: int = 0) -> list[Figure]:
    """Bias, RMSE, coverage and plug-in risk of every estimator in every setting."""
    rows = []
    for setting in SETTINGS:
        outcomes = simulate(setting, replicates, seed, base.INTER)
        for name, own in outcomes.items():
            rows += _figures_of(setting, name, own, outcomes[BAYES])
    return rows


def _figures_of(setting: Setting, name: str, own: Outcomes, bayes: Outcomes) -> list[Figure]:
    errors_R = own.estimate_R - setting.inter_var
    measured = {
        "risk": base.ratio(own.square_R, bayes.square_R),
        "coverage": base.mean(own.covered_R),
    }
    if name not in (BAYES, EQUAL):
        measured["bias"] = base.mean(errors_R)
        measured["rmse"] = base.root_mean_square(errors_R)
    rows = []
    for quantity, (value, error) in measured.items():
        expected, tolerance = specification(setting, name, quantity)
        rows.append(
            Figure(
                part="inter",
                estimator=name,
                variant=setting.variant,
                quantity=quantity,
                value=value,
                error=error,
                num_clients=setting.num_clients,
                inter_var=setting.inter_var,
                specification=expected,
                tolerance=tolerance,
            )
        )
    return rows


def specification(setting: Setting, name: str, quantity: str) -> tuple[float, float]:
    """The specification's figure (5.2) and the difference that is allowed; NaN without one.

    15 % of an RMSE or at least 0.002, 10 % of a bias or 0.05, 15 % of a risk's excess over 1 or
    0.012: the specification's figures have a Monte Carlo error of their own.
    """
    clients, dimension, inter = setting.num_clients, setting.dimension, setting.inter_var
    if quantity == "bias" and (name, clients, dimension, inter) in BIAS:
        expected = BIAS[name, clients, dimension, inter]
        return expected, max(0.1 * abs(expected), 0.05)
    if quantity == "rmse" and (name, clients, dimension, inter) == ("dl", 20, 1, 4.0):
        return 2.6, 0.15 * 2.6
    if (clients, dimension) != (20, 20):
        return math.nan, math.nan
    if quantity == "rmse" and inter in AT:
        expected = RMSE[name][AT.index(inter)]
        return expected, max(0.15 * expected, 0.002)
    if quantity == "risk" and name in RISK and inter in RISK_AT:
        expected = RISK[name][RISK_AT.index(inter)]
        return expected, max(0.15 * (expected - 1), 0.012)
    return math.nan, math.nan
