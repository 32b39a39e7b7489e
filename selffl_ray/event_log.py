"""``events.jsonl`` in a run's folder: what went wrong, a line each, written as it happens.

Rows of rounds wait in memory for up to some seconds, the summary for the end: an event that only
they had would be lost with a process that is killed. So each event is added here first, with one
write to the system, which a kill of the process does not undo (a loss of power may). Events that a
table or the summary holds for good are taken out again: the file is small, and gone when a run has
ended in order.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selffl_ray.events import Event, well_formed
from selffl_ray.whole import write_whole

logger = logging.getLogger(__name__)

EVENTS = "events.jsonl"


class EventLog:
    """The events of a run that nothing else holds for good."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS
        self._failed = False

    def add(self, event: Event) -> None:
        """One more line. A disk that does not take it is said once, and the run goes on."""
        line = json.dumps(event._asdict()) + "\n"
        try:
            with self.path.open("ab+", buffering=0) as file:
                if not _ends_a_line(file.fileno()):
                    line = "\n" + line
                file.write(line.encode())
        except OSError as error:
            self._complain(error)

    def keep(self, events: Sequence[Event]) -> None:
        """Take out all but these; without any the file is gone."""
        try:
            if not os.path.lexists(self.path):
                return
            if events:
                lines = [json.dumps(event._asdict()) + "\n" for event in events]
                write_whole(self.path, lambda draft: draft.write_text("".join(lines)))
            else:
                self.path.unlink()
        except OSError as error:
            # What is there besides does no harm: each event is taken over once.
            self._complain(error)

    def read(self) -> list[Mapping[str, Any]]:
        """The events, of the same one the newest line; those that cannot be read are said.

        A process that was killed, or a full disk, may have left half a line.
        """
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            logger.warning("%s cannot be read: %s; its events are lost", self.path, error)
            return []
        lines = [line for line in lines if line]
        found = [event for line in lines for event in _parsed(line)]
        if len(found) < len(lines):
            logger.warning(
                "%s: %d of %d lines are broken; their events are lost",
                self.path,
                len(lines) - len(found),
                len(lines),
            )
        return latest(found)

    def _complain(self, error: OSError) -> None:
        if not self._failed:
            logger.warning(
                "%s cannot be written: %s; a kill loses the events since the last checkpoint",
                self.path,
                error,
            )
        self._failed = True


def latest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Events in the order in which they first came, each as it came last."""
    return list({Event(**row).key: row for row in rows}.values())


def _ends_a_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def _parsed(line: bytes) -> list[dict[str, Any]]:
    """The event of a line; none if it is broken."""
    try:
        return well_formed([json.loads(line)])
    except (ValueError, RecursionError):
        return []
