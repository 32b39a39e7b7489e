"""The workloads: FedAvg on the first 20,000 training images of Fashion-MNIST.

Each client trains on 80 % of its images and is evaluated on the others: 16,000 in all.

W1   20 clients of Dirichlet(0.3), MLP 784-100-10, 1 epoch of batch 32, everybody, 10 rounds
W2   the same clients, the usual CNN, 3 rounds
W3   200 clients of 80 examples, MLP, everybody, 5 rounds
W3s  the same, 20 clients a round
W4   1000 clients of 16 examples, MLP, everybody, 3 rounds: one full-batch step, nothing random
R1   the clients of W1, a residual network of 20 layers, 3 rounds: for a GPU

Evaluation, tracking and checkpoints are off: a round is training and aggregation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from selffl_ray import ExperimentConfig

COMMON = [
    "data.name=fashion_mnist",
    "data.max_examples=20000",
    "method=fedavg",
    "training.learning_rate=0.01",
    "training.batch_size=32",
    "training.num_local_epochs=1",
    "tracking.enabled=false",
    "evaluation.every=1000000",
    "checkpoint.every=1000000",
]
MLP = ["model.name=mlp", "model.hidden=[100]"]
CNN = ["model.name=cnn"]
RESNET = ["model.name=resnet"]
# A test example a client is dealt from the published test part so that its images are dealt apart:
# the pool is the 20,000 training images then.
POOL = ["data.partition.test_examples=1", "evaluation.splits=[0.8,0.2,0.0]"]
DIRICHLET = [
    "data.partition.name=dirichlet",
    "data.partition.alpha=0.3",
    "data.partition.num_clients=20",
    *POOL,
]


class Workload(NamedTuple):
    """Settings on top of the common ones, and the number of rounds."""

    settings: tuple[str, ...]
    rounds: int


def _equal(clients: int) -> list[str]:
    return ["data.partition.name=iid", f"data.partition.num_clients={clients}", *POOL]


WORKLOADS = {
    "W1": Workload((*DIRICHLET, *MLP), 10),
    "W2": Workload((*DIRICHLET, *CNN), 3),
    "W3": Workload((*_equal(200), *MLP), 5),
    "W3s": Workload((*_equal(200), *MLP, "training.participation_rate=0.1"), 5),
    "W4": Workload((*_equal(1000), *MLP), 3),
}
"""What other systems are compared on."""
ON_GPU = WORKLOADS | {"R1": Workload((*DIRICHLET, *RESNET), 3)}
"""What GPUs are measured on: the others, and one that takes minutes on a processor."""


def workload_config(name: str, *more: str) -> ExperimentConfig:
    """The experiment of a workload, with further settings."""
    # Imported here: the names of the workloads are known without torch.
    from selffl_ray import load_config

    workload = ON_GPU[name]
    rounds = f"training.num_rounds={workload.rounds}"
    return load_config(None, [*COMMON, *workload.settings, rounds, *more])
