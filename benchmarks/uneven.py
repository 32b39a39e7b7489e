"""What moving clients gains, where one of two client actors is slower, and what it costs elsewhere.

    python -m benchmarks.uneven [--workloads W1,W4] [--passes 3] [--rounds 60] [--output FILE.csv]

Two client actors on Ray, with ``placement.rebalance`` and without it, one run after the other:
  quiet   nothing else is started
  busy    each actor is bound to a core of its own, and an endless loop to the second one's, so that
          this actor has half a core: as on a slower machine

Clock seconds of a round: the median from round 20 on, when whoever is to move has moved. Digests
must be the same in all runs of a workload.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from benchmarks.command_line import chosen, from_one, save
from benchmarks.workloads import workload_config
from selffl_ray import run_experiment
from selffl_ray.experiment import prepare_experiment
from selffl_ray.run_loop import Progress

STEADY = 20
"""First round that counts."""
NAMES = ("W1", "W3", "W4")


@contextlib.contextmanager
def busy_core(core: int) -> Iterator[None]:
    """A process that computes on this core meanwhile, and nowhere else."""
    # A session of its own, as Ray's actors have: sessions share a core by halves.
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        psutil.Process(process.pid).cpu_affinity([core])
        yield
    finally:
        process.kill()
        process.wait()


def bound(folder: Path, cores: tuple[int, int]) -> Callable[[Any], None]:
    """Binds each client actor to its core once the first round is done."""
    done: list[int] = []

    def watch(event: Any) -> None:
        if isinstance(event, Progress) and not done:
            actors = json.loads((folder / "environment.json").read_text())["placement"]["actors"]
            for actor, core in zip(actors, cores, strict=True):
                process = psutil.Process(actor["pid"])
                # Of this process alone a new affinity would be that of its first thread.
                for thread in process.threads():
                    psutil.Process(thread.id).cpu_affinity([core])
                done.append(actor["pid"])

    return watch


def measured(name: str, case: str, rebalance: bool, rounds: int) -> dict[str, Any]:
    """One run."""
    cores = tuple(sorted(psutil.Process().cpu_affinity() or ())[:2])
    per_actor = math.ceil(len(prepare_experiment(workload_config(name)).clients) / 2)
    config = workload_config(
        name,
        f"placement.clients_per_actor={per_actor}",
        f"placement.rebalance={str(rebalance).lower()}",
        f"training.num_rounds={rounds}",
    )
    with tempfile.TemporaryDirectory() as folder:
        if case == "quiet":
            result = run_experiment(config, output=folder)
        else:
            with busy_core(cores[1]):
                watch = bound(Path(folder), (cores[0], cores[1]))
                result = run_experiment(config, output=folder, watch=watch)
        # Read now: the folder goes.
        round_s = result.rounds["round_s"][STEADY:].median()
    return {
        "workload": name,
        "case": case,
        "rebalance": rebalance,
        "round_s": round_s,
        "moved": result.summary.get("clients_moved", 0),
        "digest": result.summary["digest"][:8],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", default=None, help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--passes", type=from_one, default=3)
    parser.add_argument("--rounds", type=from_one, default=60, help=f"more than {STEADY}")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    if options.rounds <= STEADY:
        parser.error(f"--rounds: takes more than {STEADY}, got {options.rounds}")
    if psutil.cpu_count() == 1:
        parser.error("two cores are needed")
    rows = []
    for name in chosen(parser, "--workloads", options.workloads, NAMES):
        for number in range(options.passes):
            for case in ("quiet", "busy"):
                for rebalance in (False, True):
                    row = {"pass": number} | measured(name, case, rebalance, options.rounds)
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    rows.append(row)
    save(pd.DataFrame(rows), options.output)
    if pd.DataFrame(rows).groupby("workload")["digest"].nunique().max() != 1:
        raise SystemExit("digests differ: results depend on where clients are")


if __name__ == "__main__":
    main()
