"""The whole life of a cluster on machines that one has, in a namespace: this machine is the host.

An ssh server of our own on loopback, ``ray up``, a sweep as a job, results fetched, ``ray down``.
The file is ``cluster-onprem.yaml`` with what a person fills in; packages are there already, so the
one command that would fetch them is left out.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.cluster.namespace import RAY, ROOT, mount, run

FILE = "cluster-onprem.yaml"
TUNNEL = 18265
RUNS = "/mnt/shared/selffl/runs"
SMALL = (
    *("base.training.num_rounds=4", "base.evaluation.every=2", "seeds=[0]", "confirm=null"),
    "space={method.inter: [moments, reml]}",
)
SWEEP = (
    *("python", "-m", "selffl_ray", "tune", "tune_configs/smoke.yaml", "--output", f"{RUNS}/smoke"),
    *(f"--set={one}" for one in SMALL),
)
SSHD = """
Port 22
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
"""
WAIT_S = 60


def main(folder: Path) -> dict[str, Any]:
    """Do it all; what was seen on the way."""
    place = checkout(folder)
    host(folder)
    seen: dict[str, Any] = {}
    os.chdir(place)
    seen["no token"] = run(*RAY, "up", "-y", FILE)
    seen["token"] = run(*RAY, "get-auth-token", "--generate")
    seen["up"] = run(*RAY, "up", "-y", FILE, timeout_s=300)
    wait(lambda: 5000 in listening())
    seen["listening"] = listening()
    seen["stranger"] = [ask(8265, path) for path in ("/api/jobs/", "/api/cluster_status")]
    tunnel = subprocess.Popen([*RAY, "dashboard", FILE, "--port", str(TUNNEL)])
    wait(lambda: TUNNEL in listening())
    seen |= jobs()
    tunnel.terminate()
    seen |= fetched(folder)
    stop_mlflow = 'kill "$(cat ~/mlflow.pid)"'
    seen["mlflow ended"] = run(*RAY, "exec", FILE, stop_mlflow)
    seen["down"] = run(*RAY, "down", "-y", FILE)
    wait(lambda: not set(listening()) & {5000, 6379, 8265})
    seen["left"] = [p.name() for p in psutil.process_iter() if p.name() in ("raylet", "gcs_server")]
    return seen


def checkout(folder: Path) -> Path:
    """A copy of what ``ray up`` and ``ray job submit`` are called in, with the file filled in."""
    place = folder / "checkout"
    place.mkdir()
    config = yaml.safe_load((ROOT / FILE).read_text())
    for local in config["file_mounts"].values():
        if not local.startswith("~"):
            source = ROOT / local
            (shutil.copytree if source.is_dir() else shutil.copy)(source, place / local)
    shutil.copytree(ROOT / "tune_configs", place / "tune_configs")
    config["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
    config["auth"] = {"ssh_user": me(), "ssh_private_key": str(folder / "key")}
    left_out = [c for c in config["setup_commands"] if "pip install" in c]
    assert len(left_out) == 1, left_out
    config["setup_commands"].remove(left_out[0])
    (place / FILE).write_text(yaml.safe_dump(config))
    return place


def me() -> str:
    """Who we are."""
    return pwd.getpwuid(os.geteuid()).pw_name


def host(folder: Path) -> None:
    """This machine as a host: a home, a shared folder, users, and an ssh server, all ours."""
    home = folder / "host"
    home.mkdir()
    (home / "selffl-venv").symlink_to(sys.prefix)
    (folder / "mnt" / "shared").mkdir(parents=True)
    mount(folder / "mnt", "/mnt")
    mount(folder / "mnt" / "shared", "/mnt/shared")
    users(folder, home)
    # sshd wants a folder of root's there.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"], check=True)
    Path("/run/sshd").mkdir()
    for name in ("host_key", "key"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(make, check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    found = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    assert found is not None
    start = [found, "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")]
    subprocess.run(start, check=True)
    wait(lambda: 22 in listening())


def users(folder: Path, home: Path) -> None:
    """The machine's users, with a home of ours for ours, and the one that sshd needs."""
    lines = []
    for user in pwd.getpwall():
        if user.pw_name == me():
            lines.append(f"{me()}:x:{user.pw_uid}:{user.pw_gid}::{home}:/bin/bash")
        elif user.pw_name != "sshd":
            lines.append(":".join(map(str, user)))
    lines.append("sshd:x:74:65534::/run/sshd:/usr/sbin/nologin")
    (folder / "passwd").write_text("\n".join(lines) + "\n")
    mount(folder / "passwd", "/etc/passwd")


def listening() -> dict[int, list[str]]:
    """Ports with the addresses that somebody listens on."""
    found: dict[int, set[str]] = {}
    for one in psutil.net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN:
            found.setdefault(one.laddr.port, set()).add(one.laddr.ip)
    return {port: sorted(addresses) for port, addresses in found.items()}


def ask(port: int, path: str) -> int:
    """Status of a question without a token."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def jobs() -> dict[str, Any]:
    """What a person does with a cluster that is up, through the tunnel."""
    address = ("--address", f"http://127.0.0.1:{TUNNEL}")
    submit = (*RAY, "job", "submit", *address, "--working-dir", ".", "--")
    with_token = {"RAY_AUTH_MODE": "token"}
    doctor = ("python", "-m", "selffl_ray", "doctor")
    return {
        "submit without a token": run(*submit, *doctor),
        "doctor": run(*submit, *doctor, **with_token),
        "tune": run(*submit, *SWEEP, timeout_s=240, **with_token),
    }


def fetched(folder: Path) -> dict[str, Any]:
    """What is brought home."""
    shared = Path(RUNS).parent
    commands = {}
    for name, remote in (("run", f"{RUNS}/smoke/"), ("mlflow", f"{shared}/mlflow/")):
        (folder / "fetched" / name).mkdir(parents=True)
        local = str(folder / "fetched" / name)
        commands[f"fetch {name}"] = run(*RAY, "rsync-down", FILE, remote, local)
    return commands


def wait(condition: Callable[[], bool]) -> None:
    """Until it holds; not for ever."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, json.dumps(listening())
        time.sleep(0.3)
