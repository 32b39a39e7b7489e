"""Population-based training without Ray: what is refused, what is decided, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selffl_ray import sweep_population
from selffl_ray.api import run_experiment
from selffl_ray.checkpoint import Counters, check_checkpoint, rounds_done, save_checkpoint
from selffl_ray.config import load_config, parse_part
from selffl_ray.errors import ConfigError, RunError
from selffl_ray.estimate import estimate_sweep
from selffl_ray.experiment import prepare_experiment
from selffl_ray.run_loop import run_digest
from selffl_ray.runtime.placement import Node
from selffl_ray.search_space import read_dimension
from selffl_ray.seeding import generator
from selffl_ray.sweep import SweepConfig, configurations, schedule_text, trials
from selffl_ray.sweep_mutation import changed_settings, chosen_places, decide, legs, replaced
from selffl_ray.sweep_plan import plan_sweep
from selffl_ray.sweep_population import LOG, Population
from selffl_ray.sweep_results import FAILURE, markdown, trial_rows
from selffl_ray.sweep_scheduler import SchedulerConfig
from selffl_ray.tables import write_json
from selffl_ray.verification import verify_run

MACHINE = [Node("here", 2.0, 0.0, 2**34)]
METRIC = "val/local_accuracy"
BASE = {"training": {"num_rounds": 6, "num_local_steps": 2}, "evaluation": {"every": 2}}
SPACE = {
    "training.learning_rate": {"loguniform": [0.01, 1.0]},
    "method.kappa": {"uniform": [0.5, 2.0]},
}
PBT = {"name": "pbt", "every": 2, "mutate": SPACE}


def sweep_of(space=SPACE, scheduler=(), base=(), **more):
    raw = {
        "experiment": "test",
        "base": {**BASE, **dict(base)},
        "space": space,
        "budget": {"samples": 4},
        "scheduler": {**PBT, **dict(scheduler)},
        **more,
    }
    return parse_part(SweepConfig, raw, "")


# -- what is refused -------------------------------------------------------------------------------

ONE_RATE = {"training.learning_rate": {"loguniform": [0.01, 1.0]}}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seeds": [0, 1]}, "seeds: scheduler pbt ends trials by comparing"),
        ({"within": ["method.kappa"]}, "within: scheduler pbt compares all trials"),
        ({"confirm": {"seeds": [9]}}, "confirm: scheduler pbt ends with schedules"),
        ({"open_test": True}, "open_test: scheduler pbt selects"),
        ({"budget": {"samples": 4, "seconds": 9.0}}, "budget.seconds: scheduler pbt compares"),
        (
            {"budget": {"samples": 4, "gradient_steps": 9}},
            "budget.gradient_steps: scheduler pbt compares its trials after the same rounds",
        ),
        (
            {"budget": {"samples": 4, "bytes": 9}},
            "budget.bytes: scheduler pbt compares its trials after the same rounds",
        ),
        (
            {"budget": {"samples": 4, "virtual_s": 9.0}},
            "budget.virtual_s: scheduler pbt compares its trials after the same rounds",
        ),
        ({"budget": {}}, "scheduler: pbt needs a population, and the space has 1 configuration"),
        (
            {"base": {"training": {"num_rounds": 6, "stop": {"patience": 2}}}},
            "training.stop.patience: scheduler pbt compares",
        ),
        ({"searcher": {"name": "optuna", "trials": 20}}, "scheduler: searcher optuna would tell"),
        ({"scheduler": {"every": 3}}, "after 3 rounds, and none is evaluated there; .*every, 2"),
        (
            {"scheduler": {"every": 6}},
            "scheduler.every: 6 rounds leave nothing to compare in",
        ),
        (
            {"space": {**SPACE, "training.num_rounds": [6, 8]}},
            r"training.num_rounds: scheduler pbt compares trials of one length, got \[6, 8\]",
        ),
        (
            {"space": {**SPACE, "data.partition": ["natural", "iid"]}},
            "space: scheduler pbt compares its trials, and they differ in data or partition",
        ),
        (
            {"scheduler": {"mutate": {"training.momentum": [0.0]}}},
            r"training.momentum is not set by .*kappa=.*as in training.momentum: \[0.0\]",
        ),
        (
            {"scheduler": {"mutate": {"method.kappa": {"uniform": [0.5, 0.6]}}}},
            r"method.kappa starts at .* which is not in its uniform \[0.5, 0.6\]",
        ),
        (
            {"scheduler": {"mutate": {"method.kappa": {"choice": [1], "when": {"a": 1}}}}},
            "scheduler.mutate: method.kappa: when has no place here",
        ),
        (
            {"scheduler": {"mutate": {"method.kappa": {"normal": [0, 1]}}}},
            "scheduler.mutate: method.kappa must be a list of values, or one of",
        ),
        (
            {"scheduler": {"mutate": {"method.kappa": {"uniform": [-1.0, 2.0]}}}},
            "method.kappa must be >= 0, got -1.0",
        ),
    ],
)
def test_what_would_break_it_is_one_line_before_anything_starts(more, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_sweep(sweep_of(**more), MACHINE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "training.num_rounds",
        "training.participation_rate",
        "training.schedule",
        "training.start_from",
        "data.partition",
        "model.hidden",
        "evaluation.every",
        "method",
        "method.preset",
        "method.inter",
        "method.granularity",
        "method.personalization",
        "method.upload",
        "method.init",
        "method.probe_every",
        "method.kapa",
        "plugins",
    ],
)
def test_what_state_data_or_plan_depend_on_cannot_change_in_a_run(key):
    with pytest.raises(ConfigError, match=f"scheduler.mutate: {key}.* cannot change during a run"):
        plan_sweep(sweep_of(scheduler={"mutate": {key: [1]}}), MACHINE)


def test_options_of_another_method_cannot_change_either():
    sweep = sweep_of({**ONE_RATE, "method": ["fedavg"]}, {"mutate": {"method.kappa": [1.0]}})
    with pytest.raises(ConfigError, match=r"during a run of fedavg.*of training\.batch_size"):
        plan_sweep(sweep, MACHINE)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"name": "pbt"}, "scheduler: pbt needs every and mutate, as in"),
        ({"name": "pbt", "every": 2}, "scheduler: pbt needs every and mutate, as in"),
        ({**PBT, "every": 0}, "scheduler.every must be >= 1 round, got 0"),
        ({**PBT, "quantile": 0.6}, r"scheduler.quantile must lie in \(0, 0.5\], got 0.6"),
        ({**PBT, "quantile": 0.0}, r"scheduler.quantile must lie in \(0, 0.5\], got 0.0"),
        ({**PBT, "resample": 1.5}, r"scheduler.resample must lie in \[0, 1\], got 1.5"),
        ({**PBT, "factors": [0.0, 2.0]}, "scheduler.factors must be numbers > 0"),
        ({**PBT, "factors": []}, "scheduler.factors must be numbers > 0"),
        ({**PBT, "grace": 2}, "grace and reduction act with name: asha only, and grace is given"),
        ({"name": "asha", "every": 2}, "resample and factors act with name: pbt only, and every"),
        ({"mutate": SPACE}, "factors act with name: pbt only, and mutate is given"),
    ],
)
def test_options_of_the_scheduler_are_checked(scheduler, message):
    with pytest.raises(ConfigError, match=message):
        parse_part(SchedulerConfig, scheduler, "scheduler")


def test_a_plan_tells_who_is_compared_when_and_what_changes():
    lines = estimate_sweep(plan_sweep(sweep_of(), MACHINE), 2.0)
    assert lines[0].startswith(
        "scheduler pbt: of 4 trials compared after 2, 4 of 6 rounds the worst 1 end"
    )
    assert "training.learning_rate loguniform [0.01, 1.0]" in lines[1]
    assert "a schedule, not a configuration" in lines[2]
    asha = sweep_of(scheduler=(), seeds=[0])
    asha = dataclasses.replace(asha, scheduler=SchedulerConfig(name="asha", grace=2))
    assert "scheduler asha: from round 2 of 6" in estimate_sweep(plan_sweep(asha, MACHINE), 2.0)[0]


# -- who is replaced by whom -----------------------------------------------------------------------


def test_members_are_compared_on_the_way_and_not_at_the_end():
    assert legs(SchedulerConfig(**PBT), 6) == [2, 4, None]
    assert legs(SchedulerConfig(**PBT), 7) == [2, 4, 6, None]


@pytest.mark.parametrize(
    ("count", "quantile", "expected"), [(2, 0.1, 1), (3, 0.5, 1), (8, 0.25, 2), (10, 0.25, 3)]
)
def test_at_least_one_and_at_most_half_are_replaced(count, quantile, expected):
    assert replaced(SchedulerConfig(**PBT, quantile=quantile), count) == expected


def test_the_worst_and_the_failed_are_replaced_by_the_best():
    assert chosen_places([0.1, 0.4, 0.3, 0.2], 1, 1) == ([0], [1])
    assert chosen_places([0.1, 0.4, 0.3, 0.2], -1, 1) == ([1], [0])
    assert chosen_places([0.5, 0.5, 0.5, 0.5], 1, 1) == ([3], [0])
    # A failed one counts as the worst; all of them are replaced.
    assert chosen_places([None, 0.4, 0.3, 0.2], 1, 1) == ([0], [1])
    assert chosen_places([None, 0.4, None, 0.2], 1, 1) == ([0, 2], [1])
    assert chosen_places([None, 0.4, None, None], 1, 2) == ([0, 2, 3], [1])
    assert chosen_places([None, None], 1, 1) == ([], [])


@given(st.lists(st.none() | st.floats(-1e6, 1e6), min_size=2, max_size=12), st.data())
def test_nobody_is_replaced_who_is_better_than_one_that_stays(values, data):
    count = data.draw(st.integers(1, len(values) // 2))
    worst, best = chosen_places(values, 1, count)
    assert not set(worst) & set(best)
    alive = [v for v in values if v is not None]
    if not alive:
        assert worst == []
        return
    score = [-math.inf if v is None else v for v in values]
    kept = [score[p] for p in range(len(values)) if p not in worst]
    assert all(score[p] <= min(kept) for p in worst)
    assert [score[p] for p in best] == sorted(alive, reverse=True)[: len(best)]
    assert {p for p, v in enumerate(values) if v is None} <= set(worst)


# -- what changes in a copy ------------------------------------------------------------------------

ENTRIES = {
    "a": {"loguniform": [0.01, 1.0]},
    "b": {"uniform": [0.5, 2.0]},
    "c": {"randint": [1, 9]},
    "d": [10, 20, 40],
    "e": {"choice": ["x", "y"]},
}
DIMENSIONS = [read_dimension(key, entry, key) for key, entry in ENTRIES.items()]
START = {"a": 0.9, "b": 1.0, "c": 1, "d": 20, "e": "x", "other": "kept"}


def changes(resample, seed, factors=(0.8, 1.25)):
    scheduler = SchedulerConfig(**PBT, resample=resample, factors=factors)
    return changed_settings(DIMENSIONS, START, scheduler, np.random.default_rng(seed))


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_values_stay_in_their_range_and_what_is_not_named_stays(seed, resample):
    new = changes(resample, seed, factors=(0.1, 10.0))
    assert new["other"] == "kept"
    assert all(d.holds(new[d.key]) for d in DIMENSIONS)


def test_without_drawing_anew_values_move_by_a_factor_or_to_a_neighbour():
    found = [changes(0.0, seed) for seed in range(50)]
    assert {round(new["a"], 9) for new in found} == {0.72, 1.0}  # 1.125 is cut off at the end
    assert {round(new["b"], 9) for new in found} == {0.8, 1.25}
    assert {new["c"] for new in found} == {1, 2}  # a whole step up, and nothing below 1
    assert {new["d"] for new in found} == {10, 40}
    assert {new["e"] for new in found} == {"x", "y"}  # no order, so drawn anew


def test_drawn_anew_values_come_from_the_whole_range():
    found = [changes(1.0, seed) for seed in range(300)]
    logs = np.log10([new["a"] for new in found])
    assert np.histogram(logs, bins=4, range=(-2, 0))[0].min() > 300 / 4 * 0.6
    assert {new["c"] for new in found} == set(range(1, 9))
    assert {new["d"] for new in found} == {10, 20, 40}


def test_a_single_value_never_changes():
    single = [read_dimension("d", [20], "d"), read_dimension("e", {"choice": ["x"]}, "e")]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert changed_settings(single, START, SchedulerConfig(**PBT), rng) == START


MEMBERS = [
    {"training.learning_rate": rate, "method.kappa": kappa}
    for rate, kappa in ((0.1, 1.0), (0.2, 1.5), (0.3, 0.6), (0.4, 0.7))
]


def test_decisions_follow_from_the_search_seed_alone():
    values = [0.9, 0.8, 0.2, 0.1]
    sweep = sweep_of(scheduler={"quantile": 0.5})
    first = decide(MEMBERS, values, sweep, 2)
    generator(0, "anything").random()
    np.random.seed(1)  # noqa: NPY002 - to show that nobody draws from it
    assert decide(MEMBERS, values, sweep, 2) == first
    assert [copy.place for copy in first] == [2, 3]
    assert decide(MEMBERS, values, sweep, 4) != first
    other = dataclasses.replace(sweep, search_seed=1)
    assert decide(MEMBERS, values, other, 2) != first


def test_what_happens_at_one_place_does_not_depend_on_the_other_places():
    sweep = sweep_of(scheduler={"quantile": 0.5})
    both = decide(MEMBERS, [0.9, 0.8, 0.2, 0.1], sweep, 2)
    swapped = decide(MEMBERS, [0.9, 0.8, 0.1, 0.2], sweep, 2)
    assert both == swapped
    assert both[0].settings != both[1].settings


# -- the population on disk ------------------------------------------------------------------------


class State(NamedTuple):
    """Of a server."""

    params_P: torch.Tensor


class Held:
    """A population whose members are held by hand: a table, and a checkpoint of some state."""

    def __init__(self, folder: Path, sweep: SweepConfig | None = None) -> None:
        self.sweep = sweep or sweep_of()
        self.folder, self.here = folder, folder
        chosen = configurations(self.sweep, folder)
        self.first = trials(self.sweep, chosen, [0], folder, open_test=False)
        self.population = self.again()

    def again(self) -> Population:
        """Whoever comes later and has the folder only."""
        return Population(self.sweep, self.first, self.folder, self.here)

    def hold(self, *values: float) -> None:
        done = self.population.ends[0]
        for member, value in zip(self.population.members, values, strict=True):
            folder = self.folder / "trials" / member.name
            past = folder / "rounds.parquet"
            rows = pd.read_parquet(past) if past.exists() else pd.DataFrame()
            new = pd.DataFrame({"round_index": [done - 1], METRIC: [value]})
            folder.mkdir(parents=True, exist_ok=True)
            pd.concat([rows, new]).to_parquet(past)
            digest = run_digest(prepare_experiment(member.config), member.schedule)
            counters = Counters(done - 1, 10 * done, digest)
            state = State(torch.full((3,), value))
            save_checkpoint(folder / "checkpoints", counters, state, [], 2)

    def names(self, population=None) -> list[str]:
        return [t.name for t in (population or self.population).members]


@pytest.fixture
def held(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Held(tmp_path)


def test_a_copy_begins_with_the_rows_and_the_state_of_its_source(held, tmp_path):
    held.hold(0.3, 0.2, 0.9, 0.1)
    assert held.population.held()
    held.population.compare()
    copy = held.population.members[3]
    source = held.population.members[2]
    assert copy.name.startswith("004-")
    assert copy.name.endswith("from-002-after-2-s0")
    one, other = (tmp_path / "trials" / t.name for t in (copy, source))
    assert pd.read_parquet(one / "rounds.parquet").equals(pd.read_parquet(other / "rounds.parquet"))
    assert rounds_done(one / "checkpoints") == 2
    server = "checkpoints/round_1/server.safetensors"
    assert (one / server).read_bytes() == (other / server).read_bytes()
    # Each is a run of its own: neither goes on from the other's folder by mistake.
    digest = run_digest(prepare_experiment(copy.config), copy.schedule)
    check_checkpoint(one / "checkpoints/round_1", digest)
    assert json.loads((other / "checkpoints/round_1/checkpoint.json").read_text())[
        "run_digest"
    ] not in (digest, run_digest(prepare_experiment(copy.config)))


def test_the_schedule_names_every_source_and_what_was_set(held):
    for values in ((0.3, 0.2, 0.9, 0.1), (0.3, 0.2, 0.8, 0.95)):
        held.hold(*values)
        held.population.compare()
    last = held.population.trials[-1]
    first, second, third = last.schedule
    assert (first["round"], second["round"], third["round"]) == (0, 2, 4)
    assert first["from"] is None
    assert first["options"] == held.first[2].configuration.settings
    assert second["from"] == held.first[2].name
    assert third["from"] == held.population.trials[4].name
    assert third["options"] == last.configuration.settings
    rate = last.config.training.learning_rate
    assert schedule_text(last.schedule).endswith(
        f"4: learning_rate={rate:.4g} kappa={last.configuration.settings['method.kappa']:.4g}"
    )


def test_what_comes_out_is_told_to_be_a_schedule(held, tmp_path):
    held.hold(0.3, 0.2, 0.9, 0.1)
    held.population.compare()
    for member in held.population.members:
        summary = {"status": "FINISHED", "final": {METRIC: 0.5}}
        write_json(tmp_path / "trials" / member.name / "summary.json", summary)
    ended = tmp_path / "trials" / held.first[3].name
    write_json(ended / "summary.json", {"status": "STOPPED"})
    rows = trial_rows(held.population.trials, tmp_path / "trials")
    assert rows["status"].tolist() == ["FINISHED"] * 3 + ["STOPPED", "FINISHED"]
    assert rows["schedule"].iloc[4].startswith("0: learning_rate=")
    text = markdown(rows, METRIC, "max", {"": 0}, title="t", command="c")
    assert "each row is a schedule, not a configuration" in text
    assert f"- {rows['label'].iloc[4]}: {rows['schedule'].iloc[4]}" in text
    assert f"Not in the table, stopped: {held.first[3].name}." in text


def test_whoever_comes_later_decides_the_same_and_makes_what_is_missing(
    held, tmp_path, monkeypatch
):
    held.hold(0.3, 0.2, 0.9, 0.1)

    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_population, "_copy_run", dies)
        with pytest.raises(KeyboardInterrupt):
            held.population.compare()
    assert len(list((tmp_path / "trials").iterdir())) == 4
    again = held.again()
    assert again.ends == [4, None]
    assert (tmp_path / "trials" / again.members[3].name / "checkpoints/round_1").exists()
    log = (tmp_path / LOG).read_text()
    held.population = again
    held.hold(0.3, 0.2, 0.8, 0.95)
    again.compare()
    assert (tmp_path / LOG).read_text().startswith(log[:100])
    third = held.again()
    assert held.names(third) == held.names(again)
    assert [t.config for t in third.trials] == [t.config for t in again.trials]
    assert [t.schedule for t in third.trials] == [t.schedule for t in again.trials]
    assert third.ends == [None]


def test_a_log_that_does_not_fit_is_refused(held, tmp_path):
    held.hold(0.3, 0.2, 0.9, 0.1)
    held.population.compare()
    log = json.loads((tmp_path / LOG).read_text())
    log["compared"][0]["copies"][0]["settings"]["method.kappa"] = 1.0
    write_json(tmp_path / LOG, log)
    with pytest.raises(ConfigError, match="other copies follow from it now; resume with"):
        held.again()


def test_a_member_that_failed_is_replaced_and_one_whose_value_is_infinite_too(held, tmp_path):
    held.hold(0.3, 0.2, 0.9, math.inf)
    write_json(tmp_path / "trials" / held.first[1].name / FAILURE, {"error": "diverged"})
    held.population.compare()
    assert held.names()[0] == held.first[0].name
    assert [n[:3] for n in held.names()] == ["000", "004", "002", "005"]
    told = json.loads((tmp_path / LOG).read_text())["compared"][0]["values"]
    assert list(told.values()) == [0.3, None, 0.9, None]


def test_a_copy_of_a_state_of_another_round_is_not_made(held, tmp_path):
    held.hold(0.3, 0.2, 0.9, 0.1)
    checkpoints = tmp_path / "trials" / held.first[2].name / "checkpoints"
    (checkpoints / "round_1").rename(checkpoints / "round_2")
    assert not held.population.held()
    with pytest.raises(RunError, match="is not held after 2 rounds"):
        held.population.compare()


def test_a_run_whose_options_were_changed_is_neither_resumed_alone_nor_verified(tmp_path):
    config = load_config(
        None,
        [
            "training.num_rounds=2",
            "training.num_local_steps=1",
            "placement.backend=local",
            "tracking.enabled=false",
        ],
    )
    run_experiment(config, output=tmp_path / "run")
    write_json(tmp_path / "run" / "schedule.json", [{"round": 0}])
    run_experiment(config, resume=tmp_path / "run")
    write_json(tmp_path / "run" / "schedule.json", [{"round": 0}, {"round": 1}])
    with pytest.raises(ConfigError, match=r"options were changed during this .*tune --resume"):
        run_experiment(config, resume=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"options were changed during this .*verify a run of"):
        verify_run(tmp_path / "run", lambda event: None)
