"""Running jobs on one pool: inside the driver actor, or in this process without Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selffl_ray.checkpoint import latest_checkpoint
from selffl_ray.config import ExperimentConfig
from selffl_ray.errors import DriverLostError, RunError, SelfFLError, UsageError
from selffl_ray.experiment import Prepared, fit_stacks, prepare_experiment
from selffl_ray.folder_lock import only_writer
from selffl_ray.pool import ClientPool, LocalTransport, StateLostError
from selffl_ray.run_loop import Message, RunLoop
from selffl_ray.run_writer import Job, Restart, RunWriter
from selffl_ray.runtime.actors import Control
from selffl_ray.runtime.placement import PlacementPlan

logger = logging.getLogger(__name__)


def run_jobs(
    control: Control,
    jobs: Sequence[Job],
    plan: PlacementPlan,
    label: str,
    started: Sequence[Any] = (),
) -> list[dict[str, Any]]:
    """Run jobs one after the other on one pool; their summaries.

    Args:
        started: the first client actors of the plan, if they have been asked for.
    """
    summaries: list[dict[str, Any]] = []
    with contextlib.closing(JobRunner(started)) as runner:
        for job in jobs:
            summaries.append(_finished(job) or runner.run(control, job, plan, label))
            if control.stopping:
                break
    return summaries


def _finished(job: Job) -> dict[str, Any] | None:
    """The summary of a run that an earlier driver actor has finished."""
    path = Path(job.folder) / "summary.json"
    if job.restart is None or not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary | {"tracking_problem": None} if summary["status"] == "FINISHED" else None


class JobRunner:
    """Runs jobs one after the other, and keeps the pool and the data while they serve.

    The pool is opened with the first job, and anew when the placement or the number of clients
    changes; the data are dealt anew only when they change.

    Args:
        started: the first client actors of the first pool, if they have been asked for.
    """

    def __init__(self, started: Sequence[Any] = ()) -> None:
        self._started = started
        self._pool: ClientPool | None = None
        self._where: list[dict[str, Any]] = []
        self._opened: tuple[Any, ...] = ()
        self._loaded: tuple[str, str] | None = None

    def run(self, control: Control, job: Job, plan: PlacementPlan, label: str) -> dict[str, Any]:
        """One job to its end; its summary.

        Args:
            label: prefix of the names of actors that are started for it.
        """
        with _warnings_as_messages(control):
            prepared = prepare_experiment(job.config())
            for caution in prepared.cautions:
                control.emit(Message(caution))
            pool = self._pool_for(prepared, plan, label, job.plugin_folder)
            prepared = fit_stacks(prepared, [at["memory_bytes"] for at in self._where])
            data = (prepared.store.manifest.digest, prepared.partition.digest)
            if data != self._loaded:
                self._loaded = None
                _load(pool, prepared)
                self._loaded = data
            with only_writer(Path(job.folder)):
                writer = RunWriter(job, prepared)
                # An earlier job may have had clients move.
                here = plan.with_homes(pool.homes.tolist())
                return _run_one(prepared, pool, writer, control, where=(here, self._where))

    def _pool_for(
        self, prepared: Prepared, plan: PlacementPlan, label: str, plugin_folder: str
    ) -> ClientPool:
        wanted = (plan, prepared.config.placement.device, prepared.config.faults.client_timeout_s)
        if self._pool is None or wanted != self._opened:
            self.close()
            started, self._started = self._started, ()
            self._pool, self._where = _open_pool(
                prepared.config, plan, label, plugin_folder, started
            )
            self._opened = wanted
        return self._pool

    def close(self) -> None:
        """End the pool."""
        pool, self._pool, self._loaded = self._pool, None, None
        if pool is not None:
            pool.close()


def _load(pool: ClientPool, prepared: Prepared) -> None:
    try:
        pool.load(prepared.data_spec, prepared.clients)
    except StateLostError as error:
        causes = "; ".join(f"host {item.host}: {item.cause}" for item in error.lost)
        raise RunError(f"hosts were lost while they read their clients' data ({causes})") from error


def _run_one(
    prepared: Prepared,
    pool: ClientPool,
    writer: RunWriter,
    control: Control,
    *,
    where: tuple[PlacementPlan, list[dict[str, Any]]],
) -> dict[str, Any]:
    try:
        writer.write_environment(*where)
        status = RunLoop(prepared, pool, writer, control).go()
    except BaseException as error:
        try:
            writer.finish("FAILED", str(error) or type(error).__name__)
        except OSError as full:
            # The cause of the end matters more.
            logger.warning("tables of %s cannot be written: %s", writer.folder, full)
        if isinstance(error, UsageError) or not isinstance(error, Exception):
            raise
        cause = str(error) if isinstance(error, SelfFLError) else f"{type(error).__name__}: {error}"
        raise RunError(f"{cause}; {_newest(writer)}") from error
    try:
        return writer.finish(status)
    except OSError as error:
        raise RunError(
            f"the run ended, but its tables cannot be written to {writer.folder}: {error}; make "
            f"room and give --resume {writer.folder}; {_newest(writer)}"
        ) from error


def _newest(writer: RunWriter) -> str:
    newest = latest_checkpoint(writer.folder / "checkpoints")
    return "there is no checkpoint" if newest is None else f"the last checkpoint is {newest}"


def _open_pool(
    config: ExperimentConfig,
    plan: PlacementPlan,
    label: str,
    plugin_folder: str,
    started: Sequence[Any],
) -> tuple[ClientPool, list[dict[str, Any]]]:
    if plan.backend == "local":
        return ClientPool(LocalTransport(len(plan.actors)), plan.homes), []
    from selffl_ray.runtime.ray_pool import ActorShell, RayTransport

    shell = ActorShell(config.placement.device, label, (config.plugins, plugin_folder))
    transport = RayTransport(plan, shell, config.faults.client_timeout_s, started)
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

    # A daemon: a second Ctrl-C must not wait for the round to end.
    thread = threading.Thread(target=work, name="rounds", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
            if interrupted():
                control.stop()
            for event in control.take():
                watch(event)
    except BaseException:
        control.stop()
        raise
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
    *,
    restarts: int,
) -> list[dict[str, Any]]:
    """Run jobs in a driver actor on the Ray that this process is connected to.

    Args:
        restarts: times that a driver actor that died is started again; each goes on from the
            newest checkpoints.

    Raises:
        DriverLostError: it died once more.
    """
    from selffl_ray.runtime.driver_actor import follow
    from selffl_ray.runtime.ray_pool import ActorShell, first_actors

    config = jobs[0].config()
    plugins = (config.plugins, jobs[0].plugin_folder)
    died: list[tuple[int, str]] = []
    for count in range(restarts + 1):
        # Another name, because actors of the one that died may take a moment to go.
        name = f"{label}-{count}" if count else label
        shell = ActorShell(config.placement.device, name, plugins)
        try:
            with first_actors(plan, shell) as started:
                done: list[dict[str, Any]] = follow(
                    run_jobs,
                    (jobs, plan, name, started),
                    plan=plan,
                    label=name,
                    watch=watch,
                    interrupted=interrupted,
                )
        except DriverLostError as error:
            if count == restarts or interrupted():
                raise
            watch(Message(f"{error}; another one goes on from the last checkpoint"))
            jobs = [_gone_on(job, Restart(count + 1, str(error), tuple(died))) for job in jobs]
            died.append((count + 1, str(error)))
        else:
            return done
    raise AssertionError("the last attempt returns or raises")


def _gone_on(job: Job, restart: Restart) -> Job:
    """The job for the next driver actor; one that had not begun begins."""
    if not (Path(job.folder) / "config.yaml").exists():
        return job
    return dataclasses.replace(job, resume=True, restart=restart)
