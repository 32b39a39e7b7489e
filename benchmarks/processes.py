"""An entry of a benchmark as a process of its own: its time, and the memory of all its processes.

Memory is the proportional set size (PSS) summed over the process, its children and theirs: pages
that several of them share count once. Ray's daemons and workers are among them.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

INTERVAL_S = 0.25
"""Least time between two looks at the memory."""
LOOKING = 0.03
"""Most of one core's time that looking may take: reading PSS walks every page table."""
TIMEOUT_S = 900.0
LEAVE_S = 20.0
"""Longest wait for what an entry leaves behind, before it is ended: the next one must be alone."""
LEFT_OUT = ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")
SHOWN = 600
"""Characters of a failed entry's last words."""


class Measured(NamedTuple):
    """Seconds from start to end, peak PSS in bytes, and what the process reported."""

    wall_s: float
    peak_bytes: int
    report: dict[str, Any]


class EntryError(Exception):
    """An entry failed or took too long; the text says how."""


def measure(command: Sequence[str], env: dict[str, str], timeout_s: float = TIMEOUT_S) -> Measured:
    """Run a command whose last line of output is a report as JSON.

    Raises:
        EntryError: it failed, reported nothing, or took longer than ``timeout_s``.
    """
    # Files, not pipes: a daemon that lives on would hold a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        with subprocess.Popen(command, env=env, stdout=out, stderr=err) as process:
            watcher = Watcher(process.pid)
            try:
                code: int | str = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = f"none after {timeout_s:g} s"
            finally:
                wall_s = time.perf_counter() - began
                process.kill()
                peak = watcher.stop()
        out.seek(0)
        err.seek(0)
        lines = out.read().splitlines()
        if code != 0 or not lines or not lines[-1].startswith("{"):
            last = (err.read() or "\n".join(lines)).strip()[-SHOWN:]
            raise EntryError(f"{Path(command[-1]).name}: exit code {code}: {last}")
        return Measured(wall_s, peak, json.loads(lines[-1]))


class Watcher:
    """Looks at the memory of a process and its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._known = {pid: _started(pid)}
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End the watch and whatever the process left behind; the peak in bytes."""
        self._stop.set()
        self._thread.join()
        self._known = descendants(self._known)
        end = time.monotonic() + LEAVE_S
        while (left := self._alive()) and time.monotonic() < end:
            time.sleep(0.1)
        for process in left:
            process.kill()
        return self._peak

    def _watch(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            began = time.thread_time()
            self._known = descendants(self._known)
            self._peak = max(self._peak, sum(pss_bytes(pid) for pid in self._known))
            wait_s = max(INTERVAL_S, (time.thread_time() - began) / LOOKING)

    def _alive(self) -> list[psutil.Process]:
        found = []
        for pid, started in self._known.items():
            if _started(pid) != started or started is None:
                continue
            try:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


def descendants(known: dict[int, int | None]) -> dict[int, int | None]:
    """The processes that are known and still there, and all their descendants, by id.

    Known ones stay when their parent dies and another adopts them. Values are start times, by
    which a reused id is told.
    """
    found: dict[int, int | None] = {}
    found |= {pid: s for pid, s in known.items() if s is not None and _started(pid) == s}
    children: dict[int, list[tuple[int, int]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            parent, started = stat
            children.setdefault(parent, []).append((int(entry.name), started))
    queue = list(found)
    while queue:
        for pid, started in children.get(queue.pop(), []):
            if pid not in found:
                found[pid] = started
                queue.append(pid)
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (OSError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _stat(pid: int) -> tuple[int, int] | None:
    """Parent and start time (clock ticks since boot); None if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ProcessLookupError):
        return None
    # The command's name may hold spaces and brackets, so count from the last one.
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), int(fields[19])


def _started(pid: int) -> int | None:
    stat = _stat(pid)
    return None if stat is None else stat[1]


def environment(**more: str) -> dict[str, str]:
    """This process's environment with more, without a Ray that others started.

    And with byte code kept, as everywhere but on a machine that forbids it: peers come compiled.
    """
    return {k: v for k, v in os.environ.items() if k not in LEFT_OUT} | more
