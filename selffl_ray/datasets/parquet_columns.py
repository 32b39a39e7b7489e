"""Columns of Parquet files as arrays, each checked for what it must hold."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selffl_ray.datasets.base import TEST, TRAIN, VAL
from selffl_ray.datasets.pictures import decode
from selffl_ray.errors import DataError
from selffl_ray.registry import nearest

PARTS = {"train": TRAIN, "test": TEST, "validation": VAL, "valid": VAL, "val": VAL, "dev": VAL}
"""Names of the official parts."""

PIECE = 1024
"""Rows of inputs that are decoded at once."""

Array = npt.NDArray[Any]


class Column(NamedTuple):
    """A column of an open file; the name is empty before one is chosen."""

    path: Path
    file: pq.ParquetFile
    name: str = ""

    @property
    def num_rows(self) -> int:
        """Of the file."""
        return int(self.file.metadata.num_rows)

    def of(self, name: str) -> Column:
        """Another column of the same file."""
        return self._replace(name=name)

    def place(self, row: int | None = None) -> str:
        """Where something is wrong, for messages."""
        return f"{self.path}: column {self.name!r}" + ("" if row is None else f", row {row}")


def open_file(path: Path, needed: Sequence[str], client: str | None) -> Column:
    """An open file with the needed columns; that of the client may be the name of a folder.

    Raises:
        DataError: not a Parquet file, truncated, or without one of the columns.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file: {_line(error)}; fetch it again") from error
    known = file.schema_arrow.names
    if client is not None and folder_value(path, client) is None:
        needed = [*needed, client]
    for name in needed:
        if name not in known:
            raise DataError(
                f"{path}: there is no column {name!r}{nearest(name, known)}; it has "
                f"{', '.join(known)}"
            )
    return Column(path, file)


def folder_value(path: Path, name: str) -> str | None:
    """``b`` of a file in a folder ``name=b``, None without such a folder."""
    for folder in path.parent.parts:
        key, equals, value = folder.partition("=")
        if equals and key == name:
            return unquote(value)
    return None


def part_in_name(path: Path, top: Path) -> int:
    """The official part that a word of a file's name, or else its nearest folder is named by.

    Args:
        top: the folder that all files lie in. Its own name and those above it say where the data
            are kept, not which part a file is.

    Raises:
        DataError: neither, or a name of two parts.
    """
    words = [word for word in re.split(r"[^A-Za-z]", path.stem) if word in PARTS]
    if len({PARTS[word] for word in words}) > 1:
        raise DataError(
            f"{path}: its name says {' and '.join(words)} (data.split_in_names); rename it after "
            "one part"
        )
    for word in (*words, *reversed(path.parent.relative_to(top).parts)):
        if word in PARTS:
            return PARTS[word]
    raise DataError(
        f"{path}: neither its name nor a folder below {top} says the part ({', '.join(PARTS)}); "
        "rename it, or leave out data.split_in_names"
    )


def client_names(column: Column) -> list[str]:
    """Names of the clients, row by row.

    Raises:
        DataError: neither strings nor whole numbers, a null or an empty name.
    """
    values = _values(column)
    if not (pa.types.is_integer(values.type) or _is_text(values.type)):
        raise DataError(
            f"{column.place()} (data.client) must hold strings or whole numbers, found "
            f"{values.type}"
        )
    names = [str(value) for value in values.to_pylist()]
    if "" in names:
        raise DataError(f"{column.place(names.index(''))}: the client's name is empty")
    return names


def class_labels(
    column: Column, num_classes: int, label_names: tuple[str, ...]
) -> npt.NDArray[np.int64]:
    """Class indices (N,) from whole numbers, or from names by their place in ``label_names``.

    Raises:
        DataError: another type, a null, a number out of range or an unknown name.
    """
    values = _values(column)
    if _is_text(values.type):
        return _named_labels(column, values.to_pylist(), label_names)
    if not pa.types.is_integer(values.type):
        raise DataError(
            f"{column.place()} (data.label) must hold whole numbers or names, found {values.type}"
        )
    y: npt.NDArray[np.int64] = values.to_numpy().astype(np.int64)
    outside = np.flatnonzero((y < 0) | (y >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{column.place(row)} (data.label): {y[row]} lies outside of 0..{num_classes - 1}; set "
            "data.num_classes"
        )
    return y


def _named_labels(
    column: Column, names: list[str], known: tuple[str, ...]
) -> npt.NDArray[np.int64]:
    if not known:
        raise DataError(
            f"{column.place()} (data.label) holds names; give them in order as data.label_names"
        )
    index = {name: at for at, name in enumerate(known)}
    for row, name in enumerate(names):
        if name not in index:
            raise DataError(
                f"{column.place(row)} (data.label): {name!r} is not in data.label_names"
                f"{nearest(name, known)}"
            )
    return np.asarray([index[name] for name in names], np.int64)


def parts(column: Column) -> npt.NDArray[np.uint8]:
    """Official parts (N,) from their names.

    Raises:
        DataError: a null or another name.
    """
    names = _values(column).to_pylist()
    for row, name in enumerate(names):
        if name not in PARTS:
            raise DataError(
                f"{column.place(row)} (data.split): {name!r} is none of {', '.join(PARTS)}"
            )
    return np.asarray([PARTS[name] for name in names], np.uint8)


def _values(column: Column) -> pa.ChunkedArray:
    try:
        values = column.file.read([column.name])[column.name]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{column.place()} cannot be read: {_line(error)}") from error
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise DataError(f"{column.place(row)}: it is null; fill or drop the row")
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# -- inputs ---------------------------------------------------------------------------------------


def fill_pictures(column: Column, rows: npt.NDArray[np.uint8]) -> None:
    """Decode a column of encoded pictures into rows (N, channels, height, width).

    Raises:
        DataError: no bytes, not a picture, another size.
    """
    start = 0
    for batch in _batches(column, [column.name]):
        for at, value in enumerate(batch.column(0).to_pylist(), start):
            raw = value.get("bytes") if isinstance(value, Mapping) else value
            if not isinstance(raw, bytes):
                raise DataError(
                    f"{column.place(at)} (data.image) must hold the bytes of a picture, found "
                    f"{type(raw).__name__} in a column of {batch.column(0).type}"
                )
            rows[at] = decode(raw, rows.shape[1:], column.place(at))
        start += batch.num_rows


def fill_numbers(file: Column, names: Sequence[str], rows: Array) -> None:
    """Copy columns of numbers or lists, one after the other, into rows (N, *shape).

    Raises:
        DataError: another type, lists of different lengths, a null, another number of entries a
            row than the shape has, a number that is not finite.
    """
    start = 0
    for batch in _batches(file, names):
        found = np.concatenate([_flat(file.of(n), batch.column(n), start) for n in names], axis=1)
        if found.shape[1] != math.prod(rows.shape[1:]):
            raise DataError(
                f"{file.path}: data.features give {found.shape[1]} numbers a row, data.shape "
                f"{list(rows.shape[1:])} asks for {math.prod(rows.shape[1:])}; set data.shape"
            )
        bad = np.flatnonzero(~np.isfinite(found).all(1))
        if len(bad):
            raise DataError(
                f"{file.of(', '.join(names)).place(start + int(bad[0]))} (data.features): a number "
                "is not finite"
            )
        rows[start : start + len(found)] = found.reshape(len(found), *rows.shape[1:])
        start += len(found)


def _batches(file: Column, names: Sequence[str]) -> Any:
    try:
        yield from file.file.iter_batches(PIECE, columns=list(names))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file.path}: {', '.join(names)} cannot be read: {_line(error)}; fetch it again"
        ) from error


def _flat(column: Column, values: pa.Array, start: int) -> Array:
    """(rows, entries a row) float64 of numbers, or of (nested) lists of equal length."""
    count, listed = len(values), True
    while listed:
        if values.null_count:
            raise DataError(
                f"{column.place()} (data.features): a value is null, in row {start} or one of the "
                f"{count - 1} after it; fill or drop the row"
            )
        kind = values.type
        listed = bool(
            pa.types.is_list(kind)
            or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
        )
        if listed:
            sizes = pc.list_value_length(values).to_numpy()
            if len(np.unique(sizes)) > 1:
                raise DataError(
                    f"{column.place()} (data.features): its lists have {sizes.min()} to "
                    f"{sizes.max()} entries; they must be equally long"
                )
            values = values.flatten()
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"{column.place()} (data.features) must hold numbers or lists of them, found {kind}"
        )
    flat: Array = values.to_numpy(zero_copy_only=False).astype(np.float64)
    return flat.reshape(count, -1)
