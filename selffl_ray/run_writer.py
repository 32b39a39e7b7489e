"""A run's folder and its tracker: everything that a run leaves behind, except checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from selffl_ray.config import ExperimentConfig, flatten, parse_config, to_raw, to_yaml
from selffl_ray.driver import RoundRecord
from selffl_ray.environment import describe_environment, package_version
from selffl_ray.errors import ConfigError
from selffl_ray.event_log import EVENTS, EventLog, latest
from selffl_ray.experiment import Prepared
from selffl_ray.exported_models import DIGESTS
from selffl_ray.runtime.placement import PlacementPlan
from selffl_ray.stopping import seconds_of
from selffl_ray.tables import (
    TABLES,
    RunTables,
    events_of_summary,
    final_metrics,
    selected_round,
    write_json,
    write_text,
)
from selffl_ray.tracking import MLflowTracker, NoTracker, RunInfo, Tracker
from selffl_ray.whole import remove_drafts

logger = logging.getLogger(__name__)

SCHEDULE = "schedule.json"
"""In the folder of a run whose options may change on its way."""
FILES = (
    *(
        "config.yaml",
        SCHEDULE,
        "environment.json",
        "summary.json",
        "tracking.json",
        EVENTS,
        DIGESTS,
    ),
    *(f"{name}.parquet" for name in TABLES),
)
"""What lies in a run's folder, beside its checkpoints and models."""


class Restart(NamedTuple):
    """A driver actor that was started because the one before died; number: from 1.

    earlier: number and cause of those before it; they may have died before anything was written.
    """

    number: int
    cause: str
    earlier: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Job:
    """One run to do, in a form that travels: the resolved configuration as plain values.

    folder: the run's; plugin_folder: where plugins are looked for; store: MLflow's, resolved where
    the command was given (None: not tracked); tags: further MLflow tags; resume: go on from the
    folder's newest checkpoint.
    """

    raw: Mapping[str, Any]
    folder: str
    plugin_folder: str
    store: str | None = None
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resume: bool = False
    name: str | None = None
    """The run's name in MLflow; method, preset and seed by default."""
    schedule: tuple[Mapping[str, Any], ...] = ()
    """Of a run whose options may change on its way: what was set from which round on."""
    restart: Restart | None = None
    """Why this is not the first driver actor that runs it."""

    def config(self) -> ExperimentConfig:
        """The configuration, with plugins loaded."""
        return parse_config(dict(self.raw), Path(self.plugin_folder))


def changed(schedule: Sequence[Mapping[str, Any]]) -> bool:
    """Whether options were changed on the way, and one configuration does not repeat the run."""
    return len(schedule) > 1


def check_one_configuration(folder: Path, remedy: str) -> None:
    """A run that options were changed in cannot be gone on with or repeated from its config.yaml.

    Raises:
        ConfigError: it is such a run; ``remedy`` says what to do instead. Or its schedule cannot be
            read.
    """
    path = folder / SCHEDULE
    try:
        was_changed = path.exists() and changed(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; put it back as the sweep wrote it"
        ) from error
    if was_changed:
        raise ConfigError(
            f"{folder}: options were changed during this run ({SCHEDULE}), so config.yaml holds "
            f"its last ones only; {remedy}"
        )


class RunWriter:
    """A run's folder and tracker."""

    def __init__(self, job: Job, prepared: Prepared) -> None:
        self.folder = Path(job.folder)
        self.prepared = prepared
        config = prepared.config
        self.schedule = job.schedule
        self.restart = job.restart
        self.event_log = EventLog(self.folder)
        self.clients_moved = 0
        self.unrecorded = self._earlier_events() if job.resume else ()
        """Events that no row of a round has, for ``summary.json``; at first what an earlier part of
        the run left in it and in the log, some of which rows may have."""
        self.tables = RunTables(self.folder, prepared.client_ids, prepared.dataset.task.score_name)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_drafts(self.folder, FILES)
        if not job.resume:
            self.event_log.keep([])
        write_text(self.folder / "config.yaml", to_yaml(config))
        if self.schedule:
            write_json(self.folder / SCHEDULE, list(self.schedule))
        self.tracker: Tracker = self._open_tracker(job)
        self._began = time.monotonic()
        self._resumes = job.resume
        self._raised: set[str] = set()
        self._full = False

    def _earlier_events(self) -> Sequence[Mapping[str, Any]]:
        return latest([*events_of_summary(self.folder), *self.event_log.read()])

    def _open_tracker(self, job: Job) -> Tracker:
        config, uri = self.prepared.config, job.store
        if uri is None:
            return NoTracker()
        note = self.folder / "tracking.json"
        resume_id = None
        if job.resume and note.exists():
            before = json.loads(note.read_text())
            resume_id = before["run_id"]
            # The store that the run is in, wherever this command was started.
            uri = uri if "***" in before["uri"] else before["uri"]
        tags = {
            "method": config.method.name,
            "method_label": config.method_label,
            "dataset": config.data.component.name,
            "seed": str(config.seed),
            "partition_digest": self.prepared.partition.digest,
            "data_digest": self.prepared.store.manifest.digest,
            "selffl_ray_version": package_version(),
            **config.tracking.tags,
            **job.tags,
        }
        info = RunInfo(
            config.experiment,
            job.name or f"{config.method_label}-s{config.seed}",
            flatten(to_raw(config)),
            tags,
            resume_id,
        )
        return MLflowTracker(uri, info, self.folder)

    def restore(self, last_round: int) -> list[Mapping[str, Any]]:
        """Go on after a round (-1: begin), with the rows of the rounds up to it.

        Of a run that began as another's copy the tracker is given them too; steps that the store
        has already are not sent again.

        Returns:
            Events of the rounds after it, which are done again.
        """
        dropped = self.tables.restore(last_round)
        if self._resumes:
            # Once: rounds that are done again after a lost host have been counted as they passed.
            self._resumes = False
            self._began -= sum(seconds_of(row) for row in self.tables.rows())
        if changed(self.schedule):
            for row in self.tables.rows():
                self.tracker.log({k: v for k, v in row.items() if "/" in k}, row["round_index"])
        return dropped

    def write_environment(self, plan: PlacementPlan, where: list[dict[str, Any]]) -> None:
        """``environment.json``."""
        found = describe_environment(self.prepared, plan, where)
        write_json(self.folder / "environment.json", found)

    def add(self, record: RoundRecord) -> None:
        """Tables and tracker take in a round; an alarm is said the first time it is raised.

        A full disk is said once: the rows stay in memory, and are written as soon as they can be.
        """
        try:
            self.tables.add(record)
        except OSError as error:
            if not self._full:
                logger.warning("tables of %s cannot be written for now: %s", self.folder, error)
            self._full = True
        measured = {k: v for k, v in record.metrics.items() if not math.isnan(v)}
        self.tracker.log(measured, record.plan.round_index)
        config = self.prepared.config
        for alarm in record.alarms:
            if alarm.text is not None and alarm.metric not in self._raised:
                self._raised.add(alarm.metric)
                run = f"{config.method_label} seed {config.seed}"
                at = record.plan.round_index
                logger.warning("%s, round %d, %s: %s", run, at, alarm.metric, alarm.text)

    def finish(self, status: str, error: str | None = None) -> dict[str, Any]:
        """Write tables and ``summary.json``, end tracking; returns the summary.

        Raises:
            OSError: the folder cannot be written to; tracking has ended all the same.
        """
        try:
            self.tables.flush()
            summary = self._summary(status, error)
            write_json(self.folder / "summary.json", summary)
            # Rows and summary have all of them now.
            self.event_log.keep([])
        except OSError:
            self.tracker.finish("FAILED")
            raise
        mlflow_status = {"FINISHED": "FINISHED", "STOPPED": "KILLED"}.get(status, "FAILED")
        problem = self.tracker.finish(mlflow_status)
        if isinstance(self.tracker, MLflowTracker):
            note = {"uri": self.tracker.public_uri, "run_id": self.tracker.run_id}
            write_json(self.folder / "tracking.json", note)
        return summary | {"tracking_problem": problem}

    def _summary(self, status: str, error: str | None) -> dict[str, Any]:
        config, task = self.prepared.config, self.prepared.dataset.task
        rows = self.tables.evaluated_rounds()
        newest = self.tables.last_round()
        return {
            "status": status,
            "experiment": config.experiment,
            "method": config.method.name,
            "label": config.method_label,
            "dataset": config.data.component.name,
            "seed": config.seed,
            "rounds": 0 if newest is None else newest["round_index"] + 1,
            "final": final_metrics(rows, config.evaluation.last),
            "selected": selected_round(
                rows, task.score_name, higher_is_better=task.higher_is_better
            ),
            "wall_s": time.monotonic() - self._began,
            "digest": None if newest is None else newest["digest"],
            "error": error,
            "folder": str(self.folder),
            **({"events": list(self.unrecorded)} if self.unrecorded else {}),
            **({"clients_moved": self.clients_moved} if self.clients_moved else {}),
            **({"schedule": list(self.schedule)} if self.schedule else {}),
        }
