"""A run's folder: configuration, environment, tables and summary, each written whole or not at all.

The tables are kept in memory and rewritten to Parquet under a temporary name that is renamed,
so a reader never sees half a file. Column names are those of the contract.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selffl_ray.allocator import give_back_freed_memory
from selffl_ray.driver import RoundRecord
from selffl_ray.errors import CheckpointError
from selffl_ray.evaluation import ClientScores
from selffl_ray.events import well_formed
from selffl_ray.participation import Outcome
from selffl_ray.whole import write_whole

TABLES = ("rounds", "clients", "uncertainty", "participation")
"""Names of a run's tables, each a Parquet file."""

FLUSH_SECONDS = 10.0
"""Longest time that finished rounds are kept in memory only."""

MEND = "put it back, or start the run anew in another folder"

ALIASES = {
    "round_s": "time/round_s",
    "train_s": "time/train_s",
    "eval_s": "time/eval_s",
    "bytes_down": "comm/bytes_down",
    "bytes_up": "comm/bytes_up",
    "participants": "clients/participants",
    "faults": "clients/faults",
    "available": "clients/available",
    "asked": "clients/asked",
    "dropped": "clients/dropped",
    "late": "clients/late",
    "partial": "clients/partial",
    "virtual_s": "time/virtual_s",
}
"""Columns of ``rounds.parquet`` that repeat a metric under a plain name."""

COUNTS = {name for name in ALIASES if not name.endswith("_s")}


def write_text(path: Path, text: str) -> None:
    """Write a file whole: under a temporary name that is renamed."""
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """JSON for people: indented, keys in the order given; NaN is not allowed."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_tables(folder: Path, last_round: int) -> dict[str, pa.Table]:
    """The rows of a run's tables up to a round that a checkpoint is of (-1: none).

    Raises:
        CheckpointError: a table is missing, broken, or lacks a round.
    """
    kept: dict[str, pa.Table] = {}
    for name in TABLES if last_round >= 0 else ():
        path = folder / f"{name}.parquet"
        # Lexists: a link to nowhere is no table that was never written.
        if not os.path.lexists(path):
            continue
        try:
            # Not by name: Arrow would take a folder for a table in pieces.
            table = pq.read_table(pa.BufferReader(path.read_bytes()))
            kept[name] = table.filter(pc.less_equal(table["round_index"], last_round))
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise CheckpointError(
                f"{path} cannot be read: {' '.join(str(error).split())}; {MEND}"
            ) from error
    table = kept.get("rounds")
    rounds = [] if table is None else table["round_index"].to_pylist()
    evaluated = [] if table is None or "eval_s" not in table.column_names else table["eval_s"]
    if "clients" not in kept and any(cell.is_valid for cell in evaluated):
        raise CheckpointError(f"{folder / 'clients.parquet'} is missing; {MEND}")
    if "participation" not in kept and table is not None and "late" in table.column_names:
        raise CheckpointError(f"{folder / 'participation.parquet'} is missing; {MEND}")
    if rounds != list(range(last_round + 1)):
        raise CheckpointError(
            f"{folder / 'rounds.parquet'} lacks rounds that the checkpoint of round {last_round} "
            f"is of; {MEND}"
        )
    return kept


def events_after(folder: Path, last_round: int) -> list[Mapping[str, Any]]:
    """The ``events`` of the rounds after one; none where no table was written, or a broken one."""
    try:
        table = pq.read_table(pa.BufferReader((folder / "rounds.parquet").read_bytes()))
        after = table.filter(pc.greater(table["round_index"], last_round))
        texts = after["events"].to_pylist()
        return [event for text in texts for event in well_formed(json.loads(text or "[]"))]
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return []


def events_of_summary(folder: Path) -> list[dict[str, Any]]:
    """The ``events`` that an earlier part of the run had no row for; none without a summary."""
    try:
        found = json.loads((folder / "summary.json").read_text())
        return well_formed(found.get("events", []))
    except (OSError, TypeError, ValueError, AttributeError):
        return []


class RunTables:
    """``rounds``, ``clients``, ``uncertainty`` and ``participation`` of one run.

    The last one is there where trouble is simulated: a row a client that was asked.

    Args:
        folder: the run's folder.
        client_ids: names of all clients, those that take part and then the new ones.
        score_name: ``accuracy`` or ``mse``.
    """

    def __init__(self, folder: Path, client_ids: Sequence[str], score_name: str) -> None:
        self.folder = folder
        self._ids = np.asarray(client_ids)
        self._score = score_name
        self._rounds: list[dict[str, Any]] = []
        self._clients: list[pa.Table] = []
        self._uncertainty: list[pa.Table] = []
        self._participation: list[pa.Table] = []
        self._flushed = time.monotonic()
        # With its first array pyarrow imports pandas: a quarter of a second of the start, not of a
        # round.
        pa.array(self._ids[:0])

    def restore(self, last_round: int) -> list[Mapping[str, Any]]:
        """Take over the rows of an earlier part of the run, up to a round (-1: none).

        Returns:
            The ``events`` of the rounds after it.

        Raises:
            CheckpointError: see ``read_tables``.
        """
        kept = read_tables(self.folder, last_round)
        rows = kept["rounds"].to_pylist() if "rounds" in kept else []
        self._rounds = [{k: v for k, v in row.items() if v is not None} for row in rows]
        self._clients = [kept["clients"]] if "clients" in kept else []
        self._uncertainty = [kept["uncertainty"]] if "uncertainty" in kept else []
        self._participation = [kept["participation"]] if "participation" in kept else []
        return events_after(self.folder, last_round)

    def add(self, record: RoundRecord) -> None:
        """Take in a finished round; writes when the last writing is some time ago."""
        row: dict[str, Any] = {
            "round_index": record.plan.round_index,
            "digest": record.digest,
            "events": json.dumps([event._asdict() for event in record.events]),
        }
        # What was not measured is absent, in a table null.
        row |= {k: v for k, v in record.metrics.items() if not math.isnan(v)}
        for alias, metric in ALIASES.items():
            if metric in row:
                value = row[metric]
                row[alias] = int(value) if alias in COUNTS else value
        self._rounds.append(row)
        for split, scores in record.scores.items():
            self._clients.append(self._client_rows(record.plan.round_index, split, scores))
        if record.uncertainty is not None:
            self._uncertainty.append(self._uncertainty_rows(record))
        if record.plan.trouble is not None:
            self._participation.append(
                self._asked_rows(record.plan.round_index, record.plan.trouble)
            )
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _client_rows(self, round_index: int, split: str, scores: ClientScores) -> pa.Table:
        num = np.maximum(scores.num_examples, 1)
        has = scores.num_examples > 0
        rows = len(scores.client_index)
        columns = {
            "round_index": pa.array(np.full(rows, round_index, np.int64)),
            "client_id": pa.array(self._ids[scores.client_index].tolist()),
            "split": pa.array([split] * rows),
            "num_examples": pa.array(scores.num_examples),
            f"global_{self._score}": _nullable(scores.global_score_on_clients / num, has),
            f"local_{self._score}": _nullable(scores.local_score / num, has),
            "global_loss": _nullable(scores.global_loss / num, has),
            "local_loss": _nullable(scores.local_loss / num, has),
        }
        return pa.table(columns)

    def _uncertainty_rows(self, record: RoundRecord) -> pa.Table:
        found = record.uncertainty
        assert found is not None
        rows = len(found.client_index)
        columns = {
            "round_index": pa.array(np.full(rows, record.plan.round_index, np.int64)),
            "client_id": pa.array(self._ids[found.client_index].tolist()),
            "group": pa.array(found.group.tolist()),
        }
        for name in found._fields[2:]:
            columns[name] = _nullable(getattr(found, name), np.ones(rows, bool))
        return pa.table(columns)

    def _asked_rows(self, round_index: int, found: Outcome) -> pa.Table:
        columns = {
            "round_index": pa.array(np.full(len(found.asked), round_index, np.int64)),
            "client_id": pa.array(self._ids[found.asked].tolist(), pa.string()),
            "outcome": pa.array(found.outcome.tolist(), pa.string()),
            "num_local_steps": pa.array(found.steps),
            "virtual_s": pa.array(found.ends_s, mask=np.isnan(found.ends_s)),
        }
        return pa.table(columns)

    def flush(self) -> None:
        """Write all tables."""
        self._flushed = time.monotonic()
        if self._rounds:
            names = sorted({k for row in self._rounds for k in row})
            names.sort(key=lambda n: (n != "round_index", "/" in n, n))
            columns = {n: [row.get(n) for row in self._rounds] for n in names}
            self._write("rounds", pa.table(columns))
        for name, parts in (
            ("clients", self._clients),
            ("uncertainty", self._uncertainty),
            ("participation", self._participation),
        ):
            if parts:
                # Chunks of a round each weigh several times what they hold.
                table = pa.concat_tables(parts).combine_chunks()
                parts[:] = [table]
                self._write(name, table)
        _give_back()

    def _write(self, name: str, table: pa.Table) -> None:
        path = self.folder / f"{name}.parquet"
        write_whole(path, lambda draft: pq.write_table(table, draft))

    def rows(self) -> list[Mapping[str, Any]]:
        """A row for each round, in order; what was not measured is absent."""
        return list(self._rounds)

    def evaluated_rounds(self) -> list[Mapping[str, Any]]:
        """Rows of rounds that were evaluated, in order."""
        return [row for row in self._rounds if "time/eval_s" in row]

    def last_round(self) -> Mapping[str, Any] | None:
        """Row of the newest round."""
        return self._rounds[-1] if self._rounds else None


def _give_back() -> None:
    """Return what writing took to the system: each time it is more, and freed pieces would stay."""
    pa.default_memory_pool().release_unused()
    give_back_freed_memory()


def _nullable(values: np.ndarray, has: np.ndarray) -> pa.Array:
    """A float column; NaN and rows without examples become null."""
    floats = np.asarray(values, np.float64)
    return pa.array(floats, mask=~has | np.isnan(floats))


def final_metrics(rows: Sequence[Mapping[str, Any]], last: int) -> dict[str, float]:
    """Metrics of the last evaluated round; scores and losses are means over the last so many.

    Infinite ones are left out: JSON cannot hold them.
    """
    if not rows:
        return {}
    newest = {k: v for k, v in rows[-1].items() if "/" in k}
    # A run that ended early was not evaluated in each of its last rounds.
    first = rows[-1]["round_index"] - last
    recent = [row for row in rows[-last:] if row["round_index"] > first]
    for key in newest:
        if key.startswith(("test/", "val/", "new/")):
            newest[key] = float(np.mean([row[key] for row in recent if key in row]))
    return _finite(newest)


def selected_round(
    rows: Sequence[Mapping[str, Any]], score_name: str, *, higher_is_better: bool
) -> dict[str, Any] | None:
    """The round with the best validation score of the personalized models, the first on a tie."""
    key = f"val/local_{score_name}"
    with_val = [row for row in rows if key in row]
    if not with_val:
        return None
    sign = 1 if higher_is_better else -1
    best = max(with_val, key=lambda row: (sign * row[key], -row["round_index"]))
    metrics = {k: v for k, v in best.items() if k.startswith(("test/", "val/", "new/"))}
    return {"round_index": best["round_index"], "metrics": _finite(metrics)}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if math.isfinite(v)}
