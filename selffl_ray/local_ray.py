"""A Ray of our own on this machine, started while the rest of the program is imported.

Importing this module imports neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

logger = logging.getLogger(__name__)

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

    before = set(psutil.Process().children())
    nodes: list[Any] = []
    try:
        with _altered(meanwhile, nodes), sigterm_kept():
            ray.init(address="local", _node_ip_address=LOOPBACK, include_dashboard=False, **UNHEARD)
    except BaseException:
        _break_off(set(psutil.Process().children()) - before, nodes)
        raise
    _check_loopback()


def _break_off(children: Collection[psutil.Process], nodes: Sequence[Any]) -> None:
    """End what ``ray.init`` has started and, having failed, leaves alone.

    Args:
        children: that this process has got meanwhile, Ray's and perhaps others.
    """
    import ray

    started: set[psutil.Process] = set()
    for child in children:
        with contextlib.suppress(psutil.Error):
            if any(str(Path(ray.__file__).parent) in argument for argument in child.cmdline()):
                # So that it starts no more; what it has started would take ten seconds to end.
                child.suspend()
                started |= {child, *child.children(recursive=True)}
    for process in started:
        with contextlib.suppress(psutil.Error):
            process.kill()
    for node in nodes:
        # If it was connecting already. Without a node of ours the connection is somebody else's.
        with contextlib.suppress(Exception):
            ray.shutdown()
        with contextlib.suppress(Exception):
            node.kill_all_processes(check_alive=False)
        shutil.rmtree(node.get_session_dir_path(), ignore_errors=True)


def _check_loopback() -> None:
    import ray

    at = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if at != LOOPBACK:
        logger.warning(
            "this Ray listens on %s, not on loopback only: ray was imported before selffl_ray; "
            "import selffl_ray first, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0",
            at,
        )


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """What the program does on SIGTERM stays as it was; ``ray.init`` puts an exit in its place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # Of a program that does nothing Ray's may stay: it ends Ray's processes.
        own = before not in (None, signal.SIG_DFL)
        if own and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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
    began = threading.Event()

    def once() -> None:
        if not began.is_set():
            began.set()
            done.append(work())

    start_ray(once)
    import ray

    try:
        once()
        yield done[0]
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _altered(meanwhile: Callable[[], None], nodes: list[Any]) -> Iterator[None]:
    """Have ``ray.init`` do something meanwhile, and leave out what nobody needs here.

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
    original: Callable[..., Any],
    meanwhile: Callable[[], None],
    nodes: list[Any],
    *arguments: object,
    **options: object,
) -> Any:
    nodes.append(node)
    result = original(node, *arguments, **options)
    meanwhile()
    return result


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
