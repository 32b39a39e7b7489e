"""One of our placements on a workload, as a process of its own.

python -m benchmarks.ours W1 [SETTING ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file

from benchmarks.export import torch_layout
from benchmarks.workloads import WORKLOADS, workload_config
from selffl_ray import ExperimentConfig, run_experiment
from selffl_ray.importing import leave_out_of_collections
from selffl_ray.run_loop import Progress


class Report(NamedTuple):
    """Seconds of each round without its evaluation, those of the evaluations, the last digest."""

    rounds_s: list[float]
    eval_s: list[float]
    digest: str


def rounds_of(config: ExperimentConfig, folder: str) -> Report:
    """Run an experiment into a folder, and what its rounds took."""
    ends_s: list[float] = [0.0]

    def watch(event: Any) -> None:
        if isinstance(event, Progress):
            ends_s.append(event.seconds)

    rounds = run_experiment(config, output=folder, watch=watch).rounds
    # From the end of a round to the end of the next, as of the peers; the last one is evaluated.
    eval_s = rounds["eval_s"].fillna(0.0)
    seconds = (np.diff(ends_s) - eval_s).tolist()
    return Report(seconds, eval_s.tolist(), rounds["digest"].iloc[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--params", default=None, help=".npz file for the final model")
    options = parser.parse_args()
    export = f"export_models={str(options.params is not None).lower()}"
    config = workload_config(options.workload, export, *options.settings)
    with tempfile.TemporaryDirectory() as folder:
        report = rounds_of(config, folder)
        if options.params is not None:
            model = load_file(Path(folder) / "models" / "global.safetensors")
            np.savez(options.params, allow_pickle=False, **torch_layout(model))
    print(json.dumps(report._asdict()), flush=True)
    # As the command does at its end.
    leave_out_of_collections()


if __name__ == "__main__":
    main()
