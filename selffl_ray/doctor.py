"""What could go wrong on this machine, a line each, with the remedy."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil

from selffl_ray.console import size
from selffl_ray.datasets.store import store_root
from selffl_ray.environment import PACKAGES, package_version
from selffl_ray.errors import SelfFLError
from selffl_ray.numerics import processor
from selffl_ray.runtime.cluster import cluster_nodes
from selffl_ray.runtime.placement import ACTOR_BYTES, MEMORY_SHARE
from selffl_ray.tracking import TrackingConfig, open_store, resolve_uri, without_password

OPEN_FILES = 4096
"""Ray needs a few hundred descriptors for each actor's sockets and logs."""

SHOWN = 5
"""Most nodes that are gone and named."""


class Finding(NamedTuple):
    """One line: what was looked at, what was found, and what to do if it is not good."""

    name: str
    found: str
    remedy: str | None = None


def examine() -> Iterator[Finding]:
    """All findings, cheap ones first."""
    yield Finding("selffl-ray", package_version())
    yield Finding("python", platform.python_version())
    for name in PACKAGES:
        yield Finding(name, metadata.version(name))
    yield from _machine()
    yield _gpus()
    yield _open_files()
    yield _shared_memory()
    yield _authentication()
    yield from _nodes()
    yield _stores()
    yield _mlflow()


def _machine() -> Iterator[Finding]:
    cores = psutil.cpu_count() or 1
    free = psutil.virtual_memory().available
    actors = int(MEMORY_SHARE * free / ACTOR_BYTES)
    yield Finding("cores", f"{cores}, {processor()}")
    remedy = None if actors >= 2 else "free memory, or use --set placement.backend=local"
    yield Finding("memory", f"{size(free)} free, room for about {actors} client actors", remedy)


def _gpus() -> Finding:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return Finding(
            "GPUs", "none: clients train on the CPU (placement.gpus_per_client must be 0)"
        )
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    return Finding(
        "GPUs", f"{count} ({names}); gpus_per_client=0.25 puts {4 * count} clients on them"
    )


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = None if soft >= OPEN_FILES else f"raise it: ulimit -n {OPEN_FILES}"
    return Finding("open files", f"limit {soft}", remedy)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")  # noqa: S108 - where Ray keeps its object store
    if not path.exists():
        return Finding("shared memory", "no /dev/shm: Ray keeps its object store in /tmp")
    free = psutil.disk_usage(str(path)).free
    remedy = None if free > 2**30 else "enlarge /dev/shm (docker: --shm-size=4g)"
    return Finding("shared memory", f"{size(free)} free in /dev/shm", remedy)


def _authentication() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding(
            "Ray",
            "no RAY_ADDRESS: none is used that runs, a local one is started for each command, with "
            "token authentication",
        )
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return Finding("Ray", f"RAY_ADDRESS={address}, token authentication on")
    return Finding(
        "Ray",
        f"RAY_ADDRESS={address}",
        "without RAY_AUTH_MODE=token anybody who reaches that address can run code on it",
    )


def _nodes() -> Iterator[Finding]:
    """The machines of the Ray that commands would use, a line each; or that there is none."""
    if not os.environ.get("RAY_ADDRESS"):
        names = [process.info["name"] for process in psutil.process_iter(["name"])]
        here = names.count("gcs_server")
        others = f"; {here} on this machine, of somebody else or another command" if here else ""
        yield Finding("nodes", f"none: no Ray is running for these commands{others}")
        return
    try:
        found = cluster_nodes()
    except SelfFLError as error:
        yield Finding("nodes", "none can be seen", " ".join(str(error).split()))
        return
    alive = [node for node in found if node.alive]
    yield Finding("nodes", f"{len(alive)} alive, {len(found) - len(alive)} gone")
    for node in alive:
        have = f"{node.cpus:g} CPUs, {node.gpus:g} GPUs, {size(node.memory_bytes)} for actors"
        yield Finding("node", f"{node.address} ({node.name}) alive, {have}")
    # Ray remembers many, and the newest cannot be told from the others.
    for node in found[len(alive) :][:SHOWN]:
        yield Finding(
            "node",
            f"{node.address} ({node.name}) gone",
            "see `ray status`; one that was idle is ended by the autoscaler, and nothing is wrong",
        )


def _stores() -> Finding:
    root = store_root()
    at = next(p for p in (root, *root.parents) if p.exists())
    free = psutil.disk_usage(str(at)).free
    writable = os.access(at, os.W_OK)
    remedy = None if writable else "set SELFFL_RAY_STORES to a folder that you may write"
    shared = "; on a cluster set SELFFL_RAY_STORES to a shared folder, or each node builds its own"
    return Finding("data stores", f"{root}, {size(free)} free{shared}", remedy)


def _mlflow() -> Finding:
    try:
        uri = resolve_uri(TrackingConfig(), Path.cwd())
    except SelfFLError as error:
        return Finding("MLflow", "", str(error))
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return Finding("MLflow", f"{uri} (will be created by the first run)")
    try:
        open_store(uri)
    except Exception as error:
        # A store may fail in any way; that is the finding.
        shown = f"{type(error).__name__}: {without_password(str(error))}"[:200]
        return Finding("MLflow", f"{without_password(uri)} does not answer ({shown})", "start it")
    return Finding("MLflow", f"{without_password(uri)} answers")
