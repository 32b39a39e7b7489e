"""Two processes never write one run: the second waits, and is refused if the first goes on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from selffl_ray import folder_lock, load_config, run_experiment
from selffl_ray.errors import RunError
from selffl_ray.folder_lock import only_writer

HOLD = """
import sys
from pathlib import Path
from selffl_ray.folder_lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def held_by_another(folder):
    """Until a line is written to the process, or it ends."""
    command, pipe = [sys.executable, "-c", HOLD, str(folder)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
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
    with held_by_another(tmp_path) as process:

        class LetGo(logging.Handler):
            """Ends the other one once it was said that it is waited for."""

            def emit(self, record):
                process.stdin.write("\n")
                process.stdin.flush()

        handler = LetGo()
        folder_lock.logger.addHandler(handler)
        try:
            with only_writer(tmp_path, 60):
                pass
        finally:
            folder_lock.logger.removeHandler(handler)
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


def test_where_only_files_can_be_locked_one_beside_the_folder_is(tmp_path, caplog, monkeypatch):
    """NFS: its locks need a descriptor that is open for writing."""
    real = fcntl.flock

    def files_only(handle, how):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(handle, how)

    monkeypatch.setattr("fcntl.flock", files_only)
    folder = tmp_path / "run"
    refused = pytest.raises(RunError, match=f"{folder}: another process is writing this run")
    with only_writer(folder, 0), refused, only_writer(folder, 0.1):
        pass
    with only_writer(folder, 0):
        pass
    assert list(folder.iterdir()) == []
    assert [r.getMessage() for r in caplog.records if "locks neither" in r.getMessage()] == []


def test_a_file_system_that_locks_nothing_is_said(tmp_path, caplog, monkeypatch):
    def refuse(handle, how):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING), only_writer(tmp_path, 0):
        pass
    assert "locks neither folders nor files (Bad file descriptor)" in caplog.text


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
