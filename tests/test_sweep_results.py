"""Rankings of a sweep: intervals against textbook figures, pairing by seed, what is left out."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from selffl_ray.console import ranking_table, sweep_line
from selffl_ray.sweep import Configuration
from selffl_ray.sweep_progress import SweepProgress
from selffl_ray.sweep_results import Finals, Interval, finals, interval, markdown, rank, shown

METRIC = "val/local_accuracy"
ZERO = {"": 0}
"""The first configuration is the reference of the only scene."""


def rows_of(values, statuses=None, **more):
    """A row a trial from {configuration: {seed: value}}."""
    rows = [
        {
            "scene": "",
            "configuration": number,
            "label": f"c{number}",
            "seed": seed,
            "trial": f"{number:03d}-c{number}-s{seed}",
            "status": (statuses or {}).get((number, seed), "FINISHED"),
            METRIC: value,
            "cost/gradient_steps": 100.0,
            "cost/personalization_steps": 20.0,
            **{name: column[number][seed] for name, column in more.items()},
        }
        for number, own in values.items()
        for seed, value in own.items()
    ]
    return pd.DataFrame(rows)


def test_the_interval_is_students():
    # Mean 3, standard deviation sqrt(2.5), t(0.975; 4) = 2.776: tables of any textbook.
    found = interval([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    low, high = stats.t.interval(0.95, 4, loc=3, scale=stats.sem([1, 2, 3, 4, 5]))
    assert (3 - found.half, 3 + found.half) == pytest.approx((low, high))


def test_the_quantile_has_the_bits_of_the_table_of_students_t():
    for count in range(2, 200):
        values = np.linspace(0, 1, count)
        quantile = stats.t.ppf(0.975, count - 1)
        assert interval(values).half == quantile * values.std(ddof=1) / math.sqrt(count)


def test_a_single_seed_has_no_interval_and_excludes_nothing():
    found = interval([0.9])
    assert found.mean == 0.9
    assert math.isnan(found.half)
    assert found.includes_zero


@pytest.mark.parametrize(
    ("mean", "half", "inside"), [(0.1, 0.2, True), (-0.3, 0.2, False), (0.0, 0.0, True)]
)
def test_an_interval_knows_whether_zero_lies_in_it(mean, half, inside):
    assert Interval(mean, half).includes_zero == inside


def test_the_best_mean_comes_first_and_differences_are_paired_by_seed():
    # Seeds differ by far more than configurations: only pairing shows the constant gain of 0.01.
    values = {0: {0: 0.50, 1: 0.70, 2: 0.90}, 1: {0: 0.51, 1: 0.71, 2: 0.91}}
    best, other = rank(rows_of(values), METRIC, "max", ZERO)
    assert (best.configuration, other.configuration) == (1, 0)
    assert best.difference.mean == pytest.approx(0.01)
    assert best.difference.half == pytest.approx(0, abs=1e-12)
    assert best.value.half > 0.4
    assert other.difference is None
    assert not other.level


def test_what_is_not_told_from_the_best_is_level_with_it():
    values = {0: {0: 0.90, 1: 0.80}, 1: {0: 0.80, 1: 0.91}, 2: {0: 0.10, 1: 0.11}}
    ranking = rank(rows_of(values), METRIC, "max", ZERO)
    assert [(r.configuration, r.level) for r in ranking] == [(1, True), (0, True), (2, False)]


def test_the_smallest_comes_first_where_less_is_better_and_ties_keep_the_order():
    values = {0: {0: 0.2}, 1: {0: 0.1}, 2: {0: 0.1}}
    assert [r.configuration for r in rank(rows_of(values), METRIC, "min", ZERO)] == [1, 2, 0]


def groups_of(*methods, scene=""):
    """A configuration each, numbered in order."""
    return [
        Configuration(n, {"method": m, "training.learning_rate": n}, f"c{n}", scene)
        for n, m in enumerate(methods)
    ]


def test_the_best_of_every_group_is_confirmed_and_compared_with_the_best_of_the_references():
    values = {0: {0: 0.5}, 1: {0: 0.6}, 2: {0: 0.9}, 3: {0: 0.7}, 4: {0: 0.8}}
    chosen = groups_of("a", {"name": "b", "p": 1}, "a", {"name": "b", "p": 1}, {"name": "b"})
    ranking = rank(rows_of(values), METRIC, "max", ZERO)
    found = finals(ranking, chosen, {"": chosen[1]}, top=1, per=["method"])
    assert [c.number for c in found.chosen] == [2, 4, 3]
    assert found.references == {"": 3}
    whole = finals(ranking, chosen, {"": chosen[1]}, top=2, per=())
    assert whole == Finals((chosen[2], chosen[4], chosen[1]), {"": 1})


def test_a_reference_whose_group_was_not_ranked_is_confirmed_all_the_same():
    chosen = groups_of("a", "b")
    ranking = rank(rows_of({0: {0: 0.5}, 1: {0: 0.6}}, {(1, 0): "FAILED"}), METRIC, "max", ZERO)
    found = finals(ranking, chosen, {"": chosen[1]}, top=1, per=["method"])
    assert [c.number for c in found.chosen] == [0, 1]
    assert found.references == {"": 1}


def test_groups_are_confirmed_within_their_scene():
    here, there = groups_of("a", "b", scene="x"), groups_of("a", "b", scene="y")
    moved = [Configuration(c.number + 2, c.settings, c.label, c.scene) for c in there]
    rows = rows_of({0: {0: 0.5}, 1: {0: 0.6}, 2: {0: 0.1}, 3: {0: 0.2}})
    rows["scene"] = ["x", "x", "y", "y"]
    references = {"x": here[0], "y": moved[0]}
    ranking = rank(rows, METRIC, "max", {"x": 0, "y": 2})
    found = finals(ranking, [*here, *moved], references, top=1, per=["method"])
    assert [c.number for c in found.chosen] == [1, 0, 3, 2]


def test_a_configuration_without_all_its_seeds_is_not_ranked_but_told():
    values = {n: {0: 0.5 + n / 10, 1: 0.6} for n in range(4)}
    statuses = {(1, 0): "FAILED", (2, 1): "UNFINISHED", (3, 1): "STOPPED"}
    rows = rows_of(values, statuses)
    assert [r.configuration for r in rank(rows, METRIC, "max", ZERO)] == [0]
    text = markdown(rows, METRIC, "max", ZERO, title="t", command="c")
    assert "Not in the table, failed: 001-c1-s0." in text
    assert "Not in the table, unfinished: 002-c2-s1." in text
    assert "Not in the table, stopped: 003-c3-s1." in text


def test_nothing_finished_is_an_empty_ranking():
    rows = rows_of({0: {0: 0.5}}, {(0, 0): "FAILED"})
    assert rank(rows, METRIC, "max", ZERO) == []
    assert rank(rows.drop(columns=METRIC), METRIC, "max", ZERO) == []
    assert ranking_table([], rows, METRIC).startswith("no configuration has finished")


def test_the_tables_show_percent_differences_steps_and_the_test_score_once_it_is_open():
    values = {0: {0: 0.90, 1: 0.92}, 1: {0: 0.93, 1: 0.95}}
    tested = {0: {0: 0.80, 1: 0.82}, 1: {0: 0.81, 1: 0.83}}
    rows = rows_of(values, **{"test/local_accuracy": tested})
    text = markdown(rows, METRIC, "max", ZERO, title="A study", command="selffl tune x.yaml")
    lines = [line for line in text.splitlines() if line.startswith("| c")]
    half = 100 * interval([0.93, 0.95]).half
    assert lines[1].split(" | ")[:3] == ["| c1", f"**94.00 ± {half:.2f}**", "+3.00 ± 0.00"]
    assert lines[1].split(" | ")[3:5] == [f"82.00 ± {half:.2f}", "+1.00 ± 0.00"]
    assert lines[2].split(" | ")[1:3] == [f"91.00 ± {half:.2f}", "reference"]
    assert lines[1].endswith("| 120 |")
    assert "`selffl tune x.yaml`" in text
    table = ranking_table(rank(rows, METRIC, "max", ZERO), rows, METRIC)
    assert "+3.00 ± 0.00" in table
    assert "test/local_accuracy" in table


def test_errors_and_losses_are_shown_as_measured():
    assert shown(Interval(0.01234567, math.nan), "val/local_mse") == "0.01235"
    assert shown(Interval(0.5, 0.01), "val/clients_harmed_vs_global") == "50.00 ± 1.00"
    assert shown(Interval(-0.001, 0.002), "val/local_loss", signed=True) == "-0.00100 ± 0.00200"


def test_the_progress_line_tells_trials_best_and_the_time_left():
    event = SweepProgress("select", 5, 4, 1, 9, (0.943, "kappa=1 seed 0"), METRIC, 40.0)
    assert sweep_line(event) == (
        "select  5/9 trials  1 failed  best val/local_accuracy 94.3 % (kappa=1 seed 0)  40 s left"
    )
    begun = SweepProgress("select", 0, 0, 0, 9, None, METRIC, 3.0)
    assert sweep_line(begun) == "select  0/9 trials  3 s"


def test_rankings_do_not_depend_on_the_order_of_the_rows():
    rng = np.random.default_rng(0)
    values = {n: {s: float(rng.normal()) for s in range(3)} for n in range(6)}
    rows = rows_of(values)
    shuffled = rows.sample(frac=1, random_state=1)
    assert rank(rows, METRIC, "max", {"": 2}) == rank(shuffled, METRIC, "max", {"": 2})


def test_configurations_are_ranked_and_compared_within_their_scene_only():
    values = {0: {0: 0.9}, 1: {0: 0.8}, 2: {0: 0.3}, 3: {0: 0.5}}
    rows = rows_of(values)
    rows["scene"] = ["alpha=0.1", "alpha=0.1", "alpha=100", "alpha=100"]
    ranking = rank(rows, METRIC, "max", {"alpha=0.1": 1, "alpha=100": 2})
    assert [(r.scene, r.configuration) for r in ranking] == [
        ("alpha=0.1", 0),
        ("alpha=0.1", 1),
        ("alpha=100", 3),
        ("alpha=100", 2),
    ]
    assert [r.difference and round(r.difference.mean, 3) for r in ranking] == [0.1, None, 0.2, None]
    references = {"alpha=0.1": 1, "alpha=100": 2}
    text = markdown(rows, METRIC, "max", references, title="t", command="c")
    assert text.index("## alpha=0.1") < text.index("## alpha=100")
