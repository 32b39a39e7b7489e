"""Where real data lie that no package brings: SELFFL_RAY_TEST_DATA, a folder a data set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "SELFFL_RAY_TEST_DATA"


def source_of(name: str) -> str | None:
    """Folder of that set's files, or None if there is none."""
    folder = Path(os.environ.get(VARIABLE, "nowhere")) / name
    return str(folder) if VARIABLE in os.environ and folder.is_dir() else None


def needs(name: str) -> pytest.MarkDecorator:
    """Skip without the set's real files, saying where they are looked for."""
    reason = f"no folder {name} in {VARIABLE} ({os.environ.get(VARIABLE, 'not set')})"
    return pytest.mark.skipif(source_of(name) is None, reason=reason)
