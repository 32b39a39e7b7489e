"""What runs on a workload: the plain loop, our placements, and other systems."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PLAIN = "plain loop"
LOCAL = "local pool"
ONE_ACTOR = "ray, 1 actor"
TWO_ACTORS = "ray, 2 actors"
DEDICATED = "ray, an actor each"
EVALUATED = "local pool, evaluated every round"
SELFFL = "local pool, Self-FL"
PFL = "pfl, 2 processes"
FLOWER = "Flower, 2 workers"

PLACEMENTS: dict[str, tuple[str, ...]] = {
    LOCAL: ("placement.backend=local",),
    ONE_ACTOR: ("placement.clients_per_actor={all}",),
    TWO_ACTORS: ("placement.clients_per_actor={half}",),
    DEDICATED: ("placement.clients_per_actor=1",),
    EVALUATED: ("placement.backend=local", "evaluation.every=1"),
    SELFFL: ("placement.backend=local", "method=selffl"),
}
"""Settings of our entries; {all} and {half} are numbers of clients."""
OTHER_MODEL = (SELFFL,)
"""Entries that do not end at FedAvg's model."""
PEERS = {PFL: ("pfl_peer.py", ("pfl",)), FLOWER: ("flower_peer.py", ("flwr", "ray"))}
"""Script of each peer, and the packages that it imports."""
ONLY = {DEDICATED: ("W1", "W2"), EVALUATED: ("W1", "W2"), SELFFL: ("W1",)}
"""Workloads of entries that do not run on all: up to 20 actors fit this kind of machine, and the
goals of evaluation and of Self-FL are about these."""
NAMES = (PLAIN, *PLACEMENTS, *PEERS)

HERE = Path(__file__).parent


class Entry(NamedTuple):
    """A name and the command that runs it; ``--params FILE`` is put behind it."""

    name: str
    command: tuple[str, ...]


def entries_of(workload: str, clients: int, file: Path, *, peers_python: str | None) -> list[Entry]:
    """Everything that runs on a workload.

    Args:
        file: the workload as ``benchmarks.export`` writes it.
        peers_python: interpreter that has the peers; None leaves them out.
    """
    ours = (sys.executable, "-m", "benchmarks.ours", workload)
    numbers = {"all": clients, "half": (clients + 1) // 2}
    found = [Entry(PLAIN, (sys.executable, "-m", "benchmarks.plain_loop", str(file)))]
    for name, settings in PLACEMENTS.items():
        if workload in ONLY.get(name, (workload,)):
            found.append(Entry(name, (*ours, *(s.format(**numbers) for s in settings))))
    if peers_python is not None:
        for name, (script, _) in PEERS.items():
            found.append(Entry(name, (peers_python, str(HERE / "peers" / script), str(file))))
    return found


def why_not(python: str, packages: Sequence[str]) -> str | None:
    """Why a peer cannot run with this interpreter; None if it can."""
    look = (
        "import importlib.util as u, sys; "
        "print(*[p for p in sys.argv[1:] if u.find_spec(p) is None])"
    )
    try:
        done = subprocess.run(
            [python, "-c", look, *packages], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"--peers-python {python} does not run: {error}"
    missing = done.stdout.split()
    if missing:
        return (
            f"{python} has no {' and no '.join(missing)}; install '.[bench]' into an environment "
            "of its own and give its interpreter as --peers-python"
        )
    return None
