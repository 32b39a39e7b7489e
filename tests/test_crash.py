"""SIGKILL at every step of a run's writing: ``--resume`` ends like the run that was not killed.

The steps are those of real processes (``crash_child``), counted as they happen, so that a step that
is added to the writing is killed at as well.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

ROUNDS = 2
SETTINGS = [
    f"--set={setting}"
    for setting in (
        "placement.backend=local",
        "tracking.enabled=false",
        f"training.num_rounds={ROUNDS}",
        "training.num_local_steps=2",
        "training.participation_rate=0.1",
        "method={probe_every: 2, readout_steps: 2, max_steps: 2}",
        "evaluation.every=2",
        "checkpoint.every=1",
        "checkpoint.keep=1",
    )
]
BLOCK = 5
"""Clients a file: three files for 14 clients, one of which has no change in the second round."""


class Ended(NamedTuple):
    code: int
    steps: list[str]
    said: str


class Children:
    """Processes that run the command, one after the other."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(self, folder: Path, *arguments: str, last: int = 0) -> Ended:
        """The command until its end, or until its step number ``last``."""
        request = {"folder": str(folder), "arguments": arguments, "last": last, "block": BLOCK}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{json.dumps(request)}\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))

    def begin(self, folder: Path, *, last: int = 0) -> Ended:
        """A run from its start."""
        return self.run(folder, "run", *SETTINGS, "--output", str(folder), last=last)

    def go_on(self, folder: Path, *, last: int = 0) -> Ended:
        """What one does after a kill: go on, or begin again where there is no run yet."""
        if not (folder / "config.yaml").exists():
            assert not (folder / "checkpoints").exists()
            return self.begin(folder, last=last)
        return self.run(folder, "run", "--resume", str(folder), last=last)


@pytest.fixture(scope="module")
def children(stores) -> Iterator[Children]:
    """The server of the processes."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.crash_child"]
    with subprocess.Popen(command, cwd=root, start_new_session=True, **pipes) as server:
        yield Children(server)
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def whole(children, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of the run that nobody disturbs, and its steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = children.begin(folder)
    assert ended.code == 0, ended.said
    return folder, [step.replace(str(folder), "RUN") for step in ended.steps]


TABLES = ("rounds", "clients", "uncertainty")


def assert_same_run(folder: Path, other: Path, told: str) -> None:
    """Digest, tables and final checkpoint are equal, and nothing else lies in the folder."""
    one, two = (json.loads((f / "summary.json").read_text()) for f in (folder, other))
    assert (one["status"], one["digest"]) == ("FINISHED", two["digest"]), told
    for name in TABLES:
        frames = [pd.read_parquet(f / f"{name}.parquet") for f in (folder, other)]
        timed = [c for c in frames[0] if c.startswith("time/") or c.endswith("_s")]
        pd.testing.assert_frame_equal(*(f.drop(columns=timed) for f in frames), obj=told)
    trees = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (folder, other)]
    assert trees[0] == trees[1], told
    for file in (other / "checkpoints" / f"round_{ROUNDS - 1}").iterdir():
        same = folder / file.relative_to(other)
        assert same.read_bytes() == file.read_bytes(), told


def test_the_steps_that_are_counted_are_all_of_the_writing(whole):
    folder, steps = whole
    kinds = {step.split()[0] for step in steps}
    assert kinds == {
        *("write", "half", "fsync", "os.mkdir", "os.rename"),
        *("os.link", "os.remove", "os.rmdir"),
    }
    text = "\n".join(steps)
    for path in folder.rglob("*"):
        assert path.name in text, f"{path} was written without a step"
    for file in ("server.safetensors", "clients_000001.safetensors", "checkpoint.json"):
        for step in ("write", "half", "fsync"):
            assert sum(s.startswith(step) and s.endswith(f"/{file}") for s in steps) >= 1
    # On the disk before they have their names, and then the names.
    named = [i for i, s in enumerate(steps) if s.startswith("os.rename") and ".round_" in s]
    assert len(named) == ROUNDS
    for at in named:
        assert steps[at - 1].startswith("fsync RUN/checkpoints/.round_")
        assert steps[at + 1] == "fsync RUN/checkpoints"


def test_a_kill_at_any_step_of_the_writing_changes_nothing_in_the_end(children, whole, tmp_path):
    other, steps = whole
    newest = []
    for number, step in enumerate(steps, start=1):
        if step.startswith("fsync"):
            continue  # it changes nothing that a kill leaves behind: the next step's state
        folder, told = tmp_path / f"run-{number}", f"killed before step {number}: {step}"
        killed = children.begin(folder, last=number)
        assert killed.code == -signal.SIGKILL, told
        assert len(killed.steps) == number
        newest.append(sorted(p.name for p in folder.glob("checkpoints/round_*")))
        ended = children.go_on(folder)
        assert ended.code == 0, (told, ended.said)
        assert_same_run(folder, other, told)
        shutil.rmtree(folder)
    # The kills fell before the first checkpoint, after it, and in the removal of the first.
    assert [found for at, found in enumerate(newest) if at == 0 or found != newest[at - 1]] == [
        [],
        ["round_0"],
        ["round_0", "round_1"],
        ["round_1"],
    ]


def test_a_run_that_is_killed_again_whenever_it_goes_on_ends_the_same(children, whole, tmp_path):
    other, steps = whole
    folder, kills = tmp_path / "run", 0
    # Each attempt comes so far that something is written, rarely a checkpoint.
    last = len(steps) // 5
    ended = children.begin(folder, last=last)
    while ended.code == -signal.SIGKILL:
        kills += 1
        last += 3
        assert kills < len(steps)
        ended = children.go_on(folder, last=last)
    assert ended.code == 0, ended.said
    assert kills >= 3
    assert_same_run(folder, other, f"killed {kills} times")
