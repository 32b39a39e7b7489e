"""Settings of the whole suite: one thread as in hosts, stores in a temporary folder."""

from __future__ import annotations

import contextlib

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("selffl_ray", deadline=None)
hypothesis.settings.load_profile("selffl_ray")


@pytest.fixture(scope="session", autouse=True)
def stores(tmp_path_factory):
    """Folder of all client stores of the session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("stores")
        patch.setenv("SELFFL_RAY_STORES", str(folder))
        yield folder


@contextlib.contextmanager
def no_ray_meanwhile(work):
    """As the command's own, but nothing is started."""
    yield work()


@pytest.fixture(scope="session", autouse=True)
def no_early_ray():
    """Commands in the tests' own process start a Ray no sooner than they need one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selffl_ray.cli.ray_meanwhile", no_ray_meanwhile)
        yield
