"""The cohorts of a run: drawn once, from the seed and the participation options only."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from selffl_ray.availability.diurnal import DiurnalConfig
from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.participation import (
    Fate,
    close_round,
    plan_digest,
    plan_rounds,
    trouble_cautions,
)
from selffl_ray.registry import Component
from selffl_ray.seeding import generator
from selffl_ray.stopping import StopConfig
from selffl_ray.training import TrainingConfig
from selffl_ray.trouble import DropoutConfig, StragglersConfig, TroubleConfig


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


# -- simulated trouble -----------------------------------------------------------------------------

LAWS = st.sampled_from([Component("always"), Component("markov"), Component("diurnal")])
TROUBLES = st.builds(
    TroubleConfig,
    availability=LAWS,
    dropout=st.builds(DropoutConfig, probability=st.floats(0.0, 0.6)),
    stragglers=st.builds(
        StragglersConfig, spread=st.sampled_from([0.0, 0.7]), jitter=st.sampled_from([0.0, 0.4])
    ),
    over_selection=st.sampled_from([1.0, 1.3, 2.0]),
    wait_for=st.sampled_from([1.0, 0.8, 0.3]),
    deadline=st.sampled_from([None, 15.0, 30.0]),
)


def troubled(trouble, seed=0, num_clients=20, **options):
    """Plans under trouble; steps differ between clients, unless they are given."""
    usual = {"num_rounds": 6, "participation_rate": 0.5, "num_local_epochs": 4, "batch_size": 10}
    # Virtual time that is told makes a plan with outcomes even where there is no trouble.
    stop = StopConfig(virtual_s=1e9)
    config = TrainingConfig(**{**usual, **options, "trouble": trouble, "stop": stop})
    return plan_rounds(seed, config, of(num_clients))


def troubled_if_anybody_answers(trouble, seed):
    try:
        return troubled(trouble, seed)
    except ConfigError:
        reject()


def test_without_trouble_the_cohort_is_the_plain_draw():
    """As in versions that knew no trouble, with or without virtual time being told."""
    for stop in (StopConfig(), StopConfig(virtual_s=1e9)):
        found = cohorts(3, 50, participation_rate=0.3, stop=stop)
        drawn = [
            generator(3, "participation", r).choice(50, size=15, replace=False) for r in range(6)
        ]
        assert found == [sorted(cohort.tolist()) for cohort in drawn]
    plain = plan_rounds(3, TrainingConfig(), of(50))
    assert all(p.trouble is None and p.num_asked == 50 for p in plain)
    assert all(p.most_steps([0, 7]) is None for p in plain)


@settings(max_examples=80, deadline=None)
@given(trouble=TROUBLES, seed=st.integers(0, 2**20))
def test_every_client_asked_has_one_outcome_and_those_that_count_are_the_cohort(trouble, seed):
    for plan in troubled_if_anybody_answers(trouble, seed):
        found = plan.trouble
        asked = found.asked.tolist()
        assert asked == sorted(set(asked))
        assert len(asked) == min(found.num_available, math.ceil(trouble.over_selection * 10 - 1e-9))
        assert plan.num_asked == len(asked)
        counted = found.asked[np.isin(found.outcome, ["answered", "partial"])]
        assert plan.cohort.tolist() == counted.tolist()
        assert ((found.steps > 0) == np.isin(found.outcome, ["answered", "partial"])).all()
        wanted = min(10, found.num_available)
        assert len(plan.cohort) <= math.ceil(trouble.wait_for * wanted - 1e-9)
        assert np.isnan(found.ends_s[found.outcome == "dropped"]).all()
        if trouble.deadline is not None:
            assert found.virtual_s <= trouble.deadline
        elif len(plan.cohort):
            # Nobody who counts is slower than the round, and whoever is late is not faster.
            answered = found.ends_s[found.outcome == "answered"]
            assert found.virtual_s == answered.max()
            assert (found.ends_s[found.outcome == "late"] >= answered.max()).all()


@settings(max_examples=60, deadline=None)
@given(trouble=TROUBLES, seed=st.integers(0, 2**20), less=st.floats(0.3, 0.95))
def test_a_shorter_deadline_never_adds_an_answer(trouble, seed, less):
    long = dataclasses.replace(trouble, deadline=40.0)
    short = dataclasses.replace(trouble, deadline=40.0 * less)
    plans = [troubled_if_anybody_answers(one, seed) for one in (long, short)]
    for one, other in zip(*plans, strict=True):
        assert one.trouble.asked.tolist() == other.trouble.asked.tolist()
        assert set(other.cohort) <= set(one.cohort)
        assert other.trouble.virtual_s <= one.trouble.virtual_s


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), less=st.floats(0.3, 0.95))
def test_a_shorter_deadline_never_adds_a_step_of_partial_work(seed, less):
    slow = StragglersConfig(spread=0.8)
    plans = [
        troubled(TroubleConfig(stragglers=slow, deadline=d, late="partial"), seed)
        for d in (20.0, 20.0 * less)
    ]
    for one, other in zip(*plans, strict=True):
        assert (other.trouble.steps <= one.trouble.steps).all()
    assert any(plan.trouble.count("partial") for plan in plans[1])


def hand_made(deadline=None, late="drop", needed=5):
    """Five clients of 10 steps each; the fourth drops out."""
    fate = Fate(
        np.asarray([False, False, False, True, False]),
        np.asarray([1.0, 2.0, 4.0, 1.0, 3.0]),
        np.asarray([0.5, 0.4, 0.3, 0.2, 0.1]),
    )
    config = TroubleConfig(deadline=deadline, late=late)
    outcome, steps, ends_s, virtual_s = close_round(config, fate, np.full(5, 10), needed)
    assert ends_s[[0, 1, 2, 4]].tolist() == [10.0, 20.0, 40.0, 30.0]
    assert math.isnan(ends_s[3])
    return outcome.tolist(), steps.tolist(), virtual_s


@pytest.mark.parametrize(
    ("options", "outcome", "steps", "virtual_s"),
    [
        # All that have not dropped out are waited for, the slowest for 10 steps of 4 s.
        ({}, "AAADA", [10, 10, 10, 0, 10], 40.0),
        ({"deadline": 25.0}, "AALDL", [10, 10, 0, 0, 0], 25.0),
        # 25 s are 6 steps of 4 s, and 8 of 3 s.
        ({"deadline": 25.0, "late": "partial"}, "AAPDP", [10, 10, 6, 0, 8], 25.0),
        # 3 s are no step of 4 s.
        ({"deadline": 3.5, "late": "partial"}, "PPLDP", [3, 1, 0, 0, 1], 3.5),
        ({"deadline": 40.0}, "AAADA", [10, 10, 10, 0, 10], 40.0),
        ({"needed": 3}, "AALDA", [10, 10, 0, 0, 10], 30.0),
        ({"needed": 1}, "ALLDL", [10, 0, 0, 0, 0], 10.0),
        # Two have answered after 20 s: nobody waits for the deadline.
        ({"needed": 2, "deadline": 25.0}, "AALDL", [10, 10, 0, 0, 0], 20.0),
        ({"needed": 3, "deadline": 25.0}, "AALDL", [10, 10, 0, 0, 0], 25.0),
        ({"deadline": 9.0}, "LLLDL", [0, 0, 0, 0, 0], 9.0),
    ],
)
def test_who_counts_and_how_long_it_takes_in_a_round_made_by_hand(
    options, outcome, steps, virtual_s
):
    words = {"A": "answered", "P": "partial", "L": "late", "D": "dropped"}
    assert hand_made(**options) == ([words[letter] for letter in outcome], steps, virtual_s)


def test_equal_times_are_put_in_order_by_lot():
    fate = Fate(np.zeros(4, bool), np.ones(4), np.asarray([0.9, 0.1, 0.2, 0.8]))
    outcome, *_ = close_round(TroubleConfig(), fate, np.full(4, 7), 2)
    assert outcome.tolist() == ["late", "answered", "answered", "late"]


def test_a_round_of_nobody_lasts_as_long_as_its_deadline():
    nobody = Fate(np.zeros(0, bool), np.zeros(0), np.zeros(0))
    for deadline, length in ((None, 0.0), (7.0, 7.0)):
        config = TroubleConfig(deadline=deadline)
        assert close_round(config, nobody, np.zeros(0, np.int64), 0)[3] == length


def test_virtual_time_is_that_of_the_slowest_clients_steps():
    slow = TroubleConfig(stragglers=StragglersConfig(seconds_per_step=2.5))
    plans = troubled(slow, num_clients=7, participation_rate=1.0)
    # The last client has 36 examples: 4 batches of 10, 4 times.
    assert [plan.trouble.virtual_s for plan in plans] == [16 * 2.5] * 6


def test_only_clients_that_are_there_are_asked_and_all_of_them_if_too_few(tmp_path):
    path = tmp_path / "stays.csv"
    path.write_text("client_id,first_round,last_round\nclient-003,0,9\nclient-005,1,1\n")
    plans = troubled(TroubleConfig(trace=str(path)), num_rounds=3)
    assert [plan.cohort.tolist() for plan in plans] == [[3], [3, 5], [3]]
    seldom = Component("diurnal", DiurnalConfig(mean=0.3, amplitude=0.1))
    both = TroubleConfig(trace=str(path), availability=seldom)
    found = [plan.cohort.tolist() for plan in troubled(both, num_rounds=10)]
    assert [cohort for cohort in found[:1] + found[2:] if cohort not in ([], [3])] == []
    assert found.count([]) > 1
    assert [3] in found


def test_availability_leaves_everybody_that_is_there_an_equal_chance():
    plans = troubled(TroubleConfig(availability=Component("markov")), num_rounds=3000)
    asked = np.bincount(np.concatenate([p.cohort for p in plans]), minlength=20)
    # At least about 16 of 20 are there; 10 are asked: 1500 each, with chains that last 8 rounds.
    assert np.abs(asked - asked.mean()).max() < 5 * math.sqrt(3000 * 0.25 * 2)
    assert asked.sum() > 0.9 * 30000


def test_the_plan_depends_on_no_method_and_no_placement():
    trouble = (
        "training.participation_rate=0.5",
        "training.trouble={availability: markov, dropout: {probability: 0.3, concentration: 2}, "
        "stragglers: {spread: 1.0}, over_selection: 1.5, deadline: 20, late: partial}",
    )
    digests = {
        plan_digest(prepare_experiment(load_config(None, [*trouble, *other])).plans)
        for other in (
            ["method=selffl"],
            ["method=scaffold"],
            ["method=local", "training.learning_rate=0.01"],
            ["placement.stack_size=3", "placement.clients_per_actor=2"],
            ["training.trouble.over_selection=1.5", "evaluation.every=1"],
        )
    }
    assert len(digests) == 1
    other = prepare_experiment(load_config(None, [*trouble, "training.trouble.deadline=19"]))
    assert plan_digest(other.plans) not in digests


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            TroubleConfig(deadline=3.0),
            r"trouble\.deadline: nobody is done in time in any of the 6 r",
        ),
        (
            TroubleConfig(dropout=DropoutConfig(probability=0.999999999)),
            r"trouble\.dropout: everybody drops out of all 6 rounds; lower",
        ),
    ],
)
def test_a_run_in_which_nobody_ever_answers_is_refused(trouble, message):
    with pytest.raises(ConfigError, match=message):
        troubled(trouble)


def test_a_run_in_which_nobody_is_ever_there_is_refused(tmp_path):
    path = tmp_path / "stays.csv"
    path.write_text("client_id,first_round,last_round\nclient-003,6,9\n")
    with pytest.raises(ConfigError, match="no client can be asked in any of the 6 rounds"):
        troubled(TroubleConfig(trace=str(path)))


def cautions(trouble, **options):
    config = TrainingConfig(num_rounds=6, participation_rate=0.5, trouble=trouble, **options)
    return trouble_cautions(config, plan_rounds(0, config, of(20)))


def test_trouble_that_does_nothing_and_rounds_of_nobody_are_told(tmp_path):
    path = tmp_path / "stays.csv"
    path.write_text("client_id,first_round,last_round\nclient-003,0,3\n")
    assert cautions(TroubleConfig()) == ()
    assert cautions(TroubleConfig(stragglers=StragglersConfig(spread=1.0), deadline=25.0)) == ()
    (never,) = cautions(TroubleConfig(deadline=25.0))
    assert "deadline (25) is never passed: the slowest client takes 20 virtual seconds" in never
    for lot in (TroubleConfig(over_selection=1.5), TroubleConfig(wait_for=0.5)):
        assert "keep the first ones by lot" in cautions(lot)[0]
    dropping = DropoutConfig(probability=0.3)
    assert cautions(TroubleConfig(over_selection=1.5, dropout=dropping)) == ()
    empty, short = cautions(TroubleConfig(trace=str(path)))
    assert "nobody answers in 2 of 6 rounds" in empty
    assert "trace has nobody after round 3 of 6" in short
