"""State on disk is the same state: same rows, same bits of a run, nothing left behind."""

from __future__ import annotations

import dataclasses
import errno
import os
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selffl_ray import run_experiment, trees
from selffl_ray.algorithms.base import Empty
from selffl_ray.config import load_config
from selffl_ray.errors import RunError
from selffl_ray.states import DiskStates, MemoryStates
from tests.contract.harness import as_allowed
from tests.runtime.placements import different, local_pool, outcome, prepared_with
from tests.test_digests_local import DIGITS, PROBING

CPU = torch.device("cpu")
CLIENTS = (3, 4, 8, 11)
KEEPING = ("selffl", "ditto", "apfl", "pfedme", "local", "fedper", "scaffold")
"""Methods whose clients keep something between rounds."""


class Row(NamedTuple):
    params_CP: Tensor
    count_C: Tensor
    empty_C0: Tensor


def row_of(number: int) -> Row:
    rng = np.random.default_rng(number)
    params = torch.from_numpy(rng.normal(size=(1, 5)).astype(np.float32))
    return Row(params, torch.tensor([number]), params[:, :0])


def same(one: Row, other: Row) -> bool:
    pairs = list(zip(trees.leaves(one), trees.leaves(other), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_a_row_of_another_type_is_not_written_over_its_neighbours(tmp_path):
    disk = DiskStates(tmp_path, CLIENTS, CPU)
    disk.put(CLIENTS[0], row_of(1))
    kept = disk[CLIENTS[0]]
    wide = row_of(2)._replace(params_CP=row_of(2).params_CP.double())
    with pytest.raises(AssertionError, match="all rows of a run are alike"):
        disk.put(CLIENTS[1], wide)
    assert same(disk[CLIENTS[0]], kept)


PUTS = st.lists(st.tuples(st.sampled_from(CLIENTS), st.integers(0, 99)), max_size=20)


@given(puts=PUTS)
@settings(max_examples=40, deadline=None)
def test_both_kinds_hold_the_newest_row_of_each_client_and_no_other(puts, tmp_path_factory):
    disk = DiskStates(tmp_path_factory.mktemp("states"), CLIENTS, CPU)
    memory, newest = MemoryStates(), {}
    for client, number in puts:
        newest[client] = number
        disk.put(client, row_of(number))
        memory.put(client, row_of(number))
    for states in (disk, memory):
        assert states.indices() == sorted(newest)
        for client in CLIENTS:
            assert (client in states) == (client in newest)
        assert all(same(states[client], row_of(newest[client])) for client in newest)


MOVES = st.lists(
    st.tuples(st.sampled_from(["put", "remove", "admit"]), st.integers(0, 5), st.integers(0, 99)),
    max_size=30,
)


@given(moves=MOVES)
@settings(max_examples=60, deadline=None)
def test_clients_that_come_and_go_take_nobody_elses_row_along(moves, tmp_path_factory):
    disk = DiskStates(tmp_path_factory.mktemp("states"), CLIENTS[:2], CPU)
    memory = MemoryStates()
    here, newest = set(CLIENTS[:2]), {}
    for what, client, number in moves:
        if what == "admit" and client not in here:
            here.add(client)
            disk.admit([client])
            memory.admit([client])
        elif what == "remove" and client in here:
            here.remove(client)
            newest.pop(client, None)
            disk.remove(client)
            memory.remove(client)
        elif what == "put" and client in here:
            newest[client] = number
            disk.put(client, row_of(number))
            memory.put(client, row_of(number))
    for states in (disk, memory):
        assert states.indices() == sorted(newest)
        assert all(same(states[client], row_of(newest[client])) for client in newest)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_was_read_or_put_in_can_change_and_the_state_does_not(kind, tmp_path):
    states = MemoryStates() if kind == "memory" else DiskStates(tmp_path, CLIENTS, CPU)
    stack = torch.ones((4, 3))
    states.put(3, Row(stack[1:2], torch.tensor([1]), stack[1:2, :0]))
    stack.zero_()
    assert torch.equal(states[3].params_CP, torch.ones((1, 3)))


def test_a_row_does_not_keep_the_stack_alive_that_it_was_computed_in():
    states, stack = MemoryStates(), torch.zeros((20, 1000))
    states.put(3, Row(stack[4:5], torch.tensor([1]), stack[4:5, :0]))
    assert states[3].params_CP.untyped_storage().nbytes() == 4 * 1000


def test_stateless_clients_have_a_row_too(tmp_path):
    states = DiskStates(tmp_path, CLIENTS, CPU)
    states.put(4, Empty())
    assert (states.indices(), states[4]) == ([4], Empty())


def test_untouched_clients_take_no_room_and_no_file_has_a_name(tmp_path):
    count, touched = 100_000, (0, 50_000, 99_999)
    states = DiskStates(tmp_path, range(count), CPU)
    for client in touched:
        states.put(client, Row(torch.ones((1, 10_000)), torch.tensor([1]), torch.ones((1, 0))))
    held = [os.fstat(leaf.file.fileno()) for leaf in states._leaves]
    assert sum(s.st_size for s in held) > count * 40_000
    assert sum(s.st_blocks * 512 for s in held) < 10 * len(touched) * 40_000
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    states = DiskStates(tmp_path, CLIENTS, CPU)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match=r"placement\.state_store: disk .*No space.*use memory"):
        states.put(3, row_of(1))
    assert 3 not in states


@pytest.mark.parametrize("method", KEEPING)
def test_a_run_has_the_same_bits_with_state_on_disk(method, tmp_path):
    prepared = prepared_with(*as_allowed(method, DIGITS), f"method={method}")
    assert len(prepared.clients) == 14
    reference = outcome(prepared, local_pool(14, 2))
    spec = dataclasses.replace(prepared.run_spec, state_folder=str(tmp_path))
    pool = local_pool(14, 3)
    found = outcome(dataclasses.replace(prepared, run_spec=spec), pool)
    assert different(reference, found) == []
    kept = [states for host in pool.transport._hosts if (states := host._states)._present]
    assert all(isinstance(states, DiskStates) for states in kept)
    assert kept, "the state was there indeed"


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path):
    stores, folders = ("memory", "disk"), []
    for store in stores:
        config = load_config(
            None,
            (
                *DIGITS,
                *PROBING,
                "training.num_rounds=4",
                "placement.backend=local",
                f"placement.state_store={store}",
                "tracking.enabled=false",
                "checkpoint.every=2",
            ),
        )
        folder = tmp_path / store
        folders.append(folder)
        run_experiment(config, output=folder)
        before = sorted(p.name for p in folder.iterdir())
        # As if it had been stopped after its second round.
        for late in (folder / "checkpoints").glob("round_3"):
            for file in late.iterdir():
                file.unlink()
            late.rmdir()
        (folder / "summary.json").unlink()
        run_experiment(config, resume=folder)
        assert sorted(p.name for p in folder.iterdir()) == before
    found = [run.joinpath("rounds.parquet") for run in folders]
    digests = [pd.read_parquet(path)["digest"].tolist() for path in found]
    assert len(set(digests[0])) == 4
    assert digests[0] == digests[1]
