"""Configurations as they are written: YAML files and ``dotted.key=value`` settings, unchecked.

Apart from ``config``, so that a command can look at one before it has imported torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selffl_ray.errors import ConfigError, shown
from selffl_ray.safe_yaml import BROKEN_YAML, load

Raw = dict[str, Any]


def read_raw(path: str | Path | None, sets: Sequence[str]) -> Raw:
    """What a file says, none being empty, with settings written over it.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or not a setting.
    """
    raw = read_yaml(Path(path)) if path is not None else {}
    for setting in sets:
        apply_setting(raw, setting)
    return raw


def is_for_ray(raw: Raw) -> bool:
    """Whether a configuration, right or wrong, asks for client actors."""
    placement = raw.get("placement") or {}
    return isinstance(placement, dict) and placement.get("backend", "ray") == "ray"


def read_yaml(path: Path) -> Raw:
    """A mapping from a YAML file, loaded safely.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    raw = _from_yaml(text, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found a {type(raw).__name__}")
    return raw


def _from_yaml(text: str, where: str) -> Any:
    try:
        return load(text)
    except BROKEN_YAML as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"{where} is not valid YAML: {found}") from error


def apply_setting(raw: Raw, setting: str) -> None:
    """Write one ``dotted.key=value`` into a raw configuration (which is changed)."""
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {setting!r}: write dotted.key=value, as in training.num_rounds=5")
    apply_value(raw, key, _from_yaml(text, f"--set {key}: the value {shown(text)}"))


def apply_value(raw: Raw, key: str, value: Any) -> None:
    """Write a plain value under a dotted key into a raw configuration (which is changed)."""
    at = raw
    *parents, last = key.split(".")
    for parent in parents:
        child = at.get(parent)
        if isinstance(child, str):
            child = {"name": child}
        if not isinstance(child, dict):
            child = {}
        at[parent] = child
        at = child
    at[last] = value
