"""Trials whose actor is killed: they go on, whatever schedules them, and errors do not come again.

The method ``mortal`` kills its own process, the trial's actor, as chosen rounds begin: once for
each file that it leaves in the folder ``marks``, so a folder with all of them is a quiet sweep.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from ray.exceptions import OutOfMemoryError, RayActorError

from selffl_ray.config import parse_part
from selffl_ray.run_loop import Message
from selffl_ray.run_writer import Job, Restart
from selffl_ray.runtime import trial_deaths
from selffl_ray.sweep import SweepConfig
from selffl_ray.sweep_folder import note_end
from selffl_ray.sweep_progress import SweepProgress
from selffl_ray.sweep_run import run_sweep
from selffl_ray.tuning import next_job

pytestmark = pytest.mark.ray

BASE = {
    "training": {"num_rounds": 8, "num_local_steps": 2},
    "evaluation": {"every": 2},
    "checkpoint": {"every": 2},
    "model": {"name": "mlp", "hidden": [8]},
    "plugins": ["tests.runtime.mortal"],
    "tracking": {"enabled": False},
}
LOCAL = {"placement": {"backend": "local"}}
DEATHS = (1, 3, 5)
"""Before the first checkpoint and after two others."""


def sweep_of(space, marks, base=(), *, dies=(), **more):
    method = {"name": "mortal", "dies": list(dies), "marks": str(marks)}
    base = {**BASE, "method": method, **dict(base)}
    return parse_part(
        SweepConfig, {"experiment": "deaths", "base": base, "space": space, **more}, ""
    )


def marks_of(tmp_path, name, rounds):
    """A folder of marks in which these deaths have happened already."""
    folder = tmp_path / f"marks-{name}"
    folder.mkdir()
    for round_index in rounds:
        (folder / f"{round_index}-0").touch()
    return folder


def told(seen):
    return [event.text for event in seen if isinstance(event, Message)]


def events_of(folder):
    """Events of a run by round, those without any left out."""
    rows = pd.read_parquet(folder / "rounds.parquet").to_dict("records")
    found = {row["round_index"]: json.loads(row["events"]) for row in rows}
    return {
        at: [(e["kind"], e["attempt"], e["outcome"]) for e in events]
        for at, events in found.items()
        if events
    }


def failures(folder, trial):
    """How often Tune saw the trial fail."""
    (path,) = folder.glob(f"tune/*/{trial}/error.txt")
    return path.read_text().count("Failure #")


@pytest.mark.limit_s(500)
@pytest.mark.parametrize(
    ("rates", "base", "more"),
    [
        ([0.3], {"faults": {"max_retries": 3}}, {"concurrent": 2}),
        (
            [0.3, 0.0001],
            {"faults": {"max_retries": 3}, **LOCAL},
            {"concurrent": 1, "scheduler": {"name": "asha", "grace": 2, "reduction": 2}},
        ),
    ],
    ids=["none", "asha"],
)
def test_a_trial_whose_actor_is_killed_ends_as_one_that_was_left_alone(
    local_ray, tmp_path, rates, base, more
):
    """Without a scheduler on client actors of its own, which die with it."""
    space = {"training.learning_rate": rates, "method.dies": [[], list(DEATHS)]}
    whole = marks_of(tmp_path, "quiet", DEATHS)
    quiet = run_sweep(sweep_of(space, whole, base, **more), output=tmp_path / "quiet")
    assert quiet.complete
    # The first to begin a round of DEATHS is killed there, which may be either of two trials.
    marks, seen = marks_of(tmp_path, "killed", ()), []
    sweep = sweep_of(space, marks, base, **more)
    killed = run_sweep(sweep, output=tmp_path / "killed", watch=seen.append)
    assert killed.complete
    assert sorted(int(p.name.partition("-")[0]) for p in marks.iterdir()) == list(DEATHS)
    csv = [(tmp_path / name / "results.csv").read_text() for name in ("quiet", "killed")]
    assert csv[0] == csv[1]
    rows = killed.rows["select"].set_index("trial")
    assert len(rows) == 2 * len(rates)
    if sweep.scheduler.name == "asha":
        assert rows["status"].tolist() == ["FINISHED"] * 2 + ["STOPPED"] * 2
    booked = {name: events_of(tmp_path / "killed" / "trials" / name) for name in rows.index}
    # A restart is told and booked once, in the round to go on with; of two deaths in a row the
    # later one is. Nothing happens to the trials that do not die.
    lost = [text for text in told(seen) if "the driver actor died" in text]
    assert len(lost) == len(DEATHS)
    assert all(text.endswith("another one goes on from the last checkpoint") for text in lost)
    assert {text.partition(":")[0] for text in lost} == {n for n, e in booked.items() if e}
    assert not any(booked[name] for name in rows.index[::2])
    rounds = sorted(at for events in booked.values() for at in events)
    assert rounds == [0, 2, 4]
    assert all(e == [("driver", e[0][1], "restarted")] for b in booked.values() for e in b.values())
    for events in booked.values():
        assert [e[0][1] for _, e in sorted(events.items())] == list(range(1, len(events) + 1))
    assert [e.failed for e in seen if isinstance(e, SweepProgress)][-1] == 0
    assert [e.done for e in seen if isinstance(e, SweepProgress)][-1] == len(rows)


@pytest.mark.limit_s(500)
def test_members_of_a_population_that_are_killed_change_no_comparison(local_ray, tmp_path):
    """A death in each leg, of first members and of a copy, before and after a checkpoint."""
    deaths = (1, 2, 5)
    for name, past in (("quiet", deaths), ("killed", ())):
        marks, seen = marks_of(tmp_path, name, past), []
        sweep = sweep_of(
            {"training.learning_rate": [0.3, 0.1, 0.001]},
            marks,
            {**LOCAL, "training": {"num_rounds": 6, "num_local_steps": 2}},
            dies=deaths,
            concurrent=1,
            scheduler={
                "name": "pbt",
                "every": 2,
                "mutate": {"training.learning_rate": [0.3, 0.1, 0.001]},
            },
        )
        result = run_sweep(sweep, output=tmp_path / name, watch=seen.append)
        assert result.complete
        assert not result.failed
        assert sum("the driver actor died" in text for text in told(seen)) == 3 - len(past)
    for table in ("results.csv", "results.md", "population.json"):
        one, other = ((tmp_path / name / table).read_text() for name in ("quiet", "killed"))
        assert one == other, table
    booked = [events_of(p.parent) for p in (tmp_path / "killed").glob("trials/*/rounds.parquet")]
    # In the table of a copy stands what happened to its source too.
    assert {at for events in booked for at in events} == {0, 2, 4}


@pytest.mark.limit_s(500)
def test_a_trial_whose_actor_dies_too_often_fails_alone_and_says_so(local_ray, tmp_path):
    sweep = sweep_of(
        {"method.dies": [[], [3]]}, "", {**LOCAL, "faults": {"max_retries": 1}}, concurrent=2
    )
    seen = []
    result = run_sweep(sweep, output=tmp_path / "sweep", watch=seen.append)
    assert result.complete
    assert result.failed == 1
    rows = result.rows["select"]
    assert rows["status"].tolist() == ["FINISHED", "FAILED"]
    error = rows["error"][1]
    assert error.startswith("the driver actor died: ")
    assert error.endswith("; that is more often than faults.max_retries, 1, allows")
    assert "\n" not in error
    assert sum("another one goes on" in text for text in told(seen)) == 1
    assert failures(tmp_path / "sweep", rows["trial"][1]) == 2
    folder = tmp_path / "sweep" / "trials" / rows["trial"][1]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["round_1"]
    last = [event for event in seen if isinstance(event, SweepProgress)][-1]
    assert (last.done, last.failed) == (2, 1)


@pytest.mark.limit_s(500)
def test_a_trial_whose_actor_the_memory_monitor_ends_is_one_whose_actor_died(
    local_ray, tmp_path, monkeypatch
):
    """The second dies once and goes on, the third too often and fails alone.

    They are killed, and Ray says of it here what it says when its monitor did it.
    """
    said, real = "Task was killed due to the node running low on memory.\nMore of it", local_ray.get

    def get(*given, **more):
        try:
            return real(*given, **more)
        except RayActorError as error:
            raise OutOfMemoryError(said) from error

    monkeypatch.setattr(local_ray, "get", get)
    marks, seen = marks_of(tmp_path, "killed", ()), []
    base = {**LOCAL, "faults": {"max_retries": 1}}
    sweep = sweep_of({"method.dies": [[], [3], [4, 5]]}, marks, base, concurrent=2)
    result = run_sweep(sweep, output=tmp_path / "sweep", watch=seen.append)
    assert result.complete
    assert sorted(mark.name for mark in marks.iterdir()) == ["3-0", "4-0", "5-0"]
    rows = result.rows["select"]
    assert rows["status"].tolist() == ["FINISHED", "FINISHED", "FAILED"]
    assert rows["error"][2] == (
        "the driver actor died: Task was killed due to the node running low on memory. More of it; "
        "that is more often than faults.max_retries, 1, allows"
    )
    folders = [tmp_path / "sweep" / "trials" / name for name in rows["trial"]]
    quiet, once = (pd.read_parquet(f / "rounds.parquet") for f in folders[:2])
    assert quiet["digest"].tolist() == once["digest"].tolist()
    (event,) = json.loads(once["events"][2])
    assert (event["kind"], event["outcome"]) == ("driver", "restarted")
    assert "low on memory" in event["cause"]
    assert events_of(folders[0]) == {}
    assert sum("another one goes on" in text for text in told(seen)) == 2


@pytest.mark.parametrize("there", [None, object], ids=["no class", "no method"])
def test_a_tune_that_is_built_otherwise_is_left_alone_and_said(there, monkeypatch, caplog):
    monkeypatch.setattr(trial_deaths, "_actor_manager", lambda: there)
    with trial_deaths.memory_deaths_as_deaths():
        pass
    assert "the sweep ends with it (resume it then)" in caplog.text


@pytest.mark.limit_s(500)
def test_an_error_of_the_run_is_raised_once(local_ray, tmp_path):
    sweep = parse_part(
        SweepConfig,
        {
            "experiment": "deaths",
            "base": {
                **BASE,
                **LOCAL,
                "method": {"name": "misbehaving"},
                "plugins": ["tests.runtime.misbehaving"],
                "faults": {"max_retries": 2, "min_participants": 1.0},
            },
            "space": {"method.raising": [[], ["form-03"]]},
        },
        "",
    )
    seen = []
    result = run_sweep(sweep, output=tmp_path / "sweep", watch=seen.append)
    assert result.complete
    rows = result.rows["select"]
    assert rows["status"].tolist() == ["FINISHED", "FAILED"]
    assert "the dog ate the gradient" in rows["error"][1]
    assert failures(tmp_path / "sweep", rows["trial"][1]) == 1
    assert not any("another one goes on" in text for text in told(seen))


def test_what_is_noted_of_deaths_goes_with_every_later_actor(tmp_path):
    """The second one may die before it writes of the first; tables take in each once."""
    job = Job({}, str(tmp_path / "trial"), str(tmp_path))

    def dies(number, cause):
        result = {"number": number, "cause": cause}
        note_end(SimpleNamespace(kind="lost", trial="trial", result=result), tmp_path)

    dies(1, "too early")
    # Nothing was begun: then nothing is gone on with.
    assert next_job(job) == job
    (tmp_path / "trial" / "config.yaml").touch()
    assert next_job(job) == replace(job, resume=True)
    dies(2, "why")
    assert next_job(job) == replace(job, resume=True, restart=Restart(2, "why"))
    dies(3, "again")
    both = Restart(3, "again", ((2, "why"),))
    assert next_job(job) == next_job(job) == replace(job, resume=True, restart=both)
