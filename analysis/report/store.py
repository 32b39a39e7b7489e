"""The MLflow store, read only: experiments, runs, metric series and the table of clients."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from selffl_ray.errors import UsageError
from selffl_ray.tracking import TrackingConfig, open_store, resolve_uri, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

INFINITE = 1.7e308
"""MLflow keeps an infinite metric as the largest double."""
PAGE = 1000
MOST_TEXT = 120
"""Most letters of what MLflow says that an error repeats."""
SHOWN_NAMES = 5
"""Most names that an error offers."""


@dataclass(frozen=True, eq=False)
class StoredRun:
    """One run as MLflow describes it; times in milliseconds since 1970."""

    run_id: str
    name: str
    status: str
    start_ms: int
    end_ms: int | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: frozenset[str]

    @property
    def parent(self) -> str | None:
        """Id of the run that this one belongs to."""
        return self.tags.get("mlflow.parentRunId")


class Store:
    """A store that exists.

    Args:
        uri: as in ``tracking.uri``; None for the environment's or the usual one.

    Raises:
        UsageError: there is no store at that address, or MLflow cannot read it.
    """

    def __init__(self, uri: str | None) -> None:
        self.uri = resolve_uri(TrackingConfig(), Path.cwd()) if uri is None else _absolute(uri)
        self._client = _open(self.uri)

    @property
    def public_uri(self) -> str:
        """The address without a password."""
        return without_password(self.uri)

    def runs(self, experiment: str) -> list[StoredRun]:
        """All runs of an experiment, newest first.

        Raises:
            UsageError: no experiment of that name (with the nearest ones), or none in it.
        """
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            raise UsageError(
                f"--experiment {experiment!r}: there is none in {self.public_uri}; "
                f"{nearest(experiment, self._names())}"
            )
        runs: list[StoredRun] = []
        token = None
        while True:
            page = self._client.search_runs(
                [found.experiment_id],
                max_results=PAGE,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            runs += [_stored(run) for run in page]
            token = page.token
            if not token:
                break
        if not runs:
            raise UsageError(
                f"--experiment {experiment!r} in {self.public_uri} is empty; run "
                f"`selffl compare` with `--set experiment={experiment}` first"
            )
        return runs

    def _names(self) -> list[str]:
        return [e.name for e in self._client.search_experiments() if e.name != "Default"]

    def series(self, run: StoredRun, names: Iterable[str]) -> dict[str, dict[int, float]]:
        """Metrics by round index; what is infinite or NaN is left out, as not measured."""
        return {name: self._history(run, name) for name in names}

    def _history(self, run: StoredRun, name: str) -> dict[int, float]:
        points = self._client.get_metric_history(run.run_id, name)
        # A round that was replayed after a fault is there twice; the later one counts.
        points = sorted(points, key=lambda p: (p.step, p.timestamp))
        return {int(p.step): float(p.value) for p in points if abs(p.value) < INFINITE}

    def clients(self, run: StoredRun) -> pd.DataFrame | None:
        """The run's ``clients.parquet``; None if it is not among its artifacts."""
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                path = self._client.download_artifacts(run.run_id, "clients.parquet", folder)
                return pd.read_parquet(path)
            except (MlflowException, OSError):
                return None


def _absolute(uri: str) -> str:
    """As :func:`resolve_uri`, but a user and password are allowed: nothing is written here."""
    if without_password(uri) != uri:
        return uri
    return resolve_uri(TrackingConfig(uri=uri), Path.cwd())


def _open(uri: str) -> MlflowClient:
    public = without_password(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        # MLflow would create it.
        raise UsageError(
            f"--store {public}: there is no such file; give the store that the runs are in, "
            "by --store or MLFLOW_TRACKING_URI"
        )
    # A server that does not answer is said in seconds, not minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        return open_store(uri)
    except Exception as error:
        # Whatever a database or a server may raise: the address cannot be read.
        text = " ".join(without_password(str(error)).split())[:MOST_TEXT]
        raise UsageError(
            f"--store {public}: MLflow cannot read it ({text}); give the store that the runs are "
            "in, by --store or MLFLOW_TRACKING_URI"
        ) from error


def _stored(run: object) -> StoredRun:
    info, data = run.info, run.data  # type: ignore[attr-defined]
    return StoredRun(
        run_id=info.run_id,
        name=info.run_name or info.run_id[:8],
        status=info.status,
        start_ms=info.start_time,
        end_ms=info.end_time,
        tags=dict(data.tags),
        params=dict(data.params),
        metrics=frozenset(data.metrics),
    )


def nearest(name: str, names: Sequence[str]) -> str:
    """What to say about a name that is not there: the nearest ones, or that there are none."""
    if not names:
        return "there are none at all"
    close = difflib.get_close_matches(name, names, n=SHOWN_NAMES, cutoff=0.5)
    if close:
        return f"nearest: {', '.join(close)}"
    more = ", ..." if len(names) > SHOWN_NAMES else ""
    return f"there are: {', '.join(sorted(names)[:SHOWN_NAMES])}{more}"
