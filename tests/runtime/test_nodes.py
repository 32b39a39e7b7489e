"""Three nodes, clients on each of them, and one is lost in the middle of a round."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile

import pandas as pd
import pytest

from tests.runtime.processes import Sandbox
from tests.runtime.saboteur import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.limit_s(600)]

STRUCK = 3
"""The round in which the node is lost."""
METHODS = ("fedavg", "ditto")
"""One without and one with client state."""

PLUGIN = '''
"""FedAvg or Ditto, one client of which tells that it is in a round, and then takes its time."""
import time
from dataclasses import dataclass, replace
from pathlib import Path
from selffl_ray.algorithms.ditto import DittoConfig, ditto
from selffl_ray.algorithms.fedavg import FedAvgConfig, fedavg
from selffl_ray.registry import register_algorithm

@dataclass(frozen=True, kw_only=True)
class LingeringConfig:
    base: str = "fedavg"
    client: str = ""
    round_index: int = 0
    note: str = ""

@register_algorithm("lingering", LingeringConfig)
def lingering(config, federation):
    honest = fedavg(FedAvgConfig(), federation)
    if config.base == "ditto":
        honest = ditto(DittoConfig(), federation)

    def local_update(shared, per_client, state, stack):
        note = Path(config.note)
        here = config.client in stack.client_ids and stack.round_index == config.round_index
        if here and not note.exists():
            note.touch()
            time.sleep(60)
        return honest.local_update(shared, per_client, state, stack)

    return replace(honest, local_update=local_update)
'''

SCRIPT = """
import json, sys, threading, time
from pathlib import Path
from selffl_ray.local_ray import quiet_ray
quiet_ray()
import ray
from ray.cluster_utils import Cluster
from selffl_ray.api import Interrupt, run_experiment
from selffl_ray.config import load_config

struck = int(sys.argv[1])
local = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
three = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 4, **local})
nodes = [three.add_node(num_cpus=4, **local) for _ in range(2)]
three.wait_for_nodes()

def settings(base, *more):
    note = Path(f"{base}.note").absolute()
    return load_config(None, [
        "plugins=[lingering]", "data.partition={name: dirichlet, alpha: 1.0, num_clients: 6}",
        "model.hidden=[16]", "training.num_rounds=6", "training.num_local_steps=3",
        "checkpoint.every=2", "evaluation.every=2", "placement.clients_per_actor=1",
        "placement.cpus_per_actor=1", "tracking.enabled=false",
        f"method={{name: lingering, base: {base}, client: client-5, round_index: {struck}, "
        f"note: {note}}}", *more,
    ]), note

for base in sys.argv[2:]:
    config, note = settings(base)
    gone = {}

    def lose():
        while not note.exists():
            time.sleep(0.05)
        placement = json.loads(Path(base, "environment.json").read_text())["placement"]
        at = [actor["node"] for actor in placement["actors"]]
        doomed, = (node for node in three.worker_nodes if node.node_id == at[5])
        gone.update(node=doomed.node_id, clients=[i for i, n in enumerate(at) if n == at[5]], at=at)
        three.remove_node(doomed, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    said = []
    run_experiment(config, output=base, watch=lambda event: said.append(str(event)))
    thread.join()
    Path(f"{base}.json").write_text(json.dumps({**gone, "said": said}))
    three.add_node(num_cpus=4, **local)
    three.wait_for_nodes()

    quiet, note = settings(base, "placement.backend=local")
    note.touch()
    run_experiment(quiet, output=f"{base}-quiet")
ray.shutdown()
three.shutdown()
"""


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """By method: the rounds of the run that lost a node, of the quiet one, and what was lost."""
    box = Sandbox(tmp_path_factory.mktemp("nodes"))
    token = box.home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    (box.folder / "lingering.py").write_text(PLUGIN)
    (box.folder / "script.py").write_text(SCRIPT)
    # Paths of sockets must be short, and Ray notes in its usual place which cluster is the newest.
    temporary = tempfile.mkdtemp(prefix="selffl-", dir="/tmp")
    process = box.start(
        *(sys.executable, "script.py", str(STRUCK), *METHODS),
        RAY_AUTH_MODE="token",
        RAY_TMPDIR=temporary,
        PYTHONPATH=str(ROOT),
        SELFFL_RAY_STORES=str(box.folder / "stores"),
    )
    try:
        _, err = process.communicate(timeout=540)
    finally:
        box.end_all()
        process.communicate(timeout=20)
        shutil.rmtree(temporary, ignore_errors=True)
    assert process.returncode == 0, err
    read = lambda name: pd.read_parquet(box.folder / name / "rounds.parquet")  # noqa: E731
    return {
        base: (
            read(base),
            read(f"{base}-quiet"),
            json.loads((box.folder / f"{base}.json").read_text()),
        )
        for base in METHODS
    }


@pytest.mark.parametrize("base", METHODS)
def test_clients_are_spread_over_the_nodes(lost, base):
    *_, gone = lost[base]
    assert len(set(gone["at"])) == 3
    assert 5 in gone["clients"]


@pytest.mark.parametrize("base", METHODS)
def test_a_node_that_is_lost_in_the_middle_of_a_round_changes_no_bit(lost, base):
    rounds, quiet, _ = lost[base]
    assert rounds["digest"].nunique() == 6
    assert rounds["digest"].tolist() == quiet["digest"].tolist()
    same = [c for c in quiet if "/" in c and not c.startswith("time/") and c != "clients/faults"]
    assert "test/local_loss" in same
    assert rounds[same].equals(quiet[same])


@pytest.mark.parametrize("base", METHODS)
def test_each_host_that_went_with_the_node_is_in_the_table_with_the_nodes_name(lost, base):
    rounds, _, gone = lost[base]
    events = [json.loads(text) for text in rounds["events"]]
    assert [len(one) > 0 for one in events] == [index == STRUCK for index in range(6)]
    assert {event["host"] for event in events[STRUCK]} == set(gone["clients"])
    for event in events[STRUCK]:
        assert (event["kind"], event["outcome"]) == ("died", "replaced")
        assert f"node {gone['node'][:8]}" in event["place"]
        assert event["memory_bytes"] > 2**20
    assert any(f"node {gone['node'][:8]}" in text for text in gone["said"])
