"""A prepared experiment as the file that the plain loop and the peers read."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.peers.peer_workload import Workload
from selffl_ray.experiment import Prepared


def workload_of(prepared: Prepared) -> Workload:
    """The same examples, clients, cohorts, start and training options.

    Dense weights are stored (inputs, outputs) here and (outputs, inputs) in torch.
    """
    x, y = [], []
    for client in prepared.clients:
        found = prepared.store.read(client.train)
        x.append(prepared.dataset.features(found.x))
        y.append(found.y)
    num_M = np.asarray([len(part) for part in y], np.int64)
    training = prepared.config.training
    start_P = torch.from_numpy(np.array(prepared.run_spec.start_params))
    return Workload(
        x=np.concatenate(x),
        y=np.concatenate(y),
        start_M=np.concatenate([[0], np.cumsum(num_M)[:-1]]),
        num_M=num_M,
        cohort_RK=np.stack([plan.cohort for plan in prepared.plans]),
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        weights=torch_layout(prepared.model.spec.named(start_P)),
    )


def torch_layout(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Parameters by name with dense weights as torch stores them."""
    turned = {name: (p.T if p.dim() == 2 else p) for name, p in named.items()}
    return {name: np.ascontiguousarray(p.numpy()) for name, p in turned.items()}
