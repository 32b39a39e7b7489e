"""SIGKILL of a whole command with the Ray that it started: what is left, and that one goes on.

Ray's daemons are in the command's process group and end with it. Actors have groups of their own:
they are left behind, and end by themselves once they miss their node's daemon. If only the command
is killed, its daemons are left too and end in the same way. ``--resume`` is given at once, while
they may still be there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from selffl_ray.api import run_experiment
from selffl_ray.config import load_config
from tests.runtime.processes import Sandbox

pytestmark = [pytest.mark.ray, pytest.mark.limit_s(500)]

ROUNDS = 150
SETTINGS = (
    f"training.num_rounds={ROUNDS}",
    "training.num_local_steps=5",
    "evaluation.every=50",
    "checkpoint.every=3",
    "placement.clients_per_actor=7",
    "tracking.enabled=false",
)
PATIENCE_S = 150.0
"""Longest time in which all that a kill leaves must have ended by itself: actors are gone within
seconds, but Ray's agents first try to reach its GCS for a minute."""


def checkpoints(folder: Path) -> list[int]:
    return sorted(
        int(p.name.removeprefix("round_")) for p in folder.glob("checkpoints/round_[0-9]*")
    )


def wait_for_rounds(process: subprocess.Popen[str], folder: Path, after: int) -> None:
    """Until there is a checkpoint of a later round than ``after``."""
    deadline = time.monotonic() + 120
    while max(checkpoints(folder), default=-1) <= after:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tree_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The command and all that it started, by process id."""
    command = psutil.Process(process.pid)
    return {p.pid: p for p in (command, *command.children(recursive=True))}


def name_of(process: psutil.Process) -> str:
    """Of an actor its class, whatever it does now; "" if it has just ended."""
    try:
        return process.name().removeprefix("ray::").split(".")[0]
    except psutil.Error:
        return ""


def group_of(pid: int) -> int | None:
    """The process group; None of a process that has just ended."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def kill_group(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL to the group, of which the command is the leader; what may be left."""
    tree = tree_of(process)
    members = {pid for pid in tree if group_of(pid) == process.pid}
    assert {name_of(tree[pid]) for pid in members} >= {"gcs_server", "raylet"}
    others = [p for pid, p in tree.items() if pid not in members]
    # Where there are more cores than actors, workers of Ray's wait for more.
    names = {name_of(p) for p in others} - {"", "IDLE"}
    assert names == {"ClientActor", "DriverActor"}
    os.killpg(process.pid, signal.SIGKILL)
    return others


def kill_command(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL to the command alone; what may be left."""
    tree = tree_of(process)
    process.kill()
    return [p for pid, p in tree.items() if pid != process.pid]


def test_a_run_that_is_killed_with_all_of_its_ray_goes_on_at_once_to_the_same_end(tmp_path):
    """Killed twice: with its group, and after that the command alone."""
    quiet = load_config(None, (*SETTINGS, "placement.backend=local"))
    run_experiment(quiet, output=tmp_path / "quiet")
    box, folder, reached = Sandbox(tmp_path), tmp_path / "run", -1
    begin = ("run", "--output=run", *(f"--set={setting}" for setting in SETTINGS))
    go_on = ("run", "--resume", "run")
    left: list[psutil.Process] = []
    try:
        for command, kill in ((begin, kill_group), (go_on, kill_command)):
            process = box.start(
                sys.executable, "-m", "selffl_ray", *command, output=subprocess.DEVNULL
            )
            wait_for_rounds(process, folder, reached)
            left += kill(process)
            assert process.wait(timeout=10) == -signal.SIGKILL
            reached = max(checkpoints(folder))
            assert reached < ROUNDS - 1, "the kill came when the rounds were done"
        resumed = box.selffl(*go_on)
        assert resumed.status == 0, resumed.err
        assert psutil.wait_procs(left, timeout=PATIENCE_S)[1] == []
        assert box.all_gone(within_s=PATIENCE_S), box.alive()
    finally:
        box.end_all()
    assert_same(folder, tmp_path / "quiet")


def assert_same(folder: Path, other: Path) -> None:
    """Tables and last checkpoint are equal, and no draft is left."""
    for name in ("rounds", "clients", "uncertainty"):
        frames = [pd.read_parquet(f / f"{name}.parquet") for f in (folder, other)]
        timed = [c for c in frames[0] if c.startswith("time/") or c.endswith("_s")]
        own = [c for c in frames[0] if c in ("events", "faults", "clients/faults")]
        pd.testing.assert_frame_equal(*(f.drop(columns=[*timed, *own]) for f in frames))
    # Whoever outlives the client actors by a moment notes their death, and that stays.
    rounds = [pd.read_parquet(f / "rounds.parquet") for f in (folder, other)]
    noted = [json.loads(text) for text in rounds[0]["events"]]
    assert {event["kind"] for events in noted for event in events} <= {"died"}
    counts = [sum(event["num_clients"] for event in events) for events in noted]
    assert rounds[0]["faults"].tolist() == counts
    assert not rounds[1]["faults"].any()
    assert len(frames[0]["round_index"].unique()) == ROUNDS
    trees = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (folder, other)]
    assert trees[0] == trees[1]
    for file in (other / "checkpoints" / f"round_{ROUNDS - 1}").iterdir():
        assert (folder / file.relative_to(other)).read_bytes() == file.read_bytes()
