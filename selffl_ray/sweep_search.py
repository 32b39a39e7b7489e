"""Configurations that a searcher suggests: asked for in order, told in order, batch by batch.

A batch is asked for once every earlier suggestion has been told its value, so what is suggested
does not depend on which trial ends first. What was told is kept in a file; whoever resumes the
sweep asks and tells the same again, from the same seed, and so comes to the same next batch. That
the suggestions are the same as then is checked, not assumed. A trial that failed is tried again
only as long as its batch has not been told.

Optuna is an optional extra and is imported in this module only.
"""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from selffl_ray.errors import ConfigError
from selffl_ray.search_space import Dimension, Raw, Settings, expand, read_space
from selffl_ray.seeding import generator
from selffl_ray.sweep import Configuration, SweepConfig, checked, labelled, short_keys
from selffl_ray.sweep_results import values_by_seed
from selffl_ray.tables import write_json

if TYPE_CHECKING:
    import pandas as pd

MOST_CORNERS = 4096
"""Combinations that are checked before a search starts, some milliseconds each."""


def check_search(sweep: SweepConfig, folder: Path) -> None:
    """Check a search before anything starts: its options, and every corner of its space.

    A corner has a value of each ``grid`` and ``choice`` and an end of each range. The checks of an
    experiment bound single options or order two of them, so what passes at every corner passes
    between them.

    Args:
        folder: where plugins may lie and relative paths start.

    Raises:
        ConfigError: optuna is missing, an option has no place in a search, or a corner is refused.
    """
    _check_options(sweep)
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "searcher: optuna is not installed here; pip install -e '.[optuna]', or use "
            "searcher: variants"
        )
    (dimensions,) = read_space(sweep.space)
    always = {d.key for d in dimensions if not d.when}
    for key in sweep.confirm.per if sweep.confirm is not None else ():
        if key not in always:
            raise ConfigError(
                f"confirm.per: {key} is not set by every suggestion; name a key of the space "
                "without when, or leave per out"
            )
    if sweep.reference is not None:
        _check_reference(dimensions, sweep.reference)
    corners = _corners(dimensions)
    for corner in corners:
        checked(sweep, corner, folder)
    finite = all(d.listed for d in dimensions)
    suggestions = sweep.searcher.trials
    assert suggestions is not None, "SearcherConfig asks for it"
    if finite and len(corners) <= suggestions:
        raise ConfigError(
            f"searcher.trials: {suggestions} suggestions from a space of {len(corners)} points; "
            "searcher: variants runs each of them once"
        )


def _check_options(sweep: SweepConfig) -> None:
    budget = sweep.budget
    refused = {
        "scheduler": (
            sweep.scheduler.name != "none",
            "would tell it values of different rounds; use scheduler: none",
        ),
        "budget.samples": (budget.samples != 1, "draws by itself; leave it out"),
        "budget.trials": (budget.trials is not None, "runs searcher.trials of them; leave it out"),
        "within": (bool(sweep.within), "seeks one best; make a sweep of each scene"),
        "open_test": (
            sweep.open_test,
            "selects, and test data must not be seen by it; use confirm",
        ),
        "space": (
            isinstance(sweep.space, list) and len(sweep.space) != 1,
            "needs one mapping, not a union; use choice and when",
        ),
    }
    for name, (given, why) in refused.items():
        if given:
            raise ConfigError(f"{name}: searcher optuna {why}")


def _corners(dimensions: Sequence[Dimension]) -> list[Raw]:
    named = [(key, value) for d in dimensions for key, vs in d.when.items() for value in vs]
    grids = []
    for one in dimensions:
        inside = [v for key, v in named if key == one.key and one.holds(v)]
        values = one.values if one.listed else tuple(dict.fromkeys((*one.ends(), *inside)))
        grids.append(Dimension(one.key, "grid", values, one.when))
    count = math.prod(len(d.values) for d in grids)
    if count > MOST_CORNERS:
        raise ConfigError(
            f"space: {count} combinations of values and ends of ranges are too many to be checked "
            f"before the search starts, at most {MOST_CORNERS}; take fewer entries"
        )
    return expand([grids], 1, 0)


def _check_reference(dimensions: Sequence[Dimension], reference: Settings) -> None:
    """The reference is the first suggestion, so it must be one that the space can give."""
    active = [d for d in dimensions if d.active(reference)]
    if {d.key for d in active} != set(reference):
        raise ConfigError(
            f"reference: searcher optuna suggests it first, so it must set exactly "
            f"{', '.join(d.key for d in active)}; got {', '.join(reference) or 'nothing'}"
        )
    for one in active:
        if not one.holds(reference[one.key]):
            raise ConfigError(
                f"reference: {one.key}: {reference[one.key]!r} is not in the space's {one.kind} "
                f"{list(one.values)}"
            )


class Suggestion(NamedTuple):
    """What was suggested; trial: Optuna's own object, which is told the value."""

    trial: Any
    settings: Settings
    configuration: Configuration


class Search:
    """The suggestions of a sweep so far; ``check_search`` has passed.

    Args:
        folder: where plugins may lie and relative paths start.
        log: file of what was told; what it holds is told again. None: nothing is kept.

    Raises:
        ConfigError: the log does not fit what is suggested now.
    """

    def __init__(self, sweep: SweepConfig, folder: Path, log: Path | None = None) -> None:
        self._sweep, self._folder, self._log = sweep, folder, log
        (self._dimensions,) = read_space(sweep.space)
        self._short = short_keys([d.key for d in self._dimensions])
        self._study = _new_study(sweep)
        if sweep.reference is not None:
            self._study.enqueue_trial(
                {
                    d.key: _parameter(d, sweep.reference)
                    for d in self._dimensions
                    if d.key in sweep.reference
                }
            )
        self._known: dict[str, Configuration] = {}
        self._values: dict[int, float | None] = {}
        self._told: list[dict[str, Any]] = []
        self._asked: list[Suggestion] = []
        if log is not None and log.exists():
            self._replay(log, json.loads(log.read_text()))

    @property
    def configurations(self) -> list[Configuration]:
        """The distinct ones among all suggestions, numbered as they came."""
        return list(self._known.values())

    @property
    def left(self) -> int:
        """Suggestions that have not been told a value."""
        return (self._sweep.searcher.trials or 0) - len(self._told)

    @property
    def later(self) -> int:
        """Suggestions that have not been asked for."""
        return self.left - len(self._asked)

    def ask(self) -> list[Configuration]:
        """The next batch: its configurations that have not run, perhaps none."""
        assert not self._asked, "the last batch has not been told"
        for _ in range(min(self._sweep.searcher.batch, self.left)):
            trial = self._study.ask()
            settings: Raw = {}
            for dimension in self._dimensions:
                if dimension.active(settings):
                    settings[dimension.key] = _suggest(trial, dimension)
            self._asked.append(Suggestion(trial, settings, self._configuration(settings)))
        distinct = {s.configuration.number: s.configuration for s in self._asked}
        return [one for number, one in distinct.items() if number not in self._values]

    def _configuration(self, settings: Settings) -> Configuration:
        same = checked(self._sweep, settings, self._folder)
        if same not in self._known:
            self._known[same] = labelled(self._sweep, len(self._known), settings, self._short)
        return self._known[same]

    def tell(self, values: Mapping[int, float | None]) -> None:
        """Values of the configurations that ``ask`` gave, by number.

        None: a trial of it failed or diverged, and there is nothing to learn from.
        """
        self._values |= values
        for trial, settings, configuration in self._asked:
            value = self._values[configuration.number]
            if value is None:
                self._study.tell(trial, state=_failed_state())
            else:
                self._study.tell(trial, value)
            self._told.append(
                {"configuration": configuration.number, "settings": settings, "value": value}
            )
        self._asked = []
        if self._log is not None:
            write_json(self._log, {"optuna": metadata.version("optuna"), "told": self._told})

    def _replay(self, log: Path, past: Mapping[str, Any]) -> None:
        told = past["told"]
        while len(self._told) < len(told):
            self.ask()
            batch = told[len(self._told) : len(self._told) + len(self._asked)]
            for then, now in zip(batch, self._asked, strict=True):
                if then["settings"] != json.loads(json.dumps(now.settings)):
                    raise ConfigError(
                        f"{log}: optuna {metadata.version('optuna')} suggests {now.settings} where "
                        f"optuna {past['optuna']} suggested {then['settings']}; resume with that "
                        "version, or start another sweep"
                    )
            self.tell({one["configuration"]: one["value"] for one in batch})


def values_to_tell(rows: pd.DataFrame, metric: str) -> dict[int, float | None]:
    """By configuration, the mean of the metric over all seeds; None if one of them has none.

    Args:
        rows: of the trials of a batch (``sweep_results.trial_rows``), all of them ended.
    """
    if metric not in rows:
        return dict.fromkeys(rows["configuration"].tolist())
    table = values_by_seed(rows, metric)
    means = {int(n): float(table[n].mean(skipna=False)) for n in table.columns.tolist()}
    return {n: None if math.isnan(mean) else mean for n, mean in means.items()}


def _new_study(sweep: SweepConfig) -> Any:
    import optuna

    # It announces every study, and names entries under conditions, which it samples one by one.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int(generator(sweep.search_seed, "search").integers(2**32))
    with warnings.catch_warnings():
        # Both options are experimental before Optuna 5 and its defaults since.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=sweep.searcher.startup,
            multivariate=True,
            constant_liar=True,  # keeps the suggestions of a batch apart
        )
    return optuna.create_study(
        direction="maximize" if sweep.mode == "max" else "minimize", sampler=sampler
    )


def _failed_state() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


def _parameter(dimension: Dimension, settings: Settings) -> Any:
    """A setting as Optuna knows it (``_suggest``)."""
    value = settings[dimension.key]
    return dimension.values.index(value) if dimension.listed else value


def _suggest(trial: Any, dimension: Dimension) -> Any:
    key = dimension.key
    if dimension.listed:
        # By index: Optuna's categories are numbers and strings, ours may be mappings.
        return dimension.values[trial.suggest_categorical(key, range(len(dimension.values)))]
    low, high = dimension.values
    if dimension.kind == "randint":
        return int(trial.suggest_int(key, low, high - 1))
    log = dimension.kind == "loguniform"
    return float(trial.suggest_float(key, float(low), float(high), log=log))
