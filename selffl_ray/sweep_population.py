"""Population-based training: trials are compared on the way, the best go on in place of the worst.

Source: Jaderberg et al. 2017, "Population based training of neural networks", in its synchronous
form. The configurations of the space are the population. After every ``every`` rounds all members
are held and ranked by the metric. Those at the end of the ranking are ended; in place of each a new
trial begins as a copy of one of the best, in its exact state (server, every client's state,
counters), with the options of ``mutate`` changed. A member that failed counts as the worst.

A copy is a trial of its own, with the rows and the MLflow series of the trial that it was copied
from up to that round: no series mixes two histories. What a trial's options were, from which round
on, is its schedule.

Each decision (``sweep_mutation``) is kept in ``population.json``, so a sweep that was killed goes
on exactly.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from selffl_ray.checkpoint import copy_checkpoint, latest_checkpoint, rounds_done
from selffl_ray.errors import ConfigError, RunError
from selffl_ray.experiment import Prepared, prepare_experiment
from selffl_ray.registry import algorithms, nearest
from selffl_ray.run_loop import run_digest
from selffl_ray.search_space import Dimension, Raw, Settings, expand
from selffl_ray.sweep import (
    Configuration,
    SweepConfig,
    Trial,
    checked,
    configure,
    labelled,
    short_keys,
    trial_name,
)
from selffl_ray.sweep_mutation import Copy, decide, legs, mutations
from selffl_ray.sweep_results import ENDED, FAILURE
from selffl_ray.sweep_search import MOST_CORNERS
from selffl_ray.tables import TABLES, write_json
from selffl_ray.training_config import CHANGEABLE

LOG = "population.json"
FEWEST = 2


# -- what is refused ----------------------------------------------------------------------------


def check_population(
    sweep: SweepConfig,
    chosen: Sequence[Configuration],
    prepared: Sequence[Prepared],
    folder: Path,
) -> None:
    """Check a sweep with scheduler pbt before anything starts.

    Args:
        chosen: the first members; prepared: their experiments.
        folder: where plugins may lie and relative paths start.

    Raises:
        ConfigError: an option that has no place beside it, a key that must not change during a run
            or starts outside its range, rounds that cannot be compared, or a change that no
            member's experiment allows.
    """
    _check_options(sweep)
    if len(chosen) < FEWEST:
        raise ConfigError(
            f"scheduler: pbt needs a population, and the space has {len(chosen)} configuration; "
            "vary something, or draw more with budget.samples"
        )
    dimensions = mutations(sweep.scheduler)
    for member, one in zip(chosen, prepared, strict=True):
        for dimension in dimensions:
            _check_key(dimension, member, one)
    _check_rounds(sweep, prepared)
    if len({(p.store.manifest.digest, p.partition.digest) for p in prepared}) > 1:
        raise ConfigError(
            "space: scheduler pbt compares its trials, and they differ in data or partition; make "
            "a sweep of each"
        )
    count = len(chosen) * math.prod(len(d.ends()) for d in dimensions)
    if count > MOST_CORNERS:
        raise ConfigError(
            f"scheduler.mutate: {count} combinations of members, values and ends of ranges are too "
            f"many to be checked before the sweep starts, at most {MOST_CORNERS}; mutate less"
        )
    corners = expand([[replace(d, kind="grid", values=d.ends()) for d in dimensions]], 1, 0)
    for member in chosen:
        for corner in corners:
            checked(sweep, {**member.settings, **corner}, folder)


def _check_options(sweep: SweepConfig) -> None:
    budget = sweep.budget
    refused = {
        "seeds": (len(sweep.seeds) > 1, "ends trials by comparing them with all others; give one"),
        "within": (bool(sweep.within), "compares all trials; make a sweep of each scene"),
        "confirm": (
            sweep.confirm is not None,
            "ends with schedules, and a schedule is no configuration that could be run again; try "
            "its values in a sweep with scheduler: none, and confirm there",
        ),
        "open_test": (sweep.open_test, "selects, and test data must not be seen by it"),
        "budget.seconds": (
            budget.seconds is not None,
            "compares its trials after the same rounds; bound them with training.num_rounds",
        ),
        "budget.gradient_steps": (
            budget.gradient_steps is not None,
            "compares its trials after the same rounds; bound them with training.num_rounds",
        ),
        "budget.bytes": (
            budget.bytes is not None,
            "compares its trials after the same rounds; bound them with training.num_rounds",
        ),
        "budget.virtual_s": (
            budget.virtual_s is not None,
            "compares its trials after the same rounds; bound them with training.num_rounds",
        ),
    }
    for name, (given, why) in refused.items():
        if given:
            raise ConfigError(f"{name}: scheduler pbt {why}")


def _check_key(dimension: Dimension, member: Configuration, prepared: Prepared) -> None:
    """Whether a key may change during the runs of a member, and starts in its range."""
    key, config = dimension.key, prepared.config
    part, _, option = key.partition(".")
    entry = algorithms.get(config.method.name)
    known = {"training": set(CHANGEABLE), "method": set(entry.changeable)}
    if option not in known.get(part, set()):
        able = [f"{p}.{name}" for p, names in known.items() for name in sorted(names)]
        raise ConfigError(
            f"scheduler.mutate: {key}{nearest(key, able)} cannot change during a run of "
            f"{config.method.name}: state, data or plan depend on it, or the method does not say "
            f"that it may; vary it in space, and mutate some of {', '.join(able)}"
        )
    if key not in member.settings:
        raise ConfigError(
            f"scheduler.mutate: {key} is not set by {member.label}; the space says where each "
            f"member starts, as in {key}: {list(dimension.ends())}"
        )
    if not dimension.holds(member.settings[key]):
        raise ConfigError(
            f"scheduler.mutate: {key} starts at {member.settings[key]!r} in {member.label}, which "
            f"is not in its {dimension.kind} {list(dimension.values)}; widen one or the other"
        )


def _check_rounds(sweep: SweepConfig, prepared: Sequence[Prepared]) -> None:
    """Members are compared after the same rounds, all of them evaluated, and none ends before."""
    counts = sorted({p.config.training.num_rounds for p in prepared})
    if len(counts) > 1:
        raise ConfigError(
            f"training.num_rounds: scheduler pbt compares trials of one length, got {counts}"
        )
    ends = [end for end in legs(sweep.scheduler, counts[0]) if end is not None]
    if not ends:
        raise ConfigError(
            f"scheduler.every: {sweep.scheduler.every} rounds leave nothing to compare in the "
            f"{counts[0]} of a trial; take fewer"
        )
    for one in prepared:
        if missing := [end for end in ends if end - 1 not in one.evaluation.rounds]:
            raise ConfigError(
                f"scheduler.every: trials are compared after {missing[0]} rounds, and none is "
                f"evaluated there; make it a multiple of evaluation.every, "
                f"{one.config.evaluation.every}"
            )
        stop = one.config.training.stop
        given = [n for n in vars(stop) if n != "metric" and getattr(stop, n) is not None]
        if given:
            raise ConfigError(
                f"training.stop.{given[0]}: scheduler pbt compares its trials after the same "
                "rounds; leave it out"
            )


# -- the population on disk ---------------------------------------------------------------------


class Population:
    """The members of a sweep so far; ``check_population`` has passed.

    Args:
        first: the members at the start, by place.
        folder: the sweep's; what was decided there before is decided again, and checked.
        here: where plugins may lie and relative paths start.

    Raises:
        ConfigError: the log does not fit what is decided now.
    """

    def __init__(
        self, sweep: SweepConfig, first: Sequence[Trial], folder: Path, here: Path
    ) -> None:
        self._sweep, self._here = sweep, here
        self._root, self._log = folder / "trials", folder / LOG
        self.members = [
            replace(t, schedule=(_entry(0, None, t.configuration.settings),)) for t in first
        ]
        self.trials = list(self.members)
        """Every trial so far, in the order of their numbers."""
        self._short = short_keys([key for t in first for key in t.configuration.settings])
        self._past: list[dict[str, Any]] = []
        self.ends = legs(sweep.scheduler, first[0].config.training.num_rounds)
        """Rounds until the next comparisons; None is the end."""
        if self._log.exists():
            for then in json.loads(self._log.read_text())["compared"]:
                self._take(then["round"], then["values"], then["copies"])

    def held(self) -> bool:
        """Whether every member is held after the next of ``ends``, or has failed."""
        folders = [self._root / t.name for t in self.members]
        return all(
            (f / FAILURE).exists() or rounds_done(f / "checkpoints") == self.ends[0]
            for f in folders
        )

    def compare(self) -> None:
        """Compare the members, all held after the next of ``ends``, and replace the worst."""
        done = self.ends[0]
        assert done is not None, "nothing is compared at the end"
        values = {t.name: self._value(t, done) for t in self.members}
        self._take(done, values)

    def _value(self, member: Trial, done: int) -> float | None:
        folder = self._root / member.name
        if (folder / FAILURE).exists():
            return None
        # Imported here: it takes a third of a second, and a run needs none of it.
        import pandas as pd

        rows = pd.read_parquet(folder / "rounds.parquet")
        value = float(rows.loc[rows["round_index"] == done - 1, self._sweep.metric].iloc[0])
        return value if math.isfinite(value) else None

    def _take(
        self, done: int, values: Mapping[str, float | None], then: list[Raw] | None = None
    ) -> None:
        """Decide, note the decision (``then``: as it was noted before), and carry it out."""
        copies = decide(
            [t.configuration.settings for t in self.members],
            [values[t.name] for t in self.members],
            self._sweep,
            done,
        )
        new = [self._copy_of(copy, done, at) for at, copy in enumerate(copies)]
        told = [
            {
                "trial": trial.name,
                "copy_of": self.members[copy.source].name,
                "instead_of": self.members[copy.place].name,
                "settings": copy.settings,
            }
            for trial, copy in zip(new, copies, strict=True)
        ]
        if then is not None and then != json.loads(json.dumps(told)):
            raise ConfigError(
                f"{self._log}: other copies follow from it now; resume with the versions of "
                "selffl_ray and numpy that wrote it, or start another sweep"
            )
        self._past.append({"round": done, "values": dict(values), "copies": told})
        if then is None:
            # First the decision: copies that are missing are made when the sweep goes on.
            write_json(self._log, {"compared": self._past})
        self._carry_out(new, copies, done)
        self.ends = self.ends[1:]

    def _copy_of(self, copy: Copy, done: int, at: int) -> Trial:
        source = self.members[copy.source]
        one = labelled(self._sweep, len(self.trials) + at, copy.settings, self._short)
        label = f"{one.label} from {source.configuration.number:03d} after {done}"
        one = replace(one, label=label)
        config = configure(self._sweep, copy.settings, source.seed, self._here, open_test=False)
        keys = self._sweep.scheduler.mutate
        entry = _entry(done, source.name, {key: copy.settings[key] for key in keys})
        return Trial(trial_name(one, source.seed), one, config, (*source.schedule, entry))

    def _carry_out(self, new: Sequence[Trial], copies: Sequence[Copy], done: int) -> None:
        before = list(self.members)
        for trial, copy in zip(new, copies, strict=True):
            target, ended = self._root / trial.name, self._root / before[copy.place].name
            if not (target / "checkpoints").exists():
                _copy_run(self._root / before[copy.source].name, target, trial, done)
            write_json(ended / ENDED, {"round": done, "replaced_by": trial.name})
            self.members[copy.place] = trial
        self.trials += new


def _entry(done: int, source: str | None, options: Settings) -> Raw:
    return {"round": done, "from": source, "options": dict(options)}


def _copy_run(source: Path, target: Path, trial: Trial, done: int) -> None:
    """Rows and state after so many rounds, as the beginning of another run.

    Raises:
        RunError: the source is not held there.
    """
    newest = latest_checkpoint(source / "checkpoints")
    if newest is None or rounds_done(source / "checkpoints") != done:
        raise RunError(
            f"{source} is not held after {done} rounds: its newest checkpoint is {newest}"
        )
    target.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        table = source / f"{name}.parquet"
        if table.exists():
            (target / table.name).write_bytes(table.read_bytes())
    # Last, and under its own name once it is complete: then the copy is.
    digest = run_digest(prepare_experiment(trial.config), trial.schedule)
    draft = target / ".checkpoints"
    shutil.rmtree(draft, ignore_errors=True)
    copy_checkpoint(newest, draft, digest)
    draft.rename(target / "checkpoints")
