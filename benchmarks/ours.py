"""One of our placements on a workload, as a process of its own that starts as ``selffl run`` does.

python -m benchmarks.ours W1 [SETTING ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.workloads import WORKLOADS, workload_config
from selffl_ray.importing import leave_out_of_collections, uncollected
from selffl_ray.local_ray import is_ray_ours, ray_meanwhile
from selffl_ray.raw_config import is_for_ray, read_raw

if TYPE_CHECKING:
    from selffl_ray.api import Request


class Report(NamedTuple):
    """Seconds of each round without its evaluation, those of the evaluations, the last digest."""

    rounds_s: list[float]
    eval_s: list[float]
    digest: str


def rounds_of(request: Request) -> Report:
    """Carry out the request of one run, and what its rounds took."""
    import numpy as np
    import pyarrow.parquet

    from selffl_ray.api import launch
    from selffl_ray.run_loop import Progress

    ends_s: list[float] = [0.0]

    def watch(event: Any) -> None:
        if isinstance(event, Progress):
            ends_s.append(event.seconds)

    folder = launch(request, watch)[0].folder
    # Not as a frame: pandas is a third of a second that the command does not take either.
    columns = ["eval_s", "digest"]
    rounds = pyarrow.parquet.read_table(folder / "rounds.parquet", columns=columns).to_pydict()
    # From the end of a round to the end of the next, as of the peers; the last one is evaluated.
    eval_s = [seconds or 0.0 for seconds in rounds["eval_s"]]
    return Report((np.diff(ends_s) - eval_s).tolist(), eval_s, rounds["digest"][-1])


def request_of(workload: str, settings: list[str], folder: str) -> Request:
    """A workload's run with further settings into a folder, checked."""
    with uncollected():
        from selffl_ray.api import request_run

    return request_run(workload_config(workload, *settings), output=folder)


def write_torch_params(folder: Path, file: str) -> None:
    """A run's global model as the peers write theirs: an .npz file, dense weights transposed."""
    import numpy as np
    from safetensors.torch import load_file

    from benchmarks.export import torch_layout

    model = load_file(folder / "models" / "global.safetensors")
    np.savez(file, allow_pickle=False, **torch_layout(model))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--params", default=None, help=".npz file for the final model")
    options = parser.parse_args()
    settings = [f"export_models={str(options.params is not None).lower()}", *options.settings]
    with tempfile.TemporaryDirectory() as folder:

        def request() -> Request:
            return request_of(options.workload, settings, folder)

        early = is_ray_ours() and is_for_ray(read_raw(None, settings))
        ready: AbstractContextManager[Request] = (
            ray_meanwhile(request) if early else contextlib.nullcontext(request())
        )
        with ready as asked:
            report = rounds_of(asked)
        if options.params is not None:
            write_torch_params(Path(folder), options.params)
    print(json.dumps(report._asdict()), flush=True)
    # As the command does at its end.
    leave_out_of_collections()


if __name__ == "__main__":
    main()
