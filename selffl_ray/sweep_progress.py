"""How far a sweep is: what Ray Tune tells of trials, turned into events for a person."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from selffl_ray.run_loop import Message
from selffl_ray.sweep import SweepConfig, Trial

Watch = Callable[[Any], None]


class SweepProgress(NamedTuple):
    """An event: how far a stage is.

    done: trials that have ended, started_done: of those that this command started; best: the best
    value reported so far, and by whom.
    """

    stage: str
    done: int
    started_done: int
    failed: int
    total: int
    best: tuple[float, str] | None
    metric: str
    seconds: float


class StageProgress:
    """Turns what Tune tells of trials into how far the stage is."""

    def __init__(self, name: str, sweep: SweepConfig, watch: Watch) -> None:
        self._name, self._total, self._watch = name, 0, watch
        self._metric, self._sign = sweep.metric, 1 if sweep.mode == "max" else -1
        self._before, self._done, self._failed = 0, 0, 0
        self._best: tuple[float, str] | None = None
        self._began = time.monotonic()
        self._labels: dict[str, str] = {}

    @property
    def seconds(self) -> float:
        """Since the start of the stage by this command."""
        return time.monotonic() - self._began

    def begin(self, trials: Sequence[Trial], *, finished: int, later: int) -> None:
        """Take in the stage's next trials.

        Args:
            finished: so many of them are done already.
            later: so many more will follow them.
        """
        self._labels |= {t.name: f"{t.configuration.label} seed {t.seed}" for t in trials}
        self._total = self._done + len(trials) + later
        self._before += finished
        self._done += finished

    def __call__(self, event: Any) -> None:
        """Take in a :class:`~selffl_ray.tuning.TuneEvent`."""
        for text in event.result.get("warnings", ()):
            self._watch(Message(f"{event.trial}: {text}"))
        if event.kind == "lost":
            cause = event.result["cause"]
            said = f"{event.trial}: {cause}; another one goes on from the last checkpoint"
            self._watch(Message(said))
            return
        value = event.result.get(self._metric)
        if value is not None and (
            self._best is None or self._sign * value > self._sign * self._best[0]
        ):
            self._best = (value, self._labels[event.trial])
        if event.kind != "result":
            self._done += 1
            self._failed += event.kind == "error"
        self._watch(
            SweepProgress(
                self._name,
                self._done,
                self._done - self._before,
                self._failed,
                self._total,
                self._best,
                self._metric,
                self.seconds,
            )
        )
