"""Sweep files: what is varied, over which seeds and on what budget; and the trials that follow.

A sweep file is a mapping (``SweepConfig``). ``space`` is described in
``search_space``.

Everything is checked before anything starts: each configuration is parsed, an option that has no
effect beside the others is refused, the metric must be one that will be measured, on validation
data. Seeds are an axis of their own, so that configurations are compared on the same partitions,
starts, cohorts and batches.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selffl_ray.config import ExperimentConfig, parse_config, parse_part, to_raw
from selffl_ray.errors import ConfigError
from selffl_ray.evaluation import metric_names
from selffl_ray.raw_config import apply_value, read_raw
from selffl_ray.registry import algorithms, datasets, nearest
from selffl_ray.runtime.placement import DRIVER_CPUS
from selffl_ray.search_space import Settings, expand, read_space
from selffl_ray.sweep_scheduler import SchedulerConfig

Schedule = tuple[Mapping[str, Any], ...]
"""What was set from which round on, where options change during a run: mappings with ``round``,
``from`` (the trial whose state was taken over, null at the start) and ``options``."""

LONGEST_NAME = 70
"""Characters of a configuration's label that a folder's name keeps."""

# -- the file -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SearcherConfig:
    """Where configurations come from: all of the space, or suggested one after the other.

    ``optuna``: Optuna's tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for
    hyper-parameter optimization"), told the mean of ``metric`` over ``seeds``. Lists, ``grid`` and
    ``choice`` are categories to it, the other kinds keep their distributions. What would break or
    ignore the search is refused (``sweep_search.check_search``).
    """

    name: Literal["variants", "optuna"] = "variants"
    trials: int | None = None
    """optuna: suggestions; each runs with every seed, one that comes again runs once."""
    startup: int = 10
    """optuna: suggestions drawn at random, before the first that learns from the others."""
    batch: int = 4
    """optuna: suggestions asked for before any of them is known. Their trials run side by side as
    the CPUs allow; a number of its own, so that the search does not depend on the machine."""

    def __post_init__(self) -> None:
        if self.name == "variants":
            if (self.trials, self.startup, self.batch) != (None, 10, 4):
                raise ConfigError(
                    "searcher: trials, startup and batch act with name: optuna only; budget.trials "
                    "bounds the variants"
                )
            return
        if self.trials is None:
            raise ConfigError("searcher.trials must be given with name: optuna, as in trials: 40")
        for name in ("startup", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"searcher.{name} must be >= 1, got {getattr(self, name)}")
        if self.trials <= self.startup:
            raise ConfigError(
                f"searcher.trials must be above searcher.startup ({self.startup}), or every "
                f"suggestion is random; got {self.trials}"
            )


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What a sweep may cost."""

    samples: int = 1
    """Draws of the random entries for each point of the grid."""
    trials: int | None = None
    """Most configurations; a larger space is refused, never cut."""
    seconds: float | None = None
    """End the sweep after so much time; --resume goes on."""
    gradient_steps: int | None = None
    """Each trial ends after the round in which it has computed so many gradients."""
    bytes: int | None = None
    """Each trial ends after the round in which its method has sent so many bytes, both ways."""
    virtual_s: float | None = None
    """Each trial ends after the round in which so much simulated time has passed."""

    def __post_init__(self) -> None:
        for name in ("samples", "trials", "gradient_steps", "bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"budget.{name} must be >= 1, got {value}")
        for name in ("seconds", "virtual_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"budget.{name} must be > 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class ConfirmConfig:
    """The second stage: the best configurations again, on fresh seeds, with test data opened."""

    seeds: tuple[int, ...]
    top: int = 3
    """So many configurations."""
    per: tuple[str, ...] = ()
    """Keys of the space, as method: the best of each of their values are confirmed, and the
    reference's group is compared with the others by its own best."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"confirm.top must be >= 1, got {self.top}")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep file."""

    experiment: str
    """Name of the MLflow experiment and of the folder under runs/."""
    base: dict[str, Any] = field(default_factory=dict)
    """The experiment that is varied, as in an experiment's file, without ``seed``."""
    space: list[dict[str, Any]] | dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    """Every configuration runs with each of them."""
    metric: str = "val/local_accuracy"
    """Ranks the configurations; of validation data."""
    mode: Literal["max", "min"] = "max"
    searcher: SearcherConfig = field(default_factory=SearcherConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    confirm: ConfirmConfig | None = None
    open_test: bool = False
    """Score test data in the first stage too: for studies that report every configuration and
    select none. Not together with ``confirm``."""
    reference: dict[str, Any] | None = None
    """Settings of the configuration that the others are compared with; the first by default. A
    searcher is told to suggest it first."""
    within: tuple[str, ...] = ()
    """Keys of the space that set the scene (data, participation): configurations are ranked and
    compared within each of their values only."""
    actors_per_trial: int = 1
    """Client actors of a trial, unless base.placement says how clients are placed."""
    cpus_per_trial: float = 1.0
    """CPUs that a trial reserves for its driver and its client actors."""
    concurrent: int | None = None
    """Most trials at once; as many as the CPUs allow by default."""
    search_seed: int = 0
    """Random entries of the space are drawn from it, and it seeds the searcher."""

    def __post_init__(self) -> None:
        for name, seeds in (("seeds", self.seeds), ("confirm.seeds", self._fresh)):
            if len(set(seeds)) != len(seeds):
                raise ConfigError(f"{name} {list(seeds)} names a seed twice; pairs need each once")
        if not self.seeds or (self.confirm is not None and not self._fresh):
            raise ConfigError("seeds and confirm.seeds need at least one seed")
        both = sorted(set(self.seeds) & set(self._fresh))
        if both:
            raise ConfigError(
                f"confirm.seeds must be fresh ones, but {both} are among seeds: the selection has "
                "seen them"
            )
        if self.scheduler.name == "asha":
            self._check_scheduler()
        if self.open_test and self.confirm is not None:
            raise ConfigError(
                "open_test: true shows test data before confirm selects; drop one of them"
            )
        for name in ("actors_per_trial", "concurrent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if not self.cpus_per_trial > DRIVER_CPUS:
            raise ConfigError(
                f"cpus_per_trial must be above {DRIVER_CPUS} (the driver's share), got "
                f"{self.cpus_per_trial}"
            )

    def _check_scheduler(self) -> None:
        """What would have the scheduler compare what cannot be compared, or lose trials."""
        name = self.scheduler.name
        if len(self.seeds) > 1 or self.within:
            raise ConfigError(
                f"scheduler: {name} ends trials by comparing them with all others, so of several "
                f"seeds {list(self.seeds)} or scenes {list(self.within)} the easiest would "
                "survive; give one seed and no within, and fresh seeds to confirm"
            )
        if self.budget.seconds is not None:
            raise ConfigError(
                f"budget.seconds: {self.budget.seconds:g} would end trials of scheduler: {name} "
                "for good; drop one of them"
            )

    @property
    def _fresh(self) -> tuple[int, ...]:
        return () if self.confirm is None else self.confirm.seeds


def load_sweep(path: Path, sets: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file and apply ``dotted.key=value`` settings to it.

    Raises:
        ConfigError: in one line, naming the key, the value and the remedy.
    """
    return parse_part(SweepConfig, read_raw(path, sets), "")


# -- configurations and trials ------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """One point of the space: its number, settings, and a short label for tables and folders.

    scene: label of its settings of ``within`` alone; "" without.
    """

    number: int
    settings: Settings
    label: str
    scene: str = ""


@dataclass(frozen=True)
class Trial:
    """A configuration with a seed: a name that is also its folder's, and the whole experiment."""

    name: str
    configuration: Configuration
    config: ExperimentConfig
    schedule: Schedule = ()
    """Of a member of a population (``sweep_population``)."""

    @property
    def seed(self) -> int:
        """The experiment's."""
        return self.config.seed


def configurations(sweep: SweepConfig, folder: Path) -> list[Configuration]:
    """The distinct configurations of a sweep, checked; repetitions are run once.

    Args:
        folder: where plugins may lie and relative paths start.

    Raises:
        ConfigError: naming the setting and why it cannot be.
    """
    found: dict[str, Settings] = {}
    for settings in expand(read_space(sweep.space), sweep.budget.samples, sweep.search_seed):
        found.setdefault(checked(sweep, settings, folder), settings)
    most = sweep.budget.trials
    if most is not None and len(found) > most:
        raise ConfigError(
            f"budget.trials: the space has {len(found)} configurations, more than {most}; prune "
            "the space, or raise the budget"
        )
    short = short_keys([key for settings in found.values() for key in settings])
    per = sweep.confirm.per if sweep.confirm is not None else ()
    for name, keys in (("within", sweep.within), ("confirm.per", per)):
        for key in keys:
            if not all(key in settings for settings in found.values()):
                raise ConfigError(
                    f"{name}: {key} is not set by every configuration of the space, so they "
                    "cannot be told apart by it"
                )
    return [labelled(sweep, n, settings, short) for n, settings in enumerate(found.values())]


def labelled(
    sweep: SweepConfig, number: int, settings: Settings, short: Mapping[str, str]
) -> Configuration:
    """A configuration with its label and scene; ``short`` comes from ``short_keys``."""
    scene = _label({k: settings[k] for k in sweep.within}, short) if sweep.within else ""
    return Configuration(number, settings, _label(settings, short), scene)


def checked(sweep: SweepConfig, settings: Settings, folder: Path) -> str:
    """The experiment that settings give, checked and in a form that is equal for equal ones.

    Raises:
        ConfigError: naming the setting and why it cannot be.
    """
    config = configure(sweep, settings, sweep.seeds[0], folder, open_test=sweep.open_test)
    _check_idle(config, settings)
    _check_metric(sweep, config)
    return json.dumps(to_raw(config), sort_keys=True)


def configure(
    sweep: SweepConfig, settings: Settings, seed: int, folder: Path, *, open_test: bool
) -> ExperimentConfig:
    """The experiment of a configuration with a seed."""
    raw = copy.deepcopy(sweep.base)
    if "seed" in raw:
        raise ConfigError("base.seed: seeds pair the configurations; list them in seeds")
    # What selects a component comes before the component's options.
    for key in sorted(settings, key=lambda k: k.count(".")):
        apply_value(raw, key, copy.deepcopy(settings[key]))
    raw |= {"experiment": sweep.experiment, "seed": seed}
    apply_value(raw, "evaluation.score_test", open_test)
    for cost in ("gradient_steps", "bytes", "virtual_s"):
        most = getattr(sweep.budget, cost)
        if most is not None:
            apply_value(raw, f"training.stop.{cost}", most)
    return parse_config(raw, folder)


def trials(
    sweep: SweepConfig,
    chosen: Sequence[Configuration],
    seeds: Sequence[int],
    folder: Path,
    *,
    open_test: bool,
) -> list[Trial]:
    """Every configuration with every seed; configurations of one seed stand together."""
    return [
        Trial(
            trial_name(one, seed),
            one,
            configure(sweep, one.settings, seed, folder, open_test=open_test),
        )
        for seed in seeds
        for one in chosen
    ]


def trial_name(one: Configuration, seed: int) -> str:
    """Number, label and seed, as the name of a folder."""
    return f"{one.number:03d}-{_slug(one.label)}-s{seed}"


def references_of(sweep: SweepConfig, chosen: Sequence[Configuration]) -> dict[str, Configuration]:
    """By scene, the configuration that the others are compared with.

    Raises:
        ConfigError: no configuration has the settings that ``reference`` names.
    """
    found: dict[str, Configuration] = {}
    for one in chosen:
        own = {k: v for k, v in one.settings.items() if k not in sweep.within}
        if sweep.reference is None or own == sweep.reference:
            found.setdefault(one.scene, one)
    missing = {one.scene for one in chosen} - set(found)
    if missing:
        where = "".join(f" with {scene}" for scene in sorted(missing) if scene)
        raise ConfigError(
            f"reference: no configuration of the space has exactly the settings "
            f"{sweep.reference}{where}"
        )
    return found


def _check_idle(config: ExperimentConfig, settings: Settings) -> None:
    entry = algorithms.get(config.method.name)
    idle = entry.idle(algorithms.options(config.method), config.training)
    for key in settings:
        part, _, rest = key.partition(".")
        option = rest.partition(".")[0]
        if part == "method" and option in idle:
            raise ConfigError(
                f"space: {key} has no effect here ({idle[option]}); set it only when it acts, with "
                "when"
            )


def _check_metric(sweep: SweepConfig, config: ExperimentConfig) -> None:
    split, _, name = sweep.metric.partition("/")
    if split != "val":
        raise ConfigError(
            f"metric must be of validation data (val/...), got {sweep.metric!r}: selecting on test "
            "data would spoil them"
        )
    task = datasets.make(config.data.component).task
    known = metric_names(task.score_name)
    if name not in known:
        raise ConfigError(
            f"metric: {sweep.metric} is not measured on {config.data.component.name}"
            f"{nearest(name, known)}; there are {', '.join(f'val/{k}' for k in known)}"
        )
    higher = "accuracy" in name and not name.endswith("_std")
    if higher != (sweep.mode == "max"):
        raise ConfigError(
            f"mode: {sweep.mode} seeks the worst {sweep.metric}; use {'max' if higher else 'min'}"
        )


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Last parts of dotted keys, as many as tell them apart."""
    short: dict[str, str] = {}
    for key in dict.fromkeys(keys):
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            short[key] = ".".join(parts[-count:])
            others = [k for k in set(keys) if k != key]
            if not any(f".{k}".endswith(f".{short[key]}") for k in others):
                break
    return short


def schedule_text(schedule: Schedule) -> str:
    """``0: learning_rate=0.3; 10: learning_rate=0.36``: what was set from which round on."""
    short = short_keys([key for entry in schedule for key in entry["options"]])
    return "; ".join(f"{entry['round']}: {_label(entry['options'], short)}" for entry in schedule)


def _label(settings: Settings, short: Mapping[str, str]) -> str:
    return " ".join(f"{short[k]}={_shown(v)}" for k, v in settings.items()) or "base"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and "name" in value:
        rest = {k: v for k, v in value.items() if k not in ("name", "preset")}
        name = ":".join(str(value[k]) for k in ("name", "preset") if k in value)
        inner = ",".join(f"{k}={_shown(v)}" for k, v in rest.items())
        return f"{name}({inner})" if inner else name
    if isinstance(value, dict):
        return "(" + ",".join(f"{k}={_shown(v)}" for k, v in value.items()) + ")"
    return str(value).replace(" ", "")


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", label)[:LONGEST_NAME].strip("-")
