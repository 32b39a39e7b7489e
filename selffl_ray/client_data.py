"""The examples of a host's clients, read from the store once and kept as tensors.

Clients may leave and others come. What leaves stays where it lies until its room is needed: moving
a few clients must not copy the examples of all.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selffl_ray.datasets.base import Dataset
from selffl_ray.datasets.splits import ClientRows
from selffl_ray.datasets.store import Store, prepare
from selffl_ray.errors import DataError
from selffl_ray.messages import DataSpec, Split
from selffl_ray.registry import datasets
from selffl_ray.training import Rows, TrainingConfig

SLACK = 1.25
"""Room over what a split's examples need: on processors memory that is not written to is free."""


class _Examples:
    """Examples of one split, a client after the other.

    Args:
        x, y: no examples, of the shapes and types that there would be.
        device: where the examples are kept.
    """

    def __init__(self, x: Tensor, y: Tensor, device: torch.device) -> None:
        self.x, self.y = x, y
        # Index, start and number of each client, (M, 3), and the same of those that came since:
        # tuples in a dict would be a third of what a client costs that is never asked.
        self._table = np.empty((0, 3), np.int64)
        self._arrived = array("q")
        self._used = 0
        self._device = device

    def add(self, index: int, x: npt.NDArray[Any], y: npt.NDArray[Any], more: int) -> None:
        """A client's examples, behind all others.

        Args:
            more: examples that are to come from here on, these among them.
        """
        if self._used + len(x) > len(self.x):
            self._make_room(x, y, more)
        place = slice(self._used, self._used + len(x))
        self.x[place] = torch.from_numpy(x)
        self.y[place] = torch.from_numpy(y)
        self._lie(index, len(x))

    def add_none(self, index: int) -> None:
        """A client without examples."""
        self._lie(index, 0)

    def remove(self, index: list[int]) -> None:
        """Let clients go; their examples stay until there is no room for others."""
        table = self._all()
        self._table = table[~np.isin(table[:, 0], index)]

    def _lie(self, index: int, num: int) -> None:
        self._arrived.extend((index, self._used, num))
        self._used += num

    def _all(self) -> npt.NDArray[np.int64]:
        """The table of all clients; nobody has arrived since."""
        arrived = np.array(self._arrived, np.int64).reshape(-1, 3)
        self._table, self._arrived = np.concatenate([self._table, arrived]), array("q")
        return self._table

    def _make_room(self, x: npt.NDArray[Any], y: npt.NDArray[Any], more: int) -> None:
        """Other tensors with what is still wanted, and room."""
        old_x, old_y, table = self.x, self.y, self._all()
        slack = SLACK if self._device.type == "cpu" else 1.0
        room = math.ceil((int(table[:, 2].sum()) + more) * slack)
        self.x, self.y = self._empty(room, x), self._empty(room, y)
        self._table, self._used = table[:0], 0
        for index, start, num in table.tolist():
            old, new = slice(start, start + num), slice(self._used, self._used + num)
            self.x[new], self.y[new] = old_x[old], old_y[old]
            self._lie(index, num)

    def _empty(self, room: int, like: npt.NDArray[Any]) -> Tensor:
        # NumPy's, as torch may fill what it makes, and then all of it is taken from the machine.
        return torch.from_numpy(np.empty((room, *like.shape[1:]), like.dtype)).to(self._device)

    def rows(self) -> Rows:
        """The examples of all clients, ascending."""
        table = self._all()
        self._table = table[np.argsort(table[:, 0])]
        # Views: a copy would be another sixteen bytes for each client and split.
        at = torch.from_numpy(self._table)
        return Rows(self.x, self.y, at[:, 1], at[:, 2])


class ClientData:
    """Examples of some clients on one device.

    Args:
        spec: which store, and the digest that it must have.
        clients: rows of the store by client index.
        device: where the tensors are kept.

    Raises:
        DataError: the store on this machine holds other data than the driver's.
    """

    def __init__(
        self, spec: DataSpec, clients: Mapping[int, ClientRows], device: torch.device
    ) -> None:
        self.dataset: Dataset = datasets.make(spec.dataset)
        self._spec = spec
        self._device = device
        self.clients: dict[int, ClientRows] = {}
        store = self._open()
        # Examples of nobody yet; they have the shapes of the store's rows until there are some.
        x = torch.empty((0, *store.manifest.x_shape), device=device)
        y = torch.empty((0, *store.manifest.y_shape), dtype=torch.int64, device=device)
        self._examples = {split: _Examples(x, y, device) for split in ("train", "val", "test")}
        self._take_in(store, clients)

    def _open(self) -> Store:
        options = datasets.options(self._spec.dataset)
        spec = self._spec
        store = prepare(self.dataset, options, spec.source, spec.seed, Path(spec.root))
        if store.manifest.digest != spec.digest:
            raise DataError(
                f"{store.folder} holds other data than the driver's (digest "
                f"{store.manifest.digest[:12]} instead of {spec.digest[:12]}); put the same source "
                "files on every node"
            )
        return store

    def admit(self, clients: Mapping[int, ClientRows]) -> None:
        """Read the examples of clients that come.

        Raises:
            DataError: the store on this machine holds other data than the driver's.
        """
        self._take_in(self._open(), clients)

    def release(self, index: Iterable[int]) -> None:
        """Let clients go."""
        gone = list(index)
        for i in gone:
            del self.clients[i]
        for examples in self._examples.values():
            examples.remove(gone)
        self._number()

    def _take_in(self, store: Store, clients: Mapping[int, ClientRows]) -> None:
        for split, examples in self._examples.items():
            wanted = {i: getattr(c, split) for i, c in sorted(clients.items())}
            more = sum(map(len, wanted.values()))
            for i, rows in wanted.items():
                if len(rows):
                    examples.add(i, *self._read(store, rows, clients[i].quarter_turns), more)
                    more -= len(rows)
                else:
                    examples.add_none(i)
        self.clients = dict(sorted((self.clients | dict(clients)).items()))
        self._number()

    def _number(self) -> None:
        self.place = {index: place for place, index in enumerate(self.clients)}
        self._rows = {split: own.rows() for split, own in self._examples.items()}

    def _read(
        self, store: Store, rows: npt.NDArray[np.int64], quarter_turns: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        x, y = store.read(rows)
        if quarter_turns:
            x = np.rot90(x, quarter_turns, axes=(-2, -1))
        return np.ascontiguousarray(self.dataset.features(x)), y

    @property
    def num_bytes(self) -> int:
        """Bytes of the examples of all clients."""
        return sum(
            int(rows.num_C.sum()) * (rows.x[:1].nbytes + rows.y[:1].nbytes)
            for rows in self._rows.values()
        )

    def places(self, members: Sequence[int]) -> list[int]:
        """Places of clients, by index, within the rows of a split."""
        return [self.place[i] for i in members]

    def rows(self, dtype: torch.dtype) -> dict[Split, Rows]:
        """Examples by split; real-valued targets in the model's dtype."""
        return {
            split: rows._replace(y=rows.y.to(dtype)) if rows.y.is_floating_point() else rows
            for split, rows in self._rows.items()
        }

    def stacks(self, index: Iterable[int], training: TrainingConfig, size: int) -> list[list[int]]:
        """Clients in stacks of at most ``size``: one batch length each, most steps first.

        Rows that have finished then come last, and the rest of a stack is a slice.
        """
        asked = np.fromiter(index, np.int64)
        num = self._rows["train"].num_C.numpy()[self.places(asked.tolist())]
        # Of each size once, in arrays: a key for each of many thousand clients would be more than
        # what the host keeps of one.
        sizes, which = np.unique(num, return_inverse=True)
        lengths = np.array([training.batch_length(int(n)) for n in sizes], np.int64)[which]
        steps = np.array([training.steps(int(n)) for n in sizes], np.int64)[which]
        order = np.lexsort((asked, -steps, lengths))
        stacks: list[list[int]] = []
        length_before = None
        for length, i in zip(lengths[order].tolist(), asked[order].tolist(), strict=True):
            if length != length_before or len(stacks[-1]) == size:
                stacks.append([])
            stacks[-1].append(i)
            length_before = length
        return stacks
