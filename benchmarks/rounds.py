"""Seconds a round beside a plain loop, and beside other systems.

    python -m benchmarks.rounds W1 W2 W3 W3s W4 [--peers] [--passes 3] [--output FILE.csv]

Each pass runs the plain loop, our placements and the peers one after the other, every one in a
process of its own, the second pass backwards and so on: ratios compare what ran at about the same
time on a machine that others may share. An entry's round is the median of its steady rounds (all
but the first), from the end of one to the end of the next, without evaluation; ``ratio`` is that
over the plain loop's of the same pass. ``outside_s`` is everything but the steady rounds, from the
start of the process to its end: imports, start of Ray, data, first round, stop. ``peak_gb`` is the
peak of the PSS summed over all its processes. ``apart`` is the distance of the final model from
our local pool's over the way that that one went; ``difference`` the largest one of a weight.

The peers need an environment of their own: ``pip install -e '.[bench]'`` there, without
constraints.txt, whose Ray Flower does not take (without a GPU install a CPU build of torch first);
its interpreter here as --peers-python (this one by default).
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil

from benchmarks.agreement import apart, findings, largest_difference, load
from benchmarks.command_line import from_one
from benchmarks.entries import LOCAL, NAMES, OTHER_MODEL, PEERS, PLAIN, Entry, entries_of, why_not
from benchmarks.export import workload_of
from benchmarks.goals import table
from benchmarks.peers.peer_workload import QUIET, write
from benchmarks.processes import EntryError, environment, measure
from benchmarks.workloads import WORKLOADS, workload_config
from selffl_ray.experiment import prepare_experiment
from selffl_ray.numerics import processor

WORKLOAD = "workload.npz"
ROOT = Path(__file__).parents[1]
SHOWN = ["round_s", "ratio", "outside_s", "peak_gb", "eval_s", "apart"]


def run_entry(entry: Entry, folder: Path) -> dict[str, Any]:
    """Measure an entry; its final model is left in the folder."""
    load_1m = os.getloadavg()[0]
    command = (*entry.command, "--params", str(folder / f"{entry.name}.npz"))
    # Flower makes up an identity and writes it to its home folder.
    env = environment(**QUIET, PYTHONPATH=str(ROOT), FLWR_HOME=str(folder / "flower"))
    done = measure(command, env)
    rounds_s = done.report["rounds_s"]
    steady, eval_s = rounds_s[1:], done.report.get("eval_s", [])[1:]
    row: dict[str, Any] = {
        "round_s": statistics.median(steady),
        "outside_s": done.wall_s - sum(steady) - sum(eval_s),
        "peak_gb": done.peak_bytes / 1e9,
        "digest": done.report.get("digest"),
        "versions": done.report.get("versions", "this package"),
        "load": load_1m,
    }
    evaluated = [seconds for seconds in eval_s if seconds > 0]
    # All of ours are evaluated at the end; that alone is not evaluation every round.
    if len(evaluated) > 1:
        row["eval_s"] = statistics.median(evaluated)
    return row


class Job(NamedTuple):
    """A workload, its entries in order, its folder, and the start of its model."""

    workload: str
    entries: tuple[Entry, ...]
    folder: Path
    start: dict[str, np.ndarray]


def prepare_job(name: str, folder: Path, options: argparse.Namespace, left_out: set[str]) -> Job:
    """Write the workload's file and choose its entries."""
    folder.mkdir()
    prepared = prepare_experiment(workload_config(name))
    work = workload_of(prepared)
    file = folder / WORKLOAD
    write(file, work)
    python = options.peers_python if options.peers else None
    found = entries_of(name, len(prepared.client_ids), file, peers_python=python)
    chosen = [e for e in found if e.name not in left_out and e.name in options.entries]
    return Job(name, tuple(chosen), folder, work.weights)


def one_pass(job: Job, number: int) -> list[dict[str, Any]]:
    """All entries of a workload, one after the other, with ratios and agreement."""
    rows = []
    # Backwards in every other pass: on a machine that grows busier nobody is always the last.
    for entry in job.entries if number % 2 == 0 else reversed(job.entries):
        row: dict[str, Any] = {"workload": job.workload, "pass": number, "entry": entry.name}
        print(f"pass {number}, {job.workload}, {entry.name}: ", end="", flush=True)
        try:
            row |= run_entry(entry, job.folder)
            print(f"{row['round_s']:.3f} s a round, {row['outside_s']:.1f} s outside", flush=True)
        except EntryError as error:
            # The others go on: their passes are worth keeping.
            row["failed"] = " ".join(str(error).split())
            print(f"failed: {error}", flush=True)
        rows.append(row)
    plain = {row["entry"]: row.get("round_s") for row in rows}.get(PLAIN)
    for row in rows:
        if plain is not None and "round_s" in row:
            row["ratio"] = row["round_s"] / plain
    add_agreement(rows, job)
    return rows


def add_agreement(rows: list[dict[str, Any]], job: Job) -> None:
    """How far every final model is from our local pool's; the models' files are removed."""
    models = {row["entry"]: job.folder / f"{row['entry']}.npz" for row in rows}
    found = {name: load(file) for name, file in models.items() if file.exists()}
    for row in rows:
        if row["entry"] in found and LOCAL in found and row["entry"] not in OTHER_MODEL:
            one, other = found[row["entry"]], found[LOCAL]
            row["apart"] = apart(one, other, job.start)
            row["difference"] = largest_difference(one, other)
    for file in models.values():
        file.unlink(missing_ok=True)


def skipped_peers(options: argparse.Namespace) -> dict[str, str]:
    """Peers that cannot run, each with the reason."""
    if not options.peers:
        return {}
    reasons = {name: why_not(options.peers_python, needs) for name, (_, needs) in PEERS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def all_passes(options: argparse.Namespace) -> pd.DataFrame:
    """A row for every pass, workload and entry; written as soon as a workload is through."""
    skipped = skipped_peers(options)
    for name, reason in skipped.items():
        print(f"{name} is skipped: {reason}", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rounds-") as temporary:
        jobs = [
            prepare_job(name, Path(temporary) / name, options, set(skipped))
            for name in options.workloads
        ]
        for number in range(options.passes):
            for job in jobs:
                rows += one_pass(job, number)
                print(medians(pd.DataFrame(rows[-len(job.entries) :])), flush=True)
                if options.output:
                    write_csv(pd.DataFrame(rows), options)
    return pd.DataFrame(rows)


def medians(rows: pd.DataFrame) -> str:
    """Medians over the passes, as text."""
    columns = [c for c in SHOWN if c in rows]
    found = rows.groupby(["workload", "entry"], sort=False)[columns].median()
    return found.to_string(float_format=lambda v: f"{v:.3f}", na_rep="")


def write_csv(rows: pd.DataFrame, options: argparse.Namespace) -> None:
    """All rows with the machine and the command, without paths of this machine."""
    memory_gb = psutil.virtual_memory().total / 2**30
    machine = f"{processor()}, {psutil.cpu_count()} cores, {memory_gb:.0f} GiB"
    arguments = sys.argv[1:]
    if options.peers_python in arguments:
        arguments[arguments.index(options.peers_python)] = "PATH"
    if options.output in arguments:
        arguments[arguments.index(options.output)] = Path(options.output).name
    rows = rows.assign(
        machine=f"{machine}, {platform.system()} {platform.release()}",
        command=shlex.join(["python", "-m", "benchmarks.rounds", *arguments]),
    )
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.output, index=False, float_format="%.6g")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workloads", nargs="+", choices=sorted(WORKLOADS))
    parser.add_argument("--passes", type=from_one, default=3)
    parser.add_argument("--peers", action="store_true", help="pfl and Flower besides")
    parser.add_argument("--peers-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--output", default=None, metavar="FILE.csv")
    parser.add_argument(
        "--entries", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES)
    )
    return parser.parse_args()


def main() -> int:
    """Run, print and write; 1 if an entry failed or final models disagree."""
    # Python's own answer to SIGTERM would leave the running entry behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse()
    rows = all_passes(options)
    print(f"\nMedians of {options.passes} passes")
    print(medians(rows))
    print()
    print(table(rows).to_string(index=False, float_format=lambda v: f"{v:.3f}", na_rep=""))
    said, good = findings(rows)
    print("", *said, sep="\n")
    failed = rows["failed"].dropna() if "failed" in rows else ()
    return int(not good or len(failed) > 0)


if __name__ == "__main__":
    sys.exit(main())
