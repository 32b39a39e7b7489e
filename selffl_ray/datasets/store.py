"""The Arrow client store: prepared once, memory-mapped by every host, checked as it is read.

A store is a folder: ``data.arrow`` (Arrow IPC, one record batch a natural client, or pieces of a
pool), ``index.arrow`` (a row a record batch: client, number of rows, SHA-256, and the published
split of its rows) and ``manifest.json``. It is written under a temporary name and renamed when
complete, so two processes that prepare the same store at once end with one good copy.

Whoever deals clients reads the index only, a host reads the record batches of its own clients:
nobody needs memory, or time, for the data of all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from selffl_ray.datasets.base import TRAIN, Dataset, Group
from selffl_ray.datasets.columns import as_column, flat, numbers
from selffl_ray.errors import DataError

SCHEMA_VERSION = 2
POOL_PIECE = 8192
"""Rows of a record batch of a pool."""

MOST_NAMED = 12
"""Files that a manifest names one by one."""

COLUMNS = ["x", "y"]

INDEX = pa.schema(
    [
        ("client_id", pa.string()),
        ("num_rows", pa.int64()),
        ("sha256", pa.string()),
        ("official", pa.large_binary()),
    ]
)
"""official: a byte a row, null where nothing is published."""

BROKEN = (OSError, ValueError, TypeError, KeyError, pa.ArrowException)
"""What reading a file that is not as it was written may raise."""

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Manifest:
    """What a store holds, without opening its data."""

    schema_version: int
    name: str
    title: str
    licence: str
    source: str
    num_rows: int
    num_batches: int
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    digest: str
    """Of the content: clients, examples and their order."""
    index_sha256: str
    """Of the file ``index.arrow``."""


class Fetched(NamedTuple):
    """Examples read from a store, in the order asked for."""

    x: Array
    y: Array


class StoreProgress(NamedTuple):
    """An event: how far the preparation of a store, or a look at all of it, is.

    stage: ``preparing`` or ``checking``; done: record batches, total: of them at most, None if that
    is not known before; finished: this was the last.
    """

    stage: str
    done: int
    total: int | None
    num_rows: int
    seconds: float
    finished: bool


Watch = Callable[[StoreProgress], None]


def store_root() -> Path:
    """Folder of all stores: ``SELFFL_RAY_STORES``, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "selffl_ray"
    return Path(os.environ.get("SELFFL_RAY_STORES", default)).absolute()


def prepare(
    dataset: Dataset,
    options: Any,
    source: str | None,
    seed: int,
    root: Path,
    *,
    watch: Watch = lambda event: None,
) -> Store:
    """Open the store of a data set, building it first if it is not there.

    Args:
        options: the set's config dataclass; other options are another store.
        source: where the files lie, as the configuration gives it.
        seed: used only by sets that draw their data with it.
        watch: is told after each record batch that was written.

    Raises:
        DataError: files that are missing, truncated or not what they should be.
    """
    files = dataset.find(source)
    made_with = dataset.made_with(files) if dataset.made_with else None
    try:
        stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    except OSError as error:
        raise DataError(f"{dataset.name}: {error}; mend or remove that file") from error
    identity = {
        "version": SCHEMA_VERSION,
        "name": dataset.name,
        "reader": dataset.version,
        "options": repr(options),
        "files": stamps if made_with is None else made_with,
        "seed": seed if dataset.depends_on_seed else None,
    }
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = root / f"{dataset.name}-{key}"
    if not (folder / "manifest.json").exists():
        pieces = _pieces(dataset, dataset.read(files, seed))
        total = dataset.num_groups(files) if dataset.num_groups else None
        _build(dataset, _told(pieces, total, watch), made_with or _source(files), folder)
    return Store(folder)


def _source(files: tuple[Path, ...]) -> str:
    """The files by name if they are few, else the folder that all lie in and their number."""
    if len(files) <= MOST_NAMED:
        return ", ".join(map(str, files))
    return f"{os.path.commonpath(files)} ({len(files)} files)"


def _build(dataset: Dataset, groups: Iterable[Group], source: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(dataset, groups, source, draft)
        try:
            draft.rename(folder)
        except OSError as error:
            # Usually somebody else was faster, with the same content.
            if not (folder / "manifest.json").exists():
                raise DataError(
                    f"{folder} is not a client store: {error}; {_remedy(folder)}"
                ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _told(groups: Iterable[Group], total: int | None, watch: Watch) -> Iterator[Group]:
    """The groups; each is told of when the next one is asked for, so when it is written."""
    began, done, num_rows = time.monotonic(), 0, 0
    for group in groups:
        yield group
        done, num_rows = done + 1, num_rows + len(group.y)
        seconds = time.monotonic() - began
        watch(StoreProgress("preparing", done, total, num_rows, seconds, finished=False))
    seconds = time.monotonic() - began
    watch(StoreProgress("preparing", done, done, num_rows, seconds, finished=True))


def _pieces(dataset: Dataset, groups: Iterable[Group]) -> Iterator[Group]:
    """Natural clients whole and once, pools in pieces."""
    seen: set[str] = set()
    for group in groups:
        if dataset.natural:
            if group.client_id in seen:
                raise DataError(
                    f"{dataset.name}: client {group.client_id!r} occurs twice; merge its files or "
                    "rename one"
                )
            seen.add(group.client_id)
            yield group
            continue
        for start in range(0, len(group.y), POOL_PIECE):
            cut = slice(start, start + POOL_PIECE)
            official = None if group.official is None else group.official[cut]
            yield Group("", group.x[cut], group.y[cut], official)


def _write(dataset: Dataset, groups: Iterable[Group], source: str, draft: Path) -> None:
    index: list[dict[str, Any]] = []
    first: Group | None = None
    writer: pa.RecordBatchFileWriter | None = None
    for group in groups:
        if len(group.x) != len(group.y):
            raise DataError(
                f"{dataset.name}: {len(group.x)} inputs but {len(group.y)} labels"
                f"{f' of client {group.client_id!r}' if group.client_id else ''}"
            )
        first = first or group
        batch = _record_batch(group)
        writer = writer or pa.ipc.new_file(str(draft / "data.arrow"), batch.schema)
        writer.write_batch(batch)
        index.append(
            {
                "client_id": group.client_id,
                "num_rows": len(group.y),
                "sha256": _batch_digest(batch, _published(group.official, len(group.y))),
                "official": None if group.official is None else group.official.tobytes(),
            }
        )
    if writer is None or first is None:
        raise DataError(f"{dataset.name}: no examples in {source or 'the source'}")
    writer.close()
    path = draft / "index.arrow"
    with pa.ipc.new_file(str(path), INDEX) as out:
        out.write_table(pa.Table.from_pylist(index, INDEX))
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = _manifest(dataset, first, source, index, sha)
    (draft / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1))


def _manifest(
    dataset: Dataset, first: Group, source: str, index: list[dict[str, Any]], index_sha256: str
) -> Manifest:
    return Manifest(
        SCHEMA_VERSION,
        dataset.name,
        dataset.title,
        dataset.licence,
        source,
        sum(r["num_rows"] for r in index),
        len(index),
        tuple(first.x.shape[1:]),
        tuple(first.y.shape[1:]),
        _store_digest([r["client_id"] for r in index], [r["sha256"] for r in index]),
        index_sha256,
    )


def _store_digest(client_ids: Sequence[str], digests: Sequence[str]) -> str:
    rows = (f"{c}:{d}" for c, d in zip(client_ids, digests, strict=True))
    return hashlib.sha256("|".join(rows).encode()).hexdigest()


def _record_batch(group: Group) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([as_column(group.x), as_column(group.y)], names=COLUMNS)


def _batch_digest(batch: pa.RecordBatch, official: npt.NDArray[np.uint8]) -> str:
    """SHA-256 over the types, lengths and bytes of a record batch and of its published split."""
    sha = hashlib.sha256()
    for column in batch.columns:
        sha.update(f"{column.type}|{len(column)}|".encode())
        sha.update(flat(column).data)
    # As a column of bytes; made one, it would import pandas.
    sha.update(f"uint8|{len(official)}|".encode())
    sha.update(np.ascontiguousarray(official).data)
    return sha.hexdigest()


def _published(official: npt.NDArray[np.uint8] | None, num_rows: int) -> npt.NDArray[np.uint8]:
    """The published split of so many rows; all TRAIN where nothing is published."""
    return np.full(num_rows, TRAIN, np.uint8) if official is None else official


class Store:
    """A prepared store, memory-mapped; only the rows that are read become memory of the reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = _read_manifest(folder / "manifest.json")
            self._index = _read_index(folder / "index.arrow", self.manifest)
        except BROKEN as error:
            raise DataError(
                f"{folder} is not a client store: {error}; {_remedy(folder)}"
            ) from error
        self.start_rows: Rows = np.concatenate(
            [[0], np.cumsum(numbers(self._index["num_rows"].combine_chunks()))]
        ).astype(np.int64)
        self._checked: set[int] = set()

    @cached_property
    def _reader(self) -> pa.RecordBatchFileReader:
        path = self.folder / "data.arrow"
        try:
            return pa.ipc.open_file(pa.memory_map(str(path)))
        except BROKEN as error:
            raise DataError(f"{path} cannot be read: {error}; {_remedy(self.folder)}") from error

    @property
    def client_ids(self) -> list[str]:
        """Client of each record batch; empty strings in a pool."""
        ids: list[str] = self._index["client_id"].to_pylist()
        return ids

    def labels(self) -> Array:
        """The y column of all rows, for partitioning."""
        parts = [flat(self._batch(i).column("y")) for i in range(self.manifest.num_batches)]
        return np.concatenate(parts).reshape(-1, *self.manifest.y_shape)

    def official(self, batches: Iterable[int] | None = None) -> npt.NDArray[np.uint8]:
        """The published split of all rows, or of those of some record batches, in their order.

        TRAIN, TEST, VAL or UNSEEN. It comes from the index: no example is read.
        """
        wanted = range(self.manifest.num_batches) if batches is None else batches
        return np.concatenate([self._official(i) for i in wanted])

    def _official(self, index: int) -> npt.NDArray[np.uint8]:
        raw = self._index["official"][index].as_py()
        num_rows = int(self.start_rows[index + 1] - self.start_rows[index])
        return _published(None if raw is None else np.frombuffer(raw, np.uint8), num_rows)

    def read(self, rows: Rows) -> Fetched:
        """Copies of the given rows, in that order; the record batches they lie in are checked.

        Raises:
            DataError: a record batch that is not what was written, named.
        """
        owner = np.searchsorted(self.start_rows, rows, side="right") - 1
        x = y = None
        for batch_index in np.unique(owner):
            batch = self._batch(int(batch_index))
            at = np.flatnonzero(owner == batch_index)
            inside = rows[at] - self.start_rows[batch_index]
            part_x = flat(batch.column("x")).reshape(batch.num_rows, *self.manifest.x_shape)
            part_y = flat(batch.column("y")).reshape(batch.num_rows, *self.manifest.y_shape)
            if x is None or y is None:
                x = np.empty((len(rows), *part_x.shape[1:]), part_x.dtype)
                y = np.empty((len(rows), *part_y.shape[1:]), part_y.dtype)
            x[at], y[at] = part_x[inside], part_y[inside]
        if x is None or y is None:
            raise DataError(f"{self.folder}: asked for no rows")
        return Fetched(x, y)

    def check(self, watch: Watch = lambda event: None) -> None:
        """Read all of it and compare with what was written.

        Raises:
            DataError: the first record batch that is not as it was, named.
        """
        began, total = time.monotonic(), self.manifest.num_batches
        for index in range(total):
            self._batch(index)
            done, num_rows = index + 1, int(self.start_rows[index + 1])
            seconds = time.monotonic() - began
            watch(StoreProgress("checking", done, total, num_rows, seconds, done == total))

    def _batch(self, index: int) -> pa.RecordBatch:
        try:
            batch = self._reader.get_batch(index)
            good = index in self._checked or self._as_written(batch, index)
        except BROKEN as error:
            raise DataError(
                f"{self.folder / 'data.arrow'}: record batch {index} cannot be read: {error}; "
                f"{_remedy(self.folder)}"
            ) from error
        if not good:
            raise DataError(
                f"{self.folder / 'data.arrow'}: record batch {index} (client "
                f"{self.client_ids[index]!r}) is not what was written; {_remedy(self.folder)}"
            )
        self._checked.add(index)
        return batch

    def _as_written(self, batch: pa.RecordBatch, index: int) -> bool:
        batch.validate()  # lengths first: Arrow ends the process over one that is negative
        return bool(
            batch.schema.names == COLUMNS
            and batch.num_rows == self._index["num_rows"][index].as_py()
            and _batch_digest(batch, self._official(index)) == self._index["sha256"][index].as_py()
        )


def _read_manifest(path: Path) -> Manifest:
    raw = json.loads(path.read_text())
    if raw["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"schema version {raw['schema_version']}, this release reads {SCHEMA_VERSION}"
        )
    for key in ("x_shape", "y_shape"):
        raw[key] = tuple(raw[key])
    return Manifest(**raw)


def _read_index(path: Path, manifest: Manifest) -> pa.Table:
    raw = pa.memory_map(str(path)).read_buffer()
    if hashlib.sha256(raw).hexdigest() == manifest.index_sha256:
        # Only now: Arrow may end the process over a file that was changed.
        table = pa.ipc.open_file(raw).read_all()
        digest = _store_digest(table["client_id"].to_pylist(), table["sha256"].to_pylist())
        if (sum(table["num_rows"].to_pylist()), digest) == (manifest.num_rows, manifest.digest):
            return table
    raise ValueError(f"{path.name} is not what was written")


def _remedy(folder: Path) -> str:
    return f"delete {folder} and prepare it again"
