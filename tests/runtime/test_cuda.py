"""Client actors that share a GPU: each on the device, each with its share of the memory."""

from __future__ import annotations

import json

import pytest
import torch

from selffl_ray import load_config, run_experiment

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"
    ),
]


def test_two_actors_with_half_a_gpu_each_train_as_one_process_does(local_ray, tmp_path):
    common = ("method=selffl", "training.num_rounds=2", "tracking.enabled=false")
    halves = ("placement.clients_per_actor=7", "placement.gpus_per_client=0.5")
    shared = run_experiment(load_config(None, (*common, *halves)), output=tmp_path / "gpu")
    where = json.loads((shared.folder / "environment.json").read_text())
    devices = [actor["device"] for actor in where["placement"]["actors"]]
    assert devices == ["cuda:0", "cuda:0"]
    memory = torch.cuda.get_device_properties(0).total_memory
    assert [actor["memory_bytes"] for actor in where["placement"]["actors"]] == [memory // 2] * 2
    assert where["stack_size"] == 1024, "the digits' model is small"
    assert not where["numerics"]["tf32"]
    alone = load_config(None, (*common, "placement.backend=local"))
    local = run_experiment(alone, output=tmp_path / "cpu")
    found, wanted = (run.rounds["train/loss"].tolist() for run in (shared, local))
    assert found == pytest.approx(wanted, rel=1e-3)
