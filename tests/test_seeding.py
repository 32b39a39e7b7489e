"""Random streams are named by what they are for, and by nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from selffl_ray.seeding import generator, stream_key, torch_seed

# Characters that a careless way of joining the parts of a name would mix up.
tricky = st.text(alphabet="|:/-01a", max_size=6)
names = st.tuples(st.integers(-3, 120), tricky, st.integers(0, 120), tricky)


def test_the_same_name_gives_the_same_numbers():
    name = (7, "batches/train", 3, "client-04")
    first = generator(*name).normal(size=100)
    np.testing.assert_array_equal(generator(*name).normal(size=100), first)
    assert torch_seed(*name) == torch_seed(*name)


def test_round_and_client_default_to_the_first_round_and_to_no_client():
    assert stream_key(5, "init") == stream_key(5, "init", 0, "")


def test_another_seed_purpose_round_or_client_gives_another_stream():
    base = (7, "batches/train", 3, "client-04")
    others = [
        (8, "batches/train", 3, "client-04"),
        (-7, "batches/train", 3, "client-04"),
        (7, "batches/readout", 3, "client-04"),
        (7, "batches/train", 4, "client-04"),
        (7, "batches/train", 3, "client-05"),
        (7, "batches/train", 3, ""),
    ]
    draws = {tuple(generator(*name).integers(2**63, size=4)) for name in [base, *others]}
    assert len(draws) == len(others) + 1
    assert len({torch_seed(*name) for name in [base, *others]}) == len(others) + 1


@settings(deadline=None, derandomize=True, max_examples=500)
@given(names, names)
def test_no_two_names_run_together(one, other):
    assume(one != other)
    assert stream_key(*one) != stream_key(*other)
    assert torch_seed(*one) != torch_seed(*other)


def test_names_that_look_alike_when_joined_are_different_streams():
    alike = [
        (1, "a|0|b", 0, ""),
        (1, "a", 0, "b"),
        (1, "a|0", 0, "b"),
        (1, "a", 0, "|0|b"),
        (11, "a", 0, "b"),
        (1, "1|a", 0, "b"),
        (1, "a", 10, "b"),
        (1, "a", 1, "0b"),
        (1, "a", 0, "1:b"),
    ]
    assert len({stream_key(*name) for name in alike}) == len(alike)


def test_a_stream_does_not_depend_on_what_was_drawn_before():
    alone = generator(1, "second").normal(size=10)
    first = generator(1, "first")
    first.normal(size=1000)
    second = generator(1, "second")
    interleaved = []
    for _ in range(10):
        first.normal()
        interleaved.append(second.normal())
    np.testing.assert_array_equal(interleaved, alone)


@pytest.mark.parametrize(
    "name", [(0, "batches/train", 3, "a"), (-1, "x"), (2**70, "splits", 9, "")]
)
def test_a_stream_is_that_of_philox_with_its_key(name):
    """The streams of every result on record; the key is given to Philox in a cheaper way."""
    by_name = np.random.Generator(np.random.Philox(key=stream_key(*name)))
    ours = generator(*name)
    assert ours.random(1000).tolist() == by_name.random(1000).tolist()
    assert ours.permutation(50).tolist() == by_name.permutation(50).tolist()


def test_no_global_state_is_read_or_changed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        here = generator(3, "init").normal(size=5)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(2)
        np.testing.assert_array_equal(generator(3, "init").normal(size=5), here)


def test_another_process_draws_the_same_numbers():
    """Python's own hash of a string differs from process to process."""
    code = (
        "from selffl_ray.seeding import generator; print(generator(3, 'p', 2, 'é').integers(2**60))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert int(found.stdout) == generator(3, "p", 2, "é").integers(2**60)


def test_draws_of_one_stream_are_uniform_and_uncorrelated():
    draws = generator(0, "uniform").random(200_000)
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / np.sqrt(len(draws))


def test_first_draws_of_neighbouring_streams_are_uniform_and_uncorrelated():
    """Rounds and clients count up by one; their streams must not."""
    by_round = np.array([generator(0, "batches", r, "c").random() for r in range(4000)])
    by_client = np.array([generator(0, "batches", 0, str(c)).random() for c in range(4000)])
    by_seed = np.array([generator(s, "batches", 0, "c").random() for s in range(4000)])
    for draws in (by_round, by_client, by_seed):
        assert stats.kstest(draws, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / np.sqrt(len(draws))
    pairs = np.corrcoef([by_round, by_client, by_seed])
    assert np.abs(pairs[np.triu_indices(3, 1)]).max() < 4 / np.sqrt(4000)


def test_torch_seeds_fill_the_range_that_torch_accepts():
    seeds = np.array([torch_seed(0, "init", r) for r in range(2000)], dtype=object)
    assert all(0 <= s < 2**63 for s in seeds)
    assert stats.kstest((seeds / 2**63).astype(float), "uniform").pvalue > 1e-3
    assert torch.Generator().manual_seed(int(max(seeds))).initial_seed() == max(seeds)
