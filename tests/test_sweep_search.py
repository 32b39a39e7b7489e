"""Searches with Optuna, with made values in place of trials: what is asked, told and replayed."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pandas as pd
import pytest

from selffl_ray.config import parse_part
from selffl_ray.errors import ConfigError
from selffl_ray.estimate import estimate_sweep
from selffl_ray.runtime.placement import Node
from selffl_ray.sweep import SweepConfig, references_of
from selffl_ray.sweep_plan import plan_sweep
from selffl_ray.sweep_search import Search, check_search, values_to_tell

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None,
    reason="optuna is not installed: pip install -e '.[optuna]'",
)

CONDITIONED = {
    "method.personalization": {"choice": ["early_stop", "interpolate"]},
    "method.readout_steps": {
        "randint": [20, 23],
        "when": {"method.personalization": "interpolate"},
    },
    "method.kappa": {"uniform": [0.5, 2.0]},
    "training.learning_rate": {"loguniform": [0.001, 1.0]},
}
RATE = {"training.learning_rate": {"loguniform": [0.001, 1.0]}}
BEST = 0.1
"""Learning rate at which the made values are highest."""


def sweep_of(space, trials=12, startup=4, batch=3, **more):
    searcher = {"name": "optuna", "trials": trials, "startup": startup, "batch": batch}
    raw = {"experiment": "test", "space": space, "searcher": searcher, **more}
    return parse_part(SweepConfig, raw, "")


def made_value(settings):
    return -abs(math.log(settings["training.learning_rate"] / BEST))


def advance(search, batches=1000, value_of=made_value):
    """Ask and tell some batches, or all that is left."""
    while search.left and batches:
        batch = search.ask()
        search.tell({one.number: value_of(one.settings) for one in batch})
        batches -= 1
    return search


def suggested(search):
    return [one.settings for one in search.configurations]


# -- what is suggested -----------------------------------------------------------------------------


@needs_optuna
def test_every_kind_of_entry_keeps_its_values_and_its_condition(tmp_path):
    found = suggested(advance(Search(sweep_of(CONDITIONED, trials=60), tmp_path)))
    assert len(found) == 60
    for settings in found:
        interpolates = settings["method.personalization"] == "interpolate"
        assert ("method.readout_steps" in settings) == interpolates
        assert 0.5 <= settings["method.kappa"] <= 2.0
        assert 0.001 <= settings["training.learning_rate"] <= 1.0
    # The upper end of randint is excluded, as in other sweeps.
    steps = {s["method.readout_steps"] for s in found if "method.readout_steps" in s}
    assert steps == {20, 21, 22}
    assert {s["method.personalization"] for s in found} == {"early_stop", "interpolate"}


@needs_optuna
def test_random_suggestions_follow_the_distribution_of_their_kind(tmp_path):
    """Half of a loguniform range lies below its geometric mean, of a uniform one below its mean."""
    space = {**RATE, "method.kappa": {"uniform": [0.5, 2.5]}}
    sweep = sweep_of(space, trials=401, startup=400, batch=400)
    found = pd.DataFrame([one.settings for one in Search(sweep, tmp_path).ask()])
    # 4 standard deviations of a share of 400 draws: 0.1.
    assert (found["training.learning_rate"] < math.sqrt(0.001)).mean() == pytest.approx(
        0.5, abs=0.1
    )
    assert (found["method.kappa"] < 1.5).mean() == pytest.approx(0.5, abs=0.1)


@needs_optuna
@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_is_told_draws_the_suggestions_to_the_best(tmp_path, mode):
    metric = {"metric": "val/local_accuracy" if mode == "max" else "val/local_loss", "mode": mode}
    sign = 1 if mode == "max" else -1
    sweep = sweep_of(RATE, trials=40, startup=10, **metric)
    search = advance(Search(sweep, tmp_path), value_of=lambda s: sign * made_value(s))
    distances = [-made_value(settings) for settings in suggested(search)]
    assert np.mean(distances[-15:]) < 0.5 * np.mean(distances[:10])


@needs_optuna
def test_values_of_an_entry_may_be_whole_components(tmp_path):
    values = [{"name": "selffl", "kappa": 0.5}, {"name": "selffl", "preset": "exact"}, "fedavg"]
    space = {"method": {"choice": values}, **RATE}
    found = suggested(advance(Search(sweep_of(space, trials=20), tmp_path)))
    assert all(settings["method"] in values for settings in found)
    assert len({str(settings["method"]) for settings in found}) == 3


@needs_optuna
def test_the_search_seed_is_what_a_search_starts_from(tmp_path):
    one, same, other = (
        suggested(advance(Search(sweep_of(CONDITIONED, search_seed=seed), tmp_path)))
        for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


@needs_optuna
def test_a_suggestion_that_comes_again_is_run_once_and_told_again(tmp_path):
    space = {"training.num_local_steps": {"randint": [1, 4]}}
    sweep, log = sweep_of(space, trials=12), tmp_path / "search.json"
    search, run = Search(sweep, tmp_path, log), []
    while search.left:
        batch = search.ask()
        run += [one.number for one in batch]
        search.tell({one.number: float(one.number) for one in batch})
    assert run == [one.number for one in search.configurations] == [0, 1, 2]
    told = json.loads(log.read_text())["told"]
    assert len(told) == 12
    assert all(one["value"] == one["configuration"] for one in told)


@needs_optuna
def test_the_reference_is_suggested_first_and_is_one_of_the_suggestions(tmp_path):
    first = {
        "method.personalization": "interpolate",
        "method.readout_steps": 22,
        "method.kappa": 1,
        "training.learning_rate": 0.03,
    }
    sweep, log = sweep_of(CONDITIONED, reference=first), tmp_path / "search.json"
    check_search(sweep, tmp_path)
    search = advance(Search(sweep, tmp_path, log))
    assert suggested(search)[0] == first
    assert len(suggested(search)) == 12
    assert references_of(sweep, search.configurations)[""].number == 0
    assert suggested(Search(sweep, tmp_path, log)) == suggested(search)


@needs_optuna
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"method.kappa": 1.0}, "it must set exactly method.personalization, .*; got method.kappa"),
        ({}, "it must set exactly .*; got nothing"),
        (
            {"method.personalization": "early_stop", "method.readout_steps": 20},
            "exactly method.personalization, method.kappa, training.learning_rate; got",
        ),
        ({"method.kappa": 2.5}, r"method.kappa: 2.5 is not in the space's uniform \[0.5, 2.0\]"),
        ({"method.kappa": "1"}, "method.kappa: '1' is not in the space's uniform"),
        ({"method.personalization": "map"}, "method.personalization: 'map' is not in the space's"),
        (
            {"method.personalization": "interpolate", "method.readout_steps": 23},
            r"readout_steps: 23 is not in the space's randint \[20, 23\]",
        ),
    ],
)
def test_a_reference_that_cannot_be_suggested_is_refused_in_one_line(reference, message, tmp_path):
    whole = {
        "method.personalization": "early_stop",
        "method.kappa": 1.0,
        "training.learning_rate": 0.1,
    }
    found = {**whole, **reference} if "exactly" not in message else reference
    with pytest.raises(ConfigError, match=message) as caught:
        check_search(sweep_of(CONDITIONED, reference=found), tmp_path)
    assert "\n" not in str(caught.value)


# -- replay ----------------------------------------------------------------------------------------


@needs_optuna
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_search_that_goes_on_is_the_same_to_the_last_bit(tmp_path, batches):
    sweep = sweep_of(CONDITIONED)
    whole = advance(Search(sweep, tmp_path, tmp_path / "whole.json"))
    cut = advance(Search(sweep, tmp_path, tmp_path / "cut.json"), batches)
    cut.ask()  # a batch that was never told leaves no trace
    resumed = Search(sweep, tmp_path, tmp_path / "cut.json")
    assert resumed.left == 12 - 3 * batches
    assert suggested(advance(resumed)) == suggested(whole)
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


@needs_optuna
def test_what_failed_is_told_as_failed_and_is_kept(tmp_path):
    def failing(settings):
        return None if settings["training.learning_rate"] > BEST else made_value(settings)

    log = tmp_path / "search.json"
    search = advance(Search(sweep_of(RATE), tmp_path, log), value_of=failing)
    assert not search.left
    values = [one["value"] for one in json.loads(log.read_text())["told"]]
    assert values == [failing(settings) for settings in suggested(search)]
    assert None in values
    assert suggested(Search(sweep_of(RATE), tmp_path, log)) == suggested(search)


@needs_optuna
def test_a_log_of_other_suggestions_is_refused_with_both_versions(tmp_path):
    log = tmp_path / "search.json"
    advance(Search(sweep_of(RATE), tmp_path, log), 2)
    past = json.loads(log.read_text())
    past["optuna"] = "4.9.9"
    past["told"][4]["settings"]["training.learning_rate"] *= 1 + 1e-15
    log.write_text(json.dumps(past))
    message = r"search.json: optuna \d.* suggests .* where optuna 4.9.9 suggested .*that version"
    with pytest.raises(ConfigError, match=message) as caught:
        Search(sweep_of(RATE), tmp_path, log)
    assert "\n" not in str(caught.value)


# -- what is told ----------------------------------------------------------------------------------


def test_the_value_of_a_suggestion_is_the_mean_over_seeds_and_none_without_one_of_them():
    rows = pd.DataFrame(
        {
            "configuration": [4, 5, 6, 4, 5, 6],
            "seed": [0, 0, 0, 1, 1, 1],
            "status": ["FINISHED"] * 4 + ["FAILED", "FINISHED"],
            "val/local_accuracy": [0.5, 0.6, 0.7, 0.75, 0.9, math.nan],
        }
    )
    assert values_to_tell(rows, "val/local_accuracy") == {4: 0.625, 5: None, 6: None}
    assert values_to_tell(rows, "val/local_loss") == {4: None, 5: None, 6: None}


# -- before anything starts ------------------------------------------------------------------------


@needs_optuna
def test_a_plan_holds_the_first_batch_with_every_seed(tmp_path):
    sweep = sweep_of(CONDITIONED, seeds=[3, 5])
    plan = plan_sweep(sweep, [Node("here", 2.0, 0.0, 2**34)])
    assert [one.settings for one in plan.chosen] == [
        one.settings for one in Search(sweep, tmp_path).ask()
    ]
    assert [(t.seed, t.configuration.number) for t in plan.first.trials] == [
        (seed, number) for seed in (3, 5) for number in range(3)
    ]
    # What it will cost is of the whole search.
    assert estimate_sweep(plan, 2.0)[0] == "12 suggestions x 2 seeds = 24 trials, 2 at once"


def test_without_the_package_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"^searcher: optuna is not installed here; pip install -e '\.\[optuna\]', or"
    with pytest.raises(ConfigError, match=message) as caught:
        check_search(sweep_of(RATE), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scheduler": "asha"}, "scheduler: searcher optuna would tell it values of different"),
        ({"budget": {"samples": 2}}, "budget.samples: searcher optuna draws by itself; leave it"),
        ({"budget": {"trials": 50}}, "budget.trials: searcher optuna runs searcher.trials"),
        ({"within": list(RATE)}, "within: searcher optuna seeks one best"),
        ({"open_test": True}, "open_test: searcher optuna selects, and test data must not be"),
        ({"space": [RATE, {}]}, "space: searcher optuna needs one mapping, not a union"),
        (
            {"confirm": {"seeds": [9], "per": ["method"]}},
            "confirm.per: method is not set by every suggestion",
        ),
    ],
)
def test_what_has_no_place_in_a_search_is_refused_in_one_line(more, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        check_search(sweep_of(**{"space": RATE, **more}), tmp_path)
    assert "\n" not in str(caught.value)


@needs_optuna
@pytest.mark.parametrize(
    ("space", "message"),
    [
        # Wrong at one end of a range, in one corner, for one value of a condition.
        ({"method.kappa": {"uniform": [-0.1, 1.0]}}, "method.kappa must be >= 0, got -0.1"),
        (
            {
                "method.personalization": {"choice": ["early_stop", "interpolate"]},
                "method.readout_steps": {"randint": [20, 60]},
            },
            "method.readout_steps has no effect here .*with when",
        ),
        (
            {
                "training.num_local_steps": {"randint": [1, 9]},
                "training.learning_rate": {
                    "choice": [0.1, -0.2],
                    "when": {"training.num_local_steps": 5},
                },
            },
            "training.learning_rate must be .*-0.2",
        ),
        ({"method.kapa": {"uniform": [0.5, 1.0]}}, r"did you mean 'kappa'"),
        (
            {"method.kappa": [0.5, 1.0, 2.0], "method.inter": {"choice": ["dl", "moments"]}},
            "searcher.trials: 12 suggestions from a space of 6 points; searcher: variants",
        ),
        (
            {"method.kappa": [0.1 * k for k in range(5000)]},
            "space: 5000 combinations .* at most 4096; take fewer",
        ),
    ],
)
def test_a_space_with_a_wrong_corner_is_refused_before_anything_starts(space, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        check_search(sweep_of(space), tmp_path)
    assert "\n" not in str(caught.value)


@needs_optuna
def test_a_space_whose_corners_are_all_right_passes(tmp_path):
    check_search(sweep_of(CONDITIONED), tmp_path)
