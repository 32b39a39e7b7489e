"""Which runs are compared, in which scenes, and who is reference and who baseline."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from analysis.report.grouping import SECTION_PARAMS, options, sections
from analysis.report.grouping import differences as told_apart
from analysis.report.notes import named
from analysis.report.selection import select, told
from analysis.report.store import Store, StoredRun, nearest
from analysis.report.summary import RowSummary, Summary, summarize
from selffl_ray.errors import UsageError

SCENE_PARAMS = (*SECTION_PARAMS, "model.", "training.participation_rate", "training.trouble.")
"""Beginnings of the parameters that all methods of a scene share; the others belong to methods."""
REFERENCES = "selffl"
"""Labels that begin so are references where none is named."""
SWEEP_TAGS = ("stage", "configuration")
"""Dropped: a run is named by its method, and one that was tested counts whichever stage it is."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Methods on the same data, deal, model and participation.

    references, baselines: rows of the summary, best local score first.
    """

    summary: Summary
    references: tuple[RowSummary, ...]
    baselines: tuple[RowSummary, ...]

    @property
    def title(self) -> str:
        """Name of the scene."""
        return self.summary.section.title


@dataclass(frozen=True, eq=False)
class Study:
    """All scenes; where the runs come from and what was left out, in sentences.

    failed: runs that ended with an error and that would have counted; with those of a sweep's
    stage that selects, which might have chosen otherwise.
    """

    scenes: tuple[Scene, ...]
    sources: tuple[str, ...]
    left_out: tuple[str, ...]
    failed: tuple[StoredRun, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """Labels of all references, in the order in which they are met."""
        labels = [row.label for scene in self.scenes for row in scene.references]
        return tuple(dict.fromkeys(labels))

    def failures(self, reference: str) -> str:
        """Failed runs of a reference and of the baselines, as text; "" without any."""
        rows = [row for scene in self.scenes for row in scene.references]
        own = {method_of(row) for row in rows if row.label == reference}
        others = {method_of(row) for row in rows} - own
        return told([run for run in self.failed if run.tags["method_label"] not in others])


def read_study(
    store: Store, experiments: Sequence[str], parent: str | None, wanted: Sequence[str]
) -> Study:
    """All runs with test data of the experiments, in scenes.

    Args:
        parent: id or name of a sweep's parent run; None for the newest sweep of each experiment,
            or all of its runs without parent.
        wanted: labels of references; none for every Self-FL preset.

    Raises:
        UsageError: no such experiment, parent or reference, no run with test data, or nothing
            that can be compared.
    """
    names = list(dict.fromkeys(experiments))
    if parent is not None and len(names) > 1:
        raise UsageError("--parent names a sweep of one experiment; give --experiment once")
    runs: list[StoredRun] = []
    sources, left_out, failed = [], [], []
    for name in names:
        chosen = select(store.runs(name), parent)
        runs += chosen.runs
        failed += chosen.failed
        sources.append(f"{name}: {chosen.source}")
        left_out += [f"{name}: {note}" for note in chosen.left_out]
    runs, untested = _tested(runs)
    found = sections(runs, SCENE_PARAMS)
    summaries = [summarize(store, section, None) for section in found]
    scenes = _scenes(summaries, wanted)
    _check_pairs(scenes)
    return Study(scenes, tuple(sources), (*left_out, *untested), tuple(failed))


def _tested(runs: Sequence[StoredRun]) -> tuple[list[StoredRun], list[str]]:
    """Runs with test scores, newest first and without a sweep's tags; what is left out."""
    kept: list[StoredRun] = []
    without: list[StoredRun] = []
    for run in runs:
        tested = any(metric.startswith("test/local_") for metric in run.metrics)
        (kept if tested else without).append(run)
    sealed = sum(run.tags.get("stage") == "select" for run in without)
    notes = []
    if sealed:
        notes.append(f"{_runs(sealed)} of a sweep's stage that selects, whose test data are sealed")
    if len(without) > sealed:
        notes.append(f"{_runs(len(without) - sealed)} without test data")
    if not kept:
        raise UsageError(
            f"no run has test scores ({'; '.join(notes)}); confirm what a sweep chose on fresh "
            "seeds (confirm in the sweep file), or give test data a share of evaluation.splits"
        )
    kept.sort(key=lambda run: -run.start_ms)
    return _by_method(kept), notes


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _by_method(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """The runs named by their methods.

    A sweep may vary what is no option of a row (``faults``, say): then its own names for the
    configurations tell them apart, or the newer ones would pass for the older ones repeated.
    """
    names: dict[Hashable, set[str]] = defaultdict(set)
    for run in runs:
        names[_same(run)].add(run.tags.get("configuration", ""))
    found = []
    for run in runs:
        tags = {key: value for key, value in run.tags.items() if key not in SWEEP_TAGS}
        if len(names[_same(run)]) > 1:
            tags["configuration"] = f"{tags['method_label']} ({run.tags.get('configuration')})"
        found.append(dataclasses.replace(run, tags=tags))
    return found


def _same(run: StoredRun) -> Hashable:
    """What two runs of one sweep share that would stand in one row."""
    values = options(run) | {k: v for k, v in run.params.items() if k.startswith(SCENE_PARAMS)}
    return run.parent, run.tags["method_label"], tuple(sorted(values.items()))


def method_of(row: RowSummary) -> str:
    """The method's label, without what tells its configurations apart."""
    return row.row.runs[0].tags["method_label"]


def _scenes(summaries: Sequence[Summary], wanted: Sequence[str]) -> tuple[Scene, ...]:
    rows = [row for summary in summaries for row in summary.rows]
    known = list(dict.fromkeys([*map(method_of, rows), *(row.label for row in rows)]))
    for label in wanted:
        if label not in known:
            raise UsageError(
                f"--reference {label!r}: no method is so called; {nearest(label, known)}"
            )

    def is_reference(row: RowSummary) -> bool:
        if not wanted:
            return row.label.startswith(REFERENCES)
        return row.label in wanted or method_of(row) in wanted

    if not any(map(is_reference, rows)):
        raise UsageError(
            f"no label begins with {REFERENCES!r}; name what to compare by --reference, one of: "
            f"{named(known)}"
        )
    if all(map(is_reference, rows)):
        raise UsageError(
            f"every method found is a reference ({named(known)}); run baselines too, or name "
            "fewer by --reference"
        )
    return tuple(
        Scene(
            summary,
            tuple(row for row in summary.rows if is_reference(row)),
            tuple(row for row in summary.rows if not is_reference(row)),
        )
        for summary in summaries
    )


def _check_pairs(scenes: Sequence[Scene]) -> None:
    def keys(row: RowSummary) -> set[object]:
        return {own.key for own in row.numbers}

    for scene in scenes:
        for own in scene.references:
            if any(keys(own) & keys(other) for other in scene.baselines):
                return
    seeds = {row.label: row.seeds for scene in scenes for row in scene.summary.rows}
    told = named([f"{label} {' '.join(map(str, own))}" for label, own in seeds.items()])
    raise UsageError(
        "no reference shares a seed, on the same data, partition, model and participation, with "
        f"another method (seeds: {told}); run them with the same seeds and data options"
    )


def changing_options(scenes: Sequence[Scene], label: str) -> str | None:
    """How a row's options differ between scenes, as ``mu=0.1 | mu=1``; None if they do not."""
    rows = [row for scene in scenes for row in scene.summary.rows if row.label == label]
    own = [
        {k: v for k, v in options(row.row.runs[0]).items() if not k.startswith(SCENE_PARAMS)}
        for row in rows
    ]
    found = dict.fromkeys(told_apart(own))
    return " | ".join(found) if len(found) > 1 else None
