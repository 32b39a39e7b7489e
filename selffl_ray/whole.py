"""Files that are there whole or not at all, also after a kill or a loss of power."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file under a temporary name beside it, then give it its name.

    Where that fails, on a full disk say, the temporary file vanishes and the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(draft)
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_drafts(folder: Path, names: Collection[str]) -> None:
    """Temporary files that a killed process left of files of these names."""
    for found in folder.glob(".*"):
        name = re.fullmatch(r"\.(.+)\.\d+", found.name)
        if name is not None and name[1] in names and not found.is_dir():
            found.unlink(missing_ok=True)
