"""The cohorts of a run: drawn once, from the seed and the participation options only."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.participation import plan_rounds
from selffl_ray.training import TrainingConfig


def of(num_clients):
    """Examples of clients by name."""
    return {f"client-{i:03d}": 30 + i for i in range(num_clients)}


def cohorts(seed=0, num_clients=20, **options):
    config = TrainingConfig(**{"num_rounds": 6, "participation_rate": 0.5, **options})
    return [plan.cohort.tolist() for plan in plan_rounds(seed, config, of(num_clients))]


@settings(max_examples=60)
@given(
    num_clients=st.integers(1, 60),
    rate=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**40),
)
def test_a_cohort_is_sorted_without_repeats_and_as_large_as_the_rate_says(num_clients, rate, seed):
    for cohort in cohorts(seed, num_clients, participation_rate=rate, num_rounds=3):
        assert cohort == sorted(set(cohort))
        assert 0 <= cohort[0] <= cohort[-1] < num_clients
        assert abs(len(cohort) - rate * num_clients) <= 0.5 or len(cohort) == 1


@pytest.mark.parametrize(
    ("num_clients", "rate", "size"), [(10, 0.3, 3), (14, 1.0, 14), (100, 0.001, 1), (7, 0.5, 4)]
)
def test_sizes_of_cohorts(num_clients, rate, size):
    assert {len(c) for c in cohorts(0, num_clients, participation_rate=rate)} == {size}


def test_full_participation_asks_everybody():
    assert cohorts(participation_rate=1.0) == [list(range(20))] * 6


def test_the_same_seed_asks_the_same_clients_and_another_one_others():
    assert cohorts(3) == cohorts(3)
    assert cohorts(3) != cohorts(4)


def test_rounds_differ():
    assert all(a != b for a, b in pairwise(cohorts(0, 100)))


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 0.01},
        {"batch_size": 7},
        {"num_local_steps": 99},
        {"sampling": "replacement"},
        {"momentum": 0.9},
        {"schedule": "cosine"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_cohorts_do_not_depend_on_how_clients_train(other):
    assert cohorts(**other) == cohorts()


def test_a_longer_run_begins_like_a_shorter_one():
    assert cohorts(num_rounds=9)[:6] == cohorts(num_rounds=6)


def test_every_client_is_asked_equally_often_in_the_long_run():
    asked = np.bincount(np.concatenate(cohorts(0, 20, num_rounds=2000)), minlength=20)
    # Binomial(2000, 1/2): mean 1000, standard deviation 22.
    assert np.abs(asked - 1000).max() < 5 * 22


def test_the_plan_carries_round_and_learning_rate_after_the_schedule():
    config = TrainingConfig(num_rounds=4, learning_rate=0.8, schedule="linear")
    plans = plan_rounds(0, config, of(5))
    assert [plan.round_index for plan in plans] == [0, 1, 2, 3]
    assert [plan.learning_rate for plan in plans] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert plans[0].cohort.dtype == np.int64
