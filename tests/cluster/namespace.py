"""A place for commands that end every Ray of a machine, or dial addresses that are not theirs.

``ray down`` runs ``ray stop``, which ends whatever Ray it sees; an imitation of AWS invents
addresses, and ``ray up`` dials them. So such commands run among processes of their own (nobody
else's can be seen), with a network that has nothing but loopback, and with folders of their own
where Ray's places are fixed. Inside, ``python -m tests.cluster.namespace MODULE FOLDER`` calls
``MODULE.main(FOLDER)``; it refuses to run anything if one of the walls is missing.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
"""The command ``ray`` of this Python."""
WALLS = ("pid", "net", "mnt")
OUTSIDE = "SELFFL_RAY_TEST_OUTSIDE"
"""Environment variable with the walls of whoever asks, to be sure that they are left."""
UNSHARE = ("unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc")
AS_ROOT = ("--user", "--map-root-user")
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
"""To bring a network interface up, from linux/sockios.h."""


def walls() -> dict[str, str]:
    """The namespaces of this process."""
    return {name: str(Path(f"/proc/self/ns/{name}").readlink()) for name in WALLS}


def unshare() -> list[str]:
    """The command that opens a namespace here; root needs no namespace of users."""
    return [*UNSHARE, *(() if os.geteuid() == 0 else AS_ROOT)]


def why_not() -> str | None:
    """What is missing for a namespace on this machine; None if nothing is."""
    if shutil.which("unshare") is None:
        return "there is no unshare (Debian: util-linux)"
    probe = subprocess.run([*unshare(), "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"no namespace can be made: {probe.stderr.strip()}"
    return None


def enter(module: str, folder: Path, timeout_s: float, **more: str) -> dict[str, Any]:
    """Call ``module.main(folder)`` in a namespace; what it wrote to ``seen.json``.

    Everything that was started there ends with it, also after the time-out.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    home, temporary = folder / "me", folder / "tmp"
    home.mkdir()
    temporary.mkdir()
    done = subprocess.run(
        [*unshare(), sys.executable, "-m", __name__, module, str(folder)],
        cwd=ROOT,
        env=kept
        | {
            OUTSIDE: json.dumps(walls()),
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            **more,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    seen: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return seen


def run(*command: str, timeout_s: float = 180, cwd: Path | None = None, **more: str) -> list[Any]:
    """Run a command in the namespace; its status and its output."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | more,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    print("$", *command, "\n" + done.stdout, flush=True)
    return [done.returncode, done.stdout]


# -- inside ----------------------------------------------------------------------------------------


def _check_walls() -> None:
    outside = json.loads(os.environ.pop(OUTSIDE))
    shared = [name for name, where in walls().items() if where == outside[name]]
    interfaces = [name for _, name in socket.if_nameindex()]
    if shared or os.getpid() != 1 or interfaces != ["lo"]:
        sys.exit(f"not in a namespace of our own: {shared=}, {os.getpid()=}, {interfaces=}")


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        ask = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, ask))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


def mount(folder: Path, place: str) -> None:
    """Put a folder or a file of ours in the place of the machine's, in here only."""
    subprocess.run(["mount", "--bind", str(folder), place], check=True)


def _own_places(folder: Path) -> None:
    (folder / "ray").mkdir()
    Path("/tmp/ray").mkdir(exist_ok=True)
    mount(folder / "ray", "/tmp/ray")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)


def _reap_until(child: int) -> int:
    """As the first process: bury whoever ends, until the child does; its status."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def _main(module: str, folder: Path) -> None:
    _check_walls()
    _loopback_up()
    _own_places(folder)
    child = os.fork()
    if child:
        sys.exit(_reap_until(child))
    seen = importlib.import_module(module).main(folder)
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
