"""The calibration study: its pieces against closed forms, and its results against its figures.

Shape letters: M clients, P coordinates, R replicates.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from analysis import calibration_base as base
from analysis import calibration_collapse as collapse
from analysis import calibration_inter as inter
from analysis import calibration_intra as intra
from analysis import calibration_regression as regression
from analysis import calibration_report as report
from analysis import calibration_tables as tables
from selffl_ray import hierarchy
from selffl_ray.registry import inter_estimators, intra_estimators

RESULTS = Path(__file__).parents[2] / "analysis" / "results" / "calibration"


def near(measured, expected, errors=4.0):
    """Within four Monte Carlo standard errors."""
    return abs(measured.value - expected) <= errors * measured.error


# ---------------------------------------------------------------------------------------------
# Plugged-in posterior, and figures with errors


@pytest.mark.parametrize("inter_var", [0.0, 0.02, 1.0, 50.0])
def test_the_plugged_in_posterior_is_that_of_the_hierarchy(inter_var):
    rng = np.random.default_rng(1)
    optima_MP, intra_M = rng.normal(size=(7, 3)) + 5, np.geomspace(0.01, 3, 7)
    mean_MP, var_M = hierarchy.personal_posterior(optima_MP, inter_var, intra_M)
    posterior = base.plug_in(optima_MP, inter_var, intra_M)
    np.testing.assert_allclose(posterior.mean_MP, mean_MP, rtol=1e-12)
    np.testing.assert_allclose(posterior.var_M, var_M, rtol=1e-11)


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_coverage_is_the_normal_probability_of_the_claimed_width(factor):
    """A standard deviation that is claimed f times too large covers 2 Phi(1.645 f) - 1."""
    theta_MP = np.random.default_rng(2).normal(size=(4, 40_000))
    posterior = base.Posterior(np.zeros_like(theta_MP), np.full(4, factor**2))
    expected = 2 * norm.cdf(factor * norm.ppf(0.95)) - 1
    np.testing.assert_allclose(base.coverage(posterior, theta_MP), expected, atol=0.008)


def test_standard_errors_are_the_spread_of_repeated_studies():
    rng = np.random.default_rng(3)
    below = rng.gamma(4.0, size=(1500, 50))
    above = 2 * below + rng.normal(size=below.shape)
    studies = [base.ratio(a, b) for a, b in zip(above, below, strict=True)]
    spread = np.std([s.value for s in studies])
    assert np.mean([s.error for s in studies]) == pytest.approx(spread, rel=0.08)
    studies = [base.root_mean_square(a) for a in above]
    spread = np.std([s.value for s in studies])
    assert np.mean([s.error for s in studies]) == pytest.approx(spread, rel=0.08)


# ---------------------------------------------------------------------------------------------
# Between clients


@pytest.fixture(scope="module")
def outcomes():
    """Cheap estimators at inter_var 0.3, 300 draws."""
    return inter.simulate(inter.Setting(inter_var=0.3), 300, 0, ("empirical", "moments", "dl"))


def test_the_bayes_rule_covers_what_it_claims_and_costs_nothing(outcomes):
    bayes = outcomes[inter.BAYES]
    assert near(base.mean(bayes.covered_R), 0.9)
    assert base.ratio(bayes.square_R, bayes.square_R) == (1.0, 0.0)
    intra_M = np.geomspace(1, 30, 20) / np.geomspace(1, 30, 20).mean()
    expected = hierarchy.expected_mse(0.3, intra_M, np.ones(20))["local_bayes"]
    assert near(base.mean(bayes.square_R), expected)
    for name in ("empirical", "moments", "dl", inter.EQUAL):
        assert base.ratio(outcomes[name].square_R, bayes.square_R).value > 1


def test_the_plain_variance_is_too_large_by_the_mean_intra_variance_and_dl_is_not(outcomes):
    assert near(base.mean(outcomes["empirical"].estimate_R), 0.3 + 1.0)
    assert near(base.mean(outcomes["dl"].estimate_R), 0.3)
    assert base.mean(outcomes["empirical"].estimate_R).error < 0.01


def test_every_estimator_of_the_registry_is_calibrated():
    """But those that are told the truth; the collapse study's own one may be registered too."""
    told = {"known", "known_beside_uploads"}
    assert set(base.INTER) == set(inter_estimators.names()) - told
    assert set(base.INTRA) == set(intra_estimators.names()) - told
    assert set(intra.SAMPLINGS["replacement"]) == set(base.INTRA)


# ---------------------------------------------------------------------------------------------
# Within a client, in Self-FL


@pytest.fixture(scope="module")
def drawn():
    return intra.truth(intra.configuration(3, "gradient", clients_a_size=4))


def estimated(drawn, name, **options):
    config = intra.configuration(3, name, clients_a_size=4, **options)
    return intra.run(config, drawn.client_ids)


def test_the_truth_that_is_read_is_the_truth_behind_the_examples(drawn):
    assert drawn.num_M.tolist() == [25] * 4 + [100] * 4 + [400] * 4
    np.testing.assert_allclose(drawn.intra_M, 1 / drawn.num_M)
    scaled_MP = (drawn.optima_MP - drawn.theta_MP) * np.sqrt(drawn.num_M)[:, None]
    # 240 normal draws of variance 1.
    assert (scaled_MP**2).mean() == pytest.approx(1, abs=4 * math.sqrt(2 / 240))
    assert (drawn.theta_MP**2).mean() == pytest.approx(0.01, abs=4 * 0.01 * math.sqrt(2 / 240))


def test_inside_self_fl_gradients_see_the_number_of_examples_and_time_does_not(drawn):
    gradient, trajectory = (estimated(drawn, name) for name in ("gradient", "trajectory"))
    assert intra.slope(gradient.intra_M, drawn.num_M) == pytest.approx(1, abs=0.05)
    assert intra.slope(trajectory.intra_M, drawn.num_M) == pytest.approx(0, abs=0.1)
    good = intra.judge(drawn, gradient.inter_var, gradient.intra_M)
    flat = intra.judge(drawn, trajectory.inter_var, trajectory.intra_M)
    few = drawn.num_M == 25
    assert good.covered_M[few].mean() > 0.75
    assert flat.covered_M[few].mean() < 0.45
    assert flat.square_M[few].mean() > 2 * good.square_M[few].mean()


@pytest.mark.parametrize("pooling", ["own", "pooled"])
def test_what_is_plugged_in_is_what_self_fl_itself_makes_of_the_estimates(drawn, pooling):
    found = estimated(drawn, "gradient_chunks", pooling=pooling)
    used_M = found.intra_M if pooling == "own" else intra.pooled(found.intra_M, drawn.num_M)
    expected_M = hierarchy.shrinkage_loo(found.inter_var, used_M)
    np.testing.assert_allclose(found.shrink_M, expected_M, rtol=1e-9)
    other_M = intra.pooled(found.intra_M, drawn.num_M) if pooling == "own" else found.intra_M
    apart_M = hierarchy.shrinkage_loo(found.inter_var, other_M) / expected_M
    assert np.abs(apart_M - 1).max() > 0.02


def test_a_slope_is_the_power_of_the_number_of_examples():
    num_M = np.array([25, 25, 100, 400])
    assert intra.slope(3.0 * num_M**-0.7, num_M) == pytest.approx(0.7, rel=1e-12)


# ---------------------------------------------------------------------------------------------
# Within a client, in linear regression


def test_least_squares_solutions_have_the_true_variance():
    optima_CP = regression.optima(regression.clients(25, 400, 1)).numpy()
    assert near(base.mean((optima_CP**2).mean(axis=1)), regression.true_variance(25))


@pytest.fixture(scope="module")
def variances():
    return {n: regression.variances(n, 40, 1) for n in (100, 400)}


def test_in_linear_regression_gradients_at_the_truth_measure_one_over_n(variances):
    """There E |x e|^2 / (n d) = 1 / n; fitted residuals are smaller, time sees batches only."""
    for n in (100, 400):
        found = variances[n]
        assert near(base.mean(found["gradient", regression.FROM_TRUTH]), 1 / n)
        fitted = found["gradient", regression.AT_OPTIMUM]
        assert (fitted < found["gradient", regression.FROM_TRUTH]).mean() > 0.9
    few, many = (variances[n]["trajectory", regression.FROM_TRUTH].mean() for n in (100, 400))
    assert few / many == pytest.approx(1, abs=0.25)


def test_halves_trained_to_the_end_have_the_variance_of_least_squares_on_halves(variances):
    """|a - b|^2 / (4 d) of two solutions with 50 examples each: (1/41 + 1/41) / 4."""
    found = base.mean(variances[100]["split_half", regression.FULL_BATCHES])
    assert near(found, 0.5 * regression.true_variance(50))
    assert found.error < 0.15 * found.value


# ---------------------------------------------------------------------------------------------
# Collapse


@pytest.mark.parametrize("inter_var", [0.5, 2.0, 2.9, 3.1, 4.0, 8.0])
def test_the_iterated_plain_variance_ends_at_its_closed_form(inter_var):
    found = collapse.fixed_point(
        "empirical", collapse.optima_with_spread(inter_var + 1), iterations=20_000
    )
    assert found == pytest.approx(collapse.closed_form(inter_var), rel=1e-9, abs=1e-9)


def test_the_closed_form_has_the_figures_of_the_specification():
    for inter_var, expected in collapse.FIXED_POINTS.items():
        assert collapse.closed_form(inter_var) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("name", ["moments", "dl", "pm", "reml"])
def test_every_estimator_shrinks_with_its_uploads_and_survives_on_deshrunk_ones(name):
    optima_MP = collapse.optima_with_spread(5.0)
    assert collapse.fixed_point(name, optima_MP) == 0
    assert collapse.fixed_point(name, optima_MP, deshrunk=True) == pytest.approx(4, rel=1e-9)


@pytest.mark.parametrize("inter_var", [1.0, 6.0])
def test_a_run_of_self_fl_on_two_scales_ends_where_the_closed_form_says(inter_var):
    first, last = collapse.on_system("exact", inter_var, num_rounds=40)
    expected = collapse.closed_form(first - 1)
    assert (expected == 0) == (inter_var == 1.0)
    assert last == pytest.approx(expected, rel=1e-6, abs=1e-9)


# ---------------------------------------------------------------------------------------------
# Report


def test_a_figure_outside_its_tolerance_is_called_so():
    row = pd.Series({"value": 1.2, "specification": 1.0, "tolerance": 0.1, "error": 0.06})
    assert tables.within(row)
    assert not tables.within(row.replace(0.06, 0.04))
    assert not tables.within(row.replace(0.06, math.nan))


def test_the_written_results_are_what_their_figures_say():
    """The Markdown is made of the CSV file beside it, and nobody edited either."""
    written = RESULTS.with_suffix(".md").read_text()
    command = re.match(r"Command: `(.+)`\n", written)[1]
    found = pd.read_csv(RESULTS.with_suffix(".csv"))
    assert written == report.text(found, command, RESULTS.with_suffix(".png").name)
    compared = found[found["specification"].notna()]
    assert len(compared) > 60
    assert written.count("**no**") == sum(not tables.within(row) for _, row in compared.iterrows())
