"""Two processes never write one run: the second waits, and is refused if the first goes on."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import subprocess
import sys
import time

import pytest

from selffl_ray import folder_lock, load_config, run_experiment
from selffl_ray.errors import RunError
from selffl_ray.folder_lock import only_writer

HOLD = """
import sys, time
from pathlib import Path
from selffl_ray.folder_lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def held_by_another(folder, seconds=60):
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_folder_that_another_process_holds_is_refused_by_name(tmp_path):
    with held_by_another(tmp_path / "run"):
        began = time.monotonic()
        message = f"{tmp_path}/run: another process is writing this run; .* give --resume"
        with pytest.raises(RunError, match=message), only_writer(tmp_path / "run", 0.3):
            pass
        assert time.monotonic() - began >= 0.3


def test_it_is_waited_for_and_said_once(tmp_path, caplog):
    with held_by_another(tmp_path, seconds=1), only_writer(tmp_path, 30):
        pass
    waits = [r for r in caplog.records if "waiting for it" in r.getMessage()]
    assert len(waits) == 1


def test_it_is_free_at_once_after_the_end_an_error_and_a_kill(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path, 0):
        raise KeyError
    with held_by_another(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with only_writer(tmp_path, 0):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_locks_no_folders_is_said(tmp_path, caplog, monkeypatch):
    def refuse(handle, how):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING), only_writer(tmp_path, 0):
        pass
    assert "locks no folders (Bad file descriptor)" in caplog.text


def test_a_run_is_not_begun_in_a_folder_that_is_being_written(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE_S", 0.2)
    settings = ("placement.backend=local", "tracking.enabled=false", "training.num_rounds=1")
    config = load_config(None, settings)
    folder = tmp_path / "run"
    with held_by_another(folder):
        with pytest.raises(RunError, match="another process is writing this run"):
            run_experiment(config, output=folder)
        assert list(folder.iterdir()) == []
    assert run_experiment(config, output=folder).summary["status"] == "FINISHED"
