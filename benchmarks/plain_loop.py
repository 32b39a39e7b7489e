"""L1: what anybody would write first. One model, one thread, one client after the other."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selffl_ray.experiment import Prepared


def modules(name: str) -> nn.Module:
    """The model of a workload in plain torch."""
    if name == "W2":
        return nn.Sequential(
            nn.Conv2d(1, 32, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))


class PlainLoop:
    """Federated averaging in a plain loop over the clients of a prepared experiment."""

    def __init__(self, name: str, prepared: Prepared) -> None:
        torch.set_num_threads(1)
        self._model = modules(name)
        self._params = [p.data for p in self._model.parameters()]
        self._global = [p.clone() for p in self._params]
        self._training = prepared.config.training
        self._plans = prepared.plans
        self._data: list[tuple[Tensor, Tensor]] = []
        for client in prepared.clients:
            found = prepared.store.read(client.train)
            x = torch.from_numpy(prepared.dataset.features(found.x))
            self._data.append((x, torch.from_numpy(found.y)))
        self._rng = np.random.default_rng(0)

    def rounds(self) -> list[float]:
        """Seconds of each round."""
        return [self._round(plan.cohort.tolist()) for plan in self._plans]

    def _round(self, cohort: list[int]) -> float:
        began = time.perf_counter()
        total = sum(len(self._data[c][1]) for c in cohort)
        sums = [torch.zeros_like(p) for p in self._global]
        for client in cohort:
            x, y = self._data[client]
            for mine, shared in zip(self._params, self._global, strict=True):
                mine.copy_(shared)
            optimizer = torch.optim.SGD(self._model.parameters(), lr=self._training.learning_rate)
            order = torch.from_numpy(self._rng.permutation(len(y)))
            for at in order.split(self._training.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(self._model(x[at]), y[at]).backward()
                optimizer.step()
            for total_p, mine in zip(sums, self._params, strict=True):
                total_p.add_(mine, alpha=len(y) / total)
        self._global = sums
        return time.perf_counter() - began
