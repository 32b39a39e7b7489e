"""L1: what anybody would write first. One model, one thread, one client after the other.

python -m benchmarks.plain_loop WORKLOAD.npz
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.peers.peer_workload import (
    Workload,
    arguments,
    build_model,
    keep_quiet,
    read,
    report,
    train_epoch,
)


class PlainLoop:
    """Federated averaging in a plain loop over the clients of a workload."""

    def __init__(self, work: Workload, device: torch.device | None = None) -> None:
        self._work = work
        self._model = build_model(work.weights).to(device)
        self._params = [p.data for p in self._model.parameters()]
        self._global = [p.clone() for p in self._params]
        examples = (work.examples(client) for client in range(len(work.num_M)))
        self._data = [(x.to(device), y.to(device)) for x, y in examples]
        self._rng = np.random.default_rng(0)

    def rounds(self) -> list[float]:
        """Seconds of each round."""
        return [self._round(cohort.tolist()) for cohort in self._work.cohort_RK]

    def weights(self) -> dict[str, np.ndarray]:
        """The global model by name."""
        names = (name for name, _ in self._model.named_parameters())
        return {name: p.cpu().numpy() for name, p in zip(names, self._global, strict=True)}

    def _round(self, cohort: list[int]) -> float:
        began = time.perf_counter()
        num_M = self._work.num_M
        total = int(num_M[cohort].sum())
        sums = [torch.zeros_like(p) for p in self._global]
        for client in cohort:
            for mine, shared in zip(self._params, self._global, strict=True):
                mine.copy_(shared)
            train_epoch(self._model, self._data[client], self._work, self._rng)
            for total_p, mine in zip(sums, self._params, strict=True):
                total_p.add_(mine, alpha=int(num_M[client]) / total)
        self._global = sums
        # A device may be at work still: wait for what a server would send.
        float(sums[-1].sum())
        return time.perf_counter() - began


def main() -> None:
    """Command line."""
    options = arguments(__doc__)
    keep_quiet()
    loop = PlainLoop(read(options.workload))
    report(loop.rounds(), (), loop.weights(), options.params)


if __name__ == "__main__":
    main()
