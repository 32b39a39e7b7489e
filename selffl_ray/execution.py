"""Running prepared experiments: rounds, tables, tracking, checkpoints, and getting up again.

``run_jobs`` runs inside the driver actor, or in this process without Ray; ``launch`` starts it and
passes on what it tells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch

from selffl_ray.algorithms.base import NotAvailable
from selffl_ray.checkpoint import (
    Counters,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from selffl_ray.config import ExperimentConfig, flatten, parse_config, to_raw, to_yaml
from selffl_ray.driver import RoundRecord, Run, run_rounds
from selffl_ray.environment import describe_environment, package_version
from selffl_ray.errors import RunError
from selffl_ray.experiment import Prepared, prepare_experiment, write_params
from selffl_ray.flat import digest
from selffl_ray.participation import RoundPlan
from selffl_ray.pool import ClientPool, LocalTransport, StateLostError
from selffl_ray.runtime.actors import Control
from selffl_ray.runtime.placement import PlacementPlan
from selffl_ray.tables import (
    RunTables,
    final_metrics,
    selected_round,
    write_json,
    write_text,
)
from selffl_ray.tracking import (
    MLflowTracker,
    NoTracker,
    RunInfo,
    Tracker,
    resolve_uri,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run to do, in a form that travels: the resolved configuration as plain values.

    folder: the run's; plugin_folder: where plugins and relative stores are looked for; tags:
    further MLflow tags; resume: go on from the folder's newest checkpoint.
    """

    raw: Mapping[str, Any]
    folder: str
    plugin_folder: str
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resume: bool = False

    def config(self) -> ExperimentConfig:
        """The configuration, with plugins loaded."""
        return parse_config(dict(self.raw), Path(self.plugin_folder))


class Progress(NamedTuple):
    """An event: a finished round of a run."""

    label: str
    round_index: int
    num_rounds: int
    participants: int
    metrics: Mapping[str, float]
    seconds: float


class Message(NamedTuple):
    """An event: something to tell the user."""

    text: str


def run_digest(prepared: Prepared) -> str:
    """Names what a checkpoint belongs to: everything that results depend on, not the placement."""
    raw = to_raw(prepared.config)
    parts = {k: raw[k] for k in ("seed", "data", "model", "method", "training")}
    parts["data"] = {k: v for k, v in parts["data"].items() if k != "source"}
    text = json.dumps(parts, sort_keys=True)
    return digest([], [text, prepared.store.manifest.digest, prepared.partition.digest])


class RunWriter:
    """A run's folder and tracker."""

    def __init__(self, job: Job, prepared: Prepared) -> None:
        self.folder = Path(job.folder)
        self.prepared = prepared
        config = prepared.config
        self.tables = RunTables(self.folder, prepared.client_ids, prepared.dataset.task.score_name)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", to_yaml(config))
        self.tracker: Tracker = self._open_tracker(job)
        self._began = time.monotonic()

    def _open_tracker(self, job: Job) -> Tracker:
        config = self.prepared.config
        if not config.tracking.enabled:
            return NoTracker()
        uri = resolve_uri(config.tracking, Path(job.plugin_folder))
        note = self.folder / "tracking.json"
        resume_id = None
        if job.resume and note.exists():
            resume_id = json.loads(note.read_text())["run_id"]
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
            f"{config.method_label}-s{config.seed}",
            flatten(to_raw(config)),
            tags,
            resume_id,
        )
        return MLflowTracker(uri, info, self.folder)

    def write_environment(self, plan: PlacementPlan, where: list[dict[str, Any]]) -> None:
        """``environment.json``."""
        found = describe_environment(self.prepared, plan, where)
        write_json(self.folder / "environment.json", found)

    def add(self, record: RoundRecord) -> None:
        """Tables and tracker take in a round."""
        self.tables.add(record)
        self.tracker.log(record.metrics, record.plan.round_index)

    def finish(self, status: str, error: str | None = None) -> dict[str, Any]:
        """Write tables and ``summary.json``, end tracking; returns the summary."""
        self.tables.flush()
        config, task = self.prepared.config, self.prepared.dataset.task
        rows = self.tables.evaluated_rounds()
        newest = self.tables.last_round()
        summary = {
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
        }
        write_json(self.folder / "summary.json", summary)
        mlflow_status = {"FINISHED": "FINISHED", "STOPPED": "KILLED"}.get(status, "FAILED")
        problem = self.tracker.finish(mlflow_status)
        if isinstance(self.tracker, MLflowTracker):
            note = {"uri": self.tracker.public_uri, "run_id": self.tracker.run_id}
            write_json(self.folder / "tracking.json", note)
        return summary | {"tracking_problem": problem}


@dataclass
class _Place:
    """Where a run stands: before ``next_round``, with this server."""

    next_round: int
    server: Any
    gradient_steps: int


class RunLoop:
    """One run on a pool, from its start or a checkpoint to its end."""

    def __init__(
        self, prepared: Prepared, pool: ClientPool, writer: RunWriter, control: Control
    ) -> None:
        self._prepared = prepared
        self._pool = pool
        self._writer = writer
        self._control = control
        self._digest = run_digest(prepared)
        self._checkpoints = writer.folder / "checkpoints"
        self._all_states_next = True
        self._lost_clients = 0
        self._run = Run(
            prepared.algorithm,
            prepared.federation,
            pool,
            prepared.plans,
            prepared.evaluation,
            prepared.config.faults,
            prepared.dataset.task,
        )

    def go(self) -> str:
        """Run to the end; the status. Lost hosts are replaced and their rounds replayed.

        Raises:
            RunError: hosts were lost too often, or too few clients answered.
        """
        self._pool.begin(self._prepared.run_spec, self._prepared.algorithm)
        place, losses, furthest = self._restore(), 0, -1
        while True:
            try:
                return self._rounds(place)
            except StateLostError as error:
                newest = self._writer.tables.last_round()
                reached = -1 if newest is None else int(newest["round_index"])
                losses = 1 if reached > furthest else losses + 1
                furthest = max(furthest, reached)
                place = self._get_up(error, losses)

    def _get_up(self, error: StateLostError, losses: int) -> _Place:
        causes = "; ".join(f"host {item.host}: {item.cause}" for item in error.lost)
        if losses > self._prepared.config.faults.max_retries:
            raise RunError(
                f"hosts were lost {losses} times without progress ({causes}); "
                f"the last checkpoint is {latest_checkpoint(self._checkpoints)}"
            ) from error
        hosts = {item.host for item in error.lost}
        self._lost_clients += int(np.isin(self._pool.homes, list(hosts)).sum())
        logger.warning("lost %s; replacing and replaying", causes)
        self._control.emit(Message(f"lost {causes}; replacing it and replaying its rounds"))
        self._pool.revive(error.lost)
        return self._restore()

    def _restore(self) -> _Place:
        """The newest checkpoint's state in server and hosts, or the start."""
        algorithm, spec = self._prepared.algorithm, self._prepared.run_spec
        start_P = torch.from_numpy(np.array(spec.start_params))
        path = latest_checkpoint(self._checkpoints)
        self._all_states_next = True
        if path is None:
            self._writer.tables.restore(-1)
            self._pool.import_states([])
            return _Place(0, algorithm.init(start_P), 0)
        saved = load_checkpoint(
            path, self._digest, algorithm.init(start_P), algorithm.init_client(start_P, 1)
        )
        self._writer.tables.restore(saved.counters.round_index)
        self._pool.import_states(saved.states)
        return _Place(saved.counters.round_index + 1, saved.server, saved.counters.gradient_steps)

    def _rounds(self, place: _Place) -> str:
        began, stop = time.monotonic(), _StopRule(self._prepared)
        rounds = run_rounds(
            self._run,
            place.server,
            first_round=place.next_round,
            gradient_steps=place.gradient_steps,
        )
        record = None
        for record in rounds:
            if self._lost_clients:
                record.metrics["clients/faults"] += self._lost_clients
                self._lost_clients = 0
            self._writer.add(record)
            self._control.emit(self._progress(record, time.monotonic() - began))
            enough = stop.reached(record, time.monotonic() - began)
            if self._control.stopping or self._due(record.plan.round_index):
                self._save(record)
            if self._control.stopping:
                return "STOPPED"
            if enough:
                break
        if record is not None and self._prepared.config.export_models:
            self._export(record)
        return "FINISHED"

    def _progress(self, record: RoundRecord, seconds: float) -> Progress:
        shown = {k: v for k, v in record.metrics.items() if k.count("/") == 1}
        config = self._prepared.config
        return Progress(
            f"{config.method_label} seed {config.seed}",
            record.plan.round_index,
            config.training.num_rounds,
            int(record.metrics["clients/participants"]),
            shown,
            seconds,
        )

    def _due(self, round_index: int) -> bool:
        return (round_index + 1) % self._prepared.config.checkpoint.every == 0

    def _save(self, record: RoundRecord) -> None:
        """Write a checkpoint; a full disk is said and does not end the run."""
        first = latest_checkpoint(self._checkpoints) is None
        everything = first or self._all_states_next
        changed = self._pool.export_states(changed_only=not everything)
        counters = Counters(record.plan.round_index, record.gradient_steps, self._digest)
        keep = self._prepared.config.checkpoint.keep
        try:
            save_checkpoint(self._checkpoints, counters, record.server, changed, keep)
            self._writer.tables.flush()
            self._all_states_next = False
        except OSError as error:
            self._all_states_next = True
            logger.warning("no checkpoint after round %d: %s", record.plan.round_index, error)
            self._control.emit(Message(f"no checkpoint could be written: {error}"))

    def _export(self, record: RoundRecord) -> None:
        """The global model, and the model that each client predicts with."""
        spec, folder = self._prepared.federation.spec, self._writer.folder / "models"
        params = self._prepared.algorithm.global_params(record.server)
        if not isinstance(params, NotAvailable):
            write_params(folder / "global.safetensors", params, spec)
        everybody = RoundPlan(
            record.plan.round_index,
            np.arange(len(self._prepared.client_ids), dtype=np.int64),
            record.plan.learning_rate,
        )
        message = self._prepared.algorithm.broadcast(record.server, everybody)
        for index, theta in self._pool.personal_models(everybody, message).items():
            name = quote(self._prepared.client_ids[index], safe="")
            write_params(folder / "clients" / f"{name}.safetensors", torch.from_numpy(theta), spec)


class _StopRule:
    """The ``training.stop`` part of a configuration, over the evaluations of a run."""

    def __init__(self, prepared: Prepared) -> None:
        self._config = prepared.config.training.stop
        lower = not prepared.dataset.task.higher_is_better or self._config.metric.endswith("loss")
        self._sign = -1 if lower else 1
        self._best = -np.inf
        self._since = 0

    def reached(self, record: RoundRecord, seconds: float) -> bool:
        """Whether this round was the last one."""
        config = self._config
        if config.seconds is not None and seconds >= config.seconds:
            return True
        value = record.metrics.get(config.metric)
        if value is None:
            return False
        if config.target is not None and self._sign * value >= self._sign * config.target:
            return True
        better = self._sign * value > self._best
        self._best, self._since = (
            max(self._best, self._sign * value),
            0 if better else (self._since + 1),
        )
        return config.patience is not None and self._since >= config.patience


def run_jobs(
    control: Control, jobs: Sequence[Job], plan: PlacementPlan, label: str
) -> list[dict[str, Any]]:
    """Run jobs one after the other on one pool; their summaries.

    All jobs have the same number of clients; the data are dealt anew only when they change.
    """
    summaries: list[dict[str, Any]] = []
    pool: ClientPool | None = None
    where: list[dict[str, Any]] = []
    loaded: tuple[str, str] | None = None
    with _warnings_as_messages(control):
        try:
            for job in jobs:
                prepared = prepare_experiment(job.config())
                if pool is None:
                    pool, where = _open_pool(prepared, plan, label, job.plugin_folder)
                data = (prepared.store.manifest.digest, prepared.partition.digest)
                if data != loaded:
                    pool.load(prepared.data_spec, prepared.clients)
                    loaded = data
                writer = RunWriter(job, prepared)
                writer.write_environment(plan, where)
                summaries.append(_run_one(prepared, pool, writer, control))
                if control.stopping:
                    break
        finally:
            if pool is not None:
                pool.close()
    return summaries


def _run_one(
    prepared: Prepared, pool: ClientPool, writer: RunWriter, control: Control
) -> dict[str, Any]:
    try:
        status = RunLoop(prepared, pool, writer, control).go()
    except BaseException as error:
        summary = writer.finish("FAILED", str(error))
        newest = latest_checkpoint(writer.folder / "checkpoints")
        if isinstance(error, RunError) and newest is not None:
            raise RunError(f"{error}; the last checkpoint is {newest}") from error
        del summary
        raise
    summary = writer.finish(status)
    if summary["tracking_problem"]:
        control.emit(Message(summary["tracking_problem"]))
    return summary


def _open_pool(
    prepared: Prepared, plan: PlacementPlan, label: str, plugin_folder: str
) -> tuple[ClientPool, list[dict[str, Any]]]:
    config = prepared.config
    if plan.backend == "local":
        return ClientPool(LocalTransport(len(plan.actors)), plan.homes), []
    from selffl_ray.runtime.ray_pool import RayTransport

    transport = RayTransport(
        plan,
        config.placement.device,
        config.faults.client_timeout_s,
        label,
        (config.plugins, plugin_folder),
    )
    return ClientPool(transport, plan.homes), transport.where


class _Relay(logging.Handler):
    """Passes warnings on to whoever watches the job."""

    def __init__(self, control: Control) -> None:
        super().__init__(logging.WARNING)
        self._control = control

    def emit(self, record: logging.LogRecord) -> None:
        self._control.emit(Message(record.getMessage()))


@contextlib.contextmanager
def _warnings_as_messages(control: Control) -> Iterator[None]:
    handler = _Relay(control)
    package = logging.getLogger("selffl_ray")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)


def run_in_thread(
    jobs: Sequence[Job],
    plan: PlacementPlan,
    label: str,
    watch: Callable[[Any], None],
    interrupted: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Run jobs in this process, without Ray, passing events to ``watch``."""
    control = Control()
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(run_jobs(control, jobs, plan, label))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="rounds")
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if interrupted():
            control.stop()
        for event in control.take():
            watch(event)
    for event in control.take():
        watch(event)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return list(outcome[0])


def run_on_ray(
    jobs: Sequence[Job],
    plan: PlacementPlan,
    label: str,
    watch: Callable[[Any], None],
    interrupted: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Run jobs in a driver actor on the Ray that this process is connected to."""
    from selffl_ray.runtime.driver_actor import follow

    done: list[dict[str, Any]] = follow(
        run_jobs,
        (jobs, plan, label),
        plan=plan,
        label=label,
        watch=watch,
        interrupted=interrupted,
    )
    return done
