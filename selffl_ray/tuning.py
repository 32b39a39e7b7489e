"""Ray Tune: trials that run an experiment step by step, and the Tuner that schedules them.

A trial's actor is its driver: it runs the server loop, from one evaluated round to the next for
each step that Tune asks for, on client actors of its own in the same placement group. What a trial
has done is in its run's folder, so it goes on from there whoever starts it again, and a trial that
is done is only reported. An actor that goes on with another trial keeps its client actors.

An actor that dies, or that Ray's memory monitor ends, is started again by Tune, in the same Tuner
and so with all that a scheduler knows, up to ``faults.max_retries`` times. Rounds up to the
checkpoint are reported once more, with the same values; ASHA decides once for each trial and rung.
Tune makes no difference between an actor that died and an error that the run raised, which would
come again. So such an error is first reported as a result, whereupon the trial has no retries left,
and raised in the next step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
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
from selffl_ray.run_writer import Job, Restart
from selffl_ray.runtime.cluster import driver_bundle
from selffl_ray.runtime.driver_actor import cause_of_death
from selffl_ray.runtime.placement import PlacementPlan
from selffl_ray.runtime.trial_deaths import memory_deaths_as_deaths
from selffl_ray.stepped_run import SteppedRun
from selffl_ray.sweep_folder import deaths
from selffl_ray.sweep_results import FAILURE, RESTART
from selffl_ray.sweep_scheduler import SchedulerConfig
from selffl_ray.tables import write_json

logger = logging.getLogger(__name__)

FAILED = "failed"
"""In a result: why the run failed. The next step raises it."""


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
    """Something happened to a trial.

    kind: ``result``, ``complete``, ``lost`` (its actor died, and another one goes on; the result
    says ``number`` and ``cause``) or ``error`` (the result says which).
    """

    kind: str
    trial: str
    result: Mapping[str, Any]


# -- in the trial's actor -----------------------------------------------------------------------


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
        if self._error is not None:
            self._runner.close()
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        # Only what cannot fail: Tune would try again, as after a death.
        name = config["trial"]["name"]
        spec = self._specs[name]
        self._folder = Path(spec.job.folder)
        self._metrics = spec.metrics
        self._past: deque[dict[str, Any]] | None = None
        self._until = spec.until
        self._latest: dict[str, Any] = {}
        self._error: Exception | None = None
        # Client actors serve trial after trial, so they are named after this actor.
        label = f"{spec.job.raw['experiment']}-trial-{os.getpid()}"
        self._run = SteppedRun(
            lambda control: self._runner.run(control, next_job(spec.job), spec.plan, label)
        )

    def step(self) -> dict[str, Any]:
        """Report the next evaluated round, or that the run failed: the step after that raises."""
        if self._error is not None:
            raise self._error
        try:
            if self._past is None:
                # Not in ``_begin``: an actor that Tune started for a trial may be given another.
                (self._folder / FAILURE).unlink(missing_ok=True)
                self._past = deque(past_rounds(self._folder))
                self._finished = is_done(self._folder, self._until)
            return self._again(self._past) if self._past else self._next()
        except Exception as error:
            text = " ".join(str(error).split())
            self._error = error
            # Where the disk is full, the result says it all the same.
            with contextlib.suppress(OSError):
                write_json(self._folder / FAILURE, {"error": text})
            return {FAILED: text}

    def _again(self, past: deque[dict[str, Any]]) -> dict[str, Any]:
        """The first of the rounds that were done before."""
        row = past.popleft()
        self._check_measured(row["round_index"], row)
        return self._report(row["round_index"], row, done=self._finished and not past)

    def _check_measured(self, round_index: int, metrics: Mapping[str, Any]) -> None:
        """A result without its metric cannot be compared."""
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


def next_job(job: Job) -> Job:
    """The job as its folder stands, with the reasons if actors before this one died.

    All are told every time: one may have died before it wrote of the one before, and what is in
    the tables is not taken in again.
    """
    folder = Path(job.folder)
    if not (folder / "config.yaml").exists():
        (folder / RESTART).unlink(missing_ok=True)
        return dataclasses.replace(job, resume=False, restart=None)
    died = deaths(folder)
    restart = Restart(*died[-1], tuple(died[:-1])) if died else None
    return dataclasses.replace(job, resume=True, restart=restart)


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
_retries: Mapping[str, int] = {}
"""By trial: times that its actor may die."""


class _Relay(tune.Callback):
    """Passes on what happens, and says which trials Tune tries again.

    Tune pickles its callbacks, so this one holds nothing.
    """

    def on_trial_start(self, **info: Any) -> None:  # type: ignore[override]
        """An actor is there for a trial."""
        # Not only once: the trial of a sweep that goes on may have failed before.
        info["trial"].max_failures = _retries[str(info["trial"])]

    def on_trial_result(self, **info: Any) -> None:  # type: ignore[override]
        """A step of a trial."""
        if FAILED in info["result"]:
            info["trial"].max_failures = 0
        _watch(TuneEvent("result", str(info["trial"]), info["result"]))

    def on_trial_complete(self, **info: Any) -> None:  # type: ignore[override]
        """A trial has ended, early or not."""
        _watch(TuneEvent("complete", str(info["trial"]), {}))

    def on_trial_recover(self, **info: Any) -> None:  # type: ignore[override]
        """The actor of a trial died, and Tune starts another one."""
        trial = info["trial"]
        told = {"number": trial.num_failures, "cause": cause_of_death(_last_failure(trial))}
        _watch(TuneEvent("lost", str(trial), told))

    def on_trial_error(self, **info: Any) -> None:  # type: ignore[override]
        """A trial has failed, or its actor died too often."""
        trial = info["trial"]
        often = f"that is more often than faults.max_retries, {trial.max_failures}, allows"
        died = f"{cause_of_death(_last_failure(trial))}; {often}"
        own = (trial.last_result or {}).get(FAILED)
        _watch(TuneEvent("error", str(trial), {"error": own or died}))


def _last_failure(trial: Any) -> str:
    """What Tune wrote of it; it keeps the exception too, but as a pickle in a folder."""
    path = trial.error_file
    text = Path(path).read_text() if path is not None and Path(path).exists() else ""
    return text.rpartition("Failure # ")[2].partition("\n")[2]


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
    global _watch, _retries  # noqa: PLW0603 - Tune pickles callbacks, and the watcher cannot be
    _set_up_tune()
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
    _retries = {name: _retries_of(spec) for name, spec in specs.items()}
    try:
        with memory_deaths_as_deaths():
            tuner.fit()
    except tune.TuneError as error:
        raise RunError(f"Ray Tune: {' '.join(str(error).split())[:300]}") from error
    finally:
        _watch = lambda event: None  # noqa: E731


def _set_up_tune() -> None:
    # Trials keep their own checkpoints; Tune's snapshots are small and may come often.
    # One progress line, ours, instead of Tune's boxes.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # Deaths and errors are told by us; Tune keeps their tracebacks in its error.txt.
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    # A trial that says that it failed has no metric, and must not end the others.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"


def _retries_of(spec: TrialSpec) -> int:
    return int(spec.job.raw["faults"]["max_retries"])


def _new_tuner(
    trainable: Any, specs: Mapping[str, TrialSpec], config: tune.TuneConfig, folder: Path
) -> tune.Tuner:
    shown = [{"name": name, "seed": s.job.raw["seed"], **s.settings} for name, s in specs.items()]
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(shown)},
        tune_config=config,
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[_Relay()],
            # For an actor that dies before it begins with a trial.
            failure_config=tune.FailureConfig(max_failures=max(map(_retries_of, specs.values()))),
            verbose=0,
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
