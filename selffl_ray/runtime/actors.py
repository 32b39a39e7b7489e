"""Ray actors: shells around plain classes.

A client actor holds a ClientHost. The driver actor runs a job (the server loop with all that
belongs to it) and answers questions about it meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from selffl_ray.errors import PlacementError, SelfFLError
from selffl_ray.host import ClientHost
from selffl_ray.importing import leave_out_of_collections
from selffl_ray.numerics import be_exact, processor, tf32_is_on
from selffl_ray.registry import load_plugins

logger = logging.getLogger(__name__)


def assigned_device(gpu_share: float, wanted: str, assigned: list[str]) -> torch.device:
    """The device of a client actor.

    Args:
        gpu_share: what the actor reserved; wanted: ``auto`` or ``cpu``; assigned: Ray's GPU ids.

    Raises:
        PlacementError: a GPU share without a CUDA device to go with it.
    """
    if gpu_share == 0 or wanted == "cpu":
        return torch.device("cpu")
    if not assigned or not torch.cuda.is_available():
        raise PlacementError(
            f"placement.gpus_per_client: this actor holds {gpu_share:g} of GPU "
            f"{', '.join(assigned) or 'none'}, but torch sees no CUDA device on its machine; use "
            "--set placement.gpus_per_client=0, or placement.device=cpu to train on the CPU"
        )
    # Ray sets CUDA_VISIBLE_DEVICES to what it assigned, so the first visible one is ours.
    device = torch.device("cuda", 0)
    be_exact()
    if gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_share, device)
    logger.info("GPU %s, at most %.0f %% of its memory", assigned[0], 100 * min(gpu_share, 1))
    return device


def device_bytes(device: torch.device, gpu_share: float) -> int:
    """The part of a GPU's memory that an actor may use; 0 of a processor."""
    if device.type == "cpu":
        return 0
    return int(min(gpu_share, 1.0) * torch.cuda.get_device_properties(device).total_memory)


class ClientActor:
    """Hosts the data and state of one or several clients.

    Args:
        gpu_share: GPU share that was reserved.
        wanted: ``placement.device``.
        plugins: modules of the user's, and the folder that they may lie in.
    """

    def __init__(self, gpu_share: float, wanted: str, plugins: tuple[Sequence[str], str]) -> None:
        import ray

        ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        self._gpus = [str(i) for i in ids]
        self._gpu_share = gpu_share
        self._problem: SelfFLError | None = None
        self._device = torch.device("cpu")
        try:
            load_plugins(*plugins)
            self._device = assigned_device(gpu_share, wanted, self._gpus)
        except SelfFLError as error:
            # Raised in a constructor it would reach the driver as a dead actor.
            self._problem = error
        self._host = ClientHost(self._device)
        leave_out_of_collections()

    def describe(self) -> dict[str, Any]:
        """Where this actor lives: node, process, GPUs, device, processor, memory, numerics.

        Raises:
            SelfFLError: it got no device for its GPU share, or cannot import the user's modules.
        """
        import ray

        if self._problem is not None:
            raise self._problem
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "gpus": self._gpus,
            "device": str(self._device),
            "processor": processor(),
            "memory_bytes": device_bytes(self._device, self._gpu_share),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "tf32": tf32_is_on(),
        }

    def call(self, method: str, has_shared: bool, shared: Any, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the host. ``shared`` arrives read-only."""
        first = (shared,) if has_shared else ()
        return getattr(self._host, method)(*first, *arguments)


class Control:
    """How the outside talks to a job that is running: it asks it to stop, and sees how far it is.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[Any] = []
        self._stop = threading.Event()

    def emit(self, event: Any) -> None:
        """Add an event for whoever watches."""
        with self._lock:
            self._events.append(event)

    def take(self) -> list[Any]:
        """The events since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Ask the job to end after the round it is in."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Somebody asked for the end."""
        return self._stop.is_set()


class DriverActor:
    """Runs one job at a time; needs at least two threads, so that questions are answered."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._control = Control()
        leave_out_of_collections()

    def run(self, job: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``job(control, *arguments)`` and return what it returns."""
        return job(self._control, *arguments)

    def events(self) -> list[Any]:
        """What the job has emitted since the last call."""
        return self._control.take()

    def stop(self) -> None:
        """Ask the job to end after the round it is in."""
        self._control.stop()
