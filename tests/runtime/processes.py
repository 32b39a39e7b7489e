"""Commands in processes of their own: marked, watched, and ended by their ids only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "SELFFL_RAY_TEST_MARK"
"""Environment variable that everything which a command starts inherits, Ray's processes too."""


@dataclass
class Sandbox:
    """A folder to run commands in, with a home, an MLflow store and a mark of its own."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.time)

    @property
    def home(self) -> Path:
        """Home of the commands: Ray's token is kept there."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return home

    def environment(self, **more: str) -> dict[str, str]:
        """Variables of a command; whatever concerns Ray and MLflow is ours."""
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTEST"))
        }
        return inherited | {
            MARK: self.mark,
            "HOME": str(self.home),
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            **more,
        }

    def start(
        self, *command: str, output: int = subprocess.PIPE, **more: str
    ) -> subprocess.Popen[str]:
        """Start a command in a session of its own, with its output in pipes (or nowhere)."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )

    def selffl(self, *arguments: str, timeout_s: float = 120, **more: str) -> Finished:
        """Run ``selffl`` to its end; whatever is left of it after a time-out is ended."""
        began = time.monotonic()
        process = self.start(sys.executable, "-m", "selffl_ray", *arguments, **more)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            self.end_all()
            process.communicate(timeout=10)
            raise
        return Finished(process.returncode, out, err, time.monotonic() - began)

    def alive(self) -> list[psutil.Process]:
        """Processes that carry our mark, those that are only waited for left out."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.create_time() < self.began - 1:
                    continue
                marked = process.environ().get(MARK) == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def all_gone(self, within_s: float) -> bool:
        """Whether nothing with our mark is left, after some patience."""
        deadline = time.monotonic() + within_s
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def end_all(self) -> None:
        """End what is left, by process id."""
        for _ in range(20):
            left = self.alive()
            if not left:
                return
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.2)


@dataclass
class Finished:
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float
