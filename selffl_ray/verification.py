"""Proof that a run does not depend on placement: run it again elsewhere and compare digests."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from selffl_ray.api import Interrupt, run_experiment
from selffl_ray.config import load_config
from selffl_ray.environment import processor
from selffl_ray.errors import DataError, UsageError
from selffl_ray.faults import RETRIED
from selffl_ray.run_loop import Progress
from selffl_ray.run_writer import check_one_configuration


class Verdict(NamedTuple):
    """Rounds compared, the first round whose digests differ (None: all are equal), and where."""

    num_rounds: int
    first_difference: int | None
    placement: str


def verify_run(folder: Path, watch: Callable[[Any], None]) -> Verdict:
    """Run a run's configuration again under another placement; compare digests round by round.

    A run on actors is repeated in one process; one in one process is repeated on two actors.

    Raises:
        UsageError: not a run's folder, or bits cannot be compared: another processor, GPU or
            torch, or a client that failed was left out.
    """
    environment, rounds = _read(folder)
    _check_comparable(environment, folder)
    config = load_config(folder / "config.yaml", folder=Path.cwd())
    was_local = environment.backend == "local"
    placement = dataclasses.replace(
        config.placement,
        backend="ray" if was_local else "local",
        clients_per_actor=(environment.num_clients + 1) // 2,
        cpus_per_actor="auto",
        gpus_per_client=0,
        stack_size="auto" if was_local else 3,
    )
    num_rounds = int(rounds["round_index"].max()) + 1
    again = dataclasses.replace(
        config,
        placement=placement,
        tracking=dataclasses.replace(config.tracking, enabled=False),
        training=dataclasses.replace(
            config.training, stop=dataclasses.replace(config.training.stop, seconds=None)
        ),
        export_models=False,
    )
    enough = Interrupt()

    def follow(event: Any) -> None:
        watch(event)
        if isinstance(event, Progress) and event.round_index + 1 >= num_rounds:
            # The run was stopped there; what it never did cannot be compared.
            enough.set()

    with tempfile.TemporaryDirectory(prefix="selffl-verify-") as scratch:
        repeated = run_experiment(again, output=scratch, watch=follow, interrupt=enough).rounds
    joined = rounds.merge(repeated, on="round_index", suffixes=("", "_again"))
    if len(joined) < num_rounds:
        raise DataError(
            f"{folder}: {num_rounds} rounds, but the repetition has {len(joined)} of them; was "
            "config.yaml changed?"
        )
    different = joined[joined["digest"] != joined["digest_again"]]
    first = None if different.empty else int(different["round_index"].min())
    where = "two actors" if was_local else "one process, stacks of at most 3"
    return Verdict(num_rounds, first, where)


class _Environment(NamedTuple):
    """What ``environment.json`` must tell."""

    backend: str
    num_clients: int
    devices: list[str]
    processor: str
    torch: str


def _read(folder: Path) -> tuple[_Environment, pd.DataFrame]:
    check_one_configuration(folder, "verify a run of one configuration")
    try:
        found = json.loads((folder / "environment.json").read_text())
        environment = _Environment(
            found["placement"]["backend"],
            len(found["client_ids"]),
            found["devices"],
            found["processor"],
            found["packages"]["torch"],
        )
        rounds = pd.read_parquet(folder / "rounds.parquet")
        _check_nobody_was_left_out(rounds, folder)
        return environment, rounds[["round_index", "digest"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is not the folder of a run ({error}); give one that holds config.yaml, "
            "environment.json and rounds.parquet"
        ) from error


def _check_nobody_was_left_out(rounds: pd.DataFrame, folder: Path) -> None:
    """Failures that a repetition would not have change the bits, and rightly so."""
    for text in rounds.get("events", ()):
        for event in json.loads(text or "[]"):
            if event["outcome"] == "left out" and event["kind"] in RETRIED:
                raise UsageError(
                    f"{folder}: client {event['client_id']!r} was left out of round "
                    f"{event['round_index']} ({event['cause']}), so a repetition that has it must "
                    "differ from there on; verify a run without such events"
                )


def _check_comparable(was: _Environment, folder: Path) -> None:
    if was.devices != ["cpu"]:
        raise UsageError(
            f"{folder} was run on {', '.join(was.devices)}: on a GPU results agree within "
            "rounding, not bit for bit; verify a run on the CPU"
        )
    for name, before, here in (
        ("processor", was.processor, processor()),
        ("torch", was.torch, torch.__version__),
    ):
        if before.split("+")[0] != here.split("+")[0]:
            raise UsageError(
                f"{folder} was run with {name} {before!r}, this machine has {here!r}: bits may "
                "differ between them; verify on the machine that ran it"
            )
