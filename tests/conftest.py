"""Settings of the whole suite: one thread as in hosts, stores in a temporary folder."""

from __future__ import annotations

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
