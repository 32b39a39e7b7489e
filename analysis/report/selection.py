"""Which runs of an experiment the report is about, and which it leaves out, with the reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.report.grouping import options, pair_key
from analysis.report.naming import own_name
from analysis.report.store import StoredRun, nearest
from selffl_ray.errors import UsageError

NEEDED_TAGS = ("method", "method_label", "dataset", "seed", "partition_digest", "data_digest")
"""A run without these was not written by selffl_ray, and cannot be paired."""

LEFT_OUT = {
    "RUNNING": "not finished yet",
    "SCHEDULED": "not finished yet",
    "FAILED": "failed",
    "KILLED": "stopped before the end",
}


@dataclass(frozen=True)
class Selection:
    """The runs that count, newest first; of what; and what was left out, in sentences.

    failed: runs that ended with an error, unless the same one was run again and finished.
    """

    runs: tuple[StoredRun, ...]
    source: str
    left_out: tuple[str, ...]
    failed: tuple[StoredRun, ...] = ()


def select(runs: Sequence[StoredRun], parent: str | None) -> Selection:
    """Finished runs of one sweep, or all without a parent if the experiment holds no sweep.

    Args:
        runs: all runs of the experiment, newest first.
        parent: id or name of the sweep's parent run; None for the newest sweep, if there is one.

    Raises:
        UsageError: no such parent, or no finished run is left.
    """
    chosen = _parent(runs, parent)
    if chosen is None:
        ours = [run for run in runs if run.parent is None]
        source = "all runs of the experiment that belong to no sweep"
        outside = len(runs) - len(ours)
        notes = [f"{_runs(outside)} of parent runs: --parent reports them"] if outside else []
    else:
        ours = [run for run in runs if run.parent == chosen.run_id]
        source = f"the runs of {chosen.name} ({chosen.run_id})"
        outside = len(runs) - len(ours) - 1
        notes = [f"{_runs(outside)} outside of {chosen.name}"] if outside else []
    kept: list[StoredRun] = []
    foreign = 0
    dropped: dict[str, list[StoredRun]] = defaultdict(list)
    for run in ours:
        if any(tag not in run.tags for tag in NEEDED_TAGS):
            foreign += 1
        elif run.status != "FINISHED":
            dropped[LEFT_OUT.get(run.status, run.status)].append(run)
        else:
            kept.append(run)
    notes += [f"{_runs(foreign)} without the tags of selffl_ray"] if foreign else []
    notes += [f"{_runs(len(own))} {why} ({told(own)})" for why, own in dropped.items()]
    if not kept:
        raise UsageError(
            f"no finished run among {source}" + (f" ({'; '.join(notes)})" if notes else "")
        )
    whole = {_same(run) for run in kept}
    failed = tuple(r for r in dropped[LEFT_OUT["FAILED"]] if _same(r) not in whole)
    return Selection(tuple(kept), source, tuple(notes), failed)


def told(runs: Sequence[StoredRun]) -> str:
    """``fedrep seeds 3, 4; ditto seed 0``: methods and seeds of runs."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for run in runs:
        selects = " in the stage that selects" * (run.tags.get("stage") == "select")
        seeds[own_name(run) + selects].add(int(run.tags["seed"]))
    return "; ".join(
        f"{name} seed{'s' * (len(own) > 1)} {', '.join(map(str, sorted(own)))}"
        for name, own in sorted(seeds.items())
    )


def _same(run: StoredRun) -> tuple[object, ...]:
    """What a failed run and one that was started in its place have in common."""
    row = tuple(sorted(options(run).items()))
    return run.tags.get("stage"), run.tags["dataset"], pair_key(run), run.tags["method_label"], row


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _parent(runs: Sequence[StoredRun], wanted: str | None) -> StoredRun | None:
    parents = {run.parent for run in runs} - {None}
    if wanted is None:
        sweeps = [run for run in runs if run.tags.get("selffl.kind") == "sweep"]
        return sweeps[0] if sweeps else None
    with_children = [run for run in runs if run.run_id in parents]
    for run in with_children:
        if wanted in (run.run_id, run.name):
            return run
    raise UsageError(
        f"--parent {wanted!r}: no run with runs under it has that id or name; "
        f"{nearest(wanted, [run.name for run in with_children])}"
    )
