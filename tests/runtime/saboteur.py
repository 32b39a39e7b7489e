"""Jobs in this process on real actors, with something done to an actor at a chosen moment."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from selffl_ray.api import make_job, placement_of
from selffl_ray.config import load_config
from selffl_ray.execution import run_jobs
from selffl_ray.experiment import prepare_experiment
from selffl_ray.run_loop import Message, Progress
from selffl_ray.runtime.actors import Control
from selffl_ray.runtime.cluster import cluster

ROOT = Path(__file__).parents[2]
"""Where ``tests.runtime.misbehaving`` is found, by the actors too."""

Act = Callable[[int], None]
"""Does something to a process, given its id."""


class Saboteur(Control):
    """Acts on the first actor's process, once, when a round has just been finished.

    Events are taken in the server loop itself, so what follows the act is always the next round.

    Args:
        folder: of the run; after_round: its index; act: None only watches.
    """

    def __init__(self, folder: Path, after_round: int = 0, act: Act | None = None) -> None:
        super().__init__()
        self._folder, self._after, self._act = folder, after_round, act
        self.rounds: list[int] = []
        self.messages: list[str] = []
        self.victims: list[int] = []

    def emit(self, event: Any) -> None:
        if isinstance(event, Message):
            self.messages.append(event.text)
        if isinstance(event, Progress):
            self.rounds.append(event.round_index)
            if self._act and not self.victims and event.round_index == self._after:
                self.victims.append(pid_of_actor(self._folder, 0))
                self._act(self.victims[0])


def pid_of_actor(folder: Path, actor: int) -> int:
    """Process of a client actor, from the run's ``environment.json``."""
    return int(actors_of(folder)[actor]["pid"])


def actors_of(folder: Path) -> list[dict[str, Any]]:
    """Where the client actors of a run were."""
    environment = json.loads((folder / "environment.json").read_text())
    return list(environment["placement"]["actors"])


def run(folder: Path, settings: tuple[str, ...], control: Control | None = None) -> pd.DataFrame:
    """Do one run, with the server loop in this process; its table of rounds."""
    config = load_config(None, [*settings, "tracking.enabled=false"], folder=ROOT)
    with cluster() as here:
        plan = placement_of(prepare_experiment(config), here.nodes)
        job = dataclasses.replace(make_job(config, folder), plugin_folder=str(ROOT))
        run_jobs(control or Saboteur(folder), [job], plan, folder.name)
    return pd.read_parquet(folder / "rounds.parquet")
