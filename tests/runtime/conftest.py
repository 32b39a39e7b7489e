"""One real Ray for the whole folder, on loopback; no test waits for ever."""

from __future__ import annotations

import faulthandler
import signal
from pathlib import Path

import pytest

from selffl_ray.local_ray import LOOPBACK, quiet_ray

HERE = Path(__file__).parent
LIMIT_S = 180
"""Longest time of a test, its fixtures included."""


class TookTooLongError(Exception):
    """A test or a fixture hangs."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Raise in a test that hangs; end the session if even that does not help."""
    if not item.path.is_relative_to(HERE):
        return (yield)

    own = item.get_closest_marker("limit_s")
    limit_s = LIMIT_S if own is None else own.args[0]

    def give_up(number, frame):
        raise TookTooLongError(f"{item.nodeid} took more than {limit_s} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(limit_s)
    faulthandler.dump_traceback_later(limit_s + 60, exit=True)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="package")
def local_ray(stores):
    """A connection to a Ray with 2 CPUs and 2 logical GPUs."""
    quiet_ray()
    import ray

    assert not ray.is_initialized(), "another test left its connection open"
    ray.init(
        address="local",
        _node_ip_address=LOOPBACK,
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield ray
    ray.shutdown()
