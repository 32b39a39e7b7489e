"""A Ray of our own on this machine, started while the rest of the program is imported.

Importing this module imports neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

Value = TypeVar("Value")

LOOPBACK = "127.0.0.1"
UNHEARD: dict[str, Any] = {
    "log_to_driver": False,
    "logging_level": "error",
    "configure_logging": True,
}
"""Arguments of ``ray.init`` that keep Ray off the user's terminal."""

IN_MESSAGE = "RAY_max_direct_call_object_size"
"""Ray's setting: arguments and answers of up to so many bytes travel within the message."""


def quiet_ray() -> None:
    """Settings that must stand before ray is imported: loopback only, no usage reports."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without it Ray binds the machine's own address (the name notwithstanding).
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Many small actors are what we want; Ray warns on the terminal from 4 starts a core on. Starts
    # are staggered by ray_pool.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "64")
    # What becomes of CUDA_VISIBLE_DEVICES in actors without a GPU; the future default, without the
    # warning about it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A way by the object store is four questions to Ray's daemon, some 3 ms a round for a model and
    # its sums; Ray's own limit is a tenth of this.
    os.environ.setdefault(IN_MESSAGE, str(2**20))


def ray_is_running() -> bool:
    """Whether this process is connected to a Ray already."""
    ray = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized())


def is_ray_ours() -> bool:
    """Whether something run on Ray now would start one of its own."""
    return not (os.environ.get("RAY_ADDRESS") or ray_is_running())


def start_ray(meanwhile: Callable[[], None] = lambda: None) -> None:
    """Start a Ray on this machine's loopback and connect to it.

    Ray's processes end with the thread that started them: call it in one that stays.

    Args:
        meanwhile: done as soon as Ray's processes have been started, while they come up. Not done
            with a Ray that starts them by other methods.

    Raises:
        whatever meanwhile or Ray raises, Ctrl-C too; nothing that was started is left.
    """
    quiet_ray()
    import ray

    package = str(Path(ray.__file__).parent)
    before = _descendants(package)
    nodes: list[Any] = []
    try:
        with _altered(meanwhile, nodes), sigterm_kept():
            ray.init(address="local", _node_ip_address=LOOPBACK, include_dashboard=False, **UNHEARD)
    except BaseException:
        # ray.init leaves alone what it has started, some of which ends ten seconds later only.
        for process in _descendants(package) - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for node in nodes:
            node.kill_all_processes(check_alive=False)
        raise


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """What the program does on SIGTERM stays as it was; ``ray.init`` puts an exit in its place."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    # Of a program that does nothing Ray's may stay: it ends Ray's processes.
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _descendants(package: str) -> set[psutil.Process]:
    """Processes below this one that run what lies in a folder."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(package in argument for argument in process.cmdline()):
                found.add(process)
    return found


def _end_ray() -> None:
    import ray

    ray.shutdown()


@contextlib.contextmanager
def ray_meanwhile(work: Callable[[], Value]) -> Iterator[Value]:
    """Start a Ray of our own, and do other work while its processes come up.

    They take seconds, and importing torch keeps one core busy for as long.

    Yields:
        what work returned; Ray ends with the context.

    Raises:
        whatever work or Ray's start raises; no Ray is left then.
    """
    done: list[Value] = []

    def once() -> None:
        if not done:
            done.append(work())

    try:
        start_ray(once)
        once()
        yield done[0]
    finally:
        if ray_is_running():
            _end_ray()


@contextlib.contextmanager
def _altered(meanwhile: Callable[[], None], nodes: list[Any]) -> Iterator[None]:
    """Have ``ray.init`` leave out what a cluster that nobody looks at does not need.

    The autoscaler of a cluster of one fixed machine, the reader of logs that nobody wants on the
    terminal, and the process of a dashboard that is not wanted: together some 190 MB and a third of
    the time that Ray takes to start. The autoscaler would also delay the end by a second, for it
    does not listen to SIGTERM once the GCS is gone. There is no option for it. Who has asked for
    usage reports gets all of them, and so does a Ray that starts them by other methods.

    Args:
        meanwhile: see :func:`start_ray`.
        nodes: gets Ray's object for what it starts, by which it can be ended.
    """
    try:
        from ray._private.node import Node as RayNode
    except ImportError:
        yield
        return
    wanted = os.environ.get("RAY_USAGE_STATS_ENABLED") != "0"
    substitutes = {} if wanted else dict(UNUSED_HELPERS)
    if original := getattr(RayNode, LAST_STARTED, None):
        substitutes[LAST_STARTED] = functools.partialmethod(_start_and, original, meanwhile, nodes)
    with _PATCHING, contextlib.ExitStack() as stack:
        for name, substitute in substitutes.items():
            if hasattr(RayNode, name):
                stack.callback(setattr, RayNode, name, getattr(RayNode, name))
                setattr(RayNode, name, substitute)
        yield


def _start_and(
    node: Any,
    original: Callable[[Any], None],
    meanwhile: Callable[[], None],
    nodes: list[Any],
) -> None:
    nodes.append(node)
    original(node)
    meanwhile()


def _start_nothing(node: Any, *_: object, **__: object) -> None:
    pass


def _tell_no_dashboard(node: Any, *_: object, **__: object) -> None:
    """An address where nobody listens: Ray's agent would look for one every second, and log it."""
    from ray._private import ray_constants

    node.get_gcs_client().internal_kv_put(
        ray_constants.DASHBOARD_ADDRESS.encode(),
        f"{LOOPBACK}:0".encode(),
        True,
        ray_constants.KV_NAMESPACE_DASHBOARD,
    )


LAST_STARTED = "start_ray_processes"
"""Method of Ray's node by which it starts the last of its processes."""
UNUSED_HELPERS: dict[str, Any] = {
    "start_monitor": _start_nothing,
    "start_log_monitor": _start_nothing,
    "start_api_server": _tell_no_dashboard,
}
"""Methods of Ray's node by which it starts what a Ray of our own can do without, and what to call
instead."""
_PATCHING = threading.Lock()
"""Held while they are replaced: a second thread would keep a substitute for the original."""
