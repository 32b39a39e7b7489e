"""Starting a local Ray, or connecting to the one that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from selffl_ray.errors import PlacementError
from selffl_ray.local_ray import UNHEARD, quiet_ray, sigterm_kept, start_ray
from selffl_ray.runtime.placement import Node

logger = logging.getLogger(__name__)

HEAD = "node:__internal_head__"
"""Resource that Ray gives to the head only."""
SHARED_S = 60.0
"""Longest wait for a machine to say whether it sees a folder."""
PIN = 0.001
"""Share of a machine's own resource that pins an actor to it: room for a thousand."""
REACH_S = 10.0
"""Longest wait for a cluster's port to open; Ray itself would try for many minutes."""


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray.

    nodes: the machines that are alive; ours: :func:`cluster` started it, and ends it.
    """

    nodes: list[Node]
    ours: bool


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A Ray to run in: a connection that exists, RAY_ADDRESS, or one of our own on loopback.

    Only a Ray that was started here is ended here.

    Raises:
        PlacementError: RAY_ADDRESS cannot be reached.
    """
    quiet_ray()
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        yield Cluster(_nodes(), ours=False)
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            with sigterm_kept():
                ray.init(address=address, **UNHEARD)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise PlacementError(
                f"RAY_ADDRESS={address} cannot be reached: {error}; start that cluster, give its "
                "token (RAY_AUTH_MODE=token), or unset RAY_ADDRESS to use this machine"
            ) from error
    else:
        start_ray()
    try:
        yield Cluster(_nodes(), ours=not address)
    finally:
        # Disconnects from a cluster that was there before, and ends one of our own.
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at ``host:port``; other addresses are Ray's to judge."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()


def _nodes() -> list[Node]:
    """The machines that are alive, this process's own first: the driver actor runs there."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            have = node["Resources"]
            found = Node(
                node["NodeManagerHostname"],
                have.get("CPU", 0.0),
                have.get("GPU", 0.0),
                int(have.get("memory", 0)),
            )
            nodes.append((node["NodeID"] != here, found.name, node["NodeID"], found))
    return [found for *_, found in sorted(nodes, key=lambda n: n[:3])]


class NodeState(NamedTuple):
    """A machine of a cluster; of one that is gone nothing is known but its name and address."""

    name: str
    address: str
    alive: bool
    cpus: float
    gpus: float
    memory_bytes: int


def cluster_nodes() -> list[NodeState]:
    """The machines of the cluster that RAY_ADDRESS names: those that are alive, then the others.

    Raises:
        PlacementError: it cannot be reached.
    """
    with cluster():
        import ray

        found = []
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            have = node["Resources"] if node["Alive"] else {}
            state = NodeState(
                node["NodeManagerHostname"],
                node["NodeManagerAddress"],
                node["Alive"],
                have.get("CPU", 0.0),
                have.get("GPU", 0.0),
                int(have.get("memory", 0)),
            )
            found.append(state)
    return sorted(found, key=lambda state: (not state.alive, state.name, state.address))


def driver_bundle(cpus: float, *, trains: bool = False) -> dict[str, float]:
    """Resources that place a trial's server loop on the machine of this process.

    MLflow's server listens on that machine's loopback, or its store is a file there, so a loop on
    another machine would track nothing. With several machines the loop reserves no CPU: trials
    would have to wait for room on this one, though others are free. A loop that trains its clients
    itself (``trains``) needs its CPUs wherever it is.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    alive = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    own = next(n["Resources"] for n in alive if n["NodeID"] == here)
    # Of the head there are two names; several nodes on one machine share the one with its address.
    name = max((k for k in own if k.startswith("node:")), key=lambda k: k == HEAD)
    return {name: PIN} | ({"CPU": cpus} if trains or len(alive) == 1 else {})


def check_shared(folder: Path) -> None:
    """On several machines: does each see this folder? Trials write there, wherever they are.

    Raises:
        PlacementError: a machine does not, or gives no answer.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    if len(alive) < 2:
        return
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".seen-by-all-{os.getpid()}"
    probe.touch()
    look: Any = ray.remote(_exists)
    try:
        for node in alive:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = look.options(num_cpus=0, scheduling_strategy=here).remote(str(probe))
            try:
                seen = bool(ray.get(task, timeout=SHARED_S))
            except (TimeoutError, RayError):
                seen = False
            if not seen:
                raise PlacementError(
                    f"{folder} is not seen by the node {node['NodeManagerHostname']}: trials that "
                    "run there would write to a disk of its own; give --output on storage that all "
                    "nodes share"
                )
    finally:
        probe.unlink()


def _exists(path: str) -> bool:
    return Path(path).exists()


def await_nodes(node_ids: Collection[str]) -> None:
    """Wait until each of these nodes has shown that it lives, or Ray has noticed that it does not.

    Ray takes some 15 seconds to notice, and until then would start actors on a node that is gone.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look: Any = ray.remote(_exists)
    probes = []
    alive = {n["NodeID"] for n in ray.nodes() if n["Alive"]}  # type: ignore[no-untyped-call]
    for node_id in sorted(alive & set(node_ids) if len(alive) > 1 else ()):
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
        probes.append(look.options(**options).remote("/"))
    for probe in probes:
        try:
            ray.get(probe, timeout=SHARED_S)
        except (TimeoutError, RayError) as error:
            logger.info("a node is gone: %s", error)


def this_machine() -> list[Node]:
    """What a local Ray would offer, without starting one."""
    import torch

    gpus = torch.cuda.device_count()
    memory = psutil.virtual_memory().available
    return [Node("this machine", float(psutil.cpu_count() or 1), float(gpus), memory)]
