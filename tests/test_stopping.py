"""When a run ends early: budgets, targets, patience; and that its end is always evaluated."""

from __future__ import annotations

import pytest

from selffl_ray.api import run_experiment
from selffl_ray.config import load_config
from selffl_ray.errors import ConfigError
from selffl_ray.stopping import StopConfig, StopRule

SMALL = ("placement.backend=local", "tracking.enabled=false", "training.num_local_steps=5")


def reached(config, rows, *, higher_is_better=True):
    """Index of the row after which the rule has enough; None if it never has."""
    rule = StopRule(config, [], higher_is_better=higher_is_better)
    for index, row in enumerate(rows):
        rule.take(row, seconds=float(index))
        if rule.enough:
            return index
    return None


SENT = {"comm/bytes_down": 300.0, "comm/bytes_up": 100.0}
"""Of one round."""


def scores(*values, name="val/local_accuracy"):
    return [{"cost/gradient_steps": 10.0 * (i + 1), **SENT, name: v} for i, v in enumerate(values)]


def test_a_target_is_met_from_the_right_side():
    config = StopConfig(target=0.5)
    assert reached(config, scores(0.1, 0.49, 0.5, 0.6)) == 2
    loss = StopConfig(metric="val/local_loss", target=0.5)
    assert reached(loss, scores(0.9, 0.4, name="val/local_loss")) == 1


def test_patience_counts_evaluations_without_a_better_value():
    assert reached(StopConfig(patience=2), scores(0.5, 0.4, 0.6, 0.6, 0.5)) == 4
    gaps = [{"cost/gradient_steps": 1.0, **SENT}] * 5
    assert reached(StopConfig(patience=2), gaps) is None


def test_a_budget_of_gradients_ends_after_the_round_that_reaches_it():
    assert reached(StopConfig(gradient_steps=25), scores(0.1, 0.1, 0.1, 0.1)) == 2
    assert reached(StopConfig(gradient_steps=20), scores(0.1, 0.1, 0.1)) == 1


def test_a_budget_of_bytes_counts_both_ways_and_what_was_sent_before():
    assert reached(StopConfig(bytes=1200), scores(0.1, 0.1, 0.1, 0.1)) == 2
    assert reached(StopConfig(bytes=1201), scores(0.1, 0.1, 0.1, 0.1)) == 3
    past = [{**row, "time/round_s": 1.0} for row in scores(0.1, 0.1)]
    rule = StopRule(StopConfig(bytes=1200), past, higher_is_better=True)
    assert not rule.enough
    rule.take(scores(0.1)[0], 3.0)
    assert rule.enough


def test_a_run_that_a_budget_of_bytes_ends_goes_on_to_the_same_round(tmp_path):
    # 14 clients, 4 bytes a parameter, both ways.
    size = 14 * 2 * 4 * (64 * 64 + 64 + 64 * 10 + 10)
    settings = ("method=fedavg", "training.num_rounds=9", f"training.stop.bytes={3 * size}")
    config = load_config(None, [*SMALL, *settings])
    result = run_experiment(config, output=tmp_path / "run")
    assert result.summary["rounds"] == 3
    again = run_experiment(config, resume=result.folder)
    assert again.summary["rounds"] == 3


def test_a_run_that_goes_on_counts_what_was_before():
    rows = scores(0.5, 0.4)
    rule = StopRule(
        StopConfig(patience=2), [{**r, "time/round_s": 1.0} for r in rows], higher_is_better=True
    )
    assert not rule.enough
    rule.take({"cost/gradient_steps": 30.0, **SENT, "val/local_accuracy": 0.3}, 3.0)
    assert rule.enough


@pytest.mark.parametrize("name", ["gradient_steps", "bytes"])
@pytest.mark.parametrize("most", [0, -3])
def test_a_budget_of_nothing_is_refused(name, most):
    with pytest.raises(ConfigError, match=f"training.stop.{name} must be >= 1, got {most}"):
        StopConfig(**{name: most})


@pytest.mark.parametrize("method", ["fedavg", "selffl"])
def test_a_run_that_a_budget_ends_is_evaluated_at_its_end(method, tmp_path):
    # 14 clients x 5 steps = 70 a round; a probe adds a pass over 25 examples: 2 more a client.
    settings = (
        f"method={method}",
        "training.num_rounds=30",
        "training.stop.gradient_steps=200",
        "evaluation.every=10",
    )
    result = run_experiment(load_config(None, [*SMALL, *settings]), output=tmp_path / "run")
    assert result.summary["status"] == "FINISHED"
    assert result.summary["rounds"] == 3
    final = result.summary["final"]
    assert 200 <= final["cost/gradient_steps"] < 270
    assert final["test/local_accuracy"] > 0.2
    assert result.rounds["test/local_accuracy"].notna().tolist() == [False, False, True]
    assert set(result.clients["round_index"]) == {2}


def test_a_budget_of_virtual_time_adds_up_rounds_and_those_before():
    rows = [{**row, "time/virtual_s": 20.0} for row in scores(0.1, 0.1, 0.1, 0.1)]
    assert reached(StopConfig(virtual_s=60.0), rows) == 2
    assert reached(StopConfig(virtual_s=61.0), rows) == 3
    past = [{**row, "time/round_s": 1.0} for row in rows[:2]]
    rule = StopRule(StopConfig(virtual_s=60.0), past, higher_is_better=True)
    assert (rule.enough, rule.virtual_s) == (False, 40.0)
    rule.take(rows[2], 3.0)
    assert (rule.enough, rule.virtual_s) == (True, 60.0)


def test_a_run_that_virtual_time_ends_goes_on_to_the_same_round(tmp_path):
    """5 steps of the median client's second each: 5 virtual seconds a round, trouble or none."""
    settings = ("method=fedavg", "training.num_rounds=9", "training.stop.virtual_s=14")
    config = load_config(None, [*SMALL, *settings])
    result = run_experiment(config, output=tmp_path / "run")
    assert result.rounds["virtual_s"].tolist() == [5.0, 5.0, 5.0]
    assert result.rounds["cost/virtual_s"].tolist() == [5.0, 10.0, 15.0]
    assert run_experiment(config, resume=result.folder).summary["rounds"] == 3


@pytest.mark.parametrize("most", [0.0, -1.0])
def test_no_virtual_time_at_all_is_refused(most):
    with pytest.raises(ConfigError, match=f"training.stop.virtual_s must be > 0, got {most}"):
        StopConfig(virtual_s=most)
