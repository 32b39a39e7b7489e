"""Where a host keeps the committed state of its clients: in memory, or in files mapped into memory.

A row is a state tree with one client as first axis. Clients that never took part have no row and
cost nothing. A row does not stay a part of the stack that it was computed in: one client that is
not asked again would keep the rows of all the others alive.

The files of :class:`DiskStates` have no name once they are open: they are this process's alone and
go with it, however it ends. A checkpoint is what a run goes on from, never these files.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selffl_ray import trees
from selffl_ray.errors import RunError
from selffl_ray.messages import StateRows


class States(Protocol):
    """State rows by client index."""

    def __contains__(self, index: int) -> bool:
        """Whether the client has a row."""
        ...

    def __getitem__(self, index: int) -> Any:
        """The client's row; it has one."""
        ...

    def get(self, index: int, first: Any) -> Any:
        """The client's row, or ``first`` if it has none."""
        if index not in self:
            return first
        return self[index]

    def put(self, index: int, row: Any) -> None:
        """Replace the client's row by this one, in storage of its own."""
        ...

    def admit(self, index: Iterable[int]) -> None:
        """Have room for clients that move here."""
        ...

    def remove(self, index: int) -> None:
        """Let go of a client that moves away, and of its row if it has one."""
        ...

    def indices(self) -> list[int]:
        """Clients that have a row, ascending."""
        ...


class MemoryStates(States):
    """Rows in memory, on the device that they were computed on."""

    def __init__(self) -> None:
        self._rows: dict[int, Any] = {}

    def __contains__(self, index: int) -> bool:
        """Whether the client has a row."""
        return index in self._rows

    def __getitem__(self, index: int) -> Any:
        """The client's row."""
        return self._rows[index]

    def put(self, index: int, row: Any) -> None:
        """Replace the client's row by this one, in storage of its own."""
        self._rows[index] = trees.map_tree(_own, row)

    def admit(self, index: Iterable[int]) -> None:
        """There is always room."""

    def remove(self, index: int) -> None:
        """Let go of a client that moves away, and of its row if it has one."""
        self._rows.pop(index, None)

    def indices(self) -> list[int]:
        """Clients that have a row, ascending."""
        return sorted(self._rows)


def _own(leaf: Tensor) -> Tensor:
    """The leaf, in storage of its own."""
    whole = leaf.untyped_storage().nbytes() == leaf.nbytes
    return leaf if whole else leaf.clone()


class _Leaf(NamedTuple):
    """A file with a place for a row of each client, and what a row is."""

    file: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    mapped: npt.NDArray[Any] | None


class DiskStates(States):
    """Rows in one sparse file a leaf: a place of fixed size for each client of the host.

    Places that were never written take no room on the disk.

    Args:
        folder: where the files lie; made if it is not there.
        clients: indices of the host's clients.
        device: where rows are wanted.
    """

    def __init__(self, folder: Path, clients: Sequence[int], device: torch.device) -> None:
        self._folder = folder
        self._place = {index: place for place, index in enumerate(sorted(clients))}
        self._num_places = len(self._place)
        self._left: list[int] = []
        self._device = device
        self._present: set[int] = set()
        self._like: Any = None
        self._leaves: list[_Leaf] = []

    def __contains__(self, index: int) -> bool:
        """Whether the client has a row."""
        return index in self._present

    def __getitem__(self, index: int) -> Any:
        """The client's row, read from the files."""
        assert index in self._present, "a client with a row"
        place = self._place[index]
        found = iter([self._read(leaf, place) for leaf in self._leaves])
        return trees.map_tree(lambda _: next(found), self._like)

    def put(self, index: int, row: Any) -> None:
        """Write the client's row.

        Raises:
            RunError: it cannot be written, usually because the disk is full.
        """
        arrays = [leaf.detach().cpu().numpy() for _, leaf in trees.leaves(row)]
        try:
            if not self._leaves:
                self._like = trees.map_tree(lambda leaf: None, row)
                self._leaves = [self._open(array) for array in arrays]
            for leaf, array in zip(self._leaves, arrays, strict=True):
                _write(leaf, self._place[index], array)
        except OSError as error:
            raise self._unwritable(error) from error
        self._present.add(index)

    def admit(self, index: Iterable[int]) -> None:
        """Have a place for clients that move here: one that another has left, or a new one.

        Raises:
            RunError: the files cannot be made longer.
        """
        # Whoever was to come before and did not has its place.
        for client in [i for i in index if i not in self._place]:
            if self._left:
                self._place[client] = self._left.pop()
            else:
                self._place[client] = self._num_places
                self._num_places += 1
        try:
            self._leaves = [self._as_long_as_needed(leaf) for leaf in self._leaves]
        except OSError as error:
            raise self._unwritable(error) from error

    def remove(self, index: int) -> None:
        """Let go of a client that moves away; its place is the next one's that comes."""
        self._left.append(self._place.pop(index))
        self._present.discard(index)

    def indices(self) -> list[int]:
        """Clients that have a row, ascending."""
        return sorted(self._present)

    def _open(self, row: npt.NDArray[Any]) -> _Leaf:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Unlike a mapping, a file that is written to can say that the disk is full.
        file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, file.close)
        return self._as_long_as_needed(_Leaf(file, row.shape, row.dtype, None))

    def _as_long_as_needed(self, leaf: _Leaf) -> _Leaf:
        """The leaf with a place for every client, mapped."""
        shape = (self._num_places, *leaf.shape[1:])
        size = math.prod(shape) * leaf.dtype.itemsize
        if not size or (leaf.mapped is not None and leaf.mapped.shape == shape):
            return leaf
        leaf.file.truncate(size)
        return leaf._replace(mapped=np.memmap(leaf.file, leaf.dtype, "r", 0, shape))

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"placement.state_store: disk cannot write to {self._folder}: {error}; make room "
            "there, or use memory"
        )

    def _read(self, leaf: _Leaf, place: int) -> Tensor:
        if leaf.mapped is None:
            return torch.from_numpy(np.empty(leaf.shape, leaf.dtype)).to(self._device)
        return torch.from_numpy(np.array(leaf.mapped[place : place + 1])).to(self._device)


def open_states(folder: str | None, clients: Iterable[int], device: torch.device) -> States:
    """No state yet, to be kept in the folder or (None) in memory."""
    if folder is None:
        return MemoryStates()
    return DiskStates(Path(folder), list(clients), device)


def _write(leaf: _Leaf, place: int, row: npt.NDArray[Any]) -> None:
    assert (row.shape, row.dtype) == (leaf.shape, leaf.dtype), "all rows of a run are alike"
    data = np.ascontiguousarray(row).reshape(-1).view(np.uint8).data
    at = place * len(data)
    while len(data):
        written = os.pwrite(leaf.file.fileno(), data, at)
        data, at = data[written:], at + written


def saved_rows(states: States, index: Sequence[int]) -> StateRows | None:
    """Rows of clients that have one, as they travel; None of nobody."""
    if not index:
        return None
    rows = trees.concatenate([states[i] for i in index])
    return StateRows(np.asarray(index, np.int64), trees.to_arrays(rows))


def put_rows(states: States, rows: StateRows, device: torch.device) -> None:
    """Replace the rows of these clients."""
    tensors = trees.to_tensors(rows.state, device)
    for at, index in enumerate(rows.client_index.tolist()):
        states.put(index, trees.take_rows(tensors, slice(at, at + 1)))


def rows_at(rows: StateRows, here: npt.NDArray[np.bool_]) -> StateRows | None:
    """The rows of some clients.

    Args:
        here: whether a client's is wanted, by client index.
    """
    keep = np.flatnonzero(here[rows.client_index])
    if not len(keep):
        return None
    return StateRows(rows.client_index[keep], trees.map_tree(lambda leaf: leaf[keep], rows.state))


def joined_rows(parts: Sequence[StateRows]) -> StateRows | None:
    """All rows; None of nobody."""
    if not parts:
        return None
    index = np.concatenate([p.client_index for p in parts])
    state = trees.map_tree(lambda *leaf: np.concatenate(leaf), *(p.state for p in parts))
    return StateRows(index, state)
