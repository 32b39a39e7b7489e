"""Ray Tune: trials that run an experiment step by step, and the Tuner that schedules them.

A trial's actor is its driver: it runs the server loop, from one evaluated round to the next for
each step that Tune asks for, on client actors of its own in the same placement group. What a trial
has done is in its run's folder, so it goes on from there whoever starts it again, and a trial that
is done is only reported. An actor that goes on with another trial keeps its client actors.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from selffl_ray.checkpoint import rounds_done
from selffl_ray.errors import RunError
from selffl_ray.execution import JobRunner
from selffl_ray.run_loop import Message, Progress
from selffl_ray.run_writer import Job
from selffl_ray.runtime.actors import Control
from selffl_ray.runtime.cluster import driver_bundle
from selffl_ray.runtime.placement import PlacementPlan
from selffl_ray.sweep_results import FAILURE
from selffl_ray.sweep_scheduler import SchedulerConfig
from selffl_ray.tables import write_json

logger = logging.getLogger(__name__)

POLL_S = 1.0
STOP_S = 120.0
"""Longest wait for a trial to end the round that it is in."""


class TrialSpec(NamedTuple):
    """What a trial's actor needs: the job, where its clients live, and what to show of it.

    settings: of its configuration, for Tune's pages; metrics: names that are reported, the
    sweep's own first; until: hold after so many rounds, to be gone on with later.
    """

    job: Job
    plan: PlacementPlan
    settings: Mapping[str, Any]
    metrics: tuple[str, ...]
    until: int | None = None


class TuneEvent(NamedTuple):
    """Something happened to a trial: ``result``, ``complete`` or ``error``."""

    kind: str
    trial: str
    result: Mapping[str, Any]


# -- in the trial's actor -----------------------------------------------------------------------


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


class SelfFLTrial(tune.Trainable):
    """One experiment, one evaluated round a step."""

    def setup(self, config: dict[str, Any], specs: Mapping[str, TrialSpec] | None = None) -> None:
        """Called once for an actor; ``specs`` are those of all trials."""
        assert specs is not None, "with_parameters brings them"
        torch.set_num_threads(1)
        self._specs = specs
        self._runner = JobRunner()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on with another trial; the client actors stay if they fit."""
        self._run.stop()
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        name = config["trial"]["name"]
        spec = self._specs[name]
        folder = Path(spec.job.folder)
        job = dataclasses.replace(spec.job, resume=(folder / "config.yaml").exists())
        self._folder = folder
        self._metrics = spec.metrics
        self._past = deque(past_rounds(folder))
        self._until = spec.until
        self._finished = is_done(folder, spec.until)
        self._latest: dict[str, Any] = {}
        # Client actors serve trial after trial, so they are named after this actor.
        label = f"{job.raw['experiment']}-trial-{os.getpid()}"
        self._run = SteppedRun(lambda control: self._runner.run(control, job, spec.plan, label))

    def step(self) -> dict[str, Any]:
        """Report the next evaluated round."""
        # Not in ``_begin``: an actor that Tune started for a trial may be given another one.
        (self._folder / FAILURE).unlink(missing_ok=True)
        try:
            return self._again(self._past.popleft()) if self._past else self._next()
        except Exception as error:
            write_json(self._folder / FAILURE, {"error": " ".join(str(error).split())})
            raise

    def _again(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A round that was done before."""
        self._check_measured(row["round_index"], row)
        return self._report(row["round_index"], row, done=self._finished and not self._past)

    def _check_measured(self, round_index: int, metrics: Mapping[str, Any]) -> None:
        """Tune would end the whole sweep for a result without its metric."""
        if self._metrics[0] not in metrics:
            raise RunError(
                f"round {round_index}: {self._metrics[0]} was not measured or is not finite; did "
                "the models diverge?"
            )

    def _next(self) -> dict[str, Any]:
        event = self._run.advance()
        if event is None:
            return {**self._latest, "done": True}
        self._check_measured(event.round_index, event.metrics)
        done = event.round_index + 1
        if done == self._until:
            self._run.hold()
        elif done == event.num_rounds:
            self._run.advance()
        last = done in (self._until, event.num_rounds)
        return self._report(event.round_index, event.metrics, done=last)

    def _report(
        self, round_index: int, metrics: Mapping[str, Any], *, done: bool
    ) -> dict[str, Any]:
        self._latest = {
            "round": round_index + 1,
            "gradient_steps": metrics["cost/gradient_steps"],
            **{name: metrics[name] for name in self._metrics if name in metrics},
        }
        warnings = self._run.messages()
        return {**self._latest, "done": done, **({"warnings": warnings} if warnings else {})}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The state is in the run's folder; Tune keeps a note."""
        Path(checkpoint_dir, "note.json").write_text(json.dumps(self._latest))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: ``setup`` goes on from the run's folder."""

    def cleanup(self) -> None:
        """End the job and the client actors."""
        self._run.stop()
        self._runner.close()


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "FINISHED"


def is_done(folder: Path, until: int | None) -> bool:
    """Whether a run has come to its end, or is held after ``until`` rounds."""
    reached = rounds_done(folder / "checkpoints")
    return is_finished(folder) or (until is not None and reached >= until)


def past_rounds(folder: Path) -> list[dict[str, Any]]:
    """Evaluated rounds that a run in this folder will not repeat."""
    path = folder / "rounds.parquet"
    if not path.exists():
        return []
    rows = pd.read_parquet(path)
    if not is_finished(folder):
        rows = rows[rows["round_index"] < rounds_done(folder / "checkpoints")]
    if "time/eval_s" not in rows:
        return []
    found = rows[rows["time/eval_s"].notna()].sort_values("round_index")
    return [
        {str(k): v for k, v in row.items() if not pd.isna(v)} for row in found.to_dict("records")
    ]


# -- in the sweep's process ---------------------------------------------------------------------

_watch: Callable[[TuneEvent], None] = lambda event: None  # noqa: E731


class _Relay(tune.Callback):
    """Passes on what happens. Tune pickles its callbacks, so this one holds nothing."""

    def on_trial_result(self, **info: Any) -> None:  # type: ignore[override]
        """A step of a trial."""
        _watch(TuneEvent("result", str(info["trial"]), info["result"]))

    def on_trial_complete(self, **info: Any) -> None:  # type: ignore[override]
        """A trial has ended, early or not."""
        _watch(TuneEvent("complete", str(info["trial"]), {}))

    def on_trial_error(self, **info: Any) -> None:  # type: ignore[override]
        """A trial has failed."""
        _watch(TuneEvent("error", str(info["trial"]), {}))


def run_trials(
    specs: Mapping[str, TrialSpec],
    *,
    folder: Path,
    scheduler: SchedulerConfig,
    metric: str,
    mode: str,
    num_rounds: int,
    concurrent: int | None,
    seconds: float | None,
    watch: Callable[[TuneEvent], None],
) -> None:
    """Run trials side by side as the cluster allows, or go on with those of a Tuner that died.

    Args:
        folder: Tune's own; it also holds the files for TensorBoard.
        num_rounds: of the longest trial, for the scheduler.
        seconds: budget of the whole.

    Raises:
        RunError: Tune itself failed.
    """
    global _watch  # noqa: PLW0603 - Tune pickles callbacks, and the watcher cannot be
    # Trials keep their own checkpoints; Tune's snapshots are small and may come often.
    # One progress line, ours, instead of Tune's boxes.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    trainable = _with_bundles(specs)
    if tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(
            str(folder), trainable=trainable, resume_unfinished=True, restart_errored=True
        )
    else:
        config = tune.TuneConfig(
            metric=metric,
            mode=mode,
            scheduler=_scheduler(scheduler, num_rounds),
            max_concurrent_trials=concurrent,
            time_budget_s=seconds,
            reuse_actors=True,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        )
        tuner = _new_tuner(trainable, specs, config, folder)
    _watch = watch
    try:
        tuner.fit()
    except tune.TuneError as error:
        raise RunError(f"Ray Tune: {' '.join(str(error).split())[:300]}") from error
    finally:
        _watch = lambda event: None  # noqa: E731


def _new_tuner(
    trainable: Any, specs: Mapping[str, TrialSpec], config: tune.TuneConfig, folder: Path
) -> tune.Tuner:
    shown = [{"name": name, "seed": s.job.raw["seed"], **s.settings} for name, s in specs.items()]
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(shown)},
        tune_config=config,
        run_config=tune.RunConfig(
            name=folder.name, storage_path=str(folder.parent), callbacks=[_Relay()], verbose=0
        ),
    )


def _name_of(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


def _with_bundles(specs: Mapping[str, TrialSpec]) -> Any:
    """The trainable with a placement group for each trial: its driver, then its client actors.

    The driver is on the machine of this process, the client actors are where there is room.
    """
    bundles = {name: bundles_of(spec.plan) for name, spec in specs.items()}
    trainable = tune.with_parameters(SelfFLTrial, specs=dict(specs))
    found: Any = tune.with_resources(
        trainable, lambda config: tune.PlacementGroupFactory(bundles[config["trial"]["name"]])
    )
    # Tune wraps the class in others of its own; Ray's pages show this name.
    found.__name__ = found.__qualname__ = SelfFLTrial.__name__
    return found


def bundles_of(plan: PlacementPlan) -> list[dict[str, float]]:
    """Resources of a trial: the driver's bundle, and one for each client actor."""
    # Without Ray's actors (placement.backend: local) the clients live in the trial's own.
    alone = plan.backend == "local"
    actors = [] if alone else [{"CPU": a.cpus, "GPU": a.gpus} for a in plan.actors]
    bundles = [driver_bundle(plan.driver_cpus, trains=alone), *actors]
    return [{k: v for k, v in bundle.items() if v} for bundle in bundles]


def _scheduler(config: SchedulerConfig, num_rounds: int) -> Any:
    if config.name == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    assert config.name == "asha", "legs of a population run without a scheduler"
    return ASHAScheduler(
        time_attr="round",
        max_t=num_rounds,
        grace_period=config.first_rung(num_rounds),
        reduction_factor=config.reduction,
        brackets=1,
    )
