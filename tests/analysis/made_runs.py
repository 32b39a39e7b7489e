"""Runs as selffl_ray tracks them, written to a real MLflow store with numbers of our choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from selffl_ray.tracking import experiment_id, open_store

CLIENTS = ("ann", "bob", "cid", "dee")
ROUNDS = (1, 3)
"""Rounds that are evaluated, of four."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """One run: what it is called and what it measured.

    local: score of each client after the last round; lower by ``rise`` at the earlier evaluation;
    splits: what is scored, ``val`` like ``test`` but lower by 0.01; new: score of each client that
    never trained; sizes: examples of each client, 10 by default.
    """

    label: str
    seed: int
    local: Sequence[float]
    method: str = ""
    global_: float | None = 0.8
    new: Sequence[float] = ()
    sizes: Sequence[int] = ()
    rise: float = 0.1
    splits: Sequence[str] = ("val", "test")
    score: str = "accuracy"
    steps: float = 100.0
    status: str = "FINISHED"
    partition: str = ""
    data: str = "data-1"
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    drop_tags: Sequence[str] = ()
    artifacts: bool = True

    def all_tags(self) -> dict[str, str]:
        own = {
            "method": self.method or self.label.split("-")[0],
            "method_label": self.label,
            "dataset": "toys",
            "seed": str(self.seed),
            "partition_digest": self.partition or f"partition-{self.seed}",
            "data_digest": self.data,
            "selffl_ray_version": "0.1.0",
        }
        return {k: v for k, v in (own | dict(self.tags)).items() if k not in self.drop_tags}

    def all_params(self) -> dict[str, str]:
        own = {
            "seed": str(self.seed),
            "data.name": "toys",
            "data.partition.name": "natural",
            "method.name": self.method or self.label.split("-")[0],
            "training.learning_rate": "0.3",
            "evaluation.last": "1",
            "placement.backend": "local",
        }
        return own | dict(self.params)


class MadeStore:
    """A sqlite store, new in the folder unless one is given; the folder is for files."""

    def __init__(self, *, folder: Path, store: str | None = None) -> None:
        self.uri = store or f"sqlite:///{folder / 'mlflow.db'}"
        self.client: MlflowClient = open_store(self.uri)
        self._folder = folder
        self._clock = 1_000_000

    def experiment(self, name: str) -> str:
        return experiment_id(self.client, self.uri, name)

    def add(self, experiment: str, made: Made) -> str:
        """Write a run, later than all before it; its id."""
        run_id = self._create(experiment, made.all_tags(), f"{made.label}-s{made.seed}")
        params = [Param(k, v) for k, v in made.all_params().items()]
        self.client.log_batch(run_id, metrics=_metrics(made), params=params)
        if made.artifacts:
            path = self._folder / "clients.parquet"
            _clients(made).to_parquet(path)
            self.client.log_artifact(run_id, str(path))
        self.client.set_terminated(run_id, status=made.status)
        return run_id

    def add_parent(self, experiment: str, name: str) -> str:
        """Write a sweep's parent run; its id."""
        run_id = self._create(experiment, {"selffl.kind": "sweep"}, name)
        self.client.set_terminated(run_id)
        return run_id

    def tag(self, run_id: str, **tags: str) -> None:
        self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def _create(self, experiment: str, tags: dict[str, str], name: str) -> str:
        self._clock += 1000
        where = self.experiment(experiment)
        run = self.client.create_run(where, start_time=self._clock, tags=tags, run_name=name)
        return run.info.run_id


def _metrics(made: Made) -> list[Metric]:
    found = []
    for at in range(max(ROUNDS) + 1):
        values = {
            "cost/gradient_steps": made.steps * (at + 1) / 4,
            "comm/bytes_up": 1e6,
            "comm/bytes_down": 2e6,
            "time/round_s": 0.5,
        }
        if at in ROUNDS:
            values |= {"time/eval_s": 0.25, "cost/personalization_steps": 10.0 * (at + 1)}
            for split in made.splits:
                values |= _scores(made, at, split)
            if made.new:
                values[f"new/local_{made.score}"] = float(np.mean(made.new))
        found += [Metric(name, value, 0, at) for name, value in values.items()]
    return found


def _local(made: Made, at: int, split: str) -> np.ndarray:
    lower = made.rise * (at != ROUNDS[-1]) + 0.01 * (split == "val")
    return np.asarray(made.local) - lower


def _scores(made: Made, at: int, split: str) -> dict[str, float]:
    local, name = _local(made, at, split), f"{split}/local_{made.score}"
    worst, best = (local.min(), local.max())[:: 1 if made.score == "accuracy" else -1]
    found = {
        name: np.average(local, weights=made.sizes or None),
        f"{name}_mean": local.mean(),
        f"{name}_std": local.std(),
        f"{name}_worst10": worst,
        f"{name}_best10": best,
    }
    if made.global_ is not None:
        found[f"{split}/global_{made.score}"] = made.global_
        found[f"{split}/clients_harmed_vs_global"] = float((local < made.global_).mean())
    return {key: float(value) for key, value in found.items()}


def _clients(made: Made) -> pd.DataFrame:
    parts = [
        pd.DataFrame(
            {
                "round_index": at,
                "client_id": CLIENTS[: len(made.local)],
                "split": split,
                "num_examples": made.sizes or 10,
                f"global_{made.score}": made.global_,
                f"local_{made.score}": _local(made, at, split),
            }
        )
        for at in ROUNDS
        for split in made.splits
    ]
    parts += [
        pd.DataFrame(
            {
                "round_index": at,
                "client_id": [f"new-{n}" for n in range(len(made.new))],
                "split": "new",
                "num_examples": 10,
                f"global_{made.score}": made.global_,
                f"local_{made.score}": made.new,
            }
        )
        for at in ROUNDS
        if made.new
    ]
    return pd.concat(parts, ignore_index=True)
