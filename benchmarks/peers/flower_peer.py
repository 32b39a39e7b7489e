"""Flower on a workload: its simulation on Ray with two workers.

    python benchmarks/peers/flower_peer.py WORKLOAD.npz

What its tutorials write, with the data in memory of each worker and no DataLoader, which would
cost more than the training. Node i is client i. Flower draws its own cohorts, of the same size.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_workload import Workload, arguments, build_model, keep_quiet, read, report, train_epoch
from torch import Tensor, nn

WORKERS = 2
FILE = "BENCHMARK_WORKLOAD"
"""Environment variable that tells Flower's actors where the workload lies."""


@functools.cache
def worker_state() -> tuple[Workload, nn.Module, np.random.Generator]:
    """Once a worker: the data, one model for all clients, and the order of batches."""
    torch.set_num_threads(1)
    work = read(os.environ[FILE])
    return work, build_model(work.weights), np.random.default_rng(os.getpid())


@functools.cache
def examples(client: int) -> tuple[Tensor, Tensor]:
    """A client's data, kept by the worker."""
    return worker_state()[0].examples(client)


def train(message: Any, context: Any) -> Any:
    """A client's round."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    work, model, rng = worker_state()
    own = examples(int(context.node_config["partition-id"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train_epoch(model, own, work, rng)
    answer = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(own[1])}),
    }
    return Message(content=RecordDict(answer), reply_to=message)


def simulate(work: Workload) -> tuple[list[float], dict[str, np.ndarray]]:
    """Seconds of each round, and the final model."""
    from flwr.app import ArrayRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    (rounds, asked), clients = work.cohort_RK.shape, len(work.num_M)
    ticks: list[float] = []
    found: dict[str, np.ndarray] = {}
    client, server = ClientApp(), ServerApp()
    client.train()(train)

    @server.main()
    def serve(grid: Any, context: Any) -> None:
        strategy = FedAvg(
            fraction_train=asked / clients,
            fraction_evaluate=0.0,
            min_train_nodes=asked,
            min_available_nodes=clients,
        )
        start = {name: torch.from_numpy(value) for name, value in work.weights.items()}
        # Called before the first round and after each.
        tick = lambda number, arrays: ticks.append(time.perf_counter())  # noqa: E731
        result = strategy.start(grid, ArrayRecord(start), num_rounds=rounds, evaluate_fn=tick)
        found.update({k: v.numpy() for k, v in result.arrays.to_torch_state_dict().items()})

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "address": "local",
                "num_cpus": WORKERS,
                "_node_ip_address": "127.0.0.1",
                "include_dashboard": False,
                "log_to_driver": False,
                "logging_level": "error",
            },
        },
    )
    if len(ticks) != rounds + 1:
        raise RuntimeError(f"Flower finished {len(ticks) - 1} of {rounds} rounds")
    return np.diff(ticks).tolist(), found


def main() -> None:
    """Command line."""
    options = arguments(__doc__)
    keep_quiet()
    os.environ[FILE] = options.workload
    warnings.simplefilter("ignore", DeprecationWarning)
    rounds_s, weights = simulate(read(options.workload))
    report(rounds_s, ("flwr", "ray"), weights, options.params)


if __name__ == "__main__":
    # By its name, not as __main__: workers then import this module instead of unpickling a copy of
    # it for each message, and their caches last.
    importlib.import_module(Path(__file__).stem).main()
