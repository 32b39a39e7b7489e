"""pfl-research on a workload, in two processes.

    python benchmarks/peers/pfl_peer.py WORKLOAD.npz

What an experienced user would write: tensors in memory, users dealt out by size, one flat
all-reduce a round, no evaluation. Its data sets are cut into batches once, in the order of the
examples: it never shuffles, which is a little less work than the others do.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peer_workload import Workload, arguments, build_model, keep_quiet, read, report
from torch import Tensor, nn

RANK, ADDRESSES = "PFL_WORKER_RANK", "PFL_WORKER_ADDRESSES"
PROCESSES = 2
END_S = 60.0
"""Longest wait for the second process to end after the first."""


class Classifier(nn.Module):
    """A network with the two methods that pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """What training minimizes."""
        return F.cross_entropy(self.network(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """What evaluation measures; there is none."""
        raise NotImplementedError("this benchmark never evaluates")


def train(work: Workload) -> tuple[list[float], dict[str, np.ndarray]]:
    """Seconds of each round, and the final model."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Unevaluated(FederatedAveraging):
        """pfl evaluates in iteration 0 whatever its evaluation_frequency."""

        def get_next_central_contexts(self, *given: Any, **named: Any) -> Any:
            contexts, *rest = super().get_next_central_contexts(*given, **named)
            if contexts is not None:
                contexts = tuple(replace(c, do_evaluation=False) for c in contexts)
            return (contexts, *rest)

    class Clock(TrainingProcessCallback):
        """When each iteration ended."""

        def __init__(self) -> None:
            self.ticks: list[float] = []

        def on_train_begin(self, **_: Any) -> Any:
            self.ticks.append(time.perf_counter())
            return Metrics()

        def after_central_iteration(self, *_: Any, **__: Any) -> Any:
            self.ticks.append(time.perf_counter())
            return False, Metrics()

    rounds, asked = work.cohort_RK.shape
    users = [PyTorchTensorDataset(work.examples(c), user_id=str(c)) for c in range(len(work.num_M))]
    # The cohorts of the workload one after the other, then the same again.
    sampler = MinimizeReuseUserSampler(work.cohort_RK.flatten().tolist())
    sizes = {client: int(n) for client, n in enumerate(work.num_M)}
    data = FederatedDataset(users.__getitem__, sampler, user_id_to_weight=sizes)
    network = Classifier(build_model(work.weights))
    central = torch.optim.SGD(network.parameters(), lr=1.0)
    model = PyTorchModel(network, torch.optim.SGD, central)
    clock = Clock()
    Unevaluated().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=asked,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_batch_size=work.batch_size,
            local_num_epochs=1,
            local_learning_rate=work.learning_rate,
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    weights = {k: v.numpy() for k, v in network.network.state_dict().items()}
    return np.diff(clock.ticks).tolist(), weights


def second_process() -> subprocess.Popen[bytes]:
    """Start the other rank; this process becomes rank 0."""
    ports = []
    for _ in range(PROCESSES):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    os.environ[ADDRESSES] = ",".join(f"127.0.0.1:{port}" for port in ports)
    other = {**os.environ, RANK: "1"}
    os.environ[RANK] = "0"
    return subprocess.Popen([sys.executable, *sys.argv], env=other)


def main() -> None:
    """Command line."""
    options = arguments(__doc__)
    keep_quiet()
    np.random.seed(0)  # noqa: NPY002 - pfl draws from the global generator
    if RANK in os.environ:
        train(read(options.workload))
        return
    with second_process() as other:
        rounds_s, weights = train(read(options.workload))
        if other.wait(END_S) != 0:
            raise RuntimeError("the second process failed")
    report(rounds_s, ("pfl",), weights, options.params)


if __name__ == "__main__":
    main()
