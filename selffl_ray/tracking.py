"""MLflow: one writer, a thread of its own, in batches; a store that fails never stops a run.

Only the process that runs the server loop writes. The store is prepared once, before the first run
starts. What could not be sent is kept in the run's folder (``untracked.jsonl``) and said once, as
a warning of this module's logger. A password is never written or said.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from selffl_ray.errors import ConfigError
from selffl_ray.tables import write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

BATCH_METRICS = 1000
BATCH_PARAMS = 100
MOST_VALUE = 6000
"""Longest parameter value that MLflow keeps."""
PATIENCE_S = 60.0
"""Longest wait for the store when a run ends."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The ``tracking`` part of an experiment."""

    uri: str | None = None
    """MLflow store; MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in the current folder."""
    tags: dict[str, str] = field(default_factory=dict)
    """Further tags of the run."""
    enabled: bool = True
    """false writes the run's folder only."""

    def __post_init__(self) -> None:
        if self.uri is not None and without_password(self.uri) != self.uri:
            raise ConfigError(
                f"tracking.uri must not hold a user or password, which would be written to the "
                f"run's folder, got {without_password(self.uri)}; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or the whole address as MLFLOW_TRACKING_URI"
            )


def resolve_uri(config: TrackingConfig, folder: Path) -> str:
    """The store's URI with relative paths made absolute.

    Raises:
        ConfigError: a file store, which MLflow no longer writes.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if "://" not in uri or uri.startswith("file:"):
        raise ConfigError(
            f"tracking.uri: {without_password(uri)!r} is a folder, which MLflow no longer writes; "
            "use sqlite:///path/mlflow.db or a server's http(s) address"
        )
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        return f"sqlite:///{(folder / path).resolve()}"
    return uri


def without_password(uri: str) -> str:
    """The URI (or a text with one) for people and logs: user and password replaced."""
    # Up to the last @: a password may hold one, or a slash.
    hidden = re.sub(r"//\S*@", "//***@", uri)
    return re.sub(r"(password=)[^&\s]+", r"\1***", hidden, flags=re.IGNORECASE)


class Tracker(Protocol):
    """Where a run's parameters, metrics and files go."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of a round; returns at once."""
        ...

    def finish(self, status: str) -> str | None:
        """Send what is left and the run's files; what went wrong, in words."""
        ...


class NoTracker:
    """Tracking switched off."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def finish(self, status: str) -> str | None:  # noqa: ARG002
        """Nothing to say."""
        return None


def quiet_mlflow() -> None:
    """Settings that must stand before mlflow is imported: no telemetry, no chatter."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def open_store(uri: str) -> MlflowClient:
    """A client of the store, which is created and migrated if needed."""
    quiet_mlflow()
    from mlflow import MlflowClient

    with _alone(uri):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: two that create the tables of one database break each other."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment of that name, created if needed; local stores keep artifacts beside it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / name).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        # Somebody else created it in the meantime.
        again = client.get_experiment_by_name(name)
        if again is None:
            raise
        return str(again.experiment_id)


@dataclass(frozen=True)
class RunInfo:
    """How a run is named in the store.

    resume_id: go on with this MLflow run; steps that it has are not sent again.
    """

    experiment: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    resume_id: str | None = None


Item = tuple[dict[str, float], int, int]
"""Metrics, step, time in milliseconds."""


class MLflowTracker:
    """Writes one run from a thread; every call returns at once.

    ``tracking.json`` in the run's folder says where the run is, as soon as it is there.

    Args:
        uri: the store.
        info: names, parameters and tags.
        folder: the run's folder, for what cannot be sent.
    """

    def __init__(self, uri: str, info: RunInfo, folder: Path) -> None:
        self._uri = uri
        self._info = info
        self._folder = folder
        self._queue: queue.Queue[Item | None] = queue.Queue()
        self._sending: list[Item] = []
        self._problem: str | None = None
        self._status = "FINISHED"
        self.run_id: str | None = info.resume_id
        self._last_step = -1
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def public_uri(self) -> str:
        """The store's address without a password."""
        return without_password(self._uri)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue the metrics of a round."""
        self._queue.put((dict(metrics), step, int(time.time() * 1000)))

    def finish(self, status: str) -> str | None:
        """Send what is queued, then the run's files; a slow store is waited for, not forever."""
        self._status = status
        self._queue.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive() and self._problem is None:
            self._say(f"did not answer within {PATIENCE_S:.0f} s")
        if self._problem is not None:
            self._keep_unsent()
        return self._problem

    def _say(self, what: str) -> None:
        """Once: where the store is, what is wrong, and where to find what it does not get."""
        self._problem = (
            f"MLflow store {self.public_uri}: {what}; the run goes on, and what cannot be sent is "
            f"kept in {self._folder / 'untracked.jsonl'}"
        )
        logger.warning("%s", self._problem)

    # -- in the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            client = open_store(self._uri)
            self._open_run(client)
            note = {"uri": self.public_uri, "run_id": self.run_id}
            write_json(self._folder / "tracking.json", note)
            done = False
            while not done:
                self._sending, done = self._next_batch()
                self._send(client, self._sending)
                self._sending = []
            self._close_run(client)
        except Exception as error:
            # Whatever a store may raise: tracking is never worth a run.
            text = " ".join(without_password(str(error)).split())
            if self._problem is None:
                self._say(f"{type(error).__name__}: {text}"[:300])

    def _next_batch(self) -> tuple[list[Item], bool]:
        """All that is queued now, at least one item; and whether that was the end."""
        items = [self._queue.get()]
        while not self._queue.empty():
            items.append(self._queue.get())
        return [item for item in items if item is not None], None in items

    def _open_run(self, client: MlflowClient) -> None:
        if self.run_id is not None:
            history = client.get_metric_history(self.run_id, "clients/participants")
            self._last_step = max((m.step for m in history), default=-1)
            client.update_run(self.run_id, status="RUNNING")
            return
        experiment = experiment_id(client, self._uri, self._info.experiment)
        run = client.create_run(experiment, tags=dict(self._info.tags), run_name=self._info.name)
        self.run_id = run.info.run_id
        from mlflow.entities import Param

        params = [Param(k, v[:MOST_VALUE]) for k, v in self._info.params.items()]
        for at in range(0, len(params), BATCH_PARAMS):
            client.log_batch(self.run_id, params=params[at : at + BATCH_PARAMS])

    def _send(self, client: MlflowClient, batch: list[Item]) -> None:
        from mlflow.entities import Metric

        metrics = []
        for values, step, stamp in batch:
            if step > self._last_step:
                # A round that is replayed after a host was lost has the same numbers again.
                metrics += [Metric(name, value, stamp, step) for name, value in values.items()]
                self._last_step = step
        assert self.run_id is not None
        for at in range(0, len(metrics), BATCH_METRICS):
            client.log_batch(self.run_id, metrics=metrics[at : at + BATCH_METRICS])

    def _close_run(self, client: MlflowClient) -> None:
        assert self.run_id is not None
        for path in sorted(self._folder.iterdir()):
            if path.name == "models":
                client.log_artifacts(self.run_id, str(path), path.name)
            elif path.is_file() and not path.name.startswith("."):
                client.log_artifact(self.run_id, str(path))
        client.set_terminated(self.run_id, status=self._status)

    def _keep_unsent(self) -> None:
        items: list[Item | None] = list(self._sending)
        while not self._queue.empty():
            items.append(self._queue.get())
        # Should the store answer after all, the thread closes the run and ends.
        self._queue.put(None)
        lines = [
            json.dumps({"step": step, "timestamp": stamp, "metrics": metrics}) + "\n"
            for metrics, step, stamp in (item for item in items if item is not None)
        ]
        if lines:
            try:
                with (self._folder / "untracked.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            except OSError as error:
                # The same numbers are in the tables.
                logger.warning("%s: %s", self._folder / "untracked.jsonl", error)


def open_sweep(
    uri: str, experiment: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> str:
    """A parent run for the runs of a sweep; its id."""
    client = open_store(uri)
    run = client.create_run(
        experiment_id(client, uri, experiment), run_name=name, tags={**tags, "selffl.kind": "sweep"}
    )
    for key, value in params.items():
        client.log_param(run.info.run_id, key, value[:MOST_VALUE])
    return str(run.info.run_id)


def close_sweep(
    uri: str,
    run_id: str,
    status: str,
    *,
    metrics: Mapping[str, float],
    files: Sequence[Path],
    marks: Mapping[str, Mapping[str, str]],
) -> None:
    """End a parent run with its results.

    Args:
        marks: further tags by run id, of the sweep's runs.
    """
    client = open_store(uri)
    for name, number in metrics.items():
        client.log_metric(run_id, name, number)
    for file in files:
        client.log_artifact(run_id, str(file))
    for child, tags in marks.items():
        for key, value in tags.items():
            client.set_tag(child, key, value)
    client.set_terminated(run_id, status=status)
