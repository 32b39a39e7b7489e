"""The ``selffl`` command. The only module that prints.

Exit status: 0 success, 1 a run failed, 2 a usage or configuration error, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selffl_ray.errors import ConfigError, SelfFLError, UsageError

STOPPED = 130


def out(text: str = "") -> None:
    """A line for the user."""
    print(text, flush=True)


def aside(text: str) -> None:
    """Progress, as it is, beside the results."""
    print(text, end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr_command(options):
        parser.print_help()
        return 2
    try:
        status: int = options.command(options)
        return status
    except UsageError as error:
        return _failed(error, options.verbose, 2)
    except SelfFLError as error:
        return _failed(error, options.verbose, 1)
    except KeyboardInterrupt:
        return STOPPED


def hasattr_command(options: argparse.Namespace) -> bool:
    """Whether a command was given."""
    return "command" in vars(options)


def _failed(error: Exception, verbose: bool, status: int) -> int:
    if verbose:
        traceback.print_exc()
    message = " ".join(str(error).split())
    print(f"selffl: {message}", file=sys.stderr, flush=True)
    return status


@contextlib.contextmanager
def _stoppable() -> Iterator[Any]:
    """Ctrl-C and SIGTERM end the run after its round; a second one ends at once."""
    from selffl_ray.api import Interrupt

    interrupt = Interrupt()

    def handle(number: int, frame: Any) -> None:
        if interrupt.is_set():
            raise KeyboardInterrupt
        interrupt.set()
        aside("\nstopping after this round (again to stop at once)\n")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(options: argparse.Namespace) -> int:
    from selffl_ray.api import run_experiment
    from selffl_ray.config import load_config
    from selffl_ray.console import ProgressPrinter, comparison_table

    path = options.config
    if options.resume:
        if options.config or options.output:
            raise ConfigError(
                "--resume RUN_DIR goes on with that folder's own config.yaml; drop "
                "CONFIG.yaml and --output"
            )
        path = Path(options.resume) / "config.yaml"
    config = load_config(path, options.set)
    if options.dry_run:
        return _dry_run(config)
    printer = ProgressPrinter(aside)
    with _stoppable() as interrupt:
        result = run_experiment(
            config,
            output=options.output,
            resume=options.resume,
            watch=printer,
            interrupt=interrupt,
        )
    printer.end()
    if result.summary["status"] == "STOPPED":
        out(
            f"stopped after round {result.summary['rounds']}; go on with\n"
            f"  selffl run --resume {result.folder}"
        )
        return STOPPED
    out(comparison_table([result.summary]))
    out(f"folder: {result.folder}")
    _where_to_look(config)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from selffl_ray.api import parse_method, run_comparison
    from selffl_ray.config import load_config
    from selffl_ray.console import ProgressPrinter, comparison_table

    config = load_config(options.config, options.set)
    methods = [parse_method(text, config) for text in options.methods.split(",")]
    seeds = _seeds(options.seeds) if options.seeds else None
    printer = ProgressPrinter(aside)
    with _stoppable() as interrupt:
        results = run_comparison(
            config, methods, seeds=seeds, output=options.output, watch=printer, interrupt=interrupt
        )
    printer.end()
    out(comparison_table([r.summary for r in results]))
    out(f"folders: {results[0].folder.parent}")
    _where_to_look(config)
    return STOPPED if results[-1].summary["status"] == "STOPPED" else 0


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds must be whole numbers with commas, got {text!r}") from error
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds names a seed twice: {text!r}")
    return seeds


def _where_to_look(config: Any) -> None:
    if config.tracking.enabled:
        out(
            "curves:  selffl ui    (MLflow, experiment "
            f"{config.experiment!r}: test/global_accuracy and test/local_accuracy)"
        )


def _dry_run(config: Any) -> int:
    from selffl_ray.api import placement_of
    from selffl_ray.config import to_yaml
    from selffl_ray.estimate import estimate_run
    from selffl_ray.experiment import prepare_experiment
    from selffl_ray.runtime.cluster import cluster, this_machine

    prepared = prepare_experiment(config)
    out(to_yaml(config))
    if os.environ.get("RAY_ADDRESS") and config.placement.backend == "ray":
        with cluster() as found:
            nodes = found.nodes
    else:
        nodes = this_machine()
    plan = placement_of(prepared, nodes)
    for line in (*plan.describe(), *estimate_run(prepared, plan)):
        out(f"# {line}")
    return 0


def _data(options: argparse.Namespace) -> int:
    handlers: dict[str, Callable[[argparse.Namespace], int]] = {
        "list": _data_list,
        "describe": _data_describe,
        "prepare": _data_prepare,
    }
    return handlers[options.action](options)


def _data_list(options: argparse.Namespace) -> int:
    from selffl_ray.console import text_table
    from selffl_ray.registry import Component, datasets

    rows = []
    for name in datasets.names():
        dataset = datasets.make(Component(name))
        try:
            dataset.find(None)
            state = "ready"
        except SelfFLError:
            state = "needs --source"
        clients = "its own clients" if dataset.natural else "to be partitioned"
        rows.append([name, state, clients, datasets.get(name).summary])
    header = ["data set", "here", "clients", "what it is"]
    out(text_table(header, [[c.ljust(1) for c in row] for row in rows]))
    return 0


def _data_config(options: argparse.Namespace) -> Any:
    from selffl_ray.config import load_config

    sets = [f"data.name={options.name}", *options.set]
    if options.source:
        sets.append(f"data.source={options.source}")
    return load_config(None, sets)


def _data_describe(options: argparse.Namespace) -> int:
    from selffl_ray.describe import describe, draw
    from selffl_ray.experiment import prepare_experiment

    prepared = prepare_experiment(_data_config(options))
    description = describe(prepared)
    for line in description.lines:
        out(line)
    picture = Path(options.output or f"{options.name}.png").absolute()
    draw(description, prepared.store.manifest.title, picture)
    out(f"\npicture: {picture}")
    return 0


def _data_prepare(options: argparse.Namespace) -> int:
    from selffl_ray.datasets.store import prepare, store_root
    from selffl_ray.registry import datasets

    config = _data_config(options)
    dataset = datasets.make(config.data.component)
    aside(f"preparing {dataset.name} ({dataset.title}) ...\n")
    store = prepare(
        dataset,
        datasets.options(config.data.component),
        config.data.source,
        config.seed,
        store_root(),
    )
    manifest = store.manifest
    out(f"{manifest.name}: {manifest.num_rows} examples, {manifest.num_batches} record batches")
    out(f"licence: {manifest.licence}")
    out(f"digest:  {manifest.digest}")
    out(f"store:   {store.folder}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from selffl_ray.console import ProgressPrinter
    from selffl_ray.verification import verify_run

    printer = ProgressPrinter(aside)
    verdict = verify_run(Path(options.run), printer)
    printer.end()
    where = f"repeated in {verdict.placement}"
    if verdict.first_difference is None:
        out(f"equal: all {verdict.num_rounds} rounds have the same digest, {where}")
        return 0
    out(f"DIFFERENT from round {verdict.first_difference} on (of {verdict.num_rounds}), {where}")
    return 1


def _ui(options: argparse.Namespace) -> int:
    import json

    from selffl_ray.tracking import TrackingConfig, quiet_mlflow, resolve_uri, without_password

    target = options.store
    if target and Path(target, "tracking.json").is_file():
        target = json.loads(Path(target, "tracking.json").read_text())["uri"]
    elif target and Path(target).is_file():
        target = f"sqlite:///{Path(target).absolute()}"
    uri = resolve_uri(TrackingConfig(uri=target), Path.cwd())
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ConfigError(f"there is no MLflow store {uri}; run an experiment first, or name one")
    if not uri.startswith("sqlite:///"):
        out(f"the store is a server: open {without_password(uri)}")
        return 0
    quiet_mlflow()
    out(f"MLflow UI of {uri}: http://127.0.0.1:{options.port} (Ctrl-C ends it)")
    out("Ray dashboard: of a cluster, `ray dashboard cluster.yaml`; local runs start none")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(options.port)]
    return subprocess.call(command)


def _doctor(options: argparse.Namespace) -> int:
    from selffl_ray.doctor import examine

    for finding in examine():
        mark = "ok " if finding.remedy is None else "!! "
        remedy = f"  -> {finding.remedy}" if finding.remedy else ""
        out(f"{mark}{finding.name:<14} {finding.found}{remedy}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    experiment = argparse.ArgumentParser(add_help=False)
    experiment.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG.yaml",
        help="default: Self-FL on the digits of 14 handwriting forms",
    )
    experiment.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, e.g. training.num_rounds=5; repeatable",
    )
    experiment.add_argument("--output", metavar="DIR", help="folder to write to (default: runs/)")
    parser = argparse.ArgumentParser(
        prog="selffl",
        description="Personalized federated learning on Ray: run, compare, and look.",
        epilog="example: selffl compare --methods selffl,fedavg,local",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(
        name: str,
        handler: Callable[[argparse.Namespace], int],
        text: str,
        example: str,
        *parents: argparse.ArgumentParser,
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}",
            parents=[common, *parents],
        )
        command.set_defaults(command=handler)
        return command

    run = add(
        "run",
        _run,
        "Run one experiment.",
        "selffl run --set method.preset=interpolated --set seed=1",
        experiment,
    )
    run.add_argument("--resume", metavar="RUN_DIR", help="go on from that run's last checkpoint")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print configuration, placement and estimate; start nothing",
    )
    compare = add(
        "compare",
        _compare,
        "Run several methods on the same clients and actors.",
        "selffl compare --methods selffl:two_tap,fedavg,local --seeds 0,1,2",
        experiment,
    )
    compare.add_argument(
        "--methods",
        required=True,
        metavar="A,B:PRESET,...",
        help="methods, with a preset after a colon",
    )
    compare.add_argument("--seeds", metavar="0,1,2", help="default: the configuration's seed")
    data = add("data", _data, "List, describe or prepare data sets.", "selffl data describe digits")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="what there is", parents=[common])
    for name, text in (
        ("describe", "clients, labels, skew; writes a picture"),
        ("prepare", "build the Arrow client store"),
    ):
        action = actions.add_parser(name, help=text, parents=[common])
        action.add_argument("name", metavar="NAME")
        action.add_argument("--source", metavar="PATH", help="folder of the files")
        action.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="e.g. data.partition.alpha=0.1",
        )
        if name == "describe":
            action.add_argument("--output", metavar="FILE.png", help="default: NAME.png")
    verify = add(
        "verify",
        _verify,
        "Run a finished run again under another placement and compare its digests.",
        "selffl verify runs/digits/selffl-two_tap-s0-...",
    )
    verify.add_argument("run", metavar="RUN_DIR")
    ui = add("ui", _ui, "MLflow's pages over the right store, on loopback.", "selffl ui")
    ui.add_argument(
        "store",
        nargs="?",
        metavar="RUN_OR_STORE",
        help="a run's folder, an .db file or an MLflow address",
    )
    ui.add_argument("--port", type=int, default=5000)
    add("doctor", _doctor, "What this machine offers, and what to mend.", "selffl doctor")
    return parser


def entry() -> None:
    """Console script."""
    sys.exit(main())
