"""Checkpoints: whole or not there, complete in each folder, read back bit for bit, no pickles."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selffl_ray import checkpoint, trees
from selffl_ray.checkpoint import (
    BLOCK,
    CheckpointConfig,
    Counters,
    check_checkpoint,
    copy_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    rounds_done,
    save_checkpoint,
)
from selffl_ray.errors import CheckpointError, ConfigError
from selffl_ray.messages import StateRows

RUN = "digest-of-the-run"


class Inner(NamedTuple):
    age_M: Tensor
    seen_M: Tensor


class Server(NamedTuple):
    params_P: Tensor
    inner: Inner
    nothing: Tensor


class Memory(NamedTuple):
    count_C: Tensor
    seen_C: Tensor
    empty_C0: Tensor


class State(NamedTuple):
    row_CP: Tensor
    memory: Memory


class Stateless(NamedTuple):
    """Clients that remember nothing."""


def server(seed: int = 0) -> Server:
    rng = np.random.default_rng(seed)
    return Server(
        torch.from_numpy(rng.normal(size=7).astype(np.float32)),
        Inner(torch.arange(5) + seed, torch.tensor([True, False, True])),
        torch.empty(0, dtype=torch.float64),
    )


def states(*index: int, seed: int = 0) -> StateRows:
    count = len(index)
    rng = np.random.default_rng([seed, *index])
    tree = State(
        torch.from_numpy(rng.normal(size=(count, 4))),
        Memory(
            torch.from_numpy(rng.integers(100, size=count)),
            torch.from_numpy(rng.integers(2, size=count).astype(bool)),
            torch.empty((count, 0)),
        ),
    )
    return StateRows(np.asarray(index, np.int64), trees.to_arrays(tree))


LIKE = trees.to_tensors(states(0).state)


def save(folder: Path, round_index: int, *changed: StateRows, keep: int = 2) -> Path:
    counters = Counters(round_index, 10 * round_index, RUN)
    return save_checkpoint(folder, counters, server(round_index), changed, keep)


def load(path: Path):
    return load_checkpoint(path, RUN, server(), LIKE)


def by_client(saved: list[StateRows]) -> dict[int, dict[str, np.ndarray]]:
    return {
        int(index): {name: leaf[at] for name, leaf in trees.leaves(rows.state)}
        for rows in saved
        for at, index in enumerate(rows.client_index)
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert leaf.dtype == other[name].dtype
        np.testing.assert_array_equal(leaf, other[name])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(path: Path, *wanted: StateRows) -> None:
    found, expected = by_client(load(path).states), by_client(list(wanted))
    assert found.keys() == expected.keys()
    for index in expected:
        assert_same(found[index], expected[index])


# -- round trip ---------------------------------------------------------------------------------


def test_server_counters_and_states_come_back_bit_for_bit(tmp_path):
    wanted = states(0, 3, 5)
    path = save(tmp_path / "deep" / "checkpoints", 7, wanted)
    assert path.name == "round_7"
    found = load(path)
    assert found.counters == Counters(7, 70, RUN)
    assert isinstance(found.server, Server)
    assert_same(
        dict(trees.leaves(trees.to_arrays(found.server))),
        dict(trees.leaves(trees.to_arrays(server(7)))),
    )
    assert isinstance(found.states[0].state.memory, Memory)
    assert_holds(path, wanted)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    index=st.sets(st.integers(0, 3 * BLOCK), min_size=1, max_size=30),
    others=st.sets(st.integers(0, 3 * BLOCK), max_size=10),
)
def test_any_clients_come_back_with_their_newest_rows(index, others, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    first, second = states(*sorted(index)), states(*sorted(others), seed=1)
    save(folder, 0, first)
    path = save(folder, 1, second) if others else save(folder, 1)
    expected = by_client([first]) | by_client([second] if others else [])
    found = by_client(load(path).states)
    assert found.keys() == expected.keys()
    for client in expected:
        assert_same(found[client], expected[client])
    shutil.rmtree(folder)


def test_clients_lie_in_files_of_sixty_four(tmp_path):
    wanted = [states(0, 63), states(64), states(200)]
    path = save(tmp_path, 0, *wanted)
    assert sorted(p.name for p in path.glob("clients_*")) == [
        "clients_000000.safetensors",
        "clients_000001.safetensors",
        "clients_000003.safetensors",
    ]
    assert_holds(path, *wanted)


def test_clients_without_state_and_no_clients_at_all_come_back(tmp_path):
    rows = StateRows(np.asarray([1, 70]), Stateless())
    path = save_checkpoint(tmp_path, Counters(0, 0, RUN), server(), [rows], 2)
    found = load_checkpoint(path, RUN, server(), Stateless())
    assert [rows.client_index.tolist() for rows in found.states] == [[1], [70]]
    assert load(save(tmp_path / "none", 0)).states == []


def test_rows_of_several_hosts_are_joined_by_client_index(tmp_path):
    path = save(tmp_path, 0, states(5, 9), states(2, 7))
    (block,) = load(path).states
    assert block.client_index.tolist() == [2, 5, 7, 9]
    assert_holds(path, states(5, 9), states(2, 7))


# -- only what changed --------------------------------------------------------------------------


def test_blocks_without_a_change_are_hard_links_and_each_folder_is_complete(tmp_path):
    first = states(0, 63, 64, 200)
    one = save(tmp_path, 0, first)
    two = save(tmp_path, 1, states(64, seed=1))
    same = {file.name: file.samefile(one / file.name) for file in two.glob("clients_*")}
    assert same == {
        "clients_000000.safetensors": True,
        "clients_000001.safetensors": False,
        "clients_000003.safetensors": True,
    }
    shutil.rmtree(one)
    assert by_client(load(two).states).keys() == {0, 63, 64, 200}


def test_a_change_does_not_reach_into_the_checkpoint_before(tmp_path):
    first = states(0, 1)
    one = save(tmp_path, 0, first)
    save(tmp_path, 1, states(1, seed=1))
    assert_holds(one, first)


def test_where_links_are_not_possible_files_are_copied(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError("no links on this file system")

    first = states(0, 64)
    save(tmp_path, 0, first)
    monkeypatch.setattr(os, "link", refuse)
    assert_holds(save(tmp_path, 1), first)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    for round_index in (0, 5, 9, 10, 11):
        path = save(tmp_path, round_index, states(round_index), keep=keep)
    assert names(tmp_path) == sorted(
        ["round_0", "round_5", "round_9", "round_10", "round_11"][-keep:]
    )
    assert latest_checkpoint(tmp_path) == path
    assert by_client(load(path).states).keys() == {0, 5, 9, 10, 11}


def test_without_a_folder_there_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None


# -- refused ------------------------------------------------------------------------------------


def edit(path: Path, **values: object) -> None:
    file = path / "checkpoint.json"
    head = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in head.items() if v is not None}))


def test_another_schema_is_refused_with_the_remedy(tmp_path):
    path = save(tmp_path, 0, states(0))
    edit(path, schema_version=2)
    with pytest.raises(CheckpointError, match="schema 2, this release reads 1; go on with the rel"):
        load(path)


def test_another_run_is_refused_with_the_remedy(tmp_path):
    path = save(tmp_path, 0, states(0))
    with pytest.raises(CheckpointError, match=r"belongs to another run.*resume with the run's own"):
        load_checkpoint(path, "another digest", server(), LIKE)


@pytest.mark.parametrize("key", ["schema_version", "round_index", "gradient_steps", "run_digest"])
def test_a_head_without_a_counter_is_refused(tmp_path, key):
    path = save(tmp_path, 0, states(0))
    edit(path, **{key: None})
    with pytest.raises(CheckpointError, match="delete"):
        load(path)


def test_a_server_of_another_shape_or_a_state_of_another_width_is_refused(tmp_path):
    path = save(tmp_path, 0, states(0))
    wider = server()._replace(params_P=torch.zeros(8))
    with pytest.raises(CheckpointError, match=r"params_P must have shape \(8,\), found \(7,\)"):
        load_checkpoint(path, RUN, wider, LIKE)
    like = LIKE._replace(row_CP=torch.zeros(1, 5))
    with pytest.raises(CheckpointError, match=r"row_CP must have shape \(1, 5\), found \(1, 4\)"):
        load_checkpoint(path, RUN, server(), like)


FILES = ["checkpoint.json", "server.safetensors", "clients_000000.safetensors"]


def damage_by_removal(file: Path) -> None:
    file.unlink()


def damage_by_cutting(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def damage_by_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


def damage_by_emptying(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [damage_by_removal, damage_by_cutting, damage_by_a_bit, damage_by_emptying]
)
def test_a_file_that_is_missing_or_broken_is_noticed_and_the_remedy_works(tmp_path, name, damage):
    before, path = save(tmp_path, 0, states(0)), save(tmp_path, 1, states(1))
    damage(path / name)
    for read in (load, lambda p: check_checkpoint(p, RUN)):
        with pytest.raises(CheckpointError, match="delete") as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    shutil.rmtree(path)
    assert latest_checkpoint(tmp_path) == before
    assert load(before).counters.round_index == 0


# -- crashes ------------------------------------------------------------------------------------


class CrashError(Exception):
    """The process ends here."""


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Make the n-th call of a function raise, before it does anything."""
    real, calls = getattr(owner, name), iter(range(1000))

    def failing(*args: object, **kwargs: object) -> object:
        if next(calls) == call:
            raise CrashError(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


STEPS = {
    "server": (checkpoint, "save_file", 0),
    "first block": (checkpoint, "save_file", 1),
    "second block": (checkpoint, "save_file", 2),
    "links": (os, "link", 0),
    "checksums": (checkpoint, "_sha256", 2),
    "head": (json, "dumps", 0),
    "head to disk": (Path, "write_text", 0),
    "sync": (os, "fsync", 1),
    "rename": (Path, "rename", 0),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_failure_while_writing_leaves_the_last_checkpoint_and_no_half_one(
    tmp_path, monkeypatch, step
):
    first = states(0, 64, 200)
    before = save(tmp_path, 0, first)
    with monkeypatch.context() as patch:
        fail_at(patch, *step)
        with pytest.raises(CrashError):
            save(tmp_path, 1, states(0, 64, seed=1))
    assert names(tmp_path) == ["round_0"]
    assert latest_checkpoint(tmp_path) == before
    assert_holds(before, first)
    assert_holds(save(tmp_path, 1, states(0, 64, 200, seed=2)), states(0, 64, 200, seed=2))


def test_what_a_killed_process_left_behind_is_not_taken_and_is_cleaned_up(tmp_path):
    before = save(tmp_path, 0, states(0))
    half = tmp_path / ".round_1.12345"
    shutil.copytree(before, half)
    (half / "checkpoint.json").unlink()
    assert latest_checkpoint(tmp_path) == before
    save(tmp_path, 2, states(1))
    assert names(tmp_path) == ["round_0", "round_2"]


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process may grow beyond so many bytes: writing fails like on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    yield most
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_takes_no_more_is_an_os_error_and_leaves_the_last_checkpoint(
    tmp_path, small_files
):
    before = save(tmp_path, 0, states(0))
    big = server()._replace(params_P=torch.zeros(small_files))
    with pytest.raises(OSError, match="File too large"):
        save_checkpoint(tmp_path, Counters(1, 1, RUN), big, [states(1)], 2)
    assert names(tmp_path) == ["round_0"]
    assert_holds(before, states(0))


# -- no pickles ---------------------------------------------------------------------------------


def is_plain_safetensors(content: bytes) -> bool:
    """A JSON header of numeric tensors, and exactly the bytes that it announces."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    ends = [entry["data_offsets"][1] for entry in header.values()]
    kinds = {entry["dtype"] for entry in header.values()}
    return kinds <= {"F32", "F64", "I64", "BOOL"} and 8 + length + max(ends) == len(content)


def test_a_checkpoint_is_json_and_safetensors_to_the_last_byte(tmp_path):
    path = save(tmp_path, 0, states(0, 64))
    for file in path.iterdir():
        content = file.read_bytes()
        if file.name == "checkpoint.json":
            assert set(json.loads(content)) == {
                "schema_version",
                "round_index",
                "gradient_steps",
                "run_digest",
                "files",
            }
        else:
            assert file.suffix == ".safetensors"
            assert is_plain_safetensors(content)


@pytest.mark.parametrize("name", ["every", "keep"])
def test_less_than_one_checkpoint_is_refused(name):
    with pytest.raises(ConfigError, match=f"checkpoint.{name} must be >= 1, got 0"):
        CheckpointConfig(**{name: 0})


# -- copies for another run ------------------------------------------------------------------------


def test_a_copy_holds_the_same_state_and_belongs_to_the_other_run_only(tmp_path):
    source = save(tmp_path / "one", 3, states(0, 5, 70))
    copy = copy_checkpoint(source, tmp_path / "other", "another-run")
    assert rounds_done(tmp_path / "other") == 4
    found = load_checkpoint(copy, "another-run", server(), LIKE)
    assert found.counters == Counters(3, 30, "another-run")
    whole = load(source)
    for (name, one), (_, other) in zip(
        trees.leaves(found.server), trees.leaves(whole.server), strict=True
    ):
        assert torch.equal(one, other), name
    one, other = by_client(found.states), by_client(whole.states)
    assert one.keys() == other.keys()
    for index in one:
        assert_same(one[index], other[index])
    with pytest.raises(CheckpointError, match="belongs to another run"):
        load(copy)
    # Neither is touched by what the other does.
    save(tmp_path / "one", 4, states(0, seed=9))
    assert check_checkpoint(copy, "another-run")["round_index"] == 3


def test_a_broken_checkpoint_is_not_copied(tmp_path):
    source = save(tmp_path / "one", 3, states(0))
    (source / "server.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="missing or not what was written"):
        copy_checkpoint(source, tmp_path / "other", "another-run")
    assert rounds_done(tmp_path / "other") == 0
