"""What moving clients gains, where one of two client actors is slower, and what it costs elsewhere.

    python -m benchmarks.uneven [--workloads W1,W4] [--passes 3] [--rounds 100] [--output FILE.csv]

Two client actors on Ray, with ``placement.rebalance`` and without it, one run after the other:
  quiet   nothing is done
  slow    the second actor is stopped for 5 of every 10 ms: as on a machine of half the speed

Clock seconds of a round: the median from round 40 on, when whoever is to move has moved. Digests
must be the same in all runs of a workload.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.command_line import chosen, from_one, save
from benchmarks.workloads import workload_config
from selffl_ray import run_experiment
from selffl_ray.experiment import prepare_experiment
from selffl_ray.run_loop import Progress

STEADY = 40
"""First round that counts."""
REST_S = 0.005
"""Of every rest of a slow actor, and of what it computes between two."""
NAMES = ("W1", "W3", "W4")


class Throttle:
    """Has the second client actor of a run rest for half of the time, from its first round on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, event: Any) -> None:
        """What the run is watched with: begins with the first round that is done."""
        if isinstance(event, Progress) and self._thread is None:
            text = (self._folder / "environment.json").read_text()
            pid = int(json.loads(text)["placement"]["actors"][1]["pid"])
            self._thread = threading.Thread(target=self._hold, args=(pid,), daemon=True)
            self._thread.start()

    def _hold(self, pid: int) -> None:
        # It ends with the run, in the middle of a rest maybe.
        with contextlib.suppress(ProcessLookupError):
            while not self._over.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(REST_S)
                os.kill(pid, signal.SIGCONT)
                time.sleep(REST_S)

    def end(self) -> None:
        """Leave the actor, if there still is one, to itself."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()


def ignore(event: Any) -> None:
    """Watches nothing."""


def measured(name: str, case: str, rebalance: bool, rounds: int) -> dict[str, Any]:
    """One run."""
    per_actor = math.ceil(len(prepare_experiment(workload_config(name)).clients) / 2)
    config = workload_config(
        name,
        f"placement.clients_per_actor={per_actor}",
        f"placement.rebalance={str(rebalance).lower()}",
        f"training.num_rounds={rounds}",
    )
    with tempfile.TemporaryDirectory() as folder:
        throttle = Throttle(Path(folder))
        watch = throttle.watch if case == "slow" else ignore
        try:
            result = run_experiment(config, output=folder, watch=watch)
        finally:
            throttle.end()
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
    parser.add_argument("--rounds", type=from_one, default=100, help=f"more than {STEADY}")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    if options.rounds <= STEADY:
        parser.error(f"--rounds: takes more than {STEADY}, got {options.rounds}")
    rows = []
    for name in chosen(parser, "--workloads", options.workloads, NAMES):
        for number in range(options.passes):
            for case in ("quiet", "slow"):
                for rebalance in (False, True):
                    row = {"pass": number} | measured(name, case, rebalance, options.rounds)
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    rows.append(row)
    save(pd.DataFrame(rows), options.output)
    if pd.DataFrame(rows).groupby("workload")["digest"].nunique().max() != 1:
        raise SystemExit("digests differ: results depend on where clients are")


if __name__ == "__main__":
    main()
