"""The ``selffl`` command in processes that count the steps of their writing and die at one of them.

Started by a test: ``python -m tests.crash_child``. It reads one request a line (JSON: the folder
that is watched, the command's arguments, the step at which to die, the clients a file), answers
with one line each, and does every request in a fork of itself: a process of its own that does not
have to import everything again.

A step is what Python is about to change in the file system inside the folder (an audit hook sees
it, so nothing can be forgotten), a call of ``fsync``, and for whole files also the moment when half
of the content is there. SIGKILL comes before the step is done; whatever the disk looks like
between two steps is therefore what some kill leaves behind.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch

from selffl_ray import checkpoint, commands
from selffl_ray.cli import main
from selffl_ray.config import load_config
from selffl_ray.experiment import prepare_experiment

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Steps:
    """Counts the steps in a folder, writes them down, and ends the process before the n-th.

    Args:
        log: descriptor of a file outside of the folder that each step is written to.
        last: number of the step that is not done any more, from 1; 0 goes on to the end.
    """

    def __init__(self, folder: Path, log: int, last: int) -> None:
        self._folder = str(folder)
        self._log = log
        self._last = last
        self._count = 0
        self._inside_writer = False

    def take(self, name: str, path: object) -> None:
        """One more step."""
        self._count += 1
        os.write(self._log, f"{name} {path}\n".encode())
        if self._count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if self._inside_writer:
            return
        if event == "open" and arguments[2] & WRITES and isinstance(arguments[0], str):
            self._take_inside("open", arguments[:1])
        elif event == "os.mkdir" and Path(os.fsdecode(arguments[0])).exists():
            pass  # it changes nothing
        elif event in CHANGES:
            self._take_inside(event, arguments[: 2 if event in ("os.rename", "os.link") else 1])

    def _take_inside(self, name: str, paths: tuple[Any, ...]) -> None:
        found = [os.fsdecode(path) for path in paths]
        # A relative path is one of rmtree, which goes by the folder's descriptor.
        if any(path.startswith(self._folder) or not Path(path).is_absolute() for path in found):
            self.take(name, " ".join(found))

    def in_halves(self, real: Callable[..., Any], path_at: int) -> Callable[..., Any]:
        """A function that writes a file, stopping before it and half-way."""

        @functools.wraps(real)
        def write(*args: Any, **kwargs: Any) -> Any:
            path = Path(args[path_at])
            if not str(path).startswith(self._folder):
                return real(*args, **kwargs)
            self.take("write", path)
            self._inside_writer = True
            try:
                done = real(*args, **kwargs)
                whole = path.read_bytes()
                path.write_bytes(whole[: len(whole) // 2])
                self.take("half", path)
                path.write_bytes(whole)
                return done
            finally:
                self._inside_writer = False

        return write


def watch(steps: Steps) -> None:
    """Count from now on, in this process."""
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        steps.take("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
        real_fsync(descriptor)

    os.fsync = fsync
    pyarrow.parquet.write_table = steps.in_halves(pyarrow.parquet.write_table, 1)
    checkpoint.save_file = steps.in_halves(checkpoint.save_file, 1)
    Path.write_text = steps.in_halves(Path.write_text, 0)  # type: ignore[method-assign]
    sys.addaudithook(steps.hear)


def do(request: dict[str, Any]) -> dict[str, Any]:
    """One request in a fork; how it ended, and the steps that it came to."""
    folder = Path(request["folder"])
    log = folder.with_name(f"{folder.name}.steps")
    said = folder.with_name(f"{folder.name}.said")
    child = os.fork()
    if child == 0:
        code: int | str | None = 99
        try:
            text = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(text, 1)
            os.dup2(text, 2)
            checkpoint.BLOCK = request["block"]
            opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            watch(Steps(folder, opened, request["last"]))
            code = main(request["arguments"])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 98)
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "steps": log.read_text().splitlines(),
        "said": said.read_text(),
    }


def serve() -> None:
    """Answer requests until there are none."""
    torch.set_num_threads(1)
    # Everything that is imported late or built once, so that the forks find it there.
    assert commands.run
    prepare_experiment(load_config(None))
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
