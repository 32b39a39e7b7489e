"""A plugin: a method of choice whose clients are struck by faults in chosen rounds."""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from selffl_ray.algorithms.ditto import DittoConfig, ditto
from selffl_ray.algorithms.fedavg import FedAvgConfig, fedavg
from selffl_ray.registry import register_algorithm
from selffl_ray.trees import map_tree

ONCE = ("killed", "hanging", "starved", "slow", "raised")
"""Faults of a process or a moment: they strike once. Those of an update come back whenever the
round is computed."""
ROOM = 2**29
"""Bytes that a starved process may still take, so that what it asks for besides is granted."""


@dataclass(frozen=True, kw_only=True)
class StormConfig:
    """Faults as ``round client kind``, where to note that they have struck, and who is struck.

    starved processes stay so until they are replaced. With ``quiet`` only the updates are spoiled.
    """

    base: str = "fedavg"
    strikes: tuple[str, ...] = ()
    notes: str = ""
    slow_s: float = 0.0
    quiet: bool = False


@register_algorithm("storm", StormConfig)
def storm(config, federation):
    """FedAvg or Ditto in bad weather."""
    honest = fedavg(FedAvgConfig(), federation)
    if config.base == "ditto":
        honest = ditto(DittoConfig(), federation)
    strikes = [strike.split() for strike in config.strikes]

    def local_update(shared, per_client, state, stack):
        here = [
            (kind, client)
            for at, client, kind in strikes
            if int(at) == stack.round_index and client in stack.client_ids
        ]
        for kind, client in here:
            if kind in ONCE and not config.quiet:
                note = Path(config.notes) / f"{stack.round_index} {client} {kind}"
                strike_once(kind, note, config.slow_s)
        local = honest.local_update(shared, per_client, state, stack)
        for kind, client in here:
            bad_C = torch.tensor([client == one for one in stack.client_ids])
            if kind == "diverged":
                spoil = lambda rows: torch.where(bad_C[:, None], torch.nan, rows)  # noqa: B023, E731
                local = local._replace(payload=map_tree(spoil, local.payload))
            if kind == "misshapen":
                local = local._replace(payload=map_tree(lambda rows: rows[:, 1:], local.payload))
        return local

    return replace(honest, local_update=local_update)


def strike_once(kind, note, slow_s):
    """Do it to this process, and let the next one that comes here be."""
    if note.exists():
        if kind == "starved" and note.read_text() == str(os.getpid()):
            starve()
        return
    note.write_text(str(os.getpid()))
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hanging":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "slow":
        time.sleep(slow_s)
    elif kind == "raised":
        raise ValueError("the cat sat on the keys")
    else:
        starve()


def starve():
    """Run out of memory: more than the process may take is asked for."""
    most = psutil.Process().memory_info().vms + ROOM
    limit = resource.getrlimit(resource.RLIMIT_AS)
    if limit[0] == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (most, limit[1]))
    torch.ones(4 * ROOM)
