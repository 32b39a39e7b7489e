"""Clients that move between hosts take examples and state along; no bit of a run depends on it."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.scale_memory import federation
from selffl_ray import pool as pool_module
from selffl_ray import rebalancer as rebalancer_module
from selffl_ray.balance import WINDOW
from selffl_ray.client_data import ClientData
from selffl_ray.driver import run_rounds
from selffl_ray.experiment import prepare_experiment
from selffl_ray.pool import LocalTransport
from selffl_ray.rebalancer import Rebalancer
from selffl_ray.registry import algorithms
from selffl_ray.seeding import generator
from tests.contract.harness import DIGITS, as_allowed, loop, open_pool, prepared_as_allowed, start
from tests.runtime.placements import different, local_pool, outcome, prepared_with

CPU = torch.device("cpu")
NEW = "evaluation.new_clients=0.2"


class Restless(Rebalancer):
    """Moves clients drawn at random before every round, whatever was measured."""

    def move(self, plan, rounds_left):
        rng = generator(5, "moves", plan.round_index)
        homes = self._pool.homes
        index = np.flatnonzero(rng.random(len(homes)) < 0.4)
        self._pool.move(index, rng.integers(self._pool.transport.num_hosts, size=len(index)))
        self.num_moved += len(index)


def restless(prepared, pool):
    """An outcome with clients that move before every round."""
    rounds = []

    def with_moves(run, server):
        mover = Restless(pool, prepared.federation, 0, rounds.append)
        yield from run_rounds(dataclasses.replace(run, rebalancer=mover), server)
        rounds.append(mover.num_moved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.runtime.placements.run_rounds", with_moves)
        found = outcome(prepared, pool)
    assert rounds[-1] > len(prepared.plans), "they did move"
    return found


@pytest.mark.parametrize("method", sorted(algorithms.names()))
def test_moves_before_every_round_leave_the_bits_of_every_method(method):
    chosen = as_allowed(method, (*DIGITS, NEW))
    prepared = prepared_with(*chosen, f"method={method}")
    reference = outcome(prepared, local_pool(14, 1))
    assert different(reference, restless(prepared, local_pool(14, 3))) == []


@pytest.mark.parametrize("method", ["selffl", "ditto", "scaffold"])
def test_states_on_disk_move_too(method, tmp_path):
    prepared = prepared_with(*as_allowed(method, DIGITS), f"method={method}")
    reference = outcome(prepared, local_pool(14, 1))
    spec = dataclasses.replace(prepared.run_spec, state_folder=str(tmp_path))
    found = restless(dataclasses.replace(prepared, run_spec=spec), local_pool(14, 3))
    assert different(reference, found) == []


def test_a_checkpoint_after_a_move_has_what_changed_since_the_last_one():
    prepared = prepared_as_allowed("ditto", (*DIGITS, "training.participation_rate=1"))
    pool = open_pool(prepared, 2)
    records = run_rounds(loop(prepared, pool), start(prepared))
    next(records)
    pool.export_states(changed_only=True)
    next(records)
    before = by_client(pool.export_states(changed_only=False))
    next(records)
    # Not yet told to the hosts: the move has to.
    pool.move(np.arange(14), 1 - pool.homes)
    changed = by_client(pool.export_states(changed_only=True))
    assert set(changed) == set(range(14))
    assert all(changed[i] != before[i] for i in changed)
    assert pool.export_states(changed_only=True) == []


def by_client(exported):
    """The first leaf of every client's state, as bytes."""
    found = {}
    for rows in exported:
        found |= zip(rows.client_index.tolist(), map(bytes, rows.state[0]), strict=True)
    return found


@pytest.fixture(scope="module")
def prepared():
    return prepared_with("data.partition.sizes={min: 20, max: 110}", NEW)


MOVES = st.lists(st.sets(st.integers(0, 13), max_size=6), max_size=6)


@given(moves=MOVES, first=st.sets(st.integers(0, 13)))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_examples_are_those_of_whoever_is_here_after_any_moves(prepared, moves, first):
    clients = dict(enumerate(prepared.clients))
    data = ClientData(prepared.data_spec, {i: clients[i] for i in first}, CPU)
    here = set(first)
    for some in moves:
        data.release(some & here)
        data.admit({i: clients[i] for i in some - here})
        here ^= some
    fresh = ClientData(prepared.data_spec, {i: clients[i] for i in here}, CPU)
    assert list(data.clients) == list(fresh.clients) == sorted(here)
    assert data.num_bytes == fresh.num_bytes
    for split, rows in fresh.rows(torch.float32).items():
        ours = data.rows(torch.float32)[split]
        assert ours.num_C.tolist() == rows.num_C.tolist()
        for place, num in enumerate(rows.num_C.tolist()):
            at = torch.arange(num)[None]
            for mine, right in zip(
                ours.select([place]).take(at), rows.select([place]).take(at), strict=True
            ):
                assert torch.equal(mine, right)


def test_a_client_takes_little_beside_its_examples():
    """Two dicts and 72 bytes of where its examples lie: a million clients are never asked."""
    prepared = prepare_experiment(federation(2000))
    clients = dict(enumerate(prepared.clients))
    ClientData(prepared.data_spec, {0: clients[0]}, CPU)
    tracemalloc.start()
    try:
        data = ClientData(prepared.data_spec, clients, CPU)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    examples = sum(own.x.nbytes + own.y.nbytes for own in data._examples.values())
    assert (held - examples) / len(clients) < 300


def test_a_client_that_comes_and_goes_does_not_make_its_host_grow(prepared):
    clients = dict(enumerate(prepared.clients))
    data = ClientData(prepared.data_spec, dict(list(clients.items())[:7]), CPU)
    at_first = sum(examples.x.nbytes for examples in data._examples.values())
    for _ in range(50):
        data.admit({9: clients[9]})
        data.release([9])
    assert sum(examples.x.nbytes for examples in data._examples.values()) < 2 * at_first


def test_who_comes_does_not_have_the_others_copied(prepared):
    clients = dict(enumerate(prepared.clients))
    data = ClientData(prepared.data_spec, dict(list(clients.items())[:8]), CPU)
    before = data._examples["train"].x.data_ptr()
    data.admit({9: clients[9]})
    assert data._examples["train"].x.data_ptr() == before


@pytest.mark.parametrize(("num_hosts", "can"), [(1, False), (2, True), (13, True), (14, False)])
def test_clients_with_an_actor_each_and_those_of_one_host_stay(num_hosts, can):
    assert local_pool(14, num_hosts).movable == can


# -- when a move pays ------------------------------------------------------------------------------


class Slow(LocalTransport):
    """Host 1 takes four times as long by its own account, from round ``turns_at`` on host 0.

    Seconds that are long against anything that a test's machine does beside.
    """

    turns_at = 1000

    def call(self, method, arguments, shared=None):
        answers = super().call(method, arguments, shared)
        for host, answer in answers.items() if method == "local_update" else ():
            request = arguments[host][1]
            slow = int(request.plan.round_index < self.turns_at)
            each = 4.0 if host == slow else 1.0
            answers[host] = answer._replace(seconds=each * len(request.client_index))
        return answers


def rounds_with_a_slow_host(monkeypatch, *more):
    monkeypatch.setattr(pool_module, "LocalTransport", Slow)
    monkeypatch.setattr("tests.contract.harness.LocalTransport", Slow)
    chosen = (
        f"training.num_rounds={2 * WINDOW + 2}",
        "evaluation.every=100",
        "method=fedavg",
        *more,
    )
    prepared = prepared_with(*chosen)
    pool = open_pool(prepared, 2)
    texts = []
    mover = Rebalancer(pool, prepared.federation, 0, texts.append)
    run = dataclasses.replace(loop(prepared, pool), rebalancer=mover)
    counts = [np.bincount(pool.homes).tolist() for _ in run_rounds(run, start(prepared))]
    return counts, texts, mover


def test_clients_leave_a_host_that_measures_slow_after_a_window_of_rounds(monkeypatch):
    counts, texts, mover = rounds_with_a_slow_host(monkeypatch)
    # A fifth of the work would be in proportion, but half of an equal share stays.
    assert counts == [[7, 7]] * WINDOW + [[10, 4]] * (WINDOW + 2)
    assert mover.num_moved == 3
    assert len(texts) == 1
    assert texts[0].startswith(
        f"round {WINDOW}: 3 clients moved to hosts that are faster (to save "
    )
    assert "placement.rebalance" in texts[0]


def test_states_of_many_clients_move_some_at_a_time(monkeypatch):
    monkeypatch.setattr(rebalancer_module, "AT_ONCE_BYTES", 2000)
    prepared = prepared_with("method=ditto")
    pool = open_pool(prepared, 2)
    mover = Rebalancer(pool, prepared.federation, 600, print)
    calls, move = [], pool.move
    monkeypatch.setattr(pool, "move", lambda *some: calls.append(len(some[0])) or move(*some))
    to = 1 - pool.homes
    mover._do(np.arange(14), to)
    assert calls == [3, 3, 3, 3, 2]
    assert pool.homes.tolist() == to.tolist()
    assert mover.num_moved == 14


def test_after_a_move_a_window_of_rounds_with_the_new_homes_comes_first(monkeypatch):
    monkeypatch.setattr(Slow, "turns_at", WINDOW)
    counts, texts, mover = rounds_with_a_slow_host(monkeypatch)
    assert counts == [[7, 7]] * WINDOW + [[10, 4]] * WINDOW + [[4, 10]] * 2
    assert mover.num_moved == 3 + 6
    assert len(texts) == 1, "later moves are not told"


DIVERGING = (
    "plugins=[tests.runtime.misbehaving]",
    "method={name: misbehaving, diverging: [form-00]}",
)


def test_rounds_in_which_clients_failed_say_nothing(monkeypatch):
    counts, texts, _ = rounds_with_a_slow_host(monkeypatch, *DIVERGING)
    assert counts == [[7, 7]] * len(counts)
    assert texts == []


def test_a_move_that_costs_more_than_the_rounds_to_come_save_is_not_made(monkeypatch):
    load = pool_module.ClientPool.load

    def dear(self, *arguments):
        load(self, *arguments)
        self.load_s = 1e6

    monkeypatch.setattr(pool_module.ClientPool, "load", dear)
    counts, texts, _ = rounds_with_a_slow_host(monkeypatch)
    assert counts == [[7, 7]] * len(counts)
    assert texts == []
