"""A Ray of our own ends with us; one that was there before does not."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from selffl_ray.console import size
from selffl_ray.local_ray import LAST_STARTED, LOOPBACK, UNUSED_HELPERS, _altered
from selffl_ray.runtime.cluster import cluster
from tests.runtime.processes import Sandbox
from tests.runtime.saboteur import ROOT

pytestmark = pytest.mark.ray

RUN = (
    "run",
    "--set=training.num_rounds=2",
    "--set=placement.clients_per_actor=14",
    "--set=tracking.enabled=false",
)
PLUGIN = '''
"""A method of the user's own, which says what it did where."""
import os
from dataclasses import dataclass, replace
from selffl_ray.algorithms.fedavg import FedAvgConfig, fedavg
from selffl_ray.registry import register_algorithm

@dataclass(frozen=True, kw_only=True)
class MineConfig:
    notes: str = ""

@register_algorithm("mine", MineConfig)
def mine(config, federation):
    """FedAvg that takes notes."""
    honest = fedavg(FedAvgConfig(), federation)

    def note(what):
        with open(config.notes, "a") as file:
            file.write(f"{what} {os.getpid()}\\n")

    def local_update(shared, per_client, state, stack):
        note("client")
        return honest.local_update(shared, per_client, state, stack)

    def aggregate(server, sums, reports):
        note("server")
        return honest.aggregate(server, sums, reports)

    return replace(honest, local_update=local_update, aggregate=aggregate)
'''


@pytest.fixture
def sandbox(tmp_path):
    """Commands of a test; none of them outlives it."""
    box = Sandbox(tmp_path)
    yield box
    box.end_all()


@pytest.fixture(scope="module")
def existing(tmp_path_factory):
    """A cluster that somebody else started: its sandbox and its address."""
    box = Sandbox(tmp_path_factory.mktemp("cluster"))
    # Paths of sockets must be short.
    temporary = tempfile.mkdtemp(prefix="selffl-", dir="/tmp")
    give_token(box)
    ports = free_ports(4)
    process = box.start(
        str(Path(sys.executable).with_name("ray")),
        *("start", "--head", "--block", "--num-cpus=2", f"--temp-dir={temporary}"),
        *(f"--node-ip-address={LOOPBACK}", "--include-dashboard=false", f"--port={ports[0]}"),
        *(f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}"),
        f"--ray-client-server-port={ports[3]}",
        RAY_AUTH_MODE="token",
        output=subprocess.DEVNULL,
    )
    try:
        wait_for(box, process, ports[0])
        yield box, f"{LOOPBACK}:{ports[0]}"
    finally:
        process.send_signal(signal.SIGTERM)
        box.all_gone(within_s=20)
        box.end_all()
        process.wait(timeout=20)
        shutil.rmtree(temporary, ignore_errors=True)


def give_token(box):
    """A token of the sandbox's own; whoever does not have it cannot connect."""
    folder = box.home / ".ray"
    folder.mkdir()
    (folder / "auth_token").write_text(secrets.token_hex(32))


def free_ports(count):
    """Ports that nobody listens on, above those that Ray's workers take."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(box, process, port):
    deadline = time.monotonic() + 60
    while not (ports_open(f"{LOOPBACK}:{port}") and raylets(box)):
        assert process.poll() is None, f"ray start ended with {process.returncode}"
        assert time.monotonic() < deadline, "ray start did not start a node"
        time.sleep(0.2)


def raylets(box):
    """Ray's node processes of a sandbox."""
    return {process.pid for process in box.alive() if "raylet" in process.name()}


def ports_open(address):
    host, _, port = address.partition(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host, int(port)), timeout=5).close()
        return True
    return False


def test_a_connection_that_exists_is_used_and_left_open(local_ray):
    with cluster() as here:
        assert not here.ours
        assert [(node.cpus, node.gpus) for node in here.nodes] == [(2.0, 2.0)]
    assert local_ray.is_initialized()


def test_an_existing_cluster_is_used_with_plugins_and_outlives_the_run(existing, tmp_path):
    box, address = existing
    (box.folder / "my_plugin.py").write_text(PLUGIN)
    notes = tmp_path / "notes"
    before = raylets(box)
    assert len(before) == 1
    done = box.selffl(
        *RUN,
        "--set=plugins=[my_plugin]",
        f"--set=method={{name: mine, notes: {notes}}}",
        f"--output={tmp_path / 'run'}",
        RAY_ADDRESS=address,
        RAY_AUTH_MODE="token",
    )
    assert done.status == 0, done.err
    assert (tmp_path / "run" / "rounds.parquet").exists()
    wrote = dict(line.split() for line in notes.read_text().splitlines())
    # The driver actor and the client actor: two processes of that cluster.
    assert set(wrote) == {"client", "server"}
    assert wrote["client"] != wrote["server"]
    assert ports_open(address)
    assert raylets(box) == before


def test_sigterm_ends_a_run_on_an_existing_cluster_after_its_round(existing):
    """As ``ray job stop`` sends it; Ray's own handler would end the command at once."""
    box, address = existing
    process = box.start(
        *(str(Path(sys.executable).with_name("selffl")), *RUN, "--set=training.num_rounds=3000"),
        RAY_ADDRESS=address,
        RAY_AUTH_MODE="token",
    )
    assert "round" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping after this round" in err
    assert out.startswith("stopped after ")


def test_a_cluster_that_refuses_our_token_is_a_usage_error_with_the_remedy(existing, sandbox):
    give_token(sandbox)
    done = sandbox.selffl(*RUN, RAY_ADDRESS=existing[1], RAY_AUTH_MODE="token")
    assert done.status == 2
    last = done.err.splitlines()[-1]
    assert last.startswith(f"selffl: RAY_ADDRESS={existing[1]} cannot be reached")
    assert "RAY_AUTH_MODE=token" in last
    assert "Traceback" not in done.err


@pytest.mark.parametrize("address", ["closed port", "nonsense"])
def test_an_unreachable_cluster_is_one_clear_line_at_once(sandbox, address):
    if address == "closed port":
        address = f"{LOOPBACK}:{free_ports(1)[0]}"
    done = sandbox.selffl(*RUN, RAY_ADDRESS=address)
    assert done.status == 2
    assert done.err.startswith(f"selffl: RAY_ADDRESS={address} cannot be reached")
    assert "unset RAY_ADDRESS" in done.err
    assert done.err.count("\n") == 1
    # Ray by itself tries for more than five minutes.
    assert done.seconds < 60


LOST_A_NODE = """
import os, sys
import selffl_ray.runtime
from ray.cluster_utils import Cluster

head = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}
nodes = Cluster(initialize_head=True, head_node_args=head)
room = {"node_ip_address": "127.0.0.1", "memory": 3 * 2**30}
nodes.add_node(num_cpus=2, num_gpus=1, **room)
nodes.remove_node(nodes.add_node(num_cpus=3, **room))
os.environ["RAY_ADDRESS"] = nodes.address
import time
from selffl_ray.doctor import examine
from selffl_ray.runtime.cluster import cluster_nodes
# Ray may need a while to notice.
deadline = time.monotonic() + 60
while all(node.alive for node in cluster_nodes()) and time.monotonic() < deadline:
    time.sleep(1)
for finding in examine():
    if finding.name.startswith("node"):
        print("found", finding.name, finding.found, finding.remedy is None, sep="|")
nodes.shutdown()
"""


def test_the_doctor_lists_the_nodes_that_are_alive_and_those_that_are_gone(sandbox):
    process = sandbox.start(sys.executable, "-c", LOST_A_NODE, PYTHONPATH=str(ROOT))
    out, err = process.communicate(timeout=170)
    lines = [line.split("|")[1:] for line in out.splitlines() if line.startswith("found|")]
    assert lines, err
    at = f"{LOOPBACK} ({socket.gethostname()})"
    assert lines.pop(0) == ["nodes", "2 alive, 1 gone", "True"]
    assert lines.pop() == ["node", f"{at} gone", "False"]
    assert [name for name, *_ in lines] == ["node", "node"]
    assert {good for *_, good in lines} == {"True"}
    small, large = sorted(found for _, found, _ in lines)
    assert small.startswith(f"{at} alive, 1 CPUs, 0 GPUs, ")
    assert large == f"{at} alive, 2 CPUs, 1 GPUs, {size(3 * 2**30)} for actors"


CHILDREN = """
from selffl_ray.runtime.cluster import cluster
import time
import psutil
import ray

with cluster():
    for process in psutil.Process().children():
        print(process.name() if process.status() == "zombie" else " ".join(process.cmdline()))
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    # Longer than Ray's agent waits before it looks for a dashboard again.
    time.sleep(3)
    print("LOGS", ray._private.worker.global_worker.node.get_logs_dir_path())
"""


HELPERS = ("_private/log_monitor.py", "autoscaler/_private/monitor.py", "dashboard/dashboard.py")


def test_helpers_of_ray_that_nobody_needs_are_not_started_nor_missed(sandbox):
    import ray

    # The names are those that this version of Ray would start.
    scripts = [Path(ray.__file__).parent / name for name in HELPERS]
    assert all(script.exists() for script in scripts)
    process = sandbox.start(sys.executable, "-c", CHILDREN)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    children, _, logs = out.partition("LOGS ")
    assert "raylet" in children
    assert not any(str(script) in children for script in scripts)
    agent = (Path(logs.strip()) / "dashboard_agent.log").read_text()
    assert "EventAgent" in agent
    assert "dashboard http address" not in agent
    assert sandbox.all_gone(within_s=15), sandbox.alive()


def test_ray_starts_its_helpers_afterwards_and_where_usage_reports_are_wanted(monkeypatch):
    from ray._private.node import Node

    own = {name: getattr(Node, name) for name in (*UNUSED_HELPERS, LAST_STARTED)}
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with _altered(lambda: None, []):
        assert all(getattr(Node, name) == own[name] for name in UNUSED_HELPERS)
        assert getattr(Node, LAST_STARTED) != own[LAST_STARTED]
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with contextlib.suppress(RuntimeError), _altered(lambda: None, []):
        assert not set(own.values()) & {getattr(Node, name) for name in own}
        raise RuntimeError("ray.init has failed")
    assert {name: getattr(Node, name) for name in own} == own


def test_a_ray_of_our_own_is_gone_when_the_command_ends(sandbox):
    process = sandbox.start(
        *(sys.executable, "-m", "selffl_ray", *RUN, f"--output={sandbox.folder / 'run'}")
    )
    seen = set()
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        seen |= {p.pid for p in sandbox.alive()}
        time.sleep(0.2)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 0, err
    assert "selffl-two_tap" in out
    # The command, GCS, raylet, a driver actor, a client actor, and Ray's helpers.
    assert len(seen) > 5
    assert sandbox.all_gone(within_s=15), sandbox.alive()
