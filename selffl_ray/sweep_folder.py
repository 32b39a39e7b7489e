"""A sweep's folder: where it is, what may be resumed in it, and what is noted of its trials."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

from selffl_ray.config import to_raw
from selffl_ray.errors import ConfigError
from selffl_ray.sweep import SweepConfig, load_sweep
from selffl_ray.sweep_results import ENDED, FAILURE, RESTART
from selffl_ray.tables import write_json


def new_folder(sweep: SweepConfig) -> Path:
    """A fresh name under ``runs/<experiment>/`` in the current folder."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return Path.cwd() / "runs" / sweep.experiment / f"sweep-{stamp}"


def check_folder(sweep: SweepConfig, folder: Path, *, resume: bool) -> None:
    """A new sweep needs a folder without one, a sweep that goes on its own.

    Raises:
        ConfigError: it is not so.
    """
    file = folder / "sweep.yaml"
    if resume and not file.exists():
        raise ConfigError(f"--resume {folder}: there is no sweep in that folder")
    if not resume and file.exists():
        raise ConfigError(
            f"--output {folder} holds a sweep already; go on with --resume {folder}, or give "
            "another folder"
        )
    if resume and to_raw(load_sweep(file)) != to_raw(sweep):
        raise ConfigError(
            f"--resume {folder}: not as in its sweep.yaml; leave that as it was, or start another "
            "sweep"
        )


def check_origin(folder: Path) -> None:
    """Relative paths of a sweep start where it was started.

    Raises:
        ConfigError: this is another folder.
    """
    origin = json.loads((folder / "origin.json").read_text())["folder"]
    if Path(origin) != Path.cwd():
        raise ConfigError(
            f"--resume {folder}: relative paths, plugins and the MLflow store of this sweep start "
            f"in {origin}; go on from there"
        )


def note_end(event: Any, trials: Path, *, held: bool = False) -> None:
    """Keep in a trial's folder that Tune ended it, or what happened outside of its rounds.

    Args:
        held: a trial that has done what it was asked for is held, not ended.
    """
    folder = trials / event.trial
    if event.result.get("done") and not held:
        write_json(folder / ENDED, {"round": event.result.get("round")})
    if event.kind == "lost":
        died = (event.result["number"], event.result["cause"])
        write_json(folder / RESTART, [*deaths(folder), died])
    if event.kind == "error" and not (folder / FAILURE).exists():
        write_json(folder / FAILURE, dict(event.result))


def deaths(folder: Path) -> list[tuple[int, str]]:
    """Number and cause of every death of an actor of a trial, in order."""
    path = folder / RESTART
    return [(n, cause) for n, cause in json.loads(path.read_text())] if path.exists() else []
