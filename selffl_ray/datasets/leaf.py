"""Files as the LEAF benchmark writes them: users, and for each user lists ``x`` and ``y``.

A folder holds any number of ``*.json`` files, each one object ``{"users": [ids], "num_samples":
[ints], "user_data": {id: {"x": [...], "y": [...]}}}``. A user's examples lie in one file. What a
name of a file says is not looked at. Two folders ``train`` and ``test`` hold the official split:

- ``-t sample``: the same users in both. The test part becomes their test examples.
- ``-t user``: other users in ``test`` than in ``train``. They become new clients: never trained on,
  adapted to and tested on their own examples.

LEAF drops users who are too small from ``users`` but leaves them in ``user_data`` with empty lists,
and does not shorten ``hierarchies``: only ``users`` says who is there, and ``hierarchies`` is not
read. ``num_samples`` says again what the lists show; where they differ the lists count, with a
warning.

The numbers of a user become an array as soon as its part of the text is parsed, so a file costs its
text and its arrays, never all of its numbers as Python objects. Source: Caldas et al. 2018, "LEAF:
a benchmark for federated settings", arXiv:1812.01097.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import TEST, TRAIN, UNSEEN, Group
from selffl_ray.errors import DataError

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
LeafSplit = Literal["sample", "user", "none"]

GET = (
    "make it with the scripts of the LEAF repository (github.com/TalwalkarLab/leaf) and give its "
    "data folder as data.source"
)


@dataclass(frozen=True, kw_only=True)
class LeafConfig:
    """What sets in LEAF's format have in common."""

    split: LeafSplit = "sample"
    """What LEAF's -t made of ``train`` and ``test``: sample (each user in both), user (test users
    are new clients), or none: one folder of users, split by evaluation.splits."""


class Examples(NamedTuple):
    """A user's examples: x (N, *input_shape), y (N,)."""

    x: Array
    y: Array


class ListError(ValueError):
    """What is wrong with a user's lists; whoever knows adds the file and the user."""


Convert = Callable[[list[Any], list[Any]], Examples]
"""The lists x and y of a user, equally long, as arrays; raises ListError."""


def leaf_defaults(name: str, config: LeafConfig) -> dict[str, Any]:
    """Shares that fit the split, and a folder for the runs."""
    splits = [0.8, 0.2, 0.0] if config.split == "sample" else [0.6, 0.2, 0.2]
    return {"experiment": name, "evaluation": {"splits": splits}}


def find_leaf(name: str, split: LeafSplit, source: str | None) -> tuple[Path, ...]:
    """The JSON files of a set, those of ``train`` before those of ``test``.

    Raises:
        DataError: no source, no such folder, or a folder without the files that the split needs.
    """
    if source is None:
        raise DataError(f"{name}: data.source is not set; {GET}")
    folder = Path(source).expanduser()
    if split == "none":
        if folder.is_file():
            return (folder,)
        inner = folder / "all_data"
        return _json_files(name, inner if inner.is_dir() else folder, "")
    return tuple(
        file
        for part in ("train", "test")
        for file in _json_files(name, folder / part, f" of data.split: {split}")
    )


def _json_files(name: str, folder: Path, whose: str) -> tuple[Path, ...]:
    files = tuple(sorted(folder.glob("*.json")))
    if not files:
        what = f"no *.json file in {folder}" if folder.is_dir() else f"there is no folder {folder}"
        remedy = "; if the source has no train and test folders, set data.split=none"
        raise DataError(f"{name}: {what}{whose}; {GET}{remedy if whose else ''}")
    return files


def leaf_groups(files: Sequence[Path], split: LeafSplit, convert: Convert) -> Iterator[Group]:
    """Clients of a set, file by file; only the test part is kept in memory as a whole.

    Raises:
        DataError: a file that is not what it should be, a user in two files, users of train and
            test who do not fit the split.
    """
    if split == "none":
        for user, (x, y) in _users(files, convert):
            yield Group(user, x, y)
        return
    train = [file for file in files if file.parent.name == "train"]
    test = dict(_users([file for file in files if file.parent.name == "test"], convert))
    folder, shared = train[0].parent.parent, 0
    for user, own in _users(train, convert):
        if user not in test:
            yield Group(user, own.x, own.y, np.full(len(own.y), TRAIN, np.uint8))
            continue
        if split == "user":
            raise DataError(
                f"{folder}: user {user!r} is in train and in test, but data.split is user, which "
                "needs other users in each; set data.split=sample"
            )
        shared += 1
        yield _joined(user, own, test.pop(user))
    if split == "sample" and test:
        raise _unexpected_test_users(folder, test, shared)
    for user, (x, y) in test.items():
        yield Group(user, x, y, np.full(len(y), UNSEEN, np.uint8))


def _joined(user: str, train: Examples, test: Examples) -> Group:
    official = np.repeat([TRAIN, TEST], [len(train.y), len(test.y)]).astype(np.uint8)
    x, y = (np.concatenate(parts) for parts in zip(train, test, strict=True))
    return Group(user, x, y, official)


def _unexpected_test_users(folder: Path, test: Mapping[str, Examples], shared: int) -> DataError:
    first = next(iter(test))
    if not shared:
        return DataError(
            f"{folder}: no user of test is in train (LEAF's -t user), but data.split is sample; "
            "set data.split=user, and they become new clients"
        )
    return DataError(
        f"{folder}: user {first!r} is in test but not in train, as are {len(test) - 1} more, while "
        f"{shared} users are in both: neither LEAF's -t sample nor its -t user; take them out"
    )


# -- files ----------------------------------------------------------------------------------------


def _users(files: Sequence[Path], convert: Convert) -> Iterator[tuple[str, Examples]]:
    """Users of several files in the order of the files; nobody twice."""
    place: dict[str, Path] = {}
    for path in files:
        for user, examples in read_leaf_file(path, convert).items():
            if user in place:
                raise DataError(
                    f"{path}: users: {user!r} is also in {place[user]}; a user's examples must lie "
                    "in one file, merge them or rename one"
                )
            place[user] = path
            yield user, examples


def read_leaf_file(path: Path, convert: Convert) -> dict[str, Examples]:
    """The users of one file, in its order.

    Raises:
        DataError: not JSON, truncated, a field that is missing, of another type or twice, a user
            without data, lists of different lengths, or what ``convert`` refuses.
    """
    content = _parse(path, convert)
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a LEAF file: it holds a {_kind(content)}, not an object")
    users = _field(path, content, "users", list)
    counts = _field(path, content, "num_samples", list)
    data = _field(path, content, "user_data", dict)
    for user, times in Counter(map(repr, users)).items():
        if times > 1:
            raise DataError(f"{path}: users: {user} is listed {times} times; list it once")
    if len(counts) != len(users):
        raise DataError(
            f"{path}: num_samples has {len(counts)} entries for {len(users)} users; make it one "
            "number for each"
        )
    found = {user: _examples_of(path, user, data) for user in users}
    _warn_of_counts(path, found, counts)
    if left_out := [u for u in data if u not in found and not _is_empty(data[u])]:
        logger.warning(
            "%s: user_data has examples of %r and %d more who are not in users; they are left out",
            path, left_out[0], len(left_out) - 1,
        )  # fmt: skip
    return found


def _parse(path: Path, convert: Convert) -> Any:
    def entry(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, times in Counter(k for k, _ in pairs).items() if times > 1)
            raise ListError(f"the key {twice!r} occurs twice in one object; keep one")
        if found.keys() == {"x", "y"} and all(isinstance(v, list) for v in found.values()):
            try:
                return _converted(found["x"], found["y"], convert)
            except ListError as error:
                return error  # raised when the user's name is known
        return found

    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=entry)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a whole JSON file: {error}; fetch or make it again"
        ) from error
    except ListError as error:
        raise DataError(f"{path}: {error}") from error


def _converted(x: list[Any], y: list[Any], convert: Convert) -> Examples:
    if len(x) != len(y):
        raise ListError(f"x has {len(x)} entries and y has {len(y)}; they must be as many")
    return convert(x, y)


def _field(path: Path, content: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in content:
        raise DataError(
            f"{path}: the field {name!r} is missing; a LEAF file has users, num_samples, user_data"
        )
    value = content[name]
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise DataError(f"{path}: {name} must be {wanted}, found a {_kind(value)}")
    return value


def _examples_of(path: Path, user: Any, data: Mapping[str, Any]) -> Examples:
    if not isinstance(user, str) or not user:
        raise DataError(f"{path}: users: an id must be a string that is not empty, found {user!r}")
    if user not in data:
        raise DataError(f"{path}: user_data has no entry of {user!r}, who is listed in users")
    entry = data[user]
    if isinstance(entry, ListError):
        raise DataError(f"{path}: user_data of {user!r}: {entry}")
    if not isinstance(entry, Examples):
        raise DataError(f"{path}: user_data of {user!r} must be an object of two lists, x and y")
    return entry


def _warn_of_counts(path: Path, found: Mapping[str, Examples], counts: Sequence[Any]) -> None:
    differing = [
        (user, count, len(examples.y))
        for (user, examples), count in zip(found.items(), counts, strict=True)
        if count != len(examples.y)
    ]
    if differing:
        user, count, actual = differing[0]
        logger.warning(
            "%s: num_samples says %s of %r, the lists hold %d, and differs for %d more users; the "
            "lists count", path, count, user, actual, len(differing) - 1,
        )  # fmt: skip


def _is_empty(entry: Any) -> bool:
    return isinstance(entry, Examples) and not len(entry.y)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


# -- lists ----------------------------------------------------------------------------------------


def numbers(values: list[Any], field: str, width: int | None = None) -> Array:
    """A list of numbers as (N,), or of lists of ``width`` numbers as (N, width).

    Raises:
        ListError: anything that is not a finite number, another length.
    """
    inner = "numbers" if width is None else f"lists of {width} numbers"
    shape = (len(values),) if width is None else (len(values), width)
    if not values:
        return np.empty((0, *shape[1:]), np.int64)
    try:
        found = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise ListError(f"{field} must be {inner} of equal length") from error
    if found.dtype.kind not in "iuf" or found.shape != shape:
        what = (
            f"{found.shape[1:]} of {found.dtype}" if found.dtype.kind != "O" else "something else"
        )
        raise ListError(f"{field} must be {inner}, found {what}")
    if not np.isfinite(found).all():
        raise ListError(f"{field} must be finite")
    return found


def class_labels(values: list[Any], num_classes: int) -> npt.NDArray[np.int64]:
    """The list y as class indices (N,), 0 <= y < num_classes.

    Raises:
        ListError: no whole numbers, or outside that range.
    """
    found = numbers(values, "y")
    if found.dtype.kind == "f":
        raise ListError("y must be whole numbers, found fractions")
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < num_classes:
        raise ListError(
            f"y must lie in 0..{num_classes - 1}, found {int(found.min())}..{int(found.max())}"
        )
    return found.astype(np.int64)


def strings(values: list[Any], field: str) -> list[str]:
    """A list of strings, checked.

    Raises:
        ListError: another type.
    """
    for at, value in enumerate(values):
        if not isinstance(value, str):
            raise ListError(f"{field}[{at}] must be a string, found a {_kind(value)}")
    return values
