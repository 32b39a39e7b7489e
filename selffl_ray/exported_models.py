"""Models that a run leaves behind in ``models/``, and ``models.json``, to know them again by."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import torch

from selffl_ray.errors import DataError
from selffl_ray.experiment import write_params
from selffl_ray.flat import ParamSpec
from selffl_ray.tables import write_json

FOLDER, GLOBAL = "models", "global.safetensors"
DIGESTS = "models.json"
"""SHA-256 of each file in ``models/``, by its name in there."""


def write_models(
    folder: Path,
    spec: ParamSpec,
    global_P: torch.Tensor | None,
    personal: Mapping[str, torch.Tensor],
) -> None:
    """The global model if there is one, the model of each client by its id, and their digests.

    Args:
        folder: the run's.
    """
    files = {f"clients/{quote(name, safe='')}.safetensors": personal[name] for name in personal}
    if global_P is not None:
        files = {GLOBAL: global_P, **files}
    for name, theta_P in files.items():
        write_params(folder / FOLDER / name, theta_P, spec)
    # Last: who finds them finds all models.
    write_json(folder / DIGESTS, {name: _sha256(folder / FOLDER / name) for name in files})


def check_models(folder: Path, remedy: str) -> None:
    """Every model is the one that the run wrote, and none has come or gone; a run may have none.

    Args:
        folder: the run's; remedy: what to do where one is not.

    Raises:
        DataError: naming the file, and what was found in place of what.
    """
    path, models = folder / DIGESTS, folder / FOLDER
    if not os.path.lexists(models) and not os.path.lexists(path):
        return
    try:
        recorded = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read: {' '.join(str(error).split())[:300]}; {remedy}"
        ) from error
    present = {str(file.relative_to(models)) for file in models.rglob("*.safetensors")}
    for name in sorted({*recorded, *present}):
        wanted, file = recorded.get(name), models / name
        # Only what lies there is opened, and no pipe.
        found = _sha256(file) if name in present and file.is_file() else None
        if found is None or found != wanted:
            raise DataError(
                f"{file} is not what the run wrote: SHA-256 {found or 'of no file'}, but {path} "
                f"has {wanted or 'none of it'}; {remedy}"
            )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
