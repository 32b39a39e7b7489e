"""What a script or a notebook calls: run one experiment, or compare several methods."""

from __future__ import annotations

import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selffl_ray.checkpoint import check_checkpoint, latest_checkpoint
from selffl_ray.config import (
    ExperimentConfig,
    flatten,
    load_config,
    parse_component,
    resolve,
    to_raw,
)
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.execution import run_in_thread, run_on_ray
from selffl_ray.experiment import Prepared, prepare_experiment
from selffl_ray.local_ray import is_ray_ours
from selffl_ray.registry import Component, algorithms
from selffl_ray.run_loop import run_digest, run_identity
from selffl_ray.run_writer import Job, check_one_configuration
from selffl_ray.runtime.cluster import cluster, this_machine
from selffl_ray.runtime.placement import PlacementPlan, plan_placement
from selffl_ray.tables import read_tables
from selffl_ray.tracking import resolve_uri

if TYPE_CHECKING:
    import pandas as pd

Watch = Callable[[Any], None]

JOB_FOLDER = "runtime_resources/working_dir_files"
"""Part of the path of a folder that Ray unpacks a job's working directory to, and deletes."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#8c2d04")
"""Of the methods of a comparison in MLflow: told apart by colour-blind people too (Okabe, Ito)."""
SHOWN_KEYS = 4
"""Most keys that a message names."""


@dataclass(frozen=True)
class Request:
    """Runs that have been checked, to go one after the other on the same actors.

    configs, jobs, prepared: of each run.
    """

    configs: Sequence[ExperimentConfig]
    jobs: Sequence[Job]
    prepared: Sequence[Prepared]


@dataclass(frozen=True)
class Result:
    """A finished run: its summary, its folder, and its tables as pandas frames."""

    summary: dict[str, Any]
    folder: Path

    @property
    def rounds(self) -> pd.DataFrame:
        """One row a round."""
        return self._table("rounds")

    @property
    def clients(self) -> pd.DataFrame:
        """One row a client, split and evaluated round."""
        return self._table("clients")

    @property
    def uncertainty(self) -> pd.DataFrame:
        """One row a client, parameter group and round; empty for other methods than Self-FL."""
        return self._table("uncertainty")

    @property
    def participation(self) -> pd.DataFrame:
        """One row a client asked and round; empty unless trouble is simulated."""
        return self._table("participation")

    def _table(self, name: str) -> pd.DataFrame:
        # Imported here: it is 25 MB, which a process that only runs does not need.
        import pandas as pd

        if not self.folder.is_dir():
            # Not an empty frame: that says that there were no rows.
            raise DataError(
                f"{self.folder} is gone, and the tables of its run with it; read {name} before the "
                "folder is deleted"
            )
        path = self.folder / f"{name}.parquet"
        return pd.read_parquet(path) if path.exists() else pd.DataFrame()


class Interrupt:
    """A wish to stop after the current round; Ctrl-C and SIGTERM set it in the command line."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Ask for the end."""
        self._event.set()

    def is_set(self) -> bool:
        """Somebody asked for the end."""
        return self._event.is_set()


def _ignore(event: Any) -> None:
    """Nobody watches."""


def run_experiment(
    config: ExperimentConfig,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    watch: Watch = _ignore,
    interrupt: Interrupt | None = None,
) -> Result:
    """Run one experiment to its end.

    Args:
        output: folder of the run; ``runs/<experiment>/<run>`` in the current folder by default.
        resume: a run's folder to go on in, from its newest checkpoint.
        watch: called with every :class:`~selffl_ray.run_loop.Progress` and ``Message``.
        interrupt: set it to end the run after the round it is in.

    Raises:
        UsageError: something about the request cannot work; no actor was started.
        RunError: the run failed.
    """
    return launch(request_run(config, output=output, resume=resume), watch, interrupt)[0]


def request_run(
    config: ExperimentConfig,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
) -> Request:
    """What :func:`run_experiment` checks before it starts anything, with the same arguments.

    Raises:
        UsageError: something about the request cannot work.
    """
    config = resolve(config)
    folder = Path(resume or output or new_folder(config)).absolute()
    return _checked([config], [make_job(config, folder, resume=resume is not None)])


def run_comparison(
    config: ExperimentConfig,
    methods: Sequence[Component],
    *,
    seeds: Sequence[int] | None = None,
    output: str | Path | None = None,
    watch: Watch = _ignore,
    interrupt: Interrupt | None = None,
) -> list[Result]:
    """Run several methods on the same partition, start, cohorts and batches, on the same actors.

    Args:
        methods: in the order of the table; seeds: the configuration's own by default.
        output: folder that holds the runs' folders.

    Raises:
        UsageError: something about the request cannot work; no actor was started.
        RunError: a run failed.
    """
    return launch(request_comparison(config, methods, seeds=seeds, output=output), watch, interrupt)


def request_comparison(
    config: ExperimentConfig,
    methods: Sequence[Component],
    *,
    seeds: Sequence[int] | None = None,
    output: str | Path | None = None,
) -> Request:
    """What :func:`run_comparison` checks before it starts anything, with the same arguments.

    Raises:
        UsageError: something about the request cannot work.
    """
    configs = [
        dataclasses.replace(config, method=method, seed=seed)
        for seed in (seeds if seeds is not None else [config.seed])
        for method in methods
    ]
    configs = [resolve(one) for one in configs]
    together = {"comparison": f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"}
    root = Path(output).absolute() if output is not None else None
    jobs = []
    for number, one in enumerate(configs):
        folder = new_folder(one) if root is None else root / f"{one.method_label}-s{one.seed}"
        # MLflow's own colours, drawn from the run's id, often are the same for two runs.
        colour = COLOURS[number % len(methods) % len(COLOURS)]
        jobs.append(make_job(one, folder, tags={**together, "mlflow.runColor": colour}))
    if len({job.folder for job in jobs}) < len(jobs):
        raise ConfigError(
            f"two of these runs would be written to one folder in {root}: methods need different "
            "names or presets, and a seed may occur once; without an output folder each run gets "
            "a folder of its own"
        )
    return _checked(configs, jobs)


def new_folder(config: ExperimentConfig) -> Path:
    """A fresh name under ``runs/<experiment>/`` in the current folder."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    name = f"{config.method_label}-s{config.seed}-{stamp}"
    return Path.cwd() / "runs" / config.experiment / name


def make_job(
    config: ExperimentConfig,
    folder: Path,
    *,
    resume: bool = False,
    tags: dict[str, str] | None = None,
) -> Job:
    """A job for the driver actor.

    Raises:
        ConfigError: a folder or store that would vanish with a Ray job's working directory, a
            folder that holds a run or cannot be written to.
    """
    base = Path.cwd()
    store = resolve_uri(config.tracking, base) if config.tracking.enabled else None
    for place in filter(None, (str(folder), store)):
        if JOB_FOLDER in place:
            raise ConfigError(
                f"{place} lies in the folder that this Ray job was unpacked to and would vanish "
                "with it; give absolute paths: --output, and tracking.uri or MLFLOW_TRACKING_URI"
            )
    if not resume and (folder / "config.yaml").exists():
        raise ConfigError(
            f"--output {folder} holds a run already; go on with --resume {folder}, or give another "
            "folder"
        )
    if resume and not (folder / "config.yaml").exists():
        raise ConfigError(f"--resume {folder}: there is no run in that folder")
    at = next(p for p in (folder, *folder.parents) if p.exists())
    if not at.is_dir() or not os.access(at, os.W_OK):
        raise ConfigError(
            f"--output {folder}: {at} is not a folder that can be written to; give another one"
        )
    return Job(to_raw(config), str(folder), str(base), store, tags or {}, resume)


def _check_resumable(prepared: Prepared, folder: Path) -> None:
    """Before anything in the folder is touched: is it a run of this configuration?"""
    check_one_configuration(folder, "go on with its sweep, selffl tune --resume")
    was = flatten(run_identity(load_config(folder / "config.yaml")))
    now = flatten(run_identity(prepared.config))
    if other := sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k)):
        more = ", ..." if len(other) > SHOWN_KEYS else ""
        raise ConfigError(
            f"--resume {folder}: not as in the run's own config.yaml: "
            f"{', '.join(other[:SHOWN_KEYS])}{more}; leave that as it was, or start another run"
        )
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is not None:
        head = check_checkpoint(newest, run_digest(prepared))
        read_tables(folder, head["round_index"])


def _checked(configs: Sequence[ExperimentConfig], jobs: Sequence[Job]) -> Request:
    prepared = [prepare_experiment(config) for config in configs]
    for one, job in zip(prepared, jobs, strict=True):
        if job.resume:
            _check_resumable(one, Path(job.folder))
    counts = {len(p.client_ids) for p in prepared}
    if len(counts) > 1:
        raise ConfigError(f"runs on the same actors need the same number of clients, got {counts}")
    if configs[0].placement.backend == "ray" and is_ray_ours():
        # Refused before an actor is started, if this machine alone cannot do it.
        placement_of(prepared[0], this_machine())
    return Request(configs, jobs, prepared)


def launch(
    request: Request, watch: Watch = _ignore, interrupt: Interrupt | None = None
) -> list[Result]:
    """Carry out a request to its end; see :func:`run_experiment`."""
    first, config, jobs = request.prepared[0], request.configs[0], request.jobs
    label = f"{config.experiment}-{os.getpid()}-{secrets.token_hex(2)}"
    stopping = (interrupt or Interrupt()).is_set
    if config.placement.backend == "local":
        plan = placement_of(first, [])
        done = run_in_thread(jobs, plan, label, watch, stopping)
    else:
        with cluster() as ray_cluster:
            plan = placement_of(first, ray_cluster.nodes)
            restarts = config.faults.max_retries
            done = run_on_ray(jobs, plan, label, watch, stopping, restarts=restarts)
    return [Result(summary, Path(summary["folder"])) for summary in done]


def placement_of(prepared: Prepared, nodes: Sequence[Any]) -> PlacementPlan:
    """The placement plan of an experiment on these machines.

    Raises:
        PlacementError: they cannot hold it, with the numbers.
    """
    config = prepared.config.placement
    return plan_placement(config, nodes, prepared.client_ids, prepared.work)


def parse_method(text: str, config: ExperimentConfig) -> Component:
    """``name`` or ``name:preset`` as a method; the configuration's own options if it is its method.

    Raises:
        ConfigError: unknown name or preset, with the list.
    """
    name, colon, preset = text.strip().partition(":")
    if not colon and name == config.method.name:
        return config.method
    raw: dict[str, Any] = {"name": name} | ({"preset": preset} if colon else {})
    return parse_component(algorithms, raw, "method")
