"""Small files as LEAF's scripts write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def content(users: dict[str, tuple[list[Any], list[Any]]], **other: Any) -> dict[str, Any]:
    """One file's object; ``other`` replaces or adds fields."""
    return {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in users.items()},
        **other,
    }


def write(path: Path, users: dict[str, tuple[list[Any], list[Any]]], **other: Any) -> Path:
    """Write one file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content(users, **other)), "utf-8")
    return path
