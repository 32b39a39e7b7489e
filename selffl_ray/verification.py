"""Proof that a run does not depend on placement: run it again elsewhere and compare digests.

Before that, every file of the run is looked at: one that is missing, cut short or something else is
named. After it the rows of the other tables must be those of the repetition.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from selffl_ray.api import Interrupt, run_experiment
from selffl_ray.checkpoint import check_all_checkpoints, rounds_done
from selffl_ray.config import load_config
from selffl_ray.errors import DataError, UsageError
from selffl_ray.exported_models import check_models
from selffl_ray.faults import RETRIED
from selffl_ray.numerics import processor
from selffl_ray.run_loop import Progress
from selffl_ray.run_writer import check_one_configuration
from selffl_ray.tables import TABLES

if TYPE_CHECKING:
    import pandas as pd

MEND = "put it back as the run wrote it: a run that has lost a part cannot be verified"
NOTES = ("summary.json", "tracking.json")
"""What a run that has ended or is tracked has besides; JSON."""


class Verdict(NamedTuple):
    """Rounds compared, the first round whose digests differ (None: all are equal), and where."""

    num_rounds: int
    first_difference: int | None
    placement: str


def verify_run(folder: Path, watch: Callable[[Any], None]) -> Verdict:
    """Run a run's configuration again under another placement; compare digests round by round.

    A run on actors is repeated in one process; one in one process is repeated on two actors.

    Raises:
        UsageError: not a run's folder, a file of it is missing, broken or changed, or bits cannot
            be compared: another processor, GPU or torch, or a client that failed was left out.
    """
    environment, rounds = _read(folder)
    num_rounds = _check_whole(folder, rounds)
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
        repeated = run_experiment(again, output=scratch, watch=follow, interrupt=enough)
        first = _first_difference(folder, rounds, repeated.rounds)
        if first is None:
            _check_tables(folder, repeated.folder, num_rounds)
    where = "two actors" if was_local else "one process, stacks of at most 3"
    return Verdict(num_rounds, first, where)


def _first_difference(folder: Path, rounds: pd.DataFrame, again: pd.DataFrame) -> int | None:
    """The first round whose digests differ.

    Raises:
        DataError: the repetition has fewer rounds.
    """
    joined = rounds.merge(again, on="round_index", suffixes=("", "_again"))
    if len(joined) < len(rounds):
        raise DataError(
            f"{folder}: {len(rounds)} rounds, but the repetition has {len(joined)} of them; was "
            "config.yaml changed?"
        )
    different = joined[joined["digest"] != joined["digest_again"]]
    return None if different.empty else int(different["round_index"].min())


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
        table = _table(folder, "rounds")
        if table is None:
            raise DataError(f"{folder / 'rounds.parquet'} is missing; {MEND}")
        rounds = table.to_pandas(ignore_metadata=True)
        _check_nobody_was_left_out(rounds, folder)
        return environment, rounds[["round_index", "digest"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is not the folder of a run ({error}); give one that holds config.yaml, "
            "environment.json and rounds.parquet"
        ) from error


def _table(folder: Path, name: str) -> pa.Table | None:
    """A table of a run; None if there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = folder / f"{name}.parquet"
    # Lexists: a link to nowhere is no table that was never written.
    if not os.path.lexists(path):
        return None
    try:
        # Not by name: Arrow would take a folder for a table in pieces.
        return pq.read_table(pa.BufferReader(path.read_bytes()))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}; {MEND}")


def _check_whole(folder: Path, rounds: pd.DataFrame) -> int:
    """Every file can be read, and the table of rounds has them all; how many there are.

    Raises:
        UsageError: naming the file.
    """
    promised = rounds_done(folder / "checkpoints")
    for name in NOTES:
        path = folder / name
        try:
            note = json.loads(path.read_text()) if os.path.lexists(path) else {}
            promised = max(promised, int(note.get("rounds", 0)))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise _broken(path, error) from error
    # Of a run that was killed the table may have more of them.
    num_rounds = max(promised, len(rounds))
    if not num_rounds or rounds["round_index"].tolist() != list(range(num_rounds)):
        raise DataError(
            f"{folder / 'rounds.parquet'} lacks rounds: it has {len(rounds)} rows, of rounds 0 to "
            f"{num_rounds - 1}; put it back as the run wrote it, or go on with the run: selffl run "
            f"--resume {folder}"
        )
    for name in TABLES:
        _table(folder, name)
    check_all_checkpoints(folder / "checkpoints")
    check_models(
        folder,
        f"put it back as the run wrote it, or have all models written anew: selffl run --resume "
        f"{folder}",
    )
    return num_rounds


def _check_tables(folder: Path, again: Path, num_rounds: int) -> None:
    """Tables of clients hold what the repetition, which has the same digests, wrote.

    Raises:
        DataError: naming the table and the round.
    """
    for name in TABLES:
        wanted, path = _table(again, name), folder / f"{name}.parquet"
        # Of rounds more is compared already, and the rest are times and events.
        if wanted is None or name == "rounds":
            continue
        # The repetition may have done more rounds; a run that its clock ended evaluated one more.
        wanted = wanted.filter(pc.less(wanted["round_index"], num_rounds))
        found = _table(folder, name)
        for index in pc.unique(wanted["round_index"]).to_pylist():
            if found is None:
                raise DataError(f"{path} is missing; {MEND}")
            try:
                rows = _rows(found.select(wanted.column_names).cast(wanted.schema), index)
            except (KeyError, ValueError, pa.ArrowException) as error:
                raise _broken(path, error) from error
            right = _rows(wanted, index)
            if not rows.equals(right):
                raise DataError(
                    f"{path}: the {len(rows)} rows of round {index} are not the {len(right)} of "
                    f"the repetition, though the digests are equal; {MEND}"
                )


def _rows(table: pa.Table, round_index: int) -> pa.Table:
    return table.filter(pc.equal(table["round_index"], round_index))


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
