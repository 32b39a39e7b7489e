"""What each ``selffl`` command does. Text goes through :class:`Say`; ``cli`` prints it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selffl_ray.api import (
    Interrupt,
    Request,
    Result,
    launch,
    parse_method,
    placement_of,
    request_comparison,
    request_run,
)
from selffl_ray.config import ExperimentConfig, load_config, to_yaml
from selffl_ray.console import ProgressPrinter, comparison_table, ranking_table, text_table
from selffl_ray.datasets.store import prepare, store_root
from selffl_ray.describe import describe, draw
from selffl_ray.doctor import examine
from selffl_ray.errors import ConfigError, SelfFLError
from selffl_ray.estimate import estimate_run, estimate_sweep
from selffl_ray.experiment import enough_memory, prepare_experiment
from selffl_ray.registry import Component, datasets
from selffl_ray.runtime.cluster import cluster, this_machine
from selffl_ray.runtime.placement import Node
from selffl_ray.serving import serve
from selffl_ray.sweep import SweepConfig, load_sweep
from selffl_ray.sweep_plan import plan_sweep
from selffl_ray.sweep_run import SweepResult, run_sweep
from selffl_ray.tracking import TrackingConfig, quiet_mlflow, resolve_uri, without_password
from selffl_ray.verification import verify_run

STOPPED = 130
"""Exit status after Ctrl-C."""


@dataclass(frozen=True)
class Say:
    """Where text goes: ``out`` is a line of the result, ``aside`` progress as it is."""

    out: Callable[[str], None]
    aside: Callable[[str], None]


@contextlib.contextmanager
def stoppable(say: Say) -> Iterator[Interrupt]:
    """Ctrl-C and SIGTERM end the run after its round; a second one ends at once."""
    interrupt = Interrupt()

    def handle(number: int, frame: Any) -> None:
        if interrupt.is_set():
            raise KeyboardInterrupt
        interrupt.set()
        say.aside("\nstopping after this round (again to stop at once)\n")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watching(say: Say) -> Iterator[ProgressPrinter]:
    """Progress on the terminal; what follows, an error too, begins a line of its own."""
    printer = ProgressPrinter(say.aside)
    try:
        yield printer
    finally:
        printer.end()


def request(options: argparse.Namespace) -> Request:
    """What ``selffl run`` or ``selffl compare`` is to do, checked before anything starts.

    Raises:
        UsageError: it cannot be done.
    """
    if options.command == "run":
        return request_run(_run_config(options), output=options.output, resume=options.resume)
    config = load_config(options.config, options.set)
    methods = _methods(options.methods, config)
    seeds = [config.seed] if options.seeds is None else _seeds(options.seeds)
    return request_comparison(config, methods, seeds=seeds, output=options.output)


def _run_config(options: argparse.Namespace) -> ExperimentConfig:
    path = options.config
    if options.resume:
        if options.config or options.output:
            raise ConfigError(
                "--resume RUN_DIR goes on with that folder's own config.yaml; drop CONFIG.yaml "
                "and --output"
            )
        path = Path(options.resume) / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"--resume {options.resume}: there is no run in that folder")
    return load_config(path, options.set)


def run(options: argparse.Namespace, say: Say, asked: Request | None = None) -> int:
    """``selffl run``; asked: the request, if it has been made."""
    if options.dry_run:
        return _dry_run(_run_config(options), say)
    with watching(say) as printer, stoppable(say) as interrupt:
        asked = asked or request(options)
        result = launch(asked, printer, interrupt)[0]
    if result.summary["status"] == "STOPPED":
        say.out(f"stopped after {result.summary['rounds']} rounds; go on with")
        say.out(f"  selffl run --resume {shlex.quote(str(result.folder))}")
        return STOPPED
    say.out(comparison_table([result.summary]))
    say.out(f"folder: {result.folder}")
    _where_to_look(asked.configs[0], result, say)
    return 0


@enough_memory()
def _dry_run(config: ExperimentConfig, say: Say) -> int:
    prepared = prepare_experiment(config)
    say.out(to_yaml(config))
    plan = placement_of(prepared, _nodes())
    cautions = [f"caution: {caution}" for caution in prepared.cautions]
    for line in (*cautions, *plan.describe(), *estimate_run(prepared, plan)):
        say.out(f"# {line}")
    return 0


def _nodes() -> list[Node]:
    """The machines of the cluster that RAY_ADDRESS names, or this one."""
    if not os.environ.get("RAY_ADDRESS"):
        return this_machine()
    with cluster() as found:
        return found.nodes


def compare(options: argparse.Namespace, say: Say, asked: Request | None = None) -> int:
    """``selffl compare``; asked: the request, if it has been made."""
    with watching(say) as printer, stoppable(say) as interrupt:
        asked = asked or request(options)
        results = launch(asked, printer, interrupt)
    say.out(comparison_table([r.summary for r in results]))
    say.out(f"folders: {results[0].folder.parent}")
    _where_to_look(asked.configs[0], results[0], say)
    last, wanted = results[-1], len(asked.jobs)
    if last.summary["status"] != "STOPPED" and len(results) == wanted:
        return 0
    say.out(f"stopped in run {len(results)} of {wanted}")
    if last.summary["status"] == "STOPPED":
        say.out(f"  selffl run --resume {shlex.quote(str(last.folder))}   goes on with that one")
    return STOPPED


def _methods(text: str, config: ExperimentConfig) -> list[Component]:
    names = [part.strip() for part in text.split(",")]
    if len(set(names)) != len(names):
        raise ConfigError(f"--methods names a method twice: {text!r}")
    return [parse_method(name, config) for name in names]


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds must be whole numbers with commas, got {text!r}") from error
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds names a seed twice: {text!r}")
    return seeds


def _where_to_look(config: ExperimentConfig, result: Result, say: Say) -> None:
    if config.tracking.enabled:
        say.out(
            f"curves:  selffl ui {shlex.quote(str(result.folder))}   (MLflow, experiment "
            f"{config.experiment!r}: test/global_accuracy and test/local_accuracy)"
        )


def tune(options: argparse.Namespace, say: Say) -> int:
    """``selffl tune``."""
    if options.resume:
        if options.sweep or options.output or options.set:
            raise ConfigError(
                "--resume SWEEP_DIR goes on with that folder's own sweep.yaml; drop SWEEP.yaml, "
                "--set and --output"
            )
        sweep = load_sweep(Path(options.resume) / "sweep.yaml")
    elif options.sweep:
        sweep = load_sweep(Path(options.sweep), options.set)
    else:
        raise ConfigError("tune needs a SWEEP.yaml, as in tune_configs/, or --resume SWEEP_DIR")
    if options.dry_run:
        return _dry_sweep(sweep, say)
    with watching(say) as printer, sigterm_as_ctrl_c():
        result = run_sweep(
            sweep,
            output=options.output,
            resume=options.resume,
            watch=printer,
            command=shlex.join(
                ["selffl", "tune", str(options.sweep), *(f"--set={s}" for s in options.set)]
            ),
        )
    return _tell_sweep(sweep, result, say)


def _tell_sweep(sweep: SweepConfig, result: SweepResult, say: Say) -> int:
    """The table of the last stage and where to look; the exit status."""
    last = "confirm" if "confirm" in result.rows else "select"
    name = "confirm" if last == "confirm" else "results"
    say.out(ranking_table(result.ranking, result.rows[last], sweep.metric))
    say.out(f"table:   {result.folder / name}.md   (and .csv, a row a trial)")
    say.out(f"Tune:    tensorboard --logdir {shlex.quote(str(result.folder / 'tune'))}")
    if result.tracked:
        say.out(
            f"curves:  selffl ui   (MLflow, experiment {sweep.experiment!r}, grouped by parent)"
        )
    if not result.complete:
        say.out("stopped; go on with")
        say.out(f"  selffl tune --resume {shlex.quote(str(result.folder))}")
        return STOPPED
    if result.failed:
        import pandas as pd

        rows = pd.concat(result.rows.values())
        first = rows[rows["status"] == "FAILED"].iloc[0]
        say.out(f"{result.failed} trials failed; the first: {first['trial']}: {first['error']}")
        return 1
    return 0


@enough_memory()
def _dry_sweep(sweep: SweepConfig, say: Say) -> int:
    nodes = _nodes()
    plan = plan_sweep(sweep, nodes)
    for one in plan.chosen:
        say.out(f"{one.number:4d}  {one.label}")
    if sweep.searcher.name != "variants":
        say.out("# the first suggestions; the others depend on what these come to")
    for line in estimate_sweep(plan, sum(n.cpus for n in nodes)):
        say.out(f"# {line}")
    return 0


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Ray Tune ends a sweep cleanly on Ctrl-C; let SIGTERM do the same."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def data_list(options: argparse.Namespace, say: Say) -> int:
    """``selffl data list``."""
    rows, missing = [], []
    for name in datasets.names():
        dataset = datasets.make(Component(name))
        try:
            dataset.find(None)
            state = "ready"
        except SelfFLError as error:
            state = "needs --source"
            missing.append(str(error))
        clients = "its own" if dataset.natural else "by partition"
        rows.append([name, state, clients, datasets.get(name).summary])
    say.out(text_table(["data set", "here", "clients", "what it is"], rows, left=True))
    if missing:
        say.out("\n" + "\n".join(missing))
    return 0


def _data_config(options: argparse.Namespace) -> ExperimentConfig:
    sets = [f"data.name={options.name}", *options.set]
    if options.source:
        sets.append(f"data.source={options.source}")
    return load_config(None, sets)


def data_describe(options: argparse.Namespace, say: Say) -> int:
    """``selffl data describe``."""
    prepared = prepare_experiment(_data_config(options))
    description = describe(prepared)
    for line in description.lines:
        say.out(line)
    picture = Path(options.output or f"{options.name}.png").absolute()
    draw(description, prepared.store.manifest.title, picture)
    say.out(f"\npicture: {picture}")
    return 0


def data_prepare(options: argparse.Namespace, say: Say) -> int:
    """``selffl data prepare``."""
    config = _data_config(options)
    chosen = config.data.component
    dataset = datasets.make(chosen)
    dataset.find(config.data.source)
    say.aside(f"preparing {dataset.name} ({dataset.title}) ...\n")
    own, root = datasets.options(chosen), store_root()
    with watching(say) as printer:
        store = prepare(dataset, own, config.data.source, config.seed, root, watch=printer)
        # A copy that was prepared long ago may have been damaged since.
        store.check(printer)
    manifest = store.manifest
    say.out(f"{manifest.name}: {manifest.num_rows} examples, {manifest.num_batches} record batches")
    say.out(f"licence: {manifest.licence}")
    say.out(f"digest:  {manifest.digest} (all record batches checked)")
    say.out(f"store:   {store.folder}")
    return 0


def verify(options: argparse.Namespace, say: Say) -> int:
    """``selffl verify``."""
    with watching(say) as printer:
        verdict = verify_run(Path(options.run), printer)
    where = f"repeated in {verdict.placement}"
    if verdict.first_difference is None:
        say.out(f"equal: all {verdict.num_rounds} rounds have the same digest, {where}")
        return 0
    first, count = verdict.first_difference, verdict.num_rounds
    say.out(f"DIFFERENT from round {first} on (of {count}), {where}")
    return 1


def ui(options: argparse.Namespace, say: Say) -> int:
    """``selffl ui``."""
    target = options.store
    if target and Path(target, "tracking.json").is_file():
        target = json.loads(Path(target, "tracking.json").read_text())["uri"]
        if "***" in target:
            say.out(f"the store is a server: open {target}")
            return 0
    elif target and Path(target).is_file():
        target = f"sqlite:///{Path(target).absolute()}"
    elif target and "://" not in target:
        raise ConfigError(
            f"{target} is neither a tracked run's folder (with tracking.json) nor a .db file; name "
            "one, or a server's address"
        )
    uri = resolve_uri(TrackingConfig(uri=target), Path.cwd())
    if not uri.startswith("sqlite:///"):
        say.out(f"the store is a server: open {without_password(uri)}")
        return 0
    if not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ConfigError(f"there is no MLflow store {uri}; run an experiment first, or name one")
    quiet_mlflow()
    say.out(f"MLflow UI of {uri}: http://127.0.0.1:{options.port} (Ctrl-C ends it)")
    say.out("open an experiment, its chart view, and search for ^test/(global|local)_accuracy$")
    say.out("Ray dashboard: `ray dashboard cluster.yaml` for a cluster; local runs start none")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    return serve([*command, "--host", "127.0.0.1", "--port", str(options.port)])


def doctor(options: argparse.Namespace, say: Say) -> int:
    """``selffl doctor``."""
    for finding in examine():
        mark = "ok" if finding.remedy is None else "!!"
        remedy = f"  -> {finding.remedy}" if finding.remedy else ""
        say.out(f"{mark} {finding.name:<14} {finding.found}{remedy}")
    return 0
