"""A job in a thread of its own that is held after every evaluated round, until it may go on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from selffl_ray.run_loop import Message, Progress
from selffl_ray.runtime.actors import Control

POLL_S = 1.0
STOP_S = 120.0
"""Longest wait for a job to end the round that it is in."""


class _SteppedControl(Control):
    """Holds the job after every evaluated round until it is asked to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: queue.Queue[Any] = queue.Queue()
        self._turns = threading.Semaphore(0)

    def emit(self, event: Any) -> None:
        """A message is kept; a round is handed over and held."""
        if isinstance(event, Message):
            super().emit(event)
        elif "time/eval_s" in event.metrics:
            self.rounds.put(event)
            self._turns.acquire()

    def go_on(self) -> None:
        """Let the job run to its next evaluated round."""
        self._turns.release()

    def stop(self) -> None:
        """Ask the job to end after the round it is in."""
        super().stop()
        self.go_on()


class SteppedRun:
    """A job in a thread of its own, advanced from one evaluated round to the next."""

    def __init__(self, work: Callable[[Control], Any]) -> None:
        self._control = _SteppedControl()
        self._work = work
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
        self._ended: Any = None

    def _run(self) -> None:
        try:
            self._control.rounds.put(self._work(self._control))
        except BaseException as error:
            self._control.rounds.put(error)

    def advance(self) -> Progress | None:
        """The next evaluated round; None once the job has ended.

        Raises:
            what the job raised.
        """
        if self._ended is not None:
            return None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._control.go_on()
        while True:
            try:
                event = self._control.rounds.get(timeout=POLL_S)
            except queue.Empty:
                continue  # the thread always puts something when it ends
            if isinstance(event, Progress):
                return event
            self._ended = event
            if isinstance(event, BaseException):
                raise event
            return None

    def hold(self) -> None:
        """End the job at the round that it is held after, with everything written.

        Raises:
            what the job raised.
        """
        self._control.stop()
        self.advance()

    def messages(self) -> list[str]:
        """Warnings since the last call."""
        return [event.text for event in self._control.take()]

    def stop(self) -> None:
        """End the job after the round it is in, with everything written."""
        if self._thread.ident is None:
            return
        self._control.stop()
        self._thread.join(STOP_S)
