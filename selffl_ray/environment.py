"""Where a run happened: versions, machine, placement, digests, numeric settings."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from selffl_ray.experiment import Prepared
from selffl_ray.numerics import processor
from selffl_ray.runtime.placement import PlacementPlan

PACKAGES = ("ray", "torch", "numpy", "pandas", "mlflow", "pyarrow", "scipy", "safetensors")


def package_version() -> str:
    """Version of this package, ``unknown`` if it is not installed."""
    try:
        return metadata.version("selffl-ray")
    except metadata.PackageNotFoundError:
        return "unknown"


def describe_environment(
    prepared: Prepared, plan: PlacementPlan, where: list[dict[str, Any]]
) -> dict[str, Any]:
    """Content of ``environment.json``.

    Args:
        where: node, process, GPUs and device of each client actor; empty without Ray.
    """
    return {
        "selffl_ray": package_version(),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "host": platform.node(),
        "processor": processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "devices": sorted({w["device"] for w in where}) or ["cpu"],
        "placement": {
            "backend": plan.backend,
            "num_actors": len(plan.actors),
            "cpus_per_actor": plan.actors[0].cpus,
            "gpus": [a.gpus for a in plan.actors],
            "clients": [list(a.clients) for a in plan.actors],
            "actors": where,
        },
        "stack_size": prepared.run_spec.stack_size,
        "num_params": prepared.federation.spec.num_params,
        "client_ids": prepared.client_ids,
        "num_train_examples": [len(c.train) for c in prepared.clients],
        "data_digest": prepared.store.manifest.digest,
        "partition_digest": prepared.partition.digest,
        "numerics": {
            "dtype": str(prepared.federation.spec.dtype),
            "tf32": any(at["device"] != "cpu" and at["tf32"] for at in where),
            "amp": False,
            "threads_per_host": 1,
        },
    }


def _git_commit() -> str | None:
    """Commit of the package's own checkout, if it lies in one."""
    here = Path(__file__)
    try:
        # An installed copy may lie below somebody else's repository, which does not track it.
        _git("ls-files", "--error-unmatch", here.name, folder=here.parent)
        return _git("rev-parse", "HEAD", folder=here.parent)
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str, folder: Path) -> str:
    command = ["git", *arguments]
    done = subprocess.run(  # noqa: S603 - fixed arguments
        command, cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
