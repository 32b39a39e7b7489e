"""Train, validation and test rows of every client, and the clients held out as new."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.datasets.partition import NO_ROWS, Hand
from selffl_ray.datasets.splits import split_clients
from selffl_ray.errors import ConfigError, DataError

SHARES = (0.6, 0.2, 0.2)


def hands_of(sizes, *, test=0, val=0, turns=0):
    """Clients with rows 0, 1, 2, ... in turn, test rows from 10,000 on, val rows from 20,000."""
    ends = np.cumsum([0, *sizes])
    return [
        Hand(
            f"client-{m}",
            np.arange(ends[m], ends[m + 1]),
            np.arange(10_000 + m * test, 10_000 + (m + 1) * test),
            turns,
            np.arange(20_000 + m * val, 20_000 + (m + 1) * val),
        )
        for m in range(len(sizes))
    ]


shares = st.tuples(st.floats(0.3, 1), st.floats(0, 1), st.floats(0, 1)).map(
    lambda s: tuple(part / sum(s) for part in s)
)


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(5, 60), min_size=1, max_size=6), shares=shares)
def test_parts_are_disjoint_cover_the_clients_rows_and_have_their_shares(sizes, shares):
    hands = hands_of(sizes)
    partition = split_clients(hands, shares, 0.0, 0)
    for hand, client in zip(hands, partition.clients, strict=True):
        parts = (client.train, client.val, client.test)
        assert sorted(np.concatenate(parts).tolist()) == hand.rows.tolist()
        for part, share in zip(parts, shares, strict=True):
            assert abs(len(part) - share * len(hand.rows)) <= 1
        assert client.client_id == hand.client_id


def test_usual_shares_give_whole_numbers_exactly():
    (client,) = split_clients(hands_of([130]), (0.2, 0.2, 0.6), 0.0, 0).clients
    assert [len(p) for p in (client.train, client.val, client.test)] == [26, 26, 78]


def test_shares_are_relative_to_their_sum():
    """They may be off by a rounding error, which must not leave out a row."""
    (client,) = split_clients(hands_of([50]), (3.0, 1.0, 1.0), 0.0, 0).clients
    assert [len(p) for p in (client.train, client.val, client.test)] == [30, 10, 10]


def test_parts_are_drawn_at_random_and_training_rows_keep_the_random_order():
    (client,) = split_clients(hands_of([200]), SHARES, 0.0, 0).clients
    steps = np.diff(client.train)
    assert 40 < (steps < 0).sum() < 80, "about half of 119 steps go down"
    for part in (client.val, client.test):
        assert (np.diff(part) > 0).all()
        assert part.min() < 40
        assert part.max() >= 160


def test_a_clients_parts_depend_on_the_seed_and_on_itself_only():
    def train(sizes, client, seed=0):
        return split_clients(hands_of(sizes), SHARES, 0.0, seed).clients[client].train.tolist()

    assert train([50, 50], 0) == train([50, 90, 7], 0)
    assert train([50, 50], 0) != train([50, 50], 0, seed=1)
    assert train([50, 50], 0) != [row - 50 for row in train([50, 50], 1)]


def test_test_rows_of_the_published_part_are_the_clients_test_rows():
    partition = split_clients(hands_of([20, 30], test=7), (0.8, 0.2, 0.0), 0.0, 0)
    for client, size in zip(partition.clients, (20, 30), strict=True):
        assert len(client.train) + len(client.val) == size
        assert len(client.test) == 7
        assert client.test.min() >= 10_000


def test_validation_rows_of_the_published_part_are_the_clients_validation_rows():
    partition = split_clients(hands_of([20, 30], test=7, val=4), (1.0, 0.0, 0.0), 0.0, 0)
    for client, size in zip(partition.clients, (20, 30), strict=True):
        assert [len(part) for part in (client.train, client.val, client.test)] == [size, 4, 7]
        assert client.val.min() >= 20_000
        assert 10_000 <= client.test.min() <= client.test.max() < 20_000


def test_a_client_may_have_a_published_validation_part_only():
    (client,) = split_clients(hands_of([20], val=4), (0.5, 0.0, 0.5), 0.0, 0).clients
    assert [len(part) for part in (client.train, client.val, client.test)] == [10, 4, 10]


def test_turns_are_handed_on():
    (client,) = split_clients(hands_of([5], turns=3), SHARES, 0.0, 0).clients
    assert client.quarter_turns == 3


# -- new clients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.1, 1), (0.25, 2), (0.5, 5), (0.94, 9)])
def test_a_share_of_the_clients_is_held_out_as_new(share, held):
    partition = split_clients(hands_of([10] * 10), SHARES, share, 0)
    assert len(partition.new_clients) == held
    ids = [[c.client_id for c in part] for part in (partition.clients, partition.new_clients)]
    assert sorted(ids[0] + ids[1]) == [f"client-{m}" for m in range(10)]
    assert all(part == sorted(part) for part in ids)
    assert all(len(c.train) == 6 for c in partition.new_clients)


def test_who_is_new_is_drawn_with_the_seed():
    def new(seed):
        partition = split_clients(hands_of([10] * 30), SHARES, 0.2, seed)
        return [c.client_id for c in partition.new_clients]

    assert new(0) == new(0)
    assert new(0) != new(1)
    assert new(0) != [f"client-{m}" for m in range(6)]


def test_holding_a_client_out_changes_no_split():
    everybody = split_clients(hands_of([10] * 8), SHARES, 0.0, 0)
    held = split_clients(hands_of([10] * 8), SHARES, 0.5, 0)
    by_id = {c.client_id: c.train.tolist() for c in everybody.clients}
    for client in (*held.clients, *held.new_clients):
        assert client.train.tolist() == by_id[client.client_id]


def test_clients_published_as_unseen_are_new_whatever_the_share():
    hands = hands_of([10] * 8)
    for at in (2, 5):
        hands[at] = hands[at]._replace(unseen=True)
    partition = split_clients(hands, SHARES, 0.0, 0)
    assert [c.client_id for c in partition.new_clients] == ["client-2", "client-5"]
    assert [len(c.train) for c in partition.new_clients] == [6, 6]
    drawn = {c.client_id for c in split_clients(hands, SHARES, 0.5, 0).new_clients}
    assert {"client-2", "client-5"} < drawn
    assert len(drawn) == 2 + 3


def test_unseen_clients_need_others_to_train_on_and_a_test_share():
    hands = [hand._replace(unseen=True) for hand in hands_of([10] * 3)]
    with pytest.raises(DataError, match="all 3 clients are published as unseen, so none is left"):
        split_clients(hands, SHARES, 0.0, 0)
    mixed = [*hands, *hands_of([10])]
    with pytest.raises(ConfigError, match=r"unseen are tested on .* got \[0\.8, 0\.2, 0\.0\]"):
        split_clients(mixed, (0.8, 0.2, 0.0), 0.0, 0)


# -- digest ---------------------------------------------------------------------------------------


def test_the_digest_changes_with_anything_that_changes_training_or_tests():
    def digest(hands=None, shares=SHARES, new=0.0, seed=0):
        return split_clients(hands or hands_of([20] * 10), shares, new, seed).digest

    renamed = hands_of([20] * 10)
    renamed[3] = renamed[3]._replace(client_id="somebody")
    other_row = hands_of([20] * 10)
    other_row[3] = other_row[3]._replace(rows=np.append(other_row[3].rows[:-1], 999))
    turned = hands_of([20] * 10)
    turned[3] = turned[3]._replace(quarter_turns=1)
    digests = [
        digest(),
        digest(seed=1),
        digest(shares=(0.5, 0.3, 0.2)),
        digest(shares=(0.6, 0.3, 0.1)),
        digest(new=0.1),
        digest(renamed),
        digest(other_row),
        digest(turned),
        digest(hands_of([20] * 9)),
        digest(list(reversed(hands_of([20] * 10)))),
        digest(hands_of([20] * 10, test=1), shares=(0.6, 0.4, 0.0)),
        digest(hands_of([20] * 10, test=2), shares=(0.6, 0.4, 0.0)),
        digest(hands_of([20] * 10, val=1), shares=(0.6, 0.0, 0.4)),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == digests[0]


# -- examples that overlap ------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    overlap=st.integers(1, 40),
    share=shares,
    thinned=st.booleans(),
    size=st.integers(250, 600),
    start=st.integers(0, 1000),
)
def test_parts_of_overlapping_examples_share_no_content(overlap, share, thinned, size, start):
    """Row i covers places i to i + overlap of a text; no place is in two parts."""
    share = tuple(s if s > 0.1 else 0.0 for s in share)
    rows = np.arange(start, start + size)
    if thinned:
        rows = np.sort(np.random.default_rng(size).permutation(rows)[: size // 2])
    hand = Hand("role", rows, NO_ROWS)
    (client,) = split_clients([hand], share, 0.0, 0, overlap).clients
    parts = (client.train, client.val, client.test)
    covered = [{place for row in part for place in range(row, row + overlap + 1)} for part in parts]
    assert not covered[0] & covered[1]
    assert not covered[0] & covered[2]
    assert not covered[1] & covered[2]
    assert [len(part) > 0 for part in parts] == [s > 0 for s in share]
    if not thinned:
        gaps = overlap * (sum(s > 0 for s in share) - 1)
        assert sum(map(len, parts)) == size - gaps, "no more is left out than must be"
        for part, s in zip(parts, share, strict=True):
            assert abs(len(part) - s / sum(share) * (size - gaps)) <= 1


def test_overlapping_examples_drawn_at_random_would_share_content():
    """What the cut by position is for: else every test example's last place is trained on."""
    (client,) = split_clients(hands_of([500]), SHARES, 0.0, 0).clients
    trained = {place for row in client.train for place in range(row, row + 81)}
    assert {row + 80 for row in client.test} <= trained


def test_training_rows_that_overlap_keep_a_random_order():
    (client,) = split_clients(hands_of([700]), SHARES, 0.0, 0, 80).clients
    assert sorted(client.train) == list(range(324))
    assert 100 < (np.diff(client.train) < 0).sum() < 220
    assert client.val.tolist() == list(range(404, 512))
    assert client.test.tolist() == list(range(592, 700))


@pytest.mark.parametrize("size", [1, 80, 160, 161])
def test_a_client_too_small_for_what_is_left_out_is_named(size):
    message = rf"'client-1' has {size} examples, too few .* 80 are left out .*min_examples"
    with pytest.raises(DataError, match=message):
        split_clients(hands_of([300, size]), SHARES, 0.0, 0, 80)


# -- errors ---------------------------------------------------------------------------------------


def test_a_client_without_examples_is_named():
    hands = [*hands_of([5, 6]), Hand("empty", NO_ROWS, NO_ROWS)]
    with pytest.raises(DataError, match=r"client 'empty' has no examples; lower .*num_clients"):
        split_clients(hands, SHARES, 0.0, 0)


def test_a_client_without_training_examples_is_named():
    message = r"client 'client-1' has 2 examples .*\[0\.2, 0\.2, 0\.6\] none of them is for train"
    with pytest.raises(DataError, match=message):
        split_clients(hands_of([10, 2]), (0.2, 0.2, 0.6), 0.0, 0)


def test_a_share_of_test_beside_published_test_rows_is_refused():
    message = r"share of test must be 0, got \[0\.6, 0\.2, 0\.2\]; give \[train, val, 0\]"
    with pytest.raises(ConfigError, match=message):
        split_clients(hands_of([10, 10], test=3), SHARES, 0.0, 0)


@pytest.mark.parametrize(("test", "splits"), [(0, r"\[train, 0, test\]"), (3, r"\[train, 0, 0\]")])
def test_a_share_of_validation_beside_published_validation_rows_is_refused(test, splits):
    with pytest.raises(ConfigError, match=rf"share of val must be 0, got .*; give {splits}"):
        split_clients(hands_of([10, 10], val=3, test=test), SHARES, 0.0, 0)


def test_holding_out_everybody_or_nobody_is_refused():
    with pytest.raises(ConfigError, match=r"new_clients: 0\.9 of 3 clients leaves none to train"):
        split_clients(hands_of([10] * 3), SHARES, 0.9, 0)
    with pytest.raises(ConfigError, match=r"new_clients: 0\.1 of 3 clients is none; raise it, or"):
        split_clients(hands_of([10] * 3), SHARES, 0.1, 0)
