"""The examples of a host's clients, read from the store once and kept as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from selffl_ray.datasets.base import Dataset
from selffl_ray.datasets.splits import ClientRows
from selffl_ray.datasets.store import Store, prepare
from selffl_ray.errors import DataError
from selffl_ray.messages import DataSpec, Split
from selffl_ray.registry import datasets
from selffl_ray.training import Rows, TrainingConfig


class ClientData:
    """Examples of some clients on one device, a client after the other in index order.

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
        options = datasets.options(spec.dataset)
        store = prepare(self.dataset, options, spec.source, spec.seed, Path(spec.root))
        if store.manifest.digest != spec.digest:
            raise DataError(
                f"{store.folder} holds other data than the driver's (digest "
                f"{store.manifest.digest[:12]} instead of {spec.digest[:12]}); put the same source "
                "files on every node"
            )
        self.clients = dict(sorted(clients.items()))
        self.place = {index: place for place, index in enumerate(self.clients)}
        self._device = device
        self._rows = {
            split: self._read(store, [getattr(c, split) for c in self.clients.values()])
            for split in ("train", "val", "test")
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all examples."""
        return sum(r.x.nbytes + r.y.nbytes for r in self._rows.values())

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

    def _read(self, store: Store, wanted: Sequence[npt.NDArray[np.int64]]) -> Rows:
        num = torch.tensor([len(rows) for rows in wanted], dtype=torch.int64)
        start = torch.cumsum(num, 0) - num
        x: npt.NDArray[Any] = np.empty((0, *store.manifest.x_shape), np.float32)
        y: npt.NDArray[Any] = np.empty((0, *store.manifest.y_shape), np.int64)
        for at, rows, client in zip(start.tolist(), wanted, self.clients.values(), strict=True):
            if not len(rows):
                continue
            part_x, part_y = store.read(rows)
            if client.quarter_turns:
                part_x = np.rot90(part_x, client.quarter_turns, axes=(-2, -1))
            part_x = self.dataset.features(part_x)
            if not len(x):
                # Filled client by client: joining the clients' arrays at the end would take twice
                # the memory, and much of it stays with the process.
                x = np.empty((int(num.sum()), *part_x.shape[1:]), part_x.dtype)
                y = np.empty((int(num.sum()), *part_y.shape[1:]), part_y.dtype)
            x[at : at + len(rows)], y[at : at + len(rows)] = part_x, part_y
        return Rows(
            torch.from_numpy(x).to(self._device), torch.from_numpy(y).to(self._device), start, num
        )
