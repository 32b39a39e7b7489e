"""cluster.yaml and cluster-onprem.yaml: Ray accepts them, and they protect what they start."""

from __future__ import annotations

import os
import subprocess
import tomllib

import jsonschema
import pytest
import yaml

from selffl_ray.local_ray import quiet_ray
from tests.cluster.namespace import ROOT

AWS, ONPREM = "cluster.yaml", "cluster-onprem.yaml"
BOTH = pytest.mark.parametrize("name", [AWS, ONPREM])
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def check(config, **more):
    """Ray's own checks, which `ray up` begins with."""
    quiet_ray()
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config) | more)


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def starts(config):
    return config["head_start_ray_commands"] + config["worker_start_ray_commands"]


@BOTH
def test_ray_accepts_it(name):
    check(read(name))


@BOTH
def test_ray_refuses_a_slip_of_the_pen(name):
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        check(read(name), idle_timeout_minute=10)


@BOTH
def test_it_installs_this_version_with_the_exact_packages(name):
    commands = "\n".join(read(name)["setup_commands"])
    assert f"found == '{VERSION}'" in commands
    (install,) = [one for one in commands.splitlines() if '"$HOME/selffl_ray[' in one]
    assert "-c ~/selffl_ray/constraints.txt" in install


@BOTH
def test_what_it_copies_is_there(name):
    local = [one for one in read(name)["file_mounts"].values() if not one.startswith("~")]
    assert {"selffl_ray", "pyproject.toml", "constraints.txt", "cluster-env.sh"} <= set(local)
    assert all((ROOT / one).exists() for one in local)


@BOTH
def test_the_token_is_on_every_machine_before_ray_starts_there(name):
    config = read(name)
    # Files are copied to head and workers before any command of theirs.
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert all(one.startswith(". ~/selffl-env.sh; ") for one in starts(config))
    assert sum("ray start" in one for one in starts(config)) == 2


@BOTH
def test_servers_listen_on_the_loopback_of_the_head(name):
    for one in starts(read(name)):
        assert "mlflow server" not in one or "--host 127.0.0.1" in one
        assert "--head" not in one or "--dashboard-host=127.0.0.1" in one


def test_no_machine_on_aws_gets_the_group_that_ray_opens_to_the_world():
    for kind in read(AWS)["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"] == ["sg-FILL-IN"]
    assert "security_group" not in read(AWS)["provider"]


def test_machines_on_aws_that_nobody_needs_are_given_back():
    config = read(AWS)
    assert config["idle_timeout_minutes"] <= 15
    assert config["provider"]["cache_stopped_nodes"] is False
    head = config["head_node_type"]
    workers = [k for n, k in config["available_node_types"].items() if n != head]
    assert sum(k["max_workers"] for k in workers) <= config["max_workers"]


def sourced(show, **more):
    """What a command shows after the environment was read."""
    command = f". {ROOT / 'cluster-env.sh'}; {show}"
    env = {"HOME": os.environ["HOME"], "PATH": os.environ["PATH"]} | more
    done = subprocess.run(
        ["bash", "--norc", "-c", command], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_environment_protects_ray_and_shares_what_is_to_be_shared():
    shown = dict(line.split("=", 1) for line in sourced("env").splitlines() if "=" in line)
    assert shown["RAY_AUTH_MODE"] == "token"
    assert shown["RAY_USAGE_STATS_ENABLED"] == "0"
    assert shown["SELFFL_RAY_STORES"].startswith(shown["SELFFL_SHARED"])
    assert shown["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    for name in (AWS, ONPREM):
        assert f"mkdir -p {shown['SELFFL_SHARED']}" in "\n".join(read(name)["setup_commands"])


def test_workers_keep_the_python_of_the_cluster_whatever_bashrc_says(tmp_path):
    """Debian's bash reads .bashrc for ``bash -c`` too, at the first level of an ssh connection."""
    (tmp_path / ".bashrc").write_text("PATH=/of/somebody/else:$PATH\n")
    shown = sourced(
        "SHLVL=0 exec bash -c 'echo $PATH'", HOME=str(tmp_path), SSH_CLIENT="1.2.3.4 5 22"
    )
    assert shown.split(":")[0] == f"{tmp_path}/selffl-venv/bin"


def test_the_python_that_is_asked_for_is_the_one_of_the_constraints():
    commands = "\n".join(read(AWS)["setup_commands"] + read(ONPREM)["setup_commands"])
    wanted = "for Python 3.11 on Linux"
    assert wanted in (ROOT / "constraints.txt").read_text()
    assert "uv venv -q --seed --python 3.11 " in commands
    assert "python3.11 -m venv" in commands
