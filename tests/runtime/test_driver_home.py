"""On several machines the server loops are at home: on the machine of the process that asked."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile

import pytest

from tests.runtime.processes import Sandbox

pytestmark = [pytest.mark.ray, pytest.mark.limit_s(400)]

PLUGIN = '''
"""FedAvg that notes on which node it does what."""
from dataclasses import dataclass, replace
from selffl_ray.algorithms.fedavg import FedAvgConfig, fedavg
from selffl_ray.registry import register_algorithm

@dataclass(frozen=True, kw_only=True)
class WhereConfig:
    notes: str = ""

@register_algorithm("where", WhereConfig)
def where(config, federation):
    honest = fedavg(FedAvgConfig(), federation)

    def note(what):
        import ray
        with open(config.notes, "a") as file:
            file.write(f"{what} {ray.get_runtime_context().get_node_id()}\\n")

    def local_update(shared, per_client, state, stack):
        note("client")
        return honest.local_update(shared, per_client, state, stack)

    def aggregate(server, sums, reports):
        note("server")
        return honest.aggregate(server, sums, reports)

    return replace(honest, local_update=local_update, aggregate=aggregate)
'''
# A client actor needs 1.5 CPUs: it fits on the second machine only, and the server loop would too.
SCRIPT = """
import json, sys
from pathlib import Path
from selffl_ray.local_ray import quiet_ray
quiet_ray()
import ray
from ray.cluster_utils import Cluster
from selffl_ray.config import load_config, parse_part
from selffl_ray.api import run_experiment
from selffl_ray.sweep import SweepConfig
from selffl_ray.sweep_run import run_sweep

local = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
both = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, **local})
both.add_node(num_cpus=4, **local)
both.wait_for_nodes()
head, = (n["NodeID"] for n in ray.nodes() if n["Resources"]["CPU"] == 1)
base = {
    "plugins": ["my_plugin"],
    "training": {"num_rounds": 1, "num_local_steps": 2},
    "placement": {"clients_per_actor": 7, "cpus_per_actor": 1.5},
    "method": {"name": "where", "notes": str(Path("sweep.txt").absolute())},
}
raw = {
    "experiment": "home", "base": base, "space": {"training.learning_rate": [0.1]},
    "seeds": [0], "cpus_per_trial": 3.5,
}
done = run_sweep(parse_part(SweepConfig, raw, ""), output="sweep")
assert done.complete and not done.failed
config = load_config(None, [
    "plugins=[my_plugin]", f"method={{name: where, notes: {Path('run.txt').absolute()}}}",
    "training.num_rounds=1", "placement.clients_per_actor=7", "placement.cpus_per_actor=1.5",
    "tracking.enabled=false",
])
run_experiment(config, output="run")
Path("head.json").write_text(json.dumps(head))
ray.shutdown()
both.shutdown()
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Nodes of server loops and clients, of a sweep and of a run, on two machines; and the head."""
    box = Sandbox(tmp_path_factory.mktemp("home"))
    token = box.home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    (box.folder / "my_plugin.py").write_text(PLUGIN)
    (box.folder / "script.py").write_text(SCRIPT)
    # Paths of sockets must be short, and Ray notes in its usual place which cluster is the newest.
    temporary = tempfile.mkdtemp(prefix="selffl-", dir="/tmp")
    process = box.start(sys.executable, "script.py", RAY_AUTH_MODE="token", RAY_TMPDIR=temporary)
    try:
        _, err = process.communicate(timeout=360)
    finally:
        box.end_all()
        process.communicate(timeout=20)
        shutil.rmtree(temporary, ignore_errors=True)
    assert process.returncode == 0, err
    found = {
        name: [
            tuple(line.split()) for line in (box.folder / f"{name}.txt").read_text().splitlines()
        ]
        for name in ("sweep", "run")
    }
    return found, json.loads((box.folder / "head.json").read_text())


@pytest.mark.parametrize("name", ["sweep", "run"])
def test_server_loops_run_where_they_were_asked_for_and_clients_where_there_is_room(places, name):
    found, head = places
    at = {
        what: {node for kind, node in found[name] if kind == what} for what in ("server", "client")
    }
    assert at["server"] == {head}
    assert at["client"]
    assert head not in at["client"]
