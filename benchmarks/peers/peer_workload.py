"""The file that a workload travels in, its model and its training in plain torch.

The plain loop and the peers read it, in whatever environment they run: numpy and torch only, and
nothing of this package. ``benchmarks.export`` writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import OrderedDict
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    # Ray then binds loopback instead of the machine's own address, the name notwithstanding.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "PFL_PYTORCH_DEVICE": "cpu",
    # A second thread loses more to any other load than it gains, for everybody.
    "OMP_NUM_THREADS": "1",
}
"""Nobody reports anywhere or listens beyond loopback, and everybody computes on one thread."""
WEIGHTS = "weights/"


class Workload(NamedTuple):
    """Training examples by client, who is asked when, and the start of the model.

    x, y: examples, one client after the other; start_M, num_M: where each client's lie;
    cohort_RK: clients asked in each round; weights: start by name, in torch's layout.
    """

    x: np.ndarray
    y: np.ndarray
    start_M: np.ndarray
    num_M: np.ndarray
    cohort_RK: np.ndarray
    learning_rate: float
    batch_size: int
    weights: dict[str, np.ndarray]

    def examples(self, client: int) -> tuple[Tensor, Tensor]:
        """A client's training examples."""
        own = slice(int(self.start_M[client]), int(self.start_M[client] + self.num_M[client]))
        return torch.from_numpy(self.x[own]), torch.from_numpy(self.y[own])


def write(path: Path, work: Workload) -> None:
    """As an ``.npz`` file."""
    fields = work._asdict()
    weights = {WEIGHTS + name: value for name, value in fields.pop("weights").items()}
    np.savez(path, allow_pickle=False, **fields, **weights)


def read(path: str | Path) -> Workload:
    """What :func:`write` wrote."""
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    weights = {k.removeprefix(WEIGHTS): found.pop(k) for k in list(found) if k.startswith(WEIGHTS)}
    rate, size = float(found.pop("learning_rate")), int(found.pop("batch_size"))
    return Workload(**found, learning_rate=rate, batch_size=size, weights=weights)


def build_model(weights: dict[str, np.ndarray]) -> nn.Sequential:
    """The network that has these weights: convolutions with ReLU and pooling, then dense layers."""
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name in names:
        shape = weights[f"{name}.weight"].shape
        if len(shape) == 4:
            layers[name] = nn.Conv2d(shape[1], shape[0], shape[2])
            layers[f"{name}_relu"], layers[f"{name}_pool"] = nn.ReLU(), nn.MaxPool2d(2)
            continue
        if "flatten" not in layers:
            layers["flatten"] = nn.Flatten()
        layers[name] = nn.Linear(shape[1], shape[0])
        if name != names[-1]:
            layers[f"{name}_relu"] = nn.ReLU()
    model = nn.Sequential(layers)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model


def train_epoch(
    model: nn.Module, examples: tuple[Tensor, Tensor], work: Workload, rng: np.random.Generator
) -> None:
    """One pass of plain SGD over a client's examples in a fresh order, the short batch kept."""
    x, y = examples
    optimizer = torch.optim.SGD(model.parameters(), lr=work.learning_rate)
    order = torch.from_numpy(rng.permutation(len(y)))
    for at in order.split(work.batch_size):
        optimizer.zero_grad()
        F.cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()


def arguments(purpose: str) -> argparse.Namespace:
    """Command line of the plain loop and of every peer."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("workload", help=".npz file that benchmarks.export wrote")
    parser.add_argument("--params", default=None, help=".npz file for the final model")
    return parser.parse_args()


def report(
    rounds_s: list[float],
    packages: tuple[str, ...],
    weights: dict[str, np.ndarray],
    path: str | None,
) -> None:
    """Print seconds of each round and versions as one line of JSON; write the final model."""
    if path is not None:
        np.savez(path, allow_pickle=False, **weights)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in (*packages, "torch"))
    print(json.dumps({"rounds_s": rounds_s, "versions": versions}), flush=True)


def keep_quiet() -> None:
    """Before anything of a peer is imported: no reports, loopback, one thread."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Flower makes up an identity and writes it to its home folder.
    if "FLWR_HOME" not in os.environ:
        os.environ["FLWR_HOME"] = tempfile.mkdtemp(prefix="flwr-home-")
    torch.set_num_threads(1)
