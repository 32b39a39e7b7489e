"""A disk that is full for some rounds, or for good: a real one, of a namespace's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.cluster.namespace import unshare, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

ROUNDS = 12
SCRIPT = """
import os, sys
from pathlib import Path
from selffl_ray import load_config, run_experiment, tables
from selffl_ray.errors import SelfFLError
from selffl_ray.run_loop import Message, Progress

rounds, full_from, full_until = (int(word) for word in sys.argv[1:4])
outside = Path(sys.argv[4])
tables.FLUSH_SECONDS = 0.0
ballast = Path("disk/ballast")

def watch(event):
    pass

class Filling(tables.RunTables):
    # Within the server loop: events reach a watcher late.
    def add(self, record):
        if record.plan.round_index == full_from:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        if record.plan.round_index == full_until:
            ballast.unlink()
        super().add(record)

from selffl_ray import run_writer
run_writer.RunTables = Filling
config = load_config(None, [
    "method=fedavg", "placement.backend=local", f"training.num_rounds={rounds}",
    "training.num_local_steps=2", "checkpoint.every=2", "tracking.uri=sqlite:///disk/mlflow.db",
    *sys.argv[5:],
])
said = []
try:
    result = run_experiment(config, output="disk/run", watch=said.append)
    result.rounds.to_parquet(outside / "rounds.parquet")
    (outside / "status").write_text(result.summary["status"])
except SelfFLError as error:
    (outside / "status").write_text(str(error))
(outside / "said").write_text("\\n".join(e.text for e in said if isinstance(e, Message)))
(outside / "left").write_text("\\n".join(str(p) for p in Path("disk/run").rglob("*")))
"""


def on_a_disk(folder: Path, full_from: int, full_until: int, *more: str) -> Path:
    """Run with 4 MB of disk, full from one round on until another; the folder of what was seen."""
    (folder / "disk").mkdir()
    (folder / "script.py").write_text(SCRIPT)
    numbers = (str(ROUNDS), str(full_from), str(full_until))
    mount = 'mount -t tmpfs -o size=4m none disk && exec "$@"'
    command = (sys.executable, "script.py", *numbers, str(folder), *more)
    done = subprocess.run(
        [*unshare(), "sh", "-c", mount, "sh", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return on_a_disk(tmp_path_factory.mktemp("undisturbed"), -1, -1)


def test_a_disk_that_is_full_for_some_rounds_costs_checkpoints_and_nothing_else(
    tmp_path, undisturbed
):
    on_a_disk(tmp_path, 3, 8)
    assert (tmp_path / "status").read_text() == "FINISHED"
    whole, found = (pd.read_parquet(f / "rounds.parquet") for f in (undisturbed, tmp_path))
    assert found["round_index"].tolist() == list(range(ROUNDS))
    assert found["digest"].tolist() == whole["digest"].tolist()
    timeless = [c for c in whole if c.startswith(("test/", "val/", "train/"))]
    assert found[timeless].equals(whole[timeless])
    said = (tmp_path / "said").read_text().splitlines()
    assert sum("cannot be written for now" in line for line in said) == 1
    assert all("No space left on device" in line for line in said if "for now" in line)
    assert [line.partition(":")[0] for line in said if "no checkpoint" in line] == [
        "no checkpoint after round 3",
        "no checkpoint after round 5",
        "no checkpoint after round 7",
    ]
    left = (tmp_path / "left").read_text().splitlines()
    assert {"disk/run/checkpoints/round_9", "disk/run/checkpoints/round_11"} <= set(left)
    assert not [name for name in left if Path(name).name.startswith(".")]


def test_a_disk_that_stays_full_ends_the_run_with_one_line_and_the_last_checkpoint(tmp_path):
    on_a_disk(tmp_path, 3, ROUNDS)
    status = (tmp_path / "status").read_text()
    assert status.startswith("the run ended, but its tables cannot be written to")
    assert "No space left on device" in status
    assert "make room and give --resume" in status
    assert status.endswith("disk/run/checkpoints/round_1")
    assert "\n" not in status
    left = (tmp_path / "left").read_text().splitlines()
    assert "disk/run/rounds.parquet" in left
    assert not [name for name in left if Path(name).name.startswith(".")]
