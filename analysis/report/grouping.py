"""Sections and rows: what may stand in one table, and what is averaged over seeds.

A section holds runs on the same data, dealt in the same way, of one stage of a sweep. A row holds
runs that differ in nothing but the seed. Nothing is ever averaged over two data sets or two deals.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from analysis.report.naming import SHORT, UNSET, marks, method_defaults, shorten, variant
from analysis.report.store import StoredRun

SECTION_PARAMS = ("data.", "evaluation.splits", "evaluation.new_clients", "evaluation.max_clients")
ROW_PARAMS = ("model.", "method.", "training.", "evaluation.last")
IGNORED = ("data.source",)
"""Where the data lie; what they are is in their digest."""

STAGES = {"confirm": 0, "": 1, "select": 2}
"""Stages of a sweep in the order of the report; runs outside of sweeps have none."""


class PairKey(NamedTuple):
    """What two runs must share to be compared: the seed, the data and who has which of them."""

    seed: int
    data: str
    partition: str


def pair_key(run: StoredRun) -> PairKey:
    """The key of a run."""
    return PairKey(int(run.tags["seed"]), run.tags["data_digest"], run.tags["partition_digest"])


@dataclass(frozen=True, eq=False)
class Row:
    """One method: its newest finished run for every seed, in the order of seeds.

    chosen: the sweep's choice.
    """

    label: str
    method: str
    runs: tuple[StoredRun, ...]
    chosen: bool


@dataclass(frozen=True, eq=False)
class Section:
    """Rows that may be compared.

    older: runs left out because a newer one has the same row and seed.
    """

    title: str
    stage: str
    dataset: str
    rows: tuple[Row, ...]
    older: int

    @property
    def natural(self) -> bool:
        """Whether a client is the same one for every seed: the data set's own, not drawn."""
        runs = [run for row in self.rows for run in row.runs]
        own = all(run.params.get("data.partition.name") == "natural" for run in runs)
        return own and len({run.tags["data_digest"] for run in runs}) == 1


def sections(runs: Sequence[StoredRun], apart: tuple[str, ...] = SECTION_PARAMS) -> list[Section]:
    """All sections, confirmed results first.

    Args:
        runs: newest first.
        apart: beginnings of the parameters that runs of one section have in common.
    """
    parts: dict[tuple[Hashable, ...], list[StoredRun]] = defaultdict(list)
    for run in runs:
        parts[_section_key(run, apart)].append(run)
    split = [part for same in parts.values() for part in _by_data(same)]
    split.sort(key=lambda part: (_stage(part[0]), part[0].tags["dataset"]))
    names = _distinct_names(split, apart)
    groups = [_groups(part) for part in split]
    labels = _labels([[same[0] for same in part] for part in groups])
    return [_section(*one) for one in zip(groups, labels, names, strict=True)]


def _stage(run: StoredRun) -> int:
    return STAGES.get(run.tags.get("stage", ""), len(STAGES))


def _section_key(run: StoredRun, apart: tuple[str, ...]) -> tuple[Hashable, ...]:
    return run.tags.get("stage", ""), run.tags["dataset"], _values(run, apart)


def _values(run: StoredRun, prefixes: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    names = sorted(k for k in run.params if k.startswith(prefixes) and k not in IGNORED)
    return tuple((name, run.params[name]) for name in names)


def options(run: StoredRun) -> dict[str, str]:
    """The parameters that make a row: what two runs of one row have in common."""
    return dict(_values(run, ROW_PARAMS))


def _by_data(runs: Sequence[StoredRun]) -> list[list[StoredRun]]:
    """One part, if every seed has one data digest (data may be drawn by the seed); else by it."""
    digests: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        digests[run.tags["seed"]].add(run.tags["data_digest"])
    if all(len(found) == 1 for found in digests.values()):
        return [list(runs)]
    parts: dict[str, list[StoredRun]] = defaultdict(list)
    for run in runs:
        parts[run.tags["data_digest"]].append(run)
    return list(parts.values())


def _distinct_names(parts: Sequence[Sequence[StoredRun]], apart: tuple[str, ...]) -> list[str]:
    """The data set's name, with what tells two parts of one data set and stage apart."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for at, part in enumerate(parts):
        groups[part[0].tags.get("stage", ""), part[0].tags["dataset"]].append(at)
    names = [part[0].tags["dataset"] for part in parts]
    for members in groups.values():
        values = [dict(_values(parts[at][0], apart)) for at in members]
        marks = differences(values)
        for at, mark in zip(members, marks, strict=True):
            told = [mark] if mark else []
            if len(members) > 1 and marks.count(mark) > 1:
                told.append(f"data {parts[at][0].tags['data_digest'][:8]}")
            names[at] += f" ({' '.join(told)})" if told else ""
    return names


def differences(groups: Sequence[Mapping[str, str]]) -> list[str]:
    """For every group the parameters that differ between any two, as ``name=value``, shortly."""
    names = sorted({name for group in groups for name in group})
    differing = [n for n in names if len({group.get(n) for group in groups}) > 1]
    short = shorten(differing)
    return [
        " ".join(f"{short[n]}={group.get(n, UNSET)[:SHORT]}" for n in differing) for group in groups
    ]


def _groups(runs: Sequence[StoredRun]) -> list[list[StoredRun]]:
    """The runs of every row."""
    groups: dict[tuple[Hashable, ...], list[StoredRun]] = defaultdict(list)
    for run in runs:
        groups[_label(run), _values(run, ROW_PARAMS)].append(run)
    return list(groups.values())


def _section(groups: Sequence[Sequence[StoredRun]], labels: Sequence[str], title: str) -> Section:
    rows, older = [], 0
    for label, same in zip(labels, groups, strict=True):
        newest = _newest_of_each(same, key=lambda run: int(run.tags["seed"]))
        older += len(same) - len(newest)
        chosen = any(run.tags.get("best") == "true" for run in newest)
        rows.append(Row(label, same[0].tags["method"], tuple(newest), chosen))
    first = groups[0][0].tags
    return Section(title, first.get("stage", ""), first["dataset"], tuple(rows), older)


def _label(run: StoredRun) -> str:
    return run.tags.get("configuration") or run.tags["method_label"]


def _labels(parts: Sequence[Sequence[StoredRun]]) -> list[list[str]]:
    """Labels of the rows' first runs, one list a section; one label means one thing in all."""
    found = [[_label(run) for run in runs] for runs in parts]
    for label in {label for labels in found for label in labels}:
        members = [[run for run in runs if _label(run) == label] for runs in parts]
        places = [[variant(run, options(run)) for run in runs] for runs in members]
        for runs, labels, told in zip(
            parts, found, marks(places, _defaults(label, members)), strict=True
        ):
            at = (at for at, run in enumerate(runs) if _label(run) == label)
            for place, mark in zip(at, told, strict=True):
                labels[place] = f"{label} {mark}".strip()
    return found


def _defaults(label: str, members: Sequence[Sequence[StoredRun]]) -> Mapping[str, str]:
    """The method's defaults where the label is its bare name: a preset has other ones."""
    methods = {run.tags["method"] for runs in members for run in runs}
    return method_defaults(label) if methods == {label} else {}


def _newest_of_each(runs: Iterable[StoredRun], key: Callable[[StoredRun], int]) -> list[StoredRun]:
    newest = sorted(runs, key=lambda run: (key(run), -run.start_ms))
    return [next(same) for _, same in itertools.groupby(newest, key)]
