"""A server in a process group of its own, which ends with us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any


def serve(command: list[str]) -> int:
    """Run a server until it or we are told to end; nothing that it started outlives us."""
    # MLflow's background jobs (for its language model pages) are eight more processes.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return server.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        for number, handler in before.items():
            signal.signal(number, handler)
