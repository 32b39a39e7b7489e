"""The two-level model against brute-force conditioning, gradient descent and simulation.

Shape letters: M clients, P parameters, N draws.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray import hierarchy
from selffl_ray.errors import VarianceError
from selffl_ray.hierarchy import (
    deshrink,
    discounted_weights,
    expected_mse,
    fixed_point_weights,
    global_posterior,
    interpolate,
    learning_rate,
    leave_one_out,
    leave_one_out_variances,
    mixture_mse,
    normalise,
    num_local_steps,
    personal_posterior,
    precision_weights,
    shrinkage,
    shrinkage_loo,
    smooth,
)

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=200)
variances = st.floats(1e-6, 1e6)
client_variances = st.lists(variances, min_size=1, max_size=8)


def problems(num_clients, count, seed=0):
    """Random (inter_var, intra_var_M, y_MP), variances over a factor 100."""
    rng = np.random.default_rng([seed, num_clients])
    for _ in range(count):
        inter, *intra = np.exp(rng.uniform(np.log(0.1), np.log(10), num_clients + 1))
        yield float(inter), np.array(intra), rng.normal(size=(num_clients, 3)) * 2


# ---------------------------------------------------------------------------------------------
# (1) to (4) against conditioning of the joint Gaussian


def condition(inter, intra_M, y_MP, prior_var):
    """Mean and variance of (theta_0, theta_1..M) given y, prior N(0, prior_var) on theta_0."""
    count = len(intra_M)
    above = np.vstack([np.zeros(count), np.eye(count)])
    hidden = prior_var + inter * above @ above.T
    cross = prior_var + inter * above
    seen = prior_var + np.diag(inter + intra_M)
    gain = np.linalg.solve(seen, cross.T).T
    return gain @ y_MP, hidden - gain @ cross.T


def brute_force(inter, intra_M, y_MP, prior_var=3e5):
    """The same for a flat prior: what is left of the prior falls as 1 / prior_var, so take it out.

    Returns the means of theta_0 and theta_1..M, their variances, as one array each.
    """
    near, far = (condition(inter, intra_M, y_MP, v) for v in (prior_var, 2 * prior_var))
    mean, cov = (2 * f - n for n, f in zip(near, far, strict=True))
    return mean, np.diagonal(cov)


@pytest.mark.parametrize("num_clients", range(1, 8))
def test_global_posterior_is_the_conditional_of_the_joint_gaussian(num_clients):
    for inter, intra_M, y_MP in problems(num_clients, 40):
        mean, var = brute_force(inter, intra_M, y_MP)
        ours_P, our_var = global_posterior(y_MP, inter, intra_M)
        np.testing.assert_allclose(ours_P, mean[0], rtol=0, atol=1e-7)
        assert our_var == pytest.approx(var[0], rel=1e-7)


@pytest.mark.parametrize("num_clients", range(1, 8))
def test_personal_posterior_is_the_conditional_of_the_joint_gaussian(num_clients):
    for inter, intra_M, y_MP in problems(num_clients, 40):
        mean, var = brute_force(inter, intra_M, y_MP)
        ours_MP, our_var_M = personal_posterior(y_MP, inter, intra_M)
        np.testing.assert_allclose(ours_MP, mean[1:], rtol=0, atol=1e-7)
        np.testing.assert_allclose(our_var_M, var[1:], rtol=1e-7)


@pytest.mark.parametrize("num_clients", range(2, 8))
def test_leave_one_out_is_the_conditional_without_the_clients_own_data(num_clients):
    for inter, intra_M, y_MP in problems(num_clients, 20):
        for client in range(num_clients):
            others = np.arange(num_clients) != client
            mean, var = brute_force(inter, intra_M[others], y_MP[others])
            ours_P, our_var = leave_one_out(y_MP, inter, intra_M, client)
            np.testing.assert_allclose(ours_P, mean[0], rtol=0, atol=1e-7)
            assert our_var == pytest.approx(var[0], rel=1e-7)
            assert our_var == leave_one_out_variances(inter, intra_M)[client]


@pytest.mark.parametrize("num_clients", range(1, 8))
def test_the_with_self_form_is_the_same_posterior(num_clients):
    for inter, intra_M, y_MP in problems(num_clients, 40):
        lam_M = shrinkage(inter, intra_M)
        global_P, global_var = global_posterior(y_MP, inter, intra_M)
        mean_MP, var_M = personal_posterior(y_MP, inter, intra_M)
        with_self_MP = (1 - lam_M[:, None]) * y_MP + lam_M[:, None] * global_P
        np.testing.assert_allclose(mean_MP, with_self_MP, rtol=0, atol=1e-12)
        np.testing.assert_allclose(var_M, intra_M * (1 - lam_M) + lam_M**2 * global_var, rtol=1e-12)


@EXAMPLES
@given(variances, client_variances)
def test_leave_one_out_shrinkage_is_lambda_times_the_weight_of_the_others(inter, intra):
    q_M = precision_weights(inter, intra)
    expected_M = shrinkage(inter, intra) * (1 - q_M)
    np.testing.assert_allclose(shrinkage_loo(inter, intra), expected_M, rtol=0, atol=1e-12)


def test_with_two_clients_the_prior_variance_is_twice_inter_plus_the_others_intra():
    B_M = shrinkage_loo(0.5, [1.0, 3.0])
    np.testing.assert_allclose(B_M, [1 / (1 + 2 * 0.5 + 3), 3 / (3 + 2 * 0.5 + 1)], rtol=1e-14)


def test_torch_rows_give_what_numpy_rows_give():
    for inter, intra_M, y_MP in problems(5, 10):
        rows = torch.from_numpy(y_MP)
        for numpy_result, torch_result in (
            (global_posterior(y_MP, inter, intra_M), global_posterior(rows, inter, intra_M)),
            (personal_posterior(y_MP, inter, intra_M), personal_posterior(rows, inter, intra_M)),
            (leave_one_out(y_MP, inter, intra_M, 2), leave_one_out(rows, inter, intra_M, 2)),
        ):
            assert isinstance(torch_result[0], torch.Tensor)
            np.testing.assert_array_equal(numpy_result[0], torch_result[0].numpy())
            np.testing.assert_array_equal(numpy_result[1], torch_result[1])


def test_the_personal_variance_keeps_its_digits_where_nearly_everything_is_shrunk():
    inter, intra_M = 1e-12, np.array([1.0, 1e-12, 1e-12])
    prior = inter + 1 / (2 / 2e-12)
    _, var_M = personal_posterior(np.zeros((3, 1)), inter, intra_M)
    np.testing.assert_allclose(var_M[0], prior / (1 + prior), rtol=1e-14)


# ---------------------------------------------------------------------------------------------
# Edge cases, in the order of the table

ROWS = np.array([[1.0, -2.0], [3.0, 5.0], [-4.0, 8.0]])


def test_a_single_client_is_its_own_posterior():
    mean_P, var = global_posterior(ROWS[:1], 2.0, [0.5])
    np.testing.assert_array_equal(mean_P, ROWS[0])
    assert var == 2.5
    assert shrinkage_loo(2.0, [0.5]) == 0
    mean_MP, var_M = personal_posterior(ROWS[:1], 2.0, [0.5])
    np.testing.assert_array_equal(mean_MP, ROWS[:1])
    np.testing.assert_array_equal(var_M, [0.5])
    assert leave_one_out(ROWS[:1], 2.0, [0.5], 0) == (None, math.inf)


def test_without_spread_between_clients_all_share_the_global_posterior():
    intra = [1.0, 2.0, 4.0]
    np.testing.assert_array_equal(shrinkage(0.0, intra), 1.0)
    np.testing.assert_allclose(precision_weights(0.0, intra), np.array([4, 2, 1]) / 7, rtol=1e-15)
    mean_MP, var_M = personal_posterior(ROWS, 0.0, intra)
    global_P, var = global_posterior(ROWS, 0.0, intra)
    np.testing.assert_allclose(mean_MP, np.tile(global_P, (3, 1)), rtol=1e-14)
    np.testing.assert_allclose(var_M, var, rtol=1e-14)


def test_infinite_spread_between_clients_means_equal_weights_and_no_shrinkage():
    intra = [1.0, 20.0, 400.0]
    np.testing.assert_allclose(precision_weights(math.inf, intra), 1 / 3, rtol=1e-15)
    np.testing.assert_array_equal(shrinkage(math.inf, intra), 0.0)
    np.testing.assert_array_equal(shrinkage_loo(math.inf, intra), 0.0)
    mean_MP, var_M = personal_posterior(ROWS, math.inf, intra)
    np.testing.assert_array_equal(mean_MP, ROWS)
    np.testing.assert_array_equal(var_M, intra)
    assert global_posterior(ROWS, math.inf, intra)[1] == math.inf


@pytest.mark.parametrize("inter", [0.0, 1.5])
def test_a_certain_client_is_not_shrunk(inter):
    intra = [0.0, 1.0, 2.0]
    assert shrinkage(inter, intra)[0] == shrinkage_loo(inter, intra)[0] == 0
    mean_MP, var_M = personal_posterior(ROWS, inter, intra)
    np.testing.assert_array_equal(mean_MP[0], ROWS[0])
    assert var_M[0] == 0


def test_a_client_never_seen_has_no_weight_and_takes_the_mean_of_the_others():
    intra = [1.0, math.inf, 3.0]
    rows = np.where(np.isinf(intra)[:, None], np.nan, ROWS)
    v = 1 / (1 / 1.5 + 1 / 3.5)
    assert precision_weights(0.5, intra)[1] == 0
    assert shrinkage(0.5, intra)[1] == shrinkage_loo(0.5, intra)[1] == 1
    mean_MP, var_M = personal_posterior(rows, 0.5, intra)
    np.testing.assert_allclose(mean_MP[1], (ROWS[0] / 1.5 + ROWS[2] / 3.5) * v, rtol=1e-14)
    assert var_M[1] == pytest.approx(0.5 + v, rel=1e-14)
    np.testing.assert_allclose(
        mean_MP[[0, 2]], personal_posterior(ROWS[[0, 2]], 0.5, [1.0, 3.0])[0], rtol=1e-14
    )
    np.testing.assert_array_equal(global_posterior(rows, 0.5, intra)[0], mean_MP[1])
    assert shrinkage(0.5, intra, kappa=0.0)[1] == shrinkage_loo(0.5, intra, kappa=0.0)[1] == 1


def test_clients_that_are_certain_of_the_global_model_share_all_the_weight():
    intra = [0.0, 2.0, 0.0]
    np.testing.assert_array_equal(precision_weights(0.0, intra), [0.5, 0.0, 0.5])
    np.testing.assert_array_equal(leave_one_out_variances(0.0, intra), 0.0)
    mean_P, var = global_posterior(ROWS, 0.0, intra)
    np.testing.assert_array_equal(mean_P, (ROWS[0] + ROWS[2]) / 2)
    assert var == 0
    np.testing.assert_array_equal(shrinkage_loo(0.0, intra), [0.0, 1.0, 0.0])
    np.testing.assert_array_equal(personal_posterior(ROWS, 0.0, intra)[0][1], mean_P)


def test_the_only_certain_client_is_still_left_out_of_its_own_prior():
    np.testing.assert_allclose(leave_one_out_variances(0.0, [0.0, 2.0, 2.0]), [1.0, 0.0, 0.0])


def test_a_client_whose_others_have_no_weight_has_no_prior():
    intra = [2.0, math.inf]
    np.testing.assert_array_equal(leave_one_out_variances(1.0, intra), [math.inf, 3.0])
    np.testing.assert_array_equal(shrinkage_loo(1.0, intra), [0.0, 1.0])
    assert leave_one_out(ROWS[:2], 1.0, intra, 0) == (None, math.inf)


@pytest.mark.parametrize(
    "call",
    [
        lambda: precision_weights(1.0, [math.inf, math.inf]),
        lambda: precision_weights(1.0, []),
        lambda: discounted_weights(1.0, [1.0, 2.0], [1, 3], 0.0),
        lambda: discounted_weights(1.0, [math.inf, 2.0], [0, 30], 0.5),
        lambda: global_posterior(ROWS[:2], 1.0, [math.inf, math.inf]),
    ],
)
def test_an_aggregate_of_nobody_is_an_error(call):
    with pytest.raises(VarianceError, match="all weights are 0"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: shrinkage_loo(1.0, [math.inf]),
        lambda: personal_posterior(ROWS[:2], 1.0, [math.inf, math.inf]),
    ],
)
def test_there_is_nothing_to_shrink_towards_if_nobody_was_seen(call):
    with pytest.raises(VarianceError, match="nothing to shrink towards"):
        call()


CHECKED = {
    "precision_weights": precision_weights,
    "discounted_weights": lambda i, s: discounted_weights(i, s, [0, 1, 2], 0.5),
    "global_posterior": lambda i, s: global_posterior(ROWS, i, s),
    "leave_one_out": lambda i, s: leave_one_out(ROWS, i, s, 0),
    "leave_one_out_variances": leave_one_out_variances,
    "personal_posterior": lambda i, s: personal_posterior(ROWS, i, s),
    "shrinkage": shrinkage,
    "shrinkage_loo": shrinkage_loo,
    "normalise": normalise,
    "smooth": lambda i, s: smooth(None, i, s, 0.5, [False, True, True]),
    "fixed_point_weights": lambda i, s: fixed_point_weights(i, s, "uniform", "loo"),
    "expected_mse": lambda i, s: expected_mse(i, s, [1, 1, 1]),
    "mixture_mse": lambda i, s: mixture_mse([0.5, 0.25, 0.25], i, s),
}


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("bad", [-0.25, math.nan, -math.inf])
def test_a_bad_variance_is_refused_with_its_client_and_value(name, bad):
    with pytest.raises(VarianceError, match=rf"intra_var of client 2 .*got {bad}"):
        CHECKED[name](1.0, [1.0, 2.0, bad])
    with pytest.raises(VarianceError, match=rf"inter_var .*got {bad}"):
        CHECKED[name](bad, [1.0, 2.0, 3.0])


# ---------------------------------------------------------------------------------------------
# Invariances


@EXAMPLES
@given(variances, client_variances, st.floats(1e-6, 1e6))
def test_only_ratios_of_variances_matter(inter, intra, scale):
    scaled = (inter * scale, np.array(intra) * scale)
    for function in (precision_weights, shrinkage, shrinkage_loo):
        np.testing.assert_allclose(
            function(*scaled), function(inter, intra), rtol=1e-12, atol=1e-300
        )
    np.testing.assert_allclose(normalise(*scaled)[1], normalise(inter, intra)[1], rtol=1e-12)
    np.testing.assert_allclose(
        leave_one_out_variances(*scaled), scale * leave_one_out_variances(inter, intra), rtol=1e-12
    )


@EXAMPLES
@given(variances, client_variances, st.integers(-40, 40))
def test_another_unit_changes_no_bit_of_weights_and_steps(inter, intra, power):
    scale = 2.0**power
    scaled = (inter * scale, np.array(intra) * scale)
    np.testing.assert_array_equal(precision_weights(*scaled), precision_weights(inter, intra))
    steps = [
        num_local_steps(shrinkage_loo(*both), 0.02, max_steps=200, rounding="ceil")
        for both in (scaled, (inter, intra))
    ]
    np.testing.assert_array_equal(*steps)


@EXAMPLES
@given(variances, st.permutations(range(5)), st.lists(variances, min_size=5, max_size=5))
def test_clients_can_stand_in_any_order(inter, order, intra):
    intra_M = np.array(intra)
    for function in (precision_weights, shrinkage, shrinkage_loo, leave_one_out_variances):
        np.testing.assert_allclose(
            function(inter, intra_M[order]), function(inter, intra_M)[order], rtol=1e-12
        )


@EXAMPLES
@given(variances, client_variances)
def test_shrinkage_lies_in_the_unit_interval_and_more_certain_clients_weigh_more(inter, intra):
    q_M, lam_M = precision_weights(inter, intra), shrinkage(inter, intra)
    assert q_M.sum() == pytest.approx(1, rel=1e-12)
    for values_M in (lam_M, shrinkage_loo(inter, intra)):
        assert ((values_M >= 0) & (values_M <= 1)).all()
    order = np.argsort(intra)
    assert (np.diff(q_M[order]) <= 0).all()
    assert (np.diff(lam_M[order]) >= 0).all()


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_client_with_nearly_all_the_weight_does_not_cancel_in_its_leave_one_out_variance(place):
    intra_M = np.array([1.0, 2.0, 4.0, 5.0, 10.0])
    intra_M[place] = 1e-18
    rest = np.delete(intra_M, place)
    assert leave_one_out_variances(0.0, intra_M)[place] == pytest.approx(
        1 / (1 / rest).sum(), rel=1e-14
    )


def test_kappa_multiplies_the_intra_variance_in_the_shrinkage_but_not_in_the_prior():
    inter, intra_M = 0.7, np.array([0.5, 1.0, 3.0])
    v_M = leave_one_out_variances(inter, intra_M)
    np.testing.assert_allclose(
        shrinkage(inter, intra_M, kappa=2.0), 2 * intra_M / (2 * intra_M + inter), rtol=1e-14
    )
    np.testing.assert_allclose(
        shrinkage_loo(inter, intra_M, kappa=2.0),
        2 * intra_M / (2 * intra_M + inter + v_M),
        rtol=1e-14,
    )
    np.testing.assert_array_equal(shrinkage_loo(inter, intra_M, kappa=0.0), 0.0)


# ---------------------------------------------------------------------------------------------
# (5) to (9): steps, rates and their equivalents


def descend(start, optimum, rate, steps, curvature=1.0):
    """Gradient descent on curvature / 2 * |x - optimum|^2."""
    x = np.array(start, dtype=np.float64)
    for _ in range(int(steps)):
        x = x - rate * curvature * (x - optimum)
    return x


@pytest.mark.parametrize("curvature", [1.0, 0.4])
def test_ceil_with_its_rate_lands_exactly_on_the_leave_one_out_posterior(curvature):
    rate = 0.3
    for inter, intra_M, y_MP in problems(4, 20):
        target_MP, _ = personal_posterior(y_MP, inter, intra_M)
        B_M = shrinkage_loo(inter, intra_M)
        steps_M = num_local_steps(B_M, rate, curvature, max_steps=1000, rounding="ceil")
        rate_M = learning_rate(B_M, steps_M, curvature)
        assert (rate_M <= rate * (1 + 1e-8)).all()
        fewer = steps_M > 1
        assert (learning_rate(B_M[fewer], steps_M[fewer] - 1, curvature) > rate).all()
        for m in range(4):
            start_P, _ = leave_one_out(y_MP, inter, intra_M, m)
            end_P = descend(start_P, y_MP[m], rate_M[m], steps_M[m], curvature)
            np.testing.assert_allclose(end_P, target_MP[m], rtol=0, atol=1e-12)


def test_ceil_with_its_rate_lands_exactly_on_the_with_self_posterior():
    for inter, intra_M, y_MP in problems(4, 20):
        target_MP, _ = personal_posterior(y_MP, inter, intra_M)
        start_P, _ = global_posterior(y_MP, inter, intra_M)
        lam_M = shrinkage(inter, intra_M)
        steps_M = num_local_steps(lam_M, 0.2, max_steps=1000, rounding="ceil")
        rate_M = learning_rate(lam_M, steps_M)
        ends = [descend(start_P, y_MP[m], rate_M[m], steps_M[m]) for m in range(4)]
        np.testing.assert_allclose(ends, target_MP, rtol=0, atol=1e-12)


@EXAMPLES
@given(st.floats(1e-3, 0.999), st.floats(0.005, 0.9), st.floats(0.2, 5))
def test_nearest_is_the_number_of_steps_whose_log_retained_share_is_closest(shrink, rho, curvature):
    rate = rho / curvature
    steps = int(num_local_steps(shrink, rate, curvature, min_steps=0, max_steps=10**6))
    retained = [
        descend(1.0, 0.0, rate, steps + more, curvature) if steps + more >= 0 else math.inf
        for more in (-1, 0, 1)
    ]
    away = np.abs(np.log(retained) - math.log(shrink))
    assert away[1] <= away.min() + 1e-9


def test_rounding_alone_is_harmless_for_small_contractions():
    """Worst and mean inflation of the personal error over S, the figures of the specification."""
    S = np.linspace(0.02, 0.98, 961)
    for rho, worst, mean in ((0.05, 0.046, 0.001), (0.1, 0.33, 0.008), (0.3, 4.0, 0.16)):
        a = (1 - rho) ** num_local_steps(S, rho, max_steps=10**4)
        # Own variance A = S, prior variance C = 1 - S: the least error, at a = S, is A C.
        inflation = ((1 - a) ** 2 * S + a**2 * (1 - S)) / (S * (1 - S)) - 1
        assert inflation.max() == pytest.approx(worst, rel=0.15)
        assert inflation.mean() == pytest.approx(mean, rel=0.35)


@pytest.mark.parametrize("rounding", ["nearest", "ceil"])
@pytest.mark.parametrize("rho", [0.01, 0.3, 0.9])
def test_a_whole_number_of_steps_stays_as_it_is(rounding, rho):
    count = np.arange(1, 200)
    S = np.array([descend(1.0, 0.0, rho, k) for k in count])
    found = num_local_steps(S, rho, min_steps=0, max_steps=500, rounding=rounding)
    np.testing.assert_array_equal(found, count)


@pytest.mark.parametrize("rounding", ["nearest", "ceil"])
def test_steps_are_clipped_before_they_become_integers(rounding):
    S = [-0.5, 0.0, 5e-324, 1 - 1e-16, 1.0, 1.5]
    steps = num_local_steps(S, 0.02, min_steps=3, max_steps=200, rounding=rounding)
    assert steps.dtype == np.int64
    np.testing.assert_array_equal(steps, [200, 200, 200, 3, 3, 3])
    tiny = num_local_steps([0.5], 1e-300, max_steps=7, rounding=rounding)
    np.testing.assert_array_equal(tiny, [7])


@pytest.mark.parametrize("rate", [0.0, -0.1, 0.5, 0.7, math.nan])
def test_a_contraction_outside_the_unit_interval_is_an_error(rate):
    with pytest.raises(VarianceError, match=r"learning_rate \* curvature must lie in \(0, 1\)"):
        num_local_steps(0.5, rate, 2.0, max_steps=10)


def test_steps_of_an_unknown_shrinkage_or_between_crossed_limits_are_errors():
    with pytest.raises(VarianceError, match="NaN"):
        num_local_steps([0.5, math.nan], 0.1, max_steps=10)
    for low, high in ((5, 4), (-1, 4)):
        with pytest.raises(VarianceError, match=f"got {low} and {high}"):
            num_local_steps(0.5, 0.1, min_steps=low, max_steps=high)


def test_the_rate_goes_from_staying_to_jumping_onto_the_optimum():
    np.testing.assert_allclose(learning_rate([1.0, 0.0], 5, 4.0), [0.0, 0.25], rtol=1e-15)
    # A difference 1 - S^(1/l) would keep four digits here; the series keeps all.
    small = 2.0**-40
    exact = small / 3 + small**2 / 9
    np.testing.assert_allclose(learning_rate(1 - small, 3), exact, rtol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.01, 5), "shrinkage"),
        ((-0.01, 5), "shrinkage"),
        ((math.nan, 5), "shrinkage"),
        ((0.5, 0), "at least one step"),
        ((0.5, 5, 0.0), "curvature"),
        ((0.5, 5, math.nan), "curvature"),
    ],
)
def test_a_rate_without_meaning_is_an_error(arguments, message):
    with pytest.raises(VarianceError, match=message):
        learning_rate(*arguments)


coordinates = st.lists(st.floats(-100, 100), min_size=4, max_size=4)


@EXAMPLES
@given(coordinates, coordinates, st.floats(0, 0.9))
def test_deshrinking_undoes_interpolation(initial, optimum, shrink):
    start_P, y_P = np.array(initial), np.array(optimum)
    np.testing.assert_allclose(
        deshrink(start_P, interpolate(start_P, y_P, shrink), shrink), y_P, rtol=0, atol=1e-11
    )
    np.testing.assert_allclose(
        interpolate(start_P, deshrink(start_P, y_P, shrink), shrink), y_P, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_interpolation_reaches_what_early_stopping_reaches_row_by_row(convert):
    rng = np.random.default_rng(3)
    start_CP, y_CP = rng.normal(size=(2, 3, 4))
    S_C = 0.9 ** np.array([2, 5, 9])
    stopped_CP = np.stack([descend(start_CP[c], y_CP[c], 0.1, k) for c, k in enumerate((2, 5, 9))])
    S_C1 = convert(S_C[:, None])
    found = interpolate(convert(start_CP), convert(y_CP), S_C1)
    np.testing.assert_allclose(found, stopped_CP, rtol=0, atol=1e-14)
    undone = deshrink(convert(start_CP), convert(stopped_CP), S_C1)
    np.testing.assert_allclose(undone, y_CP, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shrink", [1.0, 1.2, np.array([[0.3], [1.0]]), torch.tensor([[1.0]])])
def test_what_never_left_its_start_cannot_be_deshrunk(shrink):
    with pytest.raises(VarianceError, match="S < 1"):
        deshrink(np.zeros((2, 3)), np.ones((2, 3)), shrink)


# ---------------------------------------------------------------------------------------------
# (12): weights discounted by age


def test_discounted_weights_are_precisions_times_powers_of_the_discount():
    inter, intra_M, age_M = 0.5, np.array([1.0, 2.0, 4.0, 0.5]), np.array([0, 3, 1, 2])
    raw_M = 0.8**age_M / (inter + intra_M)
    np.testing.assert_allclose(
        discounted_weights(inter, intra_M, age_M, 0.8), raw_M / raw_M.sum(), rtol=1e-14
    )


def test_discount_one_keeps_everybody_and_discount_zero_only_the_participants():
    inter, intra_M, age_M = 0.5, [1.0, 2.0, 4.0], [0, 7, 0]
    np.testing.assert_array_equal(
        discounted_weights(inter, intra_M, age_M, 1.0), precision_weights(inter, intra_M)
    )
    np.testing.assert_array_equal(
        discounted_weights(inter, intra_M, age_M, 0.0)[[0, 2]],
        precision_weights(inter, [1.0, 4.0]),
    )
    assert discounted_weights(inter, intra_M, age_M, 0.0)[1] == 0


def test_terms_under_the_resolution_of_a_float32_sum_are_dropped():
    weights_M = discounted_weights(1.0, [1.0, 1.0, 1.0], [0, 24, 25], 0.5)
    np.testing.assert_allclose(weights_M, [1 - 2.0**-24, 2.0**-24, 0.0], rtol=1e-7)
    assert weights_M[2] == 0


def test_a_certain_client_that_is_too_old_leaves_nobody():
    """With inter 0 it holds all the weight, whatever its age."""
    np.testing.assert_array_equal(discounted_weights(0.0, [0.0, 1.0], [3, 0], 0.5), [1.0, 0.0])
    with pytest.raises(VarianceError, match="discounted away"):
        discounted_weights(0.0, [0.0, 1.0], [3, 0], 0.0)


@pytest.mark.parametrize("discount", [-0.1, 1.1, math.nan])
def test_a_discount_outside_the_unit_interval_is_an_error(discount):
    with pytest.raises(VarianceError, match="discount must lie in"):
        discounted_weights(1.0, [1.0, 2.0], [0, 1], discount)


# ---------------------------------------------------------------------------------------------
# 5.5: normalising and smoothing


def test_normalised_variances_have_a_common_scale_of_one():
    u0, u_M = normalise(3.0, [1.0, 2.0, 6.0])
    assert u0 == pytest.approx(0.5, rel=1e-15)
    np.testing.assert_allclose(u_M, np.array([1, 2, 6]) / 6, rtol=1e-15)
    assert u0 + u_M.mean() == pytest.approx(1, rel=1e-15)


def test_nothing_but_zeros_normalises_to_zeros():
    u0, u_M = normalise(0.0, [0.0, 0.0])
    assert u0 == 0
    np.testing.assert_array_equal(u_M, [0.0, 0.0])


def test_the_first_probe_is_taken_whole_and_later_ones_by_beta():
    first = smooth(None, 3.0, [1.0, 5.0], 0.8)
    assert first[0] == 0.5
    np.testing.assert_allclose(first[1], [1 / 6, 5 / 6], rtol=1e-15)
    second = smooth(first, 1.0, [2.0, 4.0], 0.8)
    assert second[0] == pytest.approx(0.8 * 0.5 + 0.2 * 0.25, rel=1e-15)
    np.testing.assert_allclose(
        second[1], [0.8 / 6 + 0.2 * 0.5, 0.8 * 5 / 6 + 0.2 * 1.0], rtol=1e-15
    )


def test_absent_clients_keep_theirs_and_are_not_read():
    nan = math.nan
    first = smooth(None, 3.0, [1.0, nan, 5.0, -7.0], 0.5, [True, False, True, False])
    assert first[0] == 0.5
    np.testing.assert_allclose(first[1], [1 / 6, nan, 5 / 6, nan], rtol=1e-15)
    second = smooth(first, 4.0, [nan, 2.0, 6.0, nan], 0.5, [False, True, True, False])
    assert second[0] == pytest.approx(0.5 * 0.5 + 0.5 * 0.5, rel=1e-15)
    np.testing.assert_allclose(second[1], [1 / 6, 0.25, 0.5 * 5 / 6 + 0.5 * 0.75, nan], rtol=1e-15)


def test_the_two_uncertainties_can_have_different_memories():
    first = smooth(None, 3.0, [1.0, 5.0], 0.9, beta_intra=0.5)
    second = smooth(first, 1.0, [2.0, 4.0], 0.9, beta_intra=0.5)
    assert second[0] == pytest.approx(0.9 * 0.5 + 0.1 * 0.25, rel=1e-15)
    np.testing.assert_allclose(
        second[1], [0.5 / 6 + 0.5 * 0.5, 0.5 * 5 / 6 + 0.5 * 1.0], rtol=1e-15
    )


def test_a_probe_with_fewer_than_two_participants_updates_nothing():
    old = (0.4, np.array([0.2, math.nan, 0.9]))
    for present in ([False, False, False], [False, True, False]):
        u0, u_M = smooth(old, 9.0, [9.0, 9.0, 9.0], 0.5, present)
        assert u0 == 0.4
        np.testing.assert_array_equal(u_M, old[1])
        assert smooth(None, 9.0, [9.0, 9.0, 9.0], 0.5, present) is None


def test_smoothing_does_not_change_what_it_is_given():
    u_M, raw_M = np.array([0.2, math.nan]), np.array([1.0, 3.0])
    result = smooth((0.4, u_M), 2.0, raw_M, 0.5)
    np.testing.assert_array_equal(u_M, [0.2, math.nan])
    np.testing.assert_array_equal(raw_M, [1.0, 3.0])
    assert not np.isnan(result[1]).any()


# ---------------------------------------------------------------------------------------------
# Section 4: what the iterated algorithm converges to


def others_mean(rows_MM, weight_M):
    """Weighted mean of all rows but the own one, for every client."""
    others_MM = np.where(np.eye(len(weight_M), dtype=bool), 0.0, weight_M)
    return others_MM @ rows_MM / others_MM.sum(1, keepdims=True)


class Federation:
    """Rounds of gradient descent on quadratics whose optima are the unit vectors.

    Rows are then mixing weights: the global model's row at the fixed point is e itself.
    """

    def __init__(self, inter, intra_M, rule, initial, *, retained=0.5, num_examples_M=None):
        self.rule, self.initial = rule, initial
        self.precision_M = 1 / (inter + intra_M)
        count = len(intra_M)
        prior_M = inter + np.array([1 / np.delete(self.precision_M, m).sum() for m in range(count)])
        shrink_M = intra_M / (intra_M + (prior_M if initial == "loo" else inter))
        if rule in ("common_tap", "fedavg"):
            shrink_M = np.full(count, retained)
        self.shrink_M1 = shrink_M[:, None]
        self.steps_M = num_local_steps(shrink_M, 0.3, max_steps=10**4, rounding="ceil")
        self.rate_M1 = learning_rate(shrink_M, self.steps_M)[:, None]
        self.average_M = {
            "uniform": np.ones(count),
            "fedavg": num_examples_M,
        }.get(rule, self.precision_M)
        self.uploads_MM = np.zeros((count, count))
        self.model_M = np.zeros(count)

    def starts(self):
        if self.initial == "global":
            return np.tile(self.model_M, (len(self.model_M), 1))
        return others_mean(self.uploads_MM, self.average_M)

    def round(self, taking_part_M=None):
        count = len(self.model_M)
        taking_part = np.ones(count, bool) if taking_part_M is None else taking_part_M
        start_MM = self.starts()
        x_MM = start_MM.copy()
        for step in range(self.steps_M.max()):
            moves_M1 = (step < self.steps_M)[:, None]
            x_MM = x_MM - np.where(moves_M1, self.rate_M1, 0.0) * (x_MM - np.eye(count))
        if self.rule == "deshrunk":
            x_MM = deshrink(start_MM, x_MM, self.shrink_M1)
        self.uploads_MM = np.where(taking_part[:, None], x_MM, self.uploads_MM)
        self.model_M = self.average_M @ self.uploads_MM / self.average_M.sum()
        return self

    def run(self, rounds):
        for _ in range(rounds):
            before = self.model_M
            self.round()
            if np.abs(self.model_M - before).max() < 1e-15:
                break
        return self.model_M


TABLE = [
    ("precision", "loo"),
    ("precision", "global"),
    ("uniform", "loo"),
    ("uniform", "global"),
    ("deshrunk", "loo"),
    ("deshrunk", "global"),
    ("common_tap", "loo"),
    ("common_tap", "global"),
    ("fedavg", "global"),
]


def quadratics(num_clients, seed):
    """Variances whose shrink factors lie between about 0.05 and 0.9, and sizes to go with them."""
    rng = np.random.default_rng([seed, num_clients])
    intra_M = np.exp(rng.uniform(np.log(0.1), np.log(5), num_clients))
    return float(rng.uniform(0.5, 2)), intra_M, rng.integers(5, 200, num_clients).astype(float)


@pytest.mark.parametrize("num_clients", [2, 3, 6, 15])
@pytest.mark.parametrize(("rule", "initial"), TABLE)
def test_iterated_federated_learning_ends_at_the_fixed_point_weights(rule, initial, num_clients):
    for seed in range(3):
        inter, intra_M, size_M = quadratics(num_clients, seed)
        options = {"retained": (0.2, 0.5, 0.9)[seed], "num_examples_M": size_M}
        run = Federation(inter, intra_M, rule, initial, **options)
        expected_M = fixed_point_weights(inter, intra_M, rule, initial, **options)
        np.testing.assert_allclose(run.run(3000), expected_M, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rule", "initial"), TABLE)
def test_kept_uploads_leave_the_fixed_point_unchanged_under_partial_participation(rule, initial):
    inter, intra_M, size_M = quadratics(20, 5)
    options = {"retained": 0.4, "num_examples_M": size_M}
    run = Federation(inter, intra_M, rule, initial, **options)
    rng = np.random.default_rng(1)
    for _ in range(2500):
        run.round(np.isin(np.arange(20), rng.choice(20, 6, replace=False)))
    expected_M = fixed_point_weights(inter, intra_M, rule, initial, **options)
    np.testing.assert_allclose(run.model_M, expected_M, rtol=0, atol=1e-10)


def test_averaging_only_the_participants_costs_global_accuracy():
    """1.4 to 2.2 times the error of Bayes in the specification, against 1.000 with memory."""
    inter, intra_M, _ = quadratics(20, 5)
    best = expected_mse(inter, intra_M, np.ones(20))["global_bayes"]
    rng = np.random.default_rng(2)
    model_M, ratios = np.zeros(20), []
    for round_index in range(400):
        chosen_M = np.isin(np.arange(20), rng.choice(20, 6, replace=False))
        uploads_MM = 0.4 * model_M + 0.6 * np.eye(20)
        weight_M = discounted_weights(inter, intra_M, ~chosen_M, 0.0)
        model_M = weight_M @ uploads_MM
        if round_index > 50:
            ratios.append((model_M**2 * (inter + intra_M)).sum() / best)
    assert 1.4 < np.mean(ratios) < 2.3


@pytest.mark.parametrize("num_clients", [3, 6, 15])
def test_which_rules_reach_the_bayes_weights(num_clients):
    inter, intra_M, size_M = quadratics(num_clients, 1)
    q_M = precision_weights(inter, intra_M)
    off = {
        entry: np.abs(
            fixed_point_weights(inter, intra_M, *entry, num_examples_M=size_M) / q_M - 1
        ).max()
        for entry in TABLE
    }
    for entry in (("uniform", "global"), ("deshrunk", "loo"), ("common_tap", "global")):
        assert off[entry] < 1e-12
    for entry in (("precision", "loo"), ("precision", "global"), ("fedavg", "global")):
        assert off[entry] > 0.1
    assert off["uniform", "loo"] < 0.5 * off["precision", "loo"]


@pytest.mark.parametrize("initial", ["loo", "global"])
def test_deshrunk_uploads_reach_the_bayes_weights_after_one_round(initial):
    inter, intra_M, _ = quadratics(6, 2)
    run = Federation(inter, intra_M, "deshrunk", initial).round()
    np.testing.assert_allclose(run.model_M, precision_weights(inter, intra_M), rtol=1e-12)


def test_every_upload_of_the_exact_rule_is_the_clients_posterior():
    inter, intra_M, _ = quadratics(6, 3)
    run = Federation(inter, intra_M, "uniform", "global")
    run.run(3000)
    posterior_MM, _ = personal_posterior(np.eye(6), inter, intra_M)
    np.testing.assert_allclose(run.uploads_MM, posterior_MM, rtol=0, atol=1e-12)


def test_fedavg_is_bayes_only_without_spread_and_with_variances_that_fall_as_one_over_n():
    size_M = np.array([5.0, 20.0, 100.0])
    found_M = fixed_point_weights(0.0, 3 / size_M, "fedavg", "global", num_examples_M=size_M)
    np.testing.assert_allclose(found_M, precision_weights(0.0, 3 / size_M), rtol=1e-14)


@pytest.mark.parametrize(("rule", "initial"), TABLE)
def test_without_spread_the_fixed_point_is_the_limit_of_small_spreads(rule, initial):
    intra_M, size_M = np.array([1.0, 2.0, 5.0]), np.array([3.0, 2.0, 1.0])
    at_0, near_0 = (
        fixed_point_weights(inter, intra_M, rule, initial, num_examples_M=size_M)
        for inter in (0.0, 1e-9)
    )
    np.testing.assert_allclose(at_0, near_0, rtol=1e-7)


def test_the_leave_one_out_common_tap_keeps_its_weights_for_a_dominating_client():
    """Of two clients, the second's share of the first's start never vanishes: a : 1."""
    found = fixed_point_weights(0.0, [1e-18, 1.0], "common_tap", "loo", retained=0.25)
    np.testing.assert_allclose(found, [0.8, 0.2], rtol=1e-12)
    with pytest.raises(VarianceError, match="no fixed point"):
        fixed_point_weights(0.0, [0.0, 1.0], "common_tap", "loo")


@pytest.mark.parametrize(("rule", "initial"), TABLE)
def test_a_single_client_is_the_whole_global_model(rule, initial):
    np.testing.assert_array_equal(fixed_point_weights(0.0, [2.0], rule, initial), [1.0])


def test_a_common_tap_retains_half_of_its_start_unless_told_otherwise():
    arguments = (0.5, [1.0, 2.0, 4.0], "common_tap", "loo")
    default_M, half_M, tenth_M = (
        fixed_point_weights(*arguments, **options)
        for options in ({}, {"retained": 0.5}, {"retained": 0.1})
    )
    np.testing.assert_array_equal(default_M, half_M)
    assert np.abs(tenth_M / half_M - 1).max() > 0.1


def test_fixed_points_that_are_not_known_are_errors():
    with pytest.raises(VarianceError, match="num_examples_M"):
        fixed_point_weights(1.0, [1.0, 2.0], "fedavg", "global")
    with pytest.raises(VarianceError, match="rule 'fedavg' with initial 'loo'"):
        fixed_point_weights(1.0, [1.0, 2.0], "fedavg", "loo", num_examples_M=[1, 2])
    with pytest.raises(VarianceError, match="rule 'median'"):
        fixed_point_weights(1.0, [1.0, 2.0], "median", "global")


# ---------------------------------------------------------------------------------------------
# Expected errors


def draw(inter, intra_M, count, seed=0):
    """theta_M and y_M around theta_0 = 0, each (N, M)."""
    rng = np.random.default_rng(seed)
    theta_NM = math.sqrt(inter) * rng.normal(size=(count, len(intra_M)))
    return theta_NM, theta_NM + np.sqrt(intra_M) * rng.normal(size=theta_NM.shape)


def assert_is_mean(errors_N, expected):
    """Within five standard errors, and those below 1 %: chance alone fails one in a million."""
    standard_error = errors_N.std() / math.sqrt(len(errors_N))
    assert standard_error < 0.01 * expected
    assert abs(errors_N.mean() - expected) < 5 * standard_error


def test_expected_errors_are_what_simulation_finds():
    inter, intra_M, size_M = 0.6, np.array([0.2, 1.0, 2.5, 0.5]), np.array([50.0, 10, 5, 30])
    theta_NM, y_NM = draw(inter, intra_M, 60_000)
    precision_M = 1 / (inter + intra_M)
    bayes_N = y_NM @ precision_M / precision_M.sum()
    fedavg_N = y_NM @ size_M / size_M.sum()
    lam_M = intra_M / (inter + intra_M)
    personal_NM = (1 - lam_M) * y_NM + lam_M * bayes_N[:, None]
    simulated = {
        "global_bayes": bayes_N**2,
        "global_fedavg": fedavg_N**2,
        "global_uniform": y_NM.mean(1) ** 2,
        "local_bayes": ((personal_NM - theta_NM) ** 2).mean(1),
        "local_only": ((y_NM - theta_NM) ** 2).mean(1),
        "local_fedavg": ((fedavg_N[:, None] - theta_NM) ** 2).mean(1),
        "local_global": ((bayes_N[:, None] - theta_NM) ** 2).mean(1),
    }
    expected = expected_mse(inter, intra_M, size_M)
    assert expected.keys() == simulated.keys()
    for name, errors_N in simulated.items():
        assert_is_mean(errors_N, expected[name])


@pytest.mark.parametrize("own_rows", [True, False])
def test_mixture_errors_are_quadratic_forms_of_the_joint_covariance(own_rows):
    rng = np.random.default_rng(4)
    inter, intra_M = 0.6, np.array([0.2, 1.0, 2.5, 0.5])
    weights = rng.dirichlet(np.ones(4), size=4 if own_rows else None)
    # Error of client m is c'y - theta_m, with Cov(theta) = inter I and y = theta + noise.
    expected_M = []
    for m, row_M in enumerate(np.broadcast_to(weights, (4, 4))):
        c_M = row_M - np.eye(4)[m]
        expected_M.append(inter * c_M @ c_M + (row_M * intra_M) @ row_M)
    np.testing.assert_allclose(mixture_mse(weights, inter, intra_M), expected_M, rtol=1e-13)


# Method specification, table 10.1: M, R, Bayes and ratios, global and then local.
TABLE_10_1 = """
10 0.01 .00463 1.006 5.411 1.207 1.000 .00652 38.09 1.020 1.016 1.130 1.000
10 0.1  .00897 1.150 3.043 1.162 1.000 .02314 10.73 1.304 1.246 1.032 1.000
10 1    .03821 1.752 1.299 1.075 1.000 .09433 2.631 2.814 2.510 1.005 1.000
10 10   .27000 2.344 1.011 1.008 1.000 .20448 1.214 12.81 11.03 1.000 1.000
50 0.01 .00101 1.004 4.430 1.273 1.000 .00304 72.78 1.032 1.030 1.083 1.000
50 0.1  .00176 1.113 2.757 1.198 1.000 .01762 12.54 1.315 1.304 1.012 1.000
50 1    .00694 1.654 1.274 1.081 1.000 .08156 2.709 2.741 2.685 1.001 1.000
50 10   .04812 2.214 1.010 1.008 1.000 .18116 1.220 12.30 11.97 1.000 1.000
"""


@pytest.mark.parametrize("line", TABLE_10_1.strip().splitlines())
def test_the_synthetic_table_of_the_specification_to_its_printed_digits(line):
    count, ratio, *printed = line.split()
    size_M = np.geomspace(10, 1000, int(count))
    intra_M = 10 / size_M
    inter = float(ratio) * intra_M.mean()
    mse = expected_mse(inter, intra_M, size_M)

    described_M = fixed_point_weights(inter, intra_M, "precision", "loo")
    exact_M = fixed_point_weights(inter, intra_M, "uniform", "global")
    B_M1 = shrinkage_loo(inter, intra_M)[:, None]
    lam_M1 = shrinkage(inter, intra_M)[:, None]
    eye = np.eye(len(size_M))
    # At the fixed point a client's start is the mean of the others' uploads X, X = (1-B) I + B S.
    q_M = precision_weights(inter, intra_M)
    others_MM = np.where(eye == 1, 0.0, q_M) / (1 - q_M)[:, None]
    uploads_MM = np.linalg.solve(eye - B_M1 * others_MM, (1 - B_M1) * eye)
    np.testing.assert_allclose(q_M @ uploads_MM, described_M, rtol=1e-9)

    def global_mse(weights_M):
        return (weights_M**2 * (inter + intra_M)).sum()

    bayes_g, bayes_l = mse["global_bayes"], mse["local_bayes"]
    found = [
        bayes_g,
        mse["global_fedavg"] / bayes_g,
        mse["global_uniform"] / bayes_g,
        global_mse(described_M) / bayes_g,
        global_mse(exact_M) / bayes_g,
        bayes_l,
        mse["local_only"] / bayes_l,
        mse["local_fedavg"] / bayes_l,
        mse["local_global"] / bayes_l,
        mixture_mse(uploads_MM, inter, intra_M).mean() / bayes_l,
        mixture_mse((1 - lam_M1) * eye + lam_M1 * exact_M, inter, intra_M).mean() / bayes_l,
    ]
    for value, text in zip(found, printed, strict=True):
        digits = len(text.partition(".")[2])
        assert f"{value:.{digits}f}" == f"{float(text):.{digits}f}"


def test_no_mixture_beats_the_bayes_rows():
    """The global posterior minimises the error among weights that sum to 1; random ones lose."""
    rng = np.random.default_rng(6)
    inter, intra_M = 0.6, np.array([0.2, 1.0, 2.5, 0.5])
    best = expected_mse(inter, intra_M, np.ones(4))
    posterior_MM, _ = personal_posterior(np.eye(4), inter, intra_M)
    assert mixture_mse(posterior_MM, inter, intra_M).mean() == pytest.approx(
        best["local_bayes"], rel=1e-13
    )
    for _ in range(50):
        step_MM = rng.normal(size=(4, 4)) * 0.05
        rows_MM = posterior_MM + step_MM - step_MM.mean(1, keepdims=True)
        assert (
            mixture_mse(rows_MM, inter, intra_M) > mixture_mse(posterior_MM, inter, intra_M)
        ).all()


def test_discounts_follow_the_convention_that_nought_to_the_nought_is_one():
    np.testing.assert_array_equal(hierarchy.discounts([0, 1, 2], 0.0), [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(hierarchy.discounts([0, 24, 25], 0.5), [1.0, 2.0**-24, 0.0])
