"""Checkpoints: server, every client's state and counters, complete in each folder, no pickles.

``checkpoints/round_<k>/`` holds ``checkpoint.json`` (schema, round, counters, SHA-256 of the other
files), ``server.safetensors`` and ``clients_<block>.safetensors`` with the rows of 64 clients each.
Blocks in which nothing changed are hard links to the last checkpoint's. A folder is written under
a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from selffl_ray import trees
from selffl_ray.errors import CheckpointError, ConfigError
from selffl_ray.messages import StateRows
from selffl_ray.whole import sync

SCHEMA_VERSION = 1
BLOCK = 64
"""Clients a file."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The ``checkpoint`` part of an experiment."""

    every: int = 10
    """Rounds between checkpoints; one is also written when a run is stopped."""
    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"checkpoint.{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Counters:
    """What a run must know to go on.

    run_digest names method, data, partition and training: another run's checkpoint is refused.
    """

    round_index: int
    gradient_steps: int
    run_digest: str


@dataclass(frozen=True)
class Checkpoint:
    """A state to go on from: after ``counters.round_index``."""

    counters: Counters
    server: Any
    states: list[StateRows]


def save_checkpoint(
    folder: Path, counters: Counters, server: Any, changed: Sequence[StateRows], keep: int
) -> Path:
    """Write one checkpoint and drop the oldest beyond ``keep``.

    Args:
        folder: the run's ``checkpoints`` folder.
        changed: rows of the clients that changed since the last checkpoint in this folder (all
            rows if there is none).

    Raises:
        OSError: it could not be written; the checkpoints before it are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tidy(folder, keep)
    previous = latest_checkpoint(folder)
    target = folder / f"round_{counters.round_index}"
    draft = folder / f".round_{counters.round_index}.{os.getpid()}"
    draft.mkdir()
    try:
        tensors = {name: np.asarray(leaf.cpu().numpy()) for name, leaf in trees.leaves(server)}
        _write_arrays(tensors, draft / "server.safetensors")
        _write_blocks(draft, previous, changed)
        files = {f.name: _sha256(f) for f in sorted(draft.iterdir())}
        head = {"schema_version": SCHEMA_VERSION, **asdict(counters), "files": files}
        (draft / "checkpoint.json").write_text(json.dumps(head, indent=1))
        _sync(draft)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        sync(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    tidy(folder, keep)
    return target


def tidy(folder: Path, keep: int) -> None:
    """Drop the oldest checkpoints beyond ``keep``, and what a killed process left half-written."""
    for left_over in (*folder.glob(".round_*"), *_folders(folder)[:-keep]):
        shutil.rmtree(left_over, ignore_errors=True)


def copy_checkpoint(source: Path, folder: Path, run_digest: str) -> Path:
    """The same state as the checkpoint of another run, that goes on from it with changed options.

    Args:
        source: a checkpoint; folder: the other run's ``checkpoints`` folder, without one.
        run_digest: of the other run.

    Raises:
        CheckpointError: the source is missing, broken or of another schema.
    """
    head = check_checkpoint(source, _read_head(source)["run_digest"])
    target = folder / source.name
    target.mkdir(parents=True)
    for name in head["files"]:
        shutil.copyfile(source / name, target / name)
    # Last: without it the folder is no checkpoint.
    (target / "checkpoint.json").write_text(json.dumps(head | {"run_digest": run_digest}, indent=1))
    _sync(target)
    return target


def _write_blocks(draft: Path, previous: Path | None, changed: Sequence[StateRows]) -> None:
    """Blocks with changed rows are written anew from the last checkpoint's; others are linked."""
    old = {} if previous is None else {f.name: f for f in previous.glob("clients_*.safetensors")}
    fresh: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for rows in changed:
        named = dict(trees.leaves(rows.state))
        for at, index in enumerate(rows.client_index.tolist()):
            block = fresh.setdefault(_block_name(index), {})
            block[index] = {name: leaf[at] for name, leaf in named.items()}
    for name, changed_rows in fresh.items():
        block = (_read_block(old[name]) if name in old else {}) | changed_rows
        index = sorted(block)
        arrays = {"index": np.asarray(index, np.int64)}
        for leaf in block[index[0]]:
            arrays[f"state.{leaf}"] = np.stack([block[i][leaf] for i in index])
        _write_arrays(arrays, draft / name)
    for name, file in old.items():
        if name not in fresh:
            try:
                os.link(file, draft / name)
            except OSError:
                shutil.copyfile(file, draft / name)


def _block_name(index: int) -> str:
    return f"clients_{index // BLOCK:06d}.safetensors"


def _read_block(file: Path) -> dict[int, dict[str, np.ndarray]]:
    arrays = load_file(file)
    names = [name.removeprefix("state.") for name in arrays if name != "index"]
    return {
        int(i): {name: arrays[f"state.{name}"][at] for name in names}
        for at, i in enumerate(arrays["index"])
    }


def _write_arrays(arrays: dict[str, np.ndarray], file: Path) -> None:
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)
    except SafetensorError as error:
        # What safetensors makes of a full disk.
        raise OSError(f"{file}: {error}") from error


def _folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("round_*") if p.name.removeprefix("round_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("round_")))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run's ``checkpoints`` folder."""
    folders = _folders(folder)
    return folders[-1] if folders else None


def rounds_done(folder: Path) -> int:
    """Rounds of a run that its newest checkpoint holds; 0 without one."""
    newest = latest_checkpoint(folder)
    return 0 if newest is None else int(newest.name.removeprefix("round_")) + 1


def load_checkpoint(path: Path, run_digest: str, server_like: Any, state_like: Any) -> Checkpoint:
    """Read a checkpoint back.

    Args:
        run_digest: of the run that wants to go on.
        server_like, state_like: trees of the same structure, for names, shapes and types.

    Raises:
        CheckpointError: another schema or run, a file that is missing, broken or does not fit.
    """
    head = check_checkpoint(path, run_digest)
    counters = Counters(head["round_index"], head["gradient_steps"], head["run_digest"])
    server = _fit(_load(path / "server.safetensors"), "", server_like, path)
    states = []
    for name in sorted(n for n in head["files"] if n.startswith("clients_")):
        arrays = _load(path / name)
        index = arrays.pop("index")
        state = _fit(arrays, "state.", state_like, path / name, rows=len(index))
        states.append(StateRows(index, trees.to_arrays(state)))
    return Checkpoint(counters, server, states)


def check_all_checkpoints(folder: Path) -> None:
    """Every checkpoint of a run's ``checkpoints`` folder is what was written, of whatever run.

    Raises:
        CheckpointError: see ``check_checkpoint``.
    """
    for path in _folders(folder):
        check_checkpoint(path, _read_head(path)["run_digest"])


def check_checkpoint(path: Path, run_digest: str) -> dict[str, Any]:
    """The content of ``checkpoint.json``, if it is of that run and its files are what was written.

    Raises:
        CheckpointError: another schema or run, or a file that is missing or broken.
    """
    head = _read_head(path)
    if head["run_digest"] != run_digest:
        raise CheckpointError(
            f"{path} belongs to another run: method, data, partition, training or the trace differ "
            "from the configuration; resume with the run's own config.yaml"
        )
    for name, sha in head["files"].items():
        if not (path / name).is_file() or _sha256(path / name) != sha:
            raise CheckpointError(
                f"{path / name} is missing or not what was written; delete the folder {path}, and "
                "the checkpoint before it is used"
            )
    return head


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = json.loads((path / "checkpoint.json").read_text())
        version = head["schema_version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint: {error}; delete it, and the one before it is used"
        ) from error
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint schema {version}, this release reads {SCHEMA_VERSION}; go on "
            "with the release that wrote it, or start the run anew"
        )
    wanted = {"round_index": int, "gradient_steps": int, "run_digest": str, "files": dict}
    if any(not isinstance(head.get(key), kind) for key, kind in wanted.items()):
        raise CheckpointError(
            f"{path / 'checkpoint.json'} lacks {', '.join(wanted)}; delete {path}"
        )
    return dict(head)


def _load(file: Path) -> dict[str, np.ndarray]:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; delete its checkpoint") from error


def _fit(
    arrays: dict[str, np.ndarray], prefix: str, like: Any, path: Path, rows: int | None = None
) -> Any:
    """The arrays as a tree of the structure of ``like``."""
    named = {}
    for name, leaf in trees.leaves(like):
        array = arrays.get(prefix + name)
        shape = tuple(leaf.shape) if rows is None else (rows, *leaf.shape[1:])
        if array is None or array.shape != shape:
            found = "nothing" if array is None else f"{array.shape}"
            raise CheckpointError(f"{path}: {name} must have shape {shape}, found {found}")
        named[name] = torch.from_numpy(array.copy())
    parts = iter(named.values())
    return trees.map_tree(lambda leaf: next(parts), like)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Have the files on disk before the folder gets its name."""
    for file in sorted(folder.iterdir()):
        sync(file)
    sync(folder)
