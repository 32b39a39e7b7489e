"""Intervals, pairing and "within the interval", against cases computed by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.report.statistics import (
    bootstrap_interval,
    holm,
    paired,
    rank,
    signed_ranks,
    t_interval,
)

T_975_DF2 = 4.302653
"""Quantile of Student's t with 2 degrees of freedom, from a printed table."""


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_three_values_give_the_t_interval_of_the_textbook():
    found = t_interval([0.90, 0.92, 0.97])
    # Mean 0.93; squared deviations 0.0009 + 0.0001 + 0.0016, over 2.
    assert found.mean == pytest.approx(0.93)
    assert found.half == pytest.approx(T_975_DF2 * math.sqrt(0.0013) / math.sqrt(3), rel=1e-6)
    assert found.num == 3


def test_one_value_has_a_mean_and_no_interval():
    found = t_interval([0.9])
    assert (found.mean, found.half, found.low, found.high) == (0.9, None, None, None)
    assert not found.excludes_zero


def test_a_paired_difference_uses_the_common_keys_only():
    found = paired({0: 0.9, 1: 0.8, 2: 0.7}, {1: 0.6, 2: 0.4, 3: 0.0})
    # 0.2 and 0.3: mean 0.25, standard deviation 0.1 / sqrt(2), t(0.975, 1) = 12.7062.
    assert found is not None
    assert found.mean == pytest.approx(0.25)
    assert found.half == pytest.approx(12.7062 * 0.1 / math.sqrt(2) / math.sqrt(2), rel=1e-5)
    assert paired({0: 1.0}, {1: 1.0}) is None


HAND = (
    # The best: mean 0.92.
    by_seed(0.90, 0.92, 0.94),
    # Differences -0.01, -0.02, 0: mean -0.01, s 0.01, half-width 4.3027 * 0.01 / sqrt(3) = 0.0248.
    by_seed(0.89, 0.90, 0.94),
    # Differences -0.02, -0.021, -0.019: mean -0.02, s 0.001, half-width 0.0025.
    by_seed(0.88, 0.899, 0.921),
)


def test_bold_is_the_best_and_whoever_is_within_the_interval_of_the_paired_difference():
    """The third row's own interval overlaps the best's almost wholly; paired, it is worse."""
    assert rank(HAND, better=1).bold == (True, True, False)
    own, best = t_interval(list(HAND[2].values())), t_interval(list(HAND[0].values()))
    assert own.high > best.mean


def test_lower_is_better_turns_the_order_and_nothing_else():
    errors = [{k: 1 - v for k, v in row.items()} for row in HAND]
    assert rank(errors, better=-1) == rank(HAND, better=1)
    assert rank(errors, better=1).best == 2


def test_a_row_with_one_lucky_seed_is_neither_the_best_nor_bold():
    found = rank([{0: 0.99}, by_seed(0.90, 0.92, 0.94), by_seed(0.89, 0.90, 0.94)], better=1)
    assert found.best == 1
    assert found.bold == (False, True, True)
    assert found.unpaired == (0,)


def test_with_one_seed_nothing_is_bold():
    found = rank([{0: 0.9}, {0: 0.1}], better=1)
    assert (found.best, found.bold) == (0, (False, False))


def test_rows_on_other_partitions_are_not_paired():
    other = {(seed, "other"): value for seed, value in HAND[1].items()}
    own = {(seed, "own"): value for seed, value in HAND[0].items()}
    found = rank([own, other], better=1)
    assert found.bold == (False, False)
    assert found.unpaired == (1,)


def test_a_row_without_the_metric_is_not_ranked():
    found = rank([{}, HAND[0], HAND[2]], better=1)
    assert (found.best, found.bold) == (1, (False, True, False))
    assert rank([{}, {}], better=1).best is None


def test_equal_rows_are_both_bold_in_spite_of_rounding():
    shifted = {seed: value + 1e-16 for seed, value in HAND[0].items()}
    assert rank([HAND[0], shifted], better=1).bold == (True, True)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=2, max_size=5),
    st.sampled_from([1, -1]),
)
def test_with_common_seeds_bold_means_that_the_interval_includes_zero(rows, better):
    values = [by_seed(*row) for row in rows]
    found = rank(values, better)
    assert found.bold[found.best]
    for at, own in enumerate(values):
        if at != found.best:
            difference = paired(own, values[found.best])
            assert found.bold[at] == (not difference.excludes_zero)


def test_the_bootstrap_of_a_constant_is_that_constant():
    assert bootstrap_interval([np.full(5, 0.3), np.full(7, 0.3)]) == pytest.approx((0.3, 0.3))


def test_the_bootstrap_resamples_seeds_and_not_only_clients():
    """Clients of a seed agree, seeds do not: all the spread is that of seeds.

    Two seeds at -1 and 1: both draws are the same with probability 1/2, so the 2.5 % quantiles are
    the seeds themselves. Clients alone would give an interval of width 0.
    """
    assert bootstrap_interval([np.full(50, -1.0), np.full(50, 1.0)]) == (-1.0, 1.0)


def test_the_bootstrap_resamples_clients_within_a_seed():
    """Both seeds alike: the spread is that of 2 x 100 clients of variance 1."""
    values = np.tile([-1.0, 1.0], 50)
    low, high = bootstrap_interval([values, values])
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.1)


def test_one_seed_gives_no_bootstrap_interval():
    assert bootstrap_interval([np.arange(10.0)]) is None


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        ([0.3, -0.1, 0.5, 0.2, 0.7, 0.4], [3, 1, 5, 2, 6, 4]),
        # Ties share the mean of their ranks; what does not differ has none.
        ([0.1, -0.1, 0.0, 0.2, 0.2, 0.2, 0.4], [1.5, 1.5, 0, 4, 4, 4, 6]),
    ],
)
def test_the_signed_rank_test_counts_sign_flips(values, ranks):
    """p by enumeration: share of the 2^n signs with a rank sum at least as far from its mean."""
    seen = abs((ranks * np.sign(values)).sum())
    signs = itertools.product((-1, 1), repeat=len(values))
    extreme = np.mean([abs((ranks * np.asarray(s)).sum()) >= seen for s in signs])
    found = signed_ranks(np.asarray(values))
    assert found.p_value == pytest.approx(extreme)
    assert abs(found.effect) == pytest.approx(seen / sum(ranks))


@pytest.mark.parametrize("num", [20, 50, 80])
def test_the_signed_rank_test_is_scipys_where_there_are_no_ties(num):
    values = np.random.default_rng(num).normal(0.3, 1, num)
    method = "exact" if num <= 50 else "asymptotic"
    expected = stats.wilcoxon(values, method=method).pvalue
    assert signed_ranks(values).p_value == pytest.approx(expected, rel=1e-9)


def test_no_client_that_differs_gives_no_test():
    assert signed_ranks(np.zeros(5)) is None


def test_holm_multiplies_by_what_is_left_and_never_decreases():
    # 0.01 * 3, 0.03 * 2, then 0.04 * 1 raised to the one before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
