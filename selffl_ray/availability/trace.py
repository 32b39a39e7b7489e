"""Availability as it was seen: a table of stays, from a CSV or a Parquet file.

Three columns, in any order: ``client_id``, ``first_round``, ``last_round``. A row says that the
client is there from the first to the last of these rounds, both included, counted from 0. Stays of
one client may touch and overlap; a client without a row is never there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from selffl_ray.errors import DataError
from selffl_ray.registry import nearest

COLUMNS = {"client_id": pa.string(), "first_round": pa.int64(), "last_round": pa.int64()}
WHERE = "training.trouble.trace"
SHOWN = 3
"""Most names in a message."""


class Trace(NamedTuple):
    """The stays of a file, row by row."""

    client_id: list[str]
    first_round: npt.NDArray[np.int64]
    last_round: npt.NDArray[np.int64]


def read_trace(path: Path) -> Trace:
    """The stays of a file, checked.

    Raises:
        DataError: it cannot be read, lacks a column or has another one, or a row is no stay.
    """
    is_parquet = path.suffix.lower() in (".parquet", ".pq")
    try:
        table = pq.read_table(path) if is_parquet else _read_csv(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{WHERE}: {path} is not a readable trace with the columns {', '.join(COLUMNS)}: "
            f"{' '.join(str(error).split())}"
        ) from error
    if sorted(table.column_names) != sorted(COLUMNS):
        raise DataError(
            f"{WHERE}: {path} must have the columns {', '.join(COLUMNS)} and no others, found "
            f"{', '.join(table.column_names) or 'none'}"
        )
    for name, kind in COLUMNS.items():
        table = _with_column(table, name, kind, path)
    found = Trace(
        table["client_id"].to_pylist(),
        table["first_round"].to_numpy(),
        table["last_round"].to_numpy(),
    )
    _check_rows(found, path)
    return found


def _read_csv(path: Path) -> pa.Table:
    # Names stay as they are written: 007 is no number.
    options = pyarrow.csv.ConvertOptions(column_types=COLUMNS, strings_can_be_null=False)
    return pyarrow.csv.read_csv(path, convert_options=options)


def _with_column(table: pa.Table, name: str, kind: pa.DataType, path: Path) -> pa.Table:
    column = table[name]
    try:
        if kind == pa.int64() and not pa.types.is_integer(column.type):
            raise pa.ArrowInvalid(f"found {column.type}")
        column = column.cast(kind)
    except pa.ArrowException as error:
        wanted = "names" if kind == pa.string() else "whole numbers"
        raise DataError(f"{WHERE}: {path}: column {name} must hold {wanted}: {error}") from error
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"{WHERE}: {path}, row {row}: {name} is empty; fill it in")
    return table.set_column(table.column_names.index(name), name, column)


def _check_rows(trace: Trace, path: Path) -> None:
    if not trace.client_id:
        raise DataError(f"{WHERE}: {path} has no rows, so nobody would ever be there")
    bad = np.flatnonzero((trace.first_round < 0) | (trace.last_round < trace.first_round))
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"{WHERE}: {path}, row {row}: rounds {trace.first_round[row]} to "
            f"{trace.last_round[row]} of client {trace.client_id[row]!r} are no stay; rounds count "
            "from 0 and the last is not before the first"
        )


def traced(path: Path, client_ids: Sequence[str], num_rounds: int) -> npt.NDArray[np.bool_]:
    """Whether each client is there in each round, by a file: (M, R) bool.

    Raises:
        DataError: the file cannot be read, or names clients that there are not.
    """
    trace, there_MR = read_trace(path), np.zeros((len(client_ids), num_rounds), bool)
    index = {name: at for at, name in enumerate(client_ids)}
    if strange := sorted(set(trace.client_id) - index.keys()):
        more = ", ..." if len(strange) > SHOWN else ""
        raise DataError(
            f"{WHERE}: {path} names clients that do not take part: "
            f"{', '.join(strange[:SHOWN])}{more}{nearest(strange[0], client_ids)}; their "
            f"names are as in {client_ids[0]!r}"
        )
    for name, first, last in zip(*trace, strict=True):
        there_MR[index[name], int(first) : int(last) + 1] = True
    return there_MR
