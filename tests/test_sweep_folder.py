"""What a sweep folder says of its trials: ended by Tune, interrupted or failed, and from where."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from selffl_ray.errors import ConfigError
from selffl_ray.sweep_folder import check_origin, note_end
from selffl_ray.sweep_results import trial_rows
from selffl_ray.tables import final_metrics


def status_of(tmp_path, summary=None, events=()):
    """Status and error of a trial that left a summary and of which Tune told events."""
    folder = tmp_path / "000-a-s0"
    folder.mkdir()
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps({"status": summary}))
    for kind, result in events:
        note_end(SimpleNamespace(kind=kind, trial=folder.name, result=result), tmp_path)
    trial = SimpleNamespace(
        name=folder.name,
        seed=0,
        schedule=(),
        configuration=SimpleNamespace(scene="", number=0, label="a"),
    )
    row = trial_rows([trial], tmp_path).iloc[0]
    return row["status"], row["error"]


@pytest.mark.parametrize(
    ("summary", "events", "expected"),
    [
        ("FINISHED", [("result", {"done": True, "round": 3})], "FINISHED"),
        ("STOPPED", [("result", {"done": True, "round": 3})], "STOPPED"),
        ("STOPPED", [("result", {"done": False, "round": 3})], "UNFINISHED"),
        (None, [], "UNFINISHED"),
        (None, [("lost", {"number": 1, "cause": "why"})], "UNFINISHED"),
        (None, [("error", {"error": "why"})], "FAILED"),
        ("FINISHED", [("error", {"error": "why"})], "FINISHED"),
    ],
)
def test_a_trial_is_what_tune_and_its_run_say_together(tmp_path, summary, events, expected):
    status, error = status_of(tmp_path, summary, events)
    assert status == expected
    assert error == ("why" if expected == "FAILED" else "")


def test_a_sweep_goes_on_from_where_it_was_started_only(tmp_path, monkeypatch):
    (tmp_path / "origin.json").write_text(json.dumps({"folder": str(tmp_path), "command": "x"}))
    monkeypatch.chdir(tmp_path)
    check_origin(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="go on from there") as caught:
        check_origin(tmp_path)
    assert "\n" not in str(caught.value)


def test_final_scores_of_a_run_that_ended_early_leave_out_rounds_before_the_last_ones():
    rows = [{"round_index": r, "test/local_accuracy": v} for r, v in ((9, 0.5), (19, 0.8), (29, 1))]
    assert final_metrics(rows, last=5)["test/local_accuracy"] == 1
    every = [{"round_index": r, "test/local_accuracy": r / 10} for r in (7, 8, 9)]
    assert final_metrics(every, last=2)["test/local_accuracy"] == pytest.approx(0.85)
