"""What the clients of a host produced in a round, until the driver names those that it accepts.

Kept as it came out of training, a stack at a time: picking each client's rows out of it when they
are wanted costs less than keeping a tree of its own for everybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from selffl_ray import trees
from selffl_ray.algorithms.base import Local


class _Row(NamedTuple):
    """A client's row of the update of its stack."""

    stack: Local
    row: int


class Told(NamedTuple):
    """What an answer says of some clients' updates, a row each: reports (None of nobody)."""

    report: Any
    loss_C: Any
    gradients_C: Any


class Staged:
    """Updates of one round by client index."""

    def __init__(self) -> None:
        self._round = -1
        self._rows: dict[int, _Row] = {}

    def __iter__(self) -> Iterator[int]:
        """Clients whose update is here, in the order in which they came."""
        return iter(self._rows)

    def __contains__(self, index: int) -> bool:
        """Whether the client's update is here."""
        return index in self._rows

    def begin(self, round_index: int) -> None:
        """Forget what is of another round."""
        if round_index != self._round:
            self._round, self._rows = round_index, {}

    def has(self, index: int, round_index: int) -> bool:
        """Whether the client's update of that round is here."""
        return round_index == self._round and index in self._rows

    def put(self, members: Sequence[int], local: Local) -> None:
        """Stage the update of a stack, a row for each of its clients."""
        for row, index in enumerate(members):
            self._rows[index] = _Row(local, row)

    def local(self, index: int) -> Local:
        """All of a client's update, one row."""
        local: Local = self._own(index, self._rows[index].stack)
        return local

    def state(self, index: int) -> Any:
        """A client's new state, one row."""
        return self._own(index, self._rows[index].stack.state)

    def payload(self, index: int) -> Any:
        """A client's payload, one row."""
        return self._own(index, self._rows[index].stack.payload)

    def told(self, index: Sequence[int]) -> Told:
        """What the answer says of these clients, in their order."""
        if not index:
            return Told(None, np.empty(0), np.empty(0, np.int64))
        found = [self._rows[i] for i in index]
        stacks = {id(one.stack): one.stack for one in found}
        told = {key: Told(s.report, s.loss_C, s.gradients_C) for key, s in stacks.items()}
        picked = trees.pick_rows([(told[id(one.stack)], one.row) for one in found])
        report, loss_C, gradients_C = trees.to_arrays(picked)
        return Told(report, loss_C.astype(np.float64), gradients_C.astype(np.int64))

    def _own(self, index: int, part: Any) -> Any:
        row = self._rows[index].row
        return trees.take_rows(part, slice(row, row + 1))
