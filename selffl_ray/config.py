"""Experiments as frozen dataclasses, read strictly from YAML and written back whole.

Unknown keys are refused with the nearest name, values of another type with the value found. A
component (``data``, ``model``, ``method``, an estimator, a partitioner) is a name and that entry's
own options: a mapping with ``name``, or the bare name. Types of single values are checked by
pydantic in strict mode; nothing is converted. A key given twice is refused, and ``1e-3`` is a
number (YAML 1.1 takes it for a string).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from selffl_ray.checkpoint import CheckpointConfig
from selffl_ray.datasets.base import Dataset
from selffl_ray.errors import ConfigError, shown
from selffl_ray.evaluation import EvaluationConfig
from selffl_ray.faults import FaultsConfig
from selffl_ray.models.build import ModelConfig
from selffl_ray.raw_config import Raw, read_raw
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
from selffl_ray.safe_yaml import dump
from selffl_ray.tracking import TrackingConfig, resolve_uri
from selffl_ray.training_config import TrainingConfig

Value = TypeVar("Value")

MOST_COUNT = 10**8
"""Largest whole number of an option: with more of anything a run would end in its preparation."""
UNBOUNDED = frozenset({"seed", "seeds", "search_seed", "gradient_steps", "bytes"})
"""Options that only seed or end a run, and may be larger."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The ``data`` part: a data set with its options, its partition and where its files are."""

    component: Annotated[Component, datasets] = Component("digits")
    partition: Annotated[Component, partitioners] = Component("natural")
    source: str | None = None
    """Folder of the files, for sets that are not generated or part of a library."""


USUAL_SPLITS = (0.6, 0.2, 0.2)
"""Shares of train, validation and test, unless the data set has others that suit it."""


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
    return parse_config(read_raw(path, sets), base)


def parse_config(raw: Raw, folder: Path) -> ExperimentConfig:
    """A resolved configuration from a raw mapping (which is not changed)."""
    raw = copy.deepcopy(_mapping(raw, ""))
    _load_plugins(raw.get("plugins") or [], folder)
    # Which data set it is decides the defaults of the rest, of its partition too.
    own = {f.name for f in dataclasses.fields(DataConfig)}
    options = {k: v for k, v in _mapping(raw.get("data"), "data").items() if k not in own}
    chosen = _parse_component(datasets, options, "data", DataConfig().component, own)
    dataset: Dataset = datasets.make(chosen)
    config = parse_part(ExperimentConfig, _under(raw, dataset.defaults), "")
    usual = dataset.defaults.get("evaluation", {}).get("splits", USUAL_SPLITS)
    splits = config.evaluation.splits or tuple(usual)
    training = _absolute(config.training, "start_from", folder)
    tracking = config.tracking
    if tracking.uri is not None:
        tracking = dataclasses.replace(tracking, uri=resolve_uri(tracking, folder))
    return dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, splits=splits),
        training=_absolute(training, "trouble.trace", folder),
        data=_absolute(config.data, "source", folder),
        tracking=tracking,
    )


def resolve(config: ExperimentConfig) -> ExperimentConfig:
    """A configuration that was built in Python, checked and resolved as if read from YAML."""
    return parse_config(to_raw(config), Path.cwd())


def _load_plugins(names: Any, folder: Path) -> None:
    if not isinstance(names, list) or not all(isinstance(p, str) for p in names):
        raise ConfigError(f"plugins must be a list of module names, got {shown(names)}")
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"plugins must be module names as in my_module, got {shown(name)}")
    load_plugins(names, str(folder))


def _absolute(part: Value, name: str, folder: Path) -> Value:
    name, _, below = name.partition(".")
    value = getattr(part, name)
    if value is None:
        return part
    path = _absolute(value, below, folder) if below else str(folder / Path(value).expanduser())
    return dataclasses.replace(part, **{name: path})  # type: ignore[type-var]


def _under(raw: Raw, defaults: Mapping[str, Any]) -> Raw:
    """User keys over defaults, level by level; another name drops that component's defaults."""
    merged = copy.deepcopy(dict(defaults))
    for key, value in raw.items():
        low = merged.get(key)
        if isinstance(low, str) and isinstance(value, dict):
            low = {"name": low}
        own = {"name": value} if isinstance(low, dict) and isinstance(value, str) else value
        if isinstance(low, dict) and own is None:
            continue  # a part that is left empty is not given
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
        where = path or "the configuration"
        raise ConfigError(f"{where} must be a mapping of keys, got {shown(raw)}")
    return raw


def parse_part(kind: type[Value], raw: Any, path: str, beside: Collection[str] = ()) -> Value:
    """A frozen dataclass from a mapping, recursively; ``beside`` are keys read elsewhere.

    Raises:
        ConfigError: an unknown key, with the nearest one, or a value of another type.
    """
    raw = dict(_mapping(raw, path))
    hints = get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    if "component" in fields:
        own = {k: raw.pop(k) for k in list(raw) if k in fields}
        given["component"] = _parse_component(
            registry_of(hints["component"]), raw, path, _default(fields["component"]), fields
        )
        raw = own
    for name, spec in fields.items():
        # Parts that are not given are written out too: a resolved configuration has no gaps.
        if name not in raw and name != "component" and _is_part(hints[name]):
            given[name] = _parse_value(hints[name], None, f"{path}.{name}".strip("."), spec)
    for key, value in raw.items():
        where = f"{path}.{key}" if path else key
        known = {*fields, *beside} - {"component"}
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key{nearest(key, known)}; known: {', '.join(sorted(known))}"
            )
        given[key] = _parse_value(hints[key], value, where, fields[key])
    return _make(kind, given, path, [n for n, f in fields.items() if n not in given and _needed(f)])


def _make(kind: type[Value], given: dict[str, Any], path: str, missing: list[str]) -> Value:
    if missing:
        raise ConfigError(f"{path}: {' and '.join(missing)} must be given")
    try:
        return kind(**given)
    except (ArithmeticError, MemoryError, ValueError) as error:
        # Checks compute with the values, and some are too large to.
        raise ConfigError(f"{path}: {error}; got {shown(given)}") from error


def _needed(spec: dataclasses.Field[Any]) -> bool:
    return spec.default is spec.default_factory is dataclasses.MISSING


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


def registry_of(hint: Any) -> Registry:
    """The registry in ``Annotated[Component, registry]``."""
    return next(a for a in get_args(hint)[1:] if isinstance(a, Registry))


def _is_component(hint: Any) -> bool:
    return get_origin(hint) is Annotated and get_args(hint)[0] is Component


def _is_part(hint: Any) -> bool:
    return _is_component(hint) or dataclasses.is_dataclass(hint)


def _parse_value(hint: Any, value: Any, where: str, spec: dataclasses.Field[Any]) -> Any:
    if _is_component(hint):
        return _parse_component(registry_of(hint), _mapping(value, where), where, _default(spec))
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            if value is None and types.NoneType in options:
                return None
            return parse_part(option, value, where)  # type: ignore[arg-type]
    return check_type(hint, value, where)


def check_type(hint: Any, value: Any, where: str) -> Any:
    """The value in the declared type, strictly.

    Raises:
        ConfigError: naming the key, what it must be, and what was found.
    """
    try:
        # JSON knows lists but no tuples, so strict mode takes a YAML list for a tuple.
        checked = _adapter(hint).validate_json(json.dumps(value))
    except ValidationError as error:
        found = ("longer" if e["type"] == "missing" else e["msg"] for e in error.errors())
        wanted = " or ".join(dict.fromkeys(found)).lower().replace("input should be ", "")
        raise ConfigError(f"{where} must be {wanted}, got {shown(value)}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {shown(value)} is not a plain value; quote it") from error
    largest = max(_whole_numbers(value), default=0)
    if largest > MOST_COUNT and where.rpartition(".")[2] not in UNBOUNDED:
        raise ConfigError(f"{where} must be at most {MOST_COUNT}, got {shown(value)}")
    return checked


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _whole_numbers(inner)


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True))


def _parse_component(
    registry: Registry, raw: Raw, path: str, default: Component, beside: Collection[str] = ()
) -> Component:
    raw = dict(raw)
    name = raw.pop("name", default.name)
    if not isinstance(name, str):
        raise ConfigError(f"{registry.key} must be a name, got {shown(name)}")
    entry = registry.get(name)
    if entry.presets:
        fallback = next(iter(entry.presets))
        preset = raw.get("preset", fallback)
        if not isinstance(preset, str) or preset not in entry.presets:
            raise ConfigError(
                f"{path}.preset: unknown preset {preset!r}{nearest(str(preset), entry.presets)}; "
                f"{name} has {', '.join(entry.presets)}"
            )
        raw = _under(raw, entry.presets[preset])
    return Component(name, parse_part(entry.config_type, raw, path, {"name", *beside}))


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
    return dump_yaml(to_raw(config))


def dump_yaml(raw: Raw) -> str:
    """Plain values as YAML that reads back equal."""
    return dump(raw)


def flatten(raw: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as strings, for MLflow's parameters."""
    if isinstance(raw, dict):
        flat: dict[str, str] = {}
        for key, value in raw.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: str(raw)}
