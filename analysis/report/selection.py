"""Which runs of an experiment the report is about, and which it leaves out, with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
    """The runs that count, newest first; of what; and what was left out, in sentences."""

    runs: tuple[StoredRun, ...]
    source: str
    left_out: tuple[str, ...]


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
    kept, reasons = [], Counter[str]()
    for run in ours:
        if any(tag not in run.tags for tag in NEEDED_TAGS):
            reasons["without the tags of selffl_ray"] += 1
        elif run.status != "FINISHED":
            reasons[LEFT_OUT.get(run.status, run.status)] += 1
        else:
            kept.append(run)
    notes += [f"{_runs(count)} {reason}" for reason, count in reasons.items()]
    if not kept:
        raise UsageError(
            f"no finished run among {source}" + (f" ({'; '.join(notes)})" if notes else "")
        )
    return Selection(tuple(kept), source, tuple(notes))


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
