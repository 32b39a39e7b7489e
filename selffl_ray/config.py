"""Experiments as frozen dataclasses, read strictly from YAML and written back whole.

Unknown keys are refused with the nearest name, values of another type with the value found. A
component (``data``, ``model``, ``method``, an estimator, a partitioner) is a name and that entry's
own options: a mapping with ``name``, or the bare name. Types of single values are checked by
pydantic in strict mode; nothing is converted.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from selffl_ray.checkpoint import CheckpointConfig
from selffl_ray.datasets.base import Dataset
from selffl_ray.errors import ConfigError
from selffl_ray.evaluation import EvaluationConfig
from selffl_ray.faults import FaultsConfig
from selffl_ray.models.build import ModelConfig
from selffl_ray.registry import (
    Component,
    Registry,
    algorithms,
    datasets,
    load_plugins,
    nearest,
    partitioners,
)
from selffl_ray.runtime.placement import PlacementConfig
from selffl_ray.tracking import TrackingConfig
from selffl_ray.training import TrainingConfig

Raw = dict[str, Any]
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The ``data`` part: a data set with its options, its partition and where its files are."""

    component: Annotated[Component, datasets] = Component("digits")
    partition: Annotated[Component, partitioners] = Component("natural")
    source: str | None = None
    """Folder of the files, for sets that are not generated or part of a library."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything about one run. The defaults are Self-FL on the digits of 14 handwriting forms."""

    experiment: str = "digits"
    """Name of the MLflow experiment and of the folder under runs/."""
    seed: int = 0
    """All draws come from it: data that are generated, partition, start, cohorts, batches."""
    plugins: tuple[str, ...] = ()
    """Modules of one's own that register algorithms, estimators, data sets or models."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Annotated[Component, algorithms] = Component("selffl")
    training: TrainingConfig = field(default_factory=TrainingConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    export_models: bool = False
    """Write the global and every client's model into the run's folder at the end."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.experiment):
            raise ConfigError(
                f"experiment must be letters, digits, '.', '_' and '-' (it names a folder), got "
                f"{self.experiment!r}"
            )

    @property
    def method_label(self) -> str:
        """Short name for tables: the method, and its preset if it has one."""
        preset = getattr(algorithms.options(self.method), "preset", None)
        return self.method.name if preset is None else f"{self.method.name}-{preset}"


# -- reading ------------------------------------------------------------------------------------


def load_config(
    path: str | Path | None = None, sets: Sequence[str] = (), folder: str | Path | None = None
) -> ExperimentConfig:
    """Read a configuration file, apply ``dotted.key=value`` settings, and resolve the rest.

    Args:
        path: YAML file; without one the default experiment.
        sets: values are read as YAML (``training.num_rounds=5``, ``method=fedavg``).
        folder: where plugins may lie and relative paths start, the current folder by default.

    Raises:
        ConfigError: in one line, naming the key, the value and the remedy.
    """
    base = Path(folder or Path.cwd()).absolute()
    raw = read_yaml(Path(path)) if path is not None else {}
    for setting in sets:
        apply_setting(raw, setting)
    return parse_config(raw, base)


def read_yaml(path: Path) -> Raw:
    """A mapping from a YAML file, loaded safely.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {where}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found a {type(raw).__name__}")
    return raw


def apply_setting(raw: Raw, setting: str) -> None:
    """Write one ``dotted.key=value`` into a raw configuration (which is changed)."""
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {setting!r}: write dotted.key=value, as in training.num_rounds=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: the value is not valid YAML") from error
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


def parse_config(raw: Raw, folder: Path) -> ExperimentConfig:
    """A resolved configuration from a raw mapping (which is not changed)."""
    raw = copy.deepcopy(raw)
    plugins = raw.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(p, str) for p in plugins):
        raise ConfigError(f"plugins must be a list of module names, got {plugins!r}")
    load_plugins(plugins, str(folder))
    data_raw = raw.get("data")
    data = _parse(DataConfig, _mapping(data_raw, "data"), "data")
    dataset: Dataset = datasets.make(data.component)
    merged = _under(raw, dataset.defaults)
    config = _parse(ExperimentConfig, merged, "")
    splits = config.evaluation.splits or (0.6, 0.2, 0.2)
    return replace_nested(
        config,
        evaluation=dataclasses.replace(config.evaluation, splits=splits),
        training=_absolute(config.training, "start_from", folder),
        data=_absolute(config.data, "source", folder),
    )


def replace_nested(config: ExperimentConfig, **parts: Any) -> ExperimentConfig:
    """``dataclasses.replace``, for symmetry with the parts' own."""
    return dataclasses.replace(config, **parts)


def _absolute(part: Value, name: str, folder: Path) -> Value:
    value = getattr(part, name)
    if value is None:
        return part
    path = folder / Path(value).expanduser()
    return dataclasses.replace(part, **{name: str(path)})  # type: ignore[type-var]


def _under(raw: Any, defaults: Mapping[str, Any]) -> Raw:
    """User keys over defaults, level by level; another name drops that component's defaults."""
    merged = copy.deepcopy(dict(defaults))
    for key, value in raw.items():
        low = merged.get(key)
        named = isinstance(low, dict) and isinstance(value, str) and "name" in low
        own = {"name": value} if named else value
        if isinstance(low, dict) and isinstance(own, dict):
            other = "name" in low and own.get("name", low["name"]) != low["name"]
            merged[key] = own if other else _under(own, low)
        else:
            merged[key] = value
    return merged


def _mapping(raw: Any, path: str) -> Raw:
    if raw is None:
        return {}
    if isinstance(raw, str):
        return {"name": raw}
    if not isinstance(raw, dict) or not all(isinstance(k, str) for k in raw):
        raise ConfigError(f"{path or 'the configuration'} must be a mapping of keys, got {raw!r}")
    return raw


def _parse(kind: type[Value], raw: Any, path: str) -> Value:
    """A frozen dataclass from a mapping, recursively."""
    raw = dict(_mapping(raw, path))
    hints = get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    if "component" in fields:
        own = {k: raw.pop(k) for k in list(raw) if k in fields}
        given["component"] = _parse_component(
            registry_of(hints["component"]), raw, path, _default(fields["component"])
        )
        raw = own
    for key, value in raw.items():
        where = f"{path}.{key}" if path else key
        if key not in fields or key == "component":
            raise ConfigError(
                f"{where}: unknown key{nearest(key, fields)}; known: {', '.join(sorted(fields))}"
            )
        given[key] = _parse_value(hints[key], value, where, fields[key])
    return kind(**given)


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


def registry_of(hint: Any) -> Registry:
    """The registry in ``Annotated[Component, registry]``."""
    return next(a for a in get_args(hint)[1:] if isinstance(a, Registry))


def _is_component(hint: Any) -> bool:
    return get_origin(hint) is Annotated and get_args(hint)[0] is Component


def _parse_value(hint: Any, value: Any, where: str, spec: dataclasses.Field[Any]) -> Any:
    if _is_component(hint):
        return _parse_component(registry_of(hint), _mapping(value, where), where, _default(spec))
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            if value is None and types.NoneType in options:
                return None
            return _parse(option, value, where)  # type: ignore[arg-type]
    return check_type(hint, value, where)


def check_type(hint: Any, value: Any, where: str) -> Any:
    """The value in the declared type, strictly.

    Raises:
        ConfigError: naming the key, what it must be, and what was found.
    """
    try:
        # JSON knows lists but no tuples, so strict mode takes a YAML list for a tuple.
        return _adapter(hint).validate_json(json.dumps(value))
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(e["msg"].lower() for e in error.errors()))
        wanted = wanted.replace("input should be ", "")
        raise ConfigError(f"{where} must be {wanted}, got {value!r}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {value!r} is not a plain value; quote it") from error


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True))


def _parse_component(registry: Registry, raw: Raw, path: str, default: Component) -> Component:
    raw = dict(raw)
    name = raw.pop("name", default.name)
    if not isinstance(name, str):
        raise ConfigError(f"{registry.key} must be a name, got {name!r}")
    entry = registry.get(name)
    if entry.presets:
        fallback = next(iter(entry.presets))
        preset = raw.get("preset", fallback)
        if not isinstance(preset, str) or preset not in entry.presets:
            raise ConfigError(
                f"{path}.preset: unknown preset {preset!r}{nearest(str(preset), entry.presets)}; "
                f"{name} has {', '.join(entry.presets)}"
            )
        raw = {**entry.presets[preset], **raw}
    return Component(name, _parse(entry.config_type, raw, path))


def parse_component(registry: Registry, raw: Raw, path: str) -> Component:
    """A component from ``{name: ..., <options>}``."""
    return _parse_component(registry, raw, path, Component(raw["name"]))


# -- writing ------------------------------------------------------------------------------------


def to_raw(value: Any, hint: Any = None) -> Any:
    """A configuration as plain mappings, lists and values, with every option written out."""
    if isinstance(value, Component):
        registry = registry_of(hint)
        return {"name": value.name, **to_raw(registry.options(value))}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value), include_extras=True)
        raw: Raw = {}
        for spec in dataclasses.fields(value):
            part = to_raw(getattr(value, spec.name), hints[spec.name])
            raw |= part if spec.name == "component" else {spec.name: part}
        return raw
    if isinstance(value, Mapping):
        return {k: to_raw(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_raw(v) for v in value]
    return value


def to_yaml(config: ExperimentConfig) -> str:
    """The resolved configuration; reading it back gives an equal one."""
    return yaml.safe_dump(to_raw(config), sort_keys=False, allow_unicode=True)


def flatten(raw: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as strings, for MLflow's parameters."""
    if isinstance(raw, dict):
        flat: dict[str, str] = {}
        for key, value in raw.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: str(raw)}
