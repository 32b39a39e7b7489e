"""Homes by measured time: what is learnt of a round, and which clients are to move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from selffl_ray.balance import (
    LEAST_GAIN,
    LEAST_LOAD,
    MOST_LOAD,
    WINDOW,
    Measured,
    evened,
    unmeasured,
    with_round,
)

ALIKE = ("cpu", "cpu")


def told(work_M, rate_H, window=WINDOW):
    """Clients of known work on hosts of known speed."""
    rates = (np.asarray(rate_H, np.float64),) * window
    return Measured(np.asarray(work_M, np.float64), np.ones(len(work_M)), rates)


def loads(homes_M, work_M, num_hosts):
    return np.bincount(homes_M, work_M, num_hosts)


@pytest.mark.parametrize("slower", [1.5, 2.0, 2.5, 3.0])
def test_small_clients_are_dealt_in_proportion_to_speed(slower):
    work_M = np.ones(1000)
    homes_M = np.arange(1000) % 2
    found = evened(told(work_M, (1.0, slower)), homes_M, ALIKE)
    on_fast, on_slow = loads(found.homes_M, work_M, 2)
    assert on_slow == pytest.approx(1000 / (1 + slower), abs=1)
    assert found.saved_s == pytest.approx(500 * slower - max(on_fast, slower * on_slow))


def test_a_host_that_is_slower_by_much_keeps_half_an_equal_share_and_none_gets_more_than_two():
    work_M = np.ones(1000)
    found = evened(told(work_M, (1.0, 100.0)), np.arange(1000) % 2, ALIKE)
    assert loads(found.homes_M, work_M, 2).tolist() == [750, 250]
    found = evened(told(work_M, (1.0, 10.0, 10.0, 10.0)), np.arange(1000) % 4, ALIKE * 2)
    load_H = loads(found.homes_M, work_M, 4)
    assert load_H.max() == MOST_LOAD * 250
    assert load_H.min() >= LEAST_LOAD * 250


def test_hosts_that_need_as_long_as_each_other_keep_their_clients():
    homes_M = np.asarray([0, 0, 0, 1])
    assert evened(told([1, 1, 1, 3], (1.0, 1.0)), homes_M, ALIKE) is None
    # Less than 15 % of a round is not worth a move.
    many = np.arange(1000) % 2
    assert evened(told(np.ones(1000), (1.0, 1.3)), many, ALIKE) is None
    assert evened(told(np.ones(1000), (1.0, 1.4)), many, ALIKE) is not None


def test_nothing_is_proposed_before_the_window_is_full_or_where_a_host_was_not_asked():
    homes_M = np.arange(10) % 2
    assert evened(unmeasured(np.ones(10)), homes_M, ALIKE) is None
    assert evened(told(np.ones(10), (1.0, 3.0), WINDOW - 1), homes_M, ALIKE) is None
    full = told(np.ones(10), (1.0, 3.0))
    assert evened(full, homes_M, ALIKE) is not None
    gap = full._replace(rates=(*full.rates[1:], np.asarray([1.0, np.nan])))
    assert evened(gap, homes_M, ALIKE) is None


HOSTS = st.integers(2, 6)
RATES = st.floats(0.01, 100)
WORK = st.floats(0.1, 1000)


@given(data=st.data(), num_hosts=HOSTS)
def test_a_proposal_saves_enough_within_kinds_and_leaves_nobody_without_clients(data, num_hosts):
    def some(values, count):
        return data.draw(st.lists(values, min_size=count, max_size=count))

    rate_H = some(RATES, num_hosts)
    kind_H = some(st.sampled_from(["cpu", "another"]), num_hosts)
    more = data.draw(st.integers(0, 40))
    homes_M = np.asarray([*range(num_hosts), *some(st.integers(0, num_hosts - 1), more)])
    work_M = np.asarray(some(WORK, len(homes_M)))
    before = homes_M.copy()
    found = evened(told(work_M, rate_H), homes_M, kind_H)
    assert homes_M.tolist() == before.tolist(), "nothing is changed in place"
    assume(found is not None)
    kinds = np.asarray(kind_H)
    assert (kinds[found.homes_M] == kinds[homes_M]).all()
    assert set(found.homes_M.tolist()) == set(range(num_hosts))
    old, new = ((rate_H * loads(h, work_M, num_hosts)).max() for h in (homes_M, found.homes_M))
    assert new <= (1 - LEAST_GAIN) * old
    assert found.saved_s == pytest.approx(old - new)


def test_one_disturbed_round_says_nothing():
    measured, homes_M, index = unmeasured(np.ones(4)), np.asarray([0, 0, 1, 1]), np.arange(4)
    usual, disturbed = np.asarray([2.0, 2.0]), np.asarray([2.0, 9.0])
    for number in range(WINDOW):
        seconds_H = disturbed if number == 1 else usual
        measured = with_round(measured, homes_M, index, np.ones(4), seconds_H)
    assert measured.rate_H.tolist() == [1.0, 1.0]
    for _ in range(WINDOW // 2 + 1):
        measured = with_round(measured, homes_M, index, np.ones(4), disturbed)
    assert measured.rate_H.tolist() == [1.0, 4.5]
    assert len(measured.rates) == WINDOW


def test_what_clients_did_counts_and_those_not_asked_are_taken_to_be_like_the_others():
    measured, homes_M = unmeasured(np.asarray([10.0, 20.0, 30.0, 40.0])), np.asarray([0, 0, 1, 1])
    asked = np.asarray([0, 2])
    seconds_H = np.asarray([4.0, 9.0])
    first = with_round(measured, homes_M, asked, np.asarray([2.0, 4.0]), seconds_H)
    assert first.work_M.tolist() == [20, 60, 120, 120]
    assert first.rates[0].tolist() == [4 / 20, 9 / 120]
    # Half of what was measured before.
    again = with_round(first, homes_M, asked, np.asarray([4.0, 4.0]), seconds_H)
    assert again.factor_M[[0, 2]].tolist() == [3, 4]
    # A host of which nobody was asked has no speed.
    alone = with_round(again, homes_M, asked[:1], np.ones(1), np.asarray([1.0, np.nan]))
    assert np.isnan(alone.rates[-1]).tolist() == [False, True]
