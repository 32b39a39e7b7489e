"""Collapse under shrinkage: inter-client estimates fed with the models that they shrank.

With equal intra variances s, a plain variance S = inter_var + s between the local optima, and
uploads shrunk towards their mean by lambda = s / (s + t), the next plain variance is
(t / (s + t))^2 S. From t = S its fixed point is 0 if inter_var < 3 s, else
(S - 2 s + sqrt(S (S - 4 s))) / 2 (method specification, 5.3). Here s = 1, and every estimator is
iterated by the package's functions on 20 local optima with exactly that spread, without and with
the remedy, which is to undo early stopping first; and ``empirical`` runs inside Self-FL beside an
intra-client estimator of this study (``calibration_plugin``) that puts the true variances beside
shrunk uploads. No estimator of the package pairs these two, so the runs say what the mistake does
to the system, not how the presets do as they are.

Shape letters: M clients, P coordinates.
"""

from __future__ import annotations

import math
import tempfile

import numpy as np

from analysis import calibration_base as base
from analysis.calibration_base import Figure, Floats
from selffl_ray import hierarchy, load_config, run_experiment
from selffl_ray.estimators.inter_base import block_from_rows, floored
from selffl_ray.registry import Component, inter_estimators
from selffl_ray.seeding import generator

INTRA_VAR = 1.0
INTER_VARS = (1.0, 2.0, 4.0, 8.0)
FIXED_POINTS = {1.0: 0.0, 2.0: 0.0, 4.0: 2.618, 8.0: 6.854}
"""The figures of 5.3, for ``empirical``."""
TOLERANCE = 0.001
SHRUNK, DESHRUNK = "shrunk uploads", "de-shrunk uploads"
PRESETS = ("exact", "as_described")
"""Run on the real system: global initial model and plain means, where the closed form holds
exactly; leave-one-out initial models and precision weights, where it holds up to 1 / M."""
NUM_CLIENTS, DIMENSION, NUM_ROUNDS = 20, 50, 60


def closed_form(inter_var: float, intra_var: float = INTRA_VAR) -> float:
    """Fixed point of the plain variance on shrunk uploads, from the unshrunk start."""
    total = inter_var + intra_var
    if inter_var < 3 * intra_var:
        return 0.0
    return (total - 2 * intra_var + math.sqrt(total * (total - 4 * intra_var))) / 2


def optima_with_spread(variance: float) -> Floats:
    """Local optima (M, P) whose plain variance is exactly this."""
    rows_MP = generator(0, "calibration/collapse").standard_normal((NUM_CLIENTS, DIMENSION))
    drawn = block_from_rows(rows_MP).spread / (DIMENSION * (NUM_CLIENTS - 1))
    return rows_MP * math.sqrt(variance / drawn)


def fixed_point(
    name: str, optima_MP: Floats, *, deshrunk: bool = False, iterations: int = 2000
) -> float:
    """Iterate an estimator on the uploads that its own estimate shrinks, from unshrunk ones.

    deshrunk: early stopping is undone first, equation (9), where the shrink factor allows it.
    """
    solve = inter_estimators.make(Component(name)).solve
    intra_M = floored(np.full(len(optima_MP), INTRA_VAR))
    start_P = optima_MP.mean(axis=0)
    inter_var = solve(block_from_rows(optima_MP), intra_M)
    for _ in range(iterations):
        shrink = float(hierarchy.shrinkage(inter_var, intra_M)[0])
        rows_MP = hierarchy.interpolate(start_P, optima_MP, shrink)
        if deshrunk:
            rows_MP = hierarchy.deshrink(start_P, rows_MP, shrink)
        before, inter_var = inter_var, solve(block_from_rows(rows_MP), intra_M)
        if abs(inter_var - before) <= 1e-13 * before:
            break
    return inter_var


def on_system(preset: str, inter_var: float, num_rounds: int = NUM_ROUNDS) -> tuple[float, float]:
    """Run Self-FL with true intra variances beside shrunk uploads, and ``empirical``.

    Returns:
        the estimates of the first round, on unshrunk uploads, and of the last.
    """
    config = load_config(
        None,
        [
            "experiment=calibration-collapse",
            "plugins=[analysis.calibration_plugin]",
            f"data={{name: gaussian, num_clients: {NUM_CLIENTS}, dimension: {DIMENSION}, "
            f"num_examples: [4], intra_var: [{INTRA_VAR}], inter_var: {inter_var}}}",
            f"method={{name: selffl, preset: {preset}, intra: known_beside_uploads, "
            "intra_pooling: own, inter: empirical, probe_every: 1, beta: 0.0, curvature: 1.0, "
            "contraction: null, max_contraction: 0.9, max_steps: 3000, rounding: ceil, "
            "warm_up_rounds: 1}",
            "model.dtype=float64",
            f"training.num_rounds={num_rounds}",
            "training.num_local_steps=100",
            "training.learning_rate=0.3",
            "placement.backend=local",
            "tracking.enabled=false",
            f"evaluation.every={num_rounds}",
            f"checkpoint.every={num_rounds}",
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        table = run_experiment(config, output=folder).uncertainty
    by_round = table.groupby("round_index")["inter_var"].first()
    return float(by_round.iloc[0]), float(by_round.iloc[-1])


def figures() -> list[Figure]:
    """Fixed points of every estimator by the package's functions, and of two presets."""
    rows = []
    for inter_var in INTER_VARS:
        optima_MP = optima_with_spread(inter_var + INTRA_VAR)
        for name in base.INTER:
            expected = FIXED_POINTS[inter_var] if name == "empirical" else math.nan
            end = _figure(name, SHRUNK, "fixed_point", inter_var, fixed_point(name, optima_MP))
            rows.append(end._replace(specification=expected, tolerance=TOLERANCE))
            undone = fixed_point(name, optima_MP, deshrunk=True)
            rows.append(_figure(name, DESHRUNK, "fixed_point", inter_var, undone))
        for preset in PRESETS:
            first, last = on_system(preset, inter_var)
            ends = {
                "first_round": first,
                "last_round": last,
                "closed_form": closed_form(first - INTRA_VAR),
            }
            rows += [
                _figure("empirical", f"Self-FL, {preset}", quantity, inter_var, value)
                for quantity, value in ends.items()
            ]
    return rows


def _figure(name: str, variant: str, quantity: str, inter_var: float, value: float) -> Figure:
    return Figure("collapse", name, variant, quantity, value, inter_var=inter_var)
