"""The driver actor: what it tells meanwhile, how it is stopped, and how its end is told."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pandas as pd
import pytest

from selffl_ray.algorithms.ditto import DittoConfig
from selffl_ray.api import Interrupt, run_comparison, run_experiment
from selffl_ray.config import load_config
from selffl_ray.errors import ClientError, ConfigError, DriverLostError, RunError, SelfFLError
from selffl_ray.registry import Component
from selffl_ray.run_loop import Message, Progress
from selffl_ray.runtime import driver_actor
from selffl_ray.runtime.placement import PlacementPlan
from tests.runtime.processes import Sandbox
from tests.runtime.saboteur import ROOT

pytestmark = pytest.mark.ray

ROUNDS = 100
LONG = (
    f"training.num_rounds={ROUNDS}",
    "training.num_local_steps=3",
    "evaluation.every=100",
    "placement.clients_per_actor=14",
    "tracking.enabled=false",
)


def follow(job, *arguments, watch=lambda event: None, driver_cpus=0.1):
    """Do a job in a driver actor."""
    return driver_actor.follow(
        job,
        arguments,
        plan=PlacementPlan((), driver_cpus, ""),
        label=f"test-{job.__name__}",
        watch=watch,
        interrupted=lambda: False,
    )


def emit_many(control, count):
    for number in range(count):
        control.emit(number)
        time.sleep(0.002)
    return "done"


def test_events_arrive_once_and_in_order_and_then_the_result(local_ray):
    seen = []
    assert follow(emit_many, 500, watch=seen.append) == "done"
    assert seen == list(range(500))


def fail(control, error):
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("training.num_rounds must be >= 1, got 0"),
        RunError("round 3: nobody answered"),
        ClientError("out of memory", "form-03", 7, "local_update"),
    ],
    ids=["config", "run", "client"],
)
def test_an_error_of_the_job_comes_back_as_it_was_raised(local_ray, error):
    with pytest.raises(SelfFLError) as caught:
        follow(fail, error)
    assert isinstance(caught.value, type(error))
    assert str(caught.value) == str(error)
    assert caught.value.args == error.args


def die(control):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_driver_actor_that_is_killed_is_an_error_and_no_hang(local_ray):
    began = time.monotonic()
    with pytest.raises(RunError, match="the driver actor died"):
        follow(die)
    assert time.monotonic() - began < 60


MORTAL = (
    "plugins=[tests.runtime.mortal]",
    "training.num_rounds=12",
    "training.num_local_steps=3",
    "evaluation.every=4",
    "checkpoint.every=4",
    "placement.clients_per_actor=7",
)


def mortal(dies, marks="", *settings):
    """Ditto on two client actors, with a driver actor that dies."""
    method = f"method={{name: mortal, dies: {dies}, marks: '{marks}'}}"
    return load_config(None, (*MORTAL, method, *settings), folder=ROOT)


@pytest.mark.limit_s(500)
def test_a_driver_actor_that_is_killed_is_started_again_and_the_bits_are_those_of_a_quiet_run(
    local_ray, tmp_path
):
    """Killed before anything is written, twice, and after a checkpoint.

    Clients have state, the run a tracker. What the second actor knew of the first it had not
    written.
    """
    quiet = run_experiment(mortal([]), output=tmp_path / "quiet")
    marks, seen = tmp_path / "marks", []
    marks.mkdir()
    dying = mortal([2, 2, 9], marks, "faults.max_retries=3")
    run = run_experiment(dying, output=tmp_path / "run", watch=seen.append)
    assert run.summary["status"] == "FINISHED"
    same = ["round_index", "digest", "test/local_accuracy", "cost/gradient_steps"]
    pd.testing.assert_frame_equal(run.rounds[same], quiet.rounds[same])
    pd.testing.assert_frame_equal(run.clients, quiet.clients)
    done = [event.round_index for event in seen if isinstance(event, Progress)]
    # What an actor had not told when it died is not told.
    assert done[-4:] == [8, 9, 10, 11]
    told = [event.text for event in seen if isinstance(event, Message)]
    assert sum("the driver actor died" in text for text in told) == 3
    events = {
        row["round_index"]: [
            (e["kind"], e["attempt"], e["outcome"]) for e in json.loads(row["events"])
        ]
        for row in run.rounds.to_dict("records")
    }
    assert events.pop(0) == [("driver", 1, "restarted"), ("driver", 2, "restarted")]
    assert events.pop(8) == [("driver", 3, "restarted")]
    assert not any(events.values())


@pytest.mark.limit_s(500)
def test_what_went_wrong_just_before_a_driver_actor_was_killed_stands_in_the_table_once(
    local_ray, tmp_path
):
    """No checkpoint and no table was written by then, and all rounds are done again.

    A host that dies and a client that raises do so once; NaN comes back in the replayed round.
    """
    strikes = ["1 form-03 killed", "2 form-05 raised", "2 form-00 diverged"]
    dying = (
        *MORTAL,
        "plugins=[tests.runtime.doomed]",
        "training.num_rounds=6",
        "checkpoint.every=6",
        # In a stack a client that raises is tried once more alone.
        "placement.stack_size=1",
        "tracking.enabled=false",
        f"method={{name: doomed, dies: 3, notes: '{tmp_path}', strikes: {json.dumps(strikes)}}}",
    )
    quiet = (*dying, "method.quiet=true", "method.dies=-1", "placement.backend=local")
    quiet_run = run_experiment(load_config(None, quiet, folder=ROOT), output=tmp_path / "quiet")
    run = run_experiment(load_config(None, dying, folder=ROOT), output=tmp_path / "run")
    assert (tmp_path / "dead").exists()
    assert run.rounds["digest"].tolist() == quiet_run.rounds["digest"].tolist()
    found = [
        sorted((e["kind"], e["client_id"], e["outcome"]) for e in json.loads(text))
        for text in run.rounds["events"]
    ]
    assert [(found[0][0][0], found[0][0][2])] == [("driver", "restarted")]
    assert [(kind, outcome) for kind, _, outcome in found[1]] == [("died", "replaced")]
    assert ("raised", "form-05", "retried") in found[2]
    assert ("diverged", "form-00", "left out") in found[2]
    assert [len(events) for events in found] == [1, 1, 2, 0, 0, 0]
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_driver_actor_that_dies_too_often_ends_the_run_and_what_was_done_is_kept(
    local_ray, tmp_path
):
    config = mortal([9], "", "faults.max_retries=1", "tracking.enabled=false")
    seen = []
    with pytest.raises(DriverLostError, match="the driver actor died"):
        run_experiment(config, output=tmp_path / "run", watch=seen.append)
    assert [type(event) for event in seen].count(Message) == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "round_3",
        "round_7",
    ]


def test_a_run_that_was_finished_before_the_driver_actor_died_is_not_done_again(
    local_ray, tmp_path
):
    config = mortal([9], tmp_path, "tracking.enabled=false")
    other = Component("ditto", DittoConfig())
    written = tmp_path / "all" / "ditto-s0" / "summary.json"
    first, seen = [], []

    def watch(event):
        seen.append(event)
        if not first and written.exists():
            first.append(written.read_text())

    done, died = run_comparison(
        config, [other, config.method], output=tmp_path / "all", watch=watch
    )
    assert sum(isinstance(event, Message) for event in seen) == 1
    assert died.summary["status"] == "FINISHED"
    assert [written.read_text()] == first
    assert done.summary["wall_s"] == json.loads(first[0])["wall_s"]
    assert set(done.rounds["events"]) == {"[]"}


class Greedy:
    """Takes the CPUs that it reserves, and nothing else."""

    def here(self):
        return True


def test_a_driver_actor_that_finds_no_room_is_an_error_and_no_hang(local_ray, monkeypatch):
    monkeypatch.setattr(driver_actor, "ANSWER_S", 2.0)
    other = local_ray.remote(Greedy).options(num_cpus=2).remote()
    try:
        assert local_ray.get(other.here.remote(), timeout=60)
        with pytest.raises(RunError, match=r"did not answer within 2 s.* 0\.1 CPU"):
            follow(emit_many, 1)
    finally:
        local_ray.kill(other)


def test_a_driver_actor_that_never_can_find_room_is_an_error_and_no_hang(local_ray):
    with pytest.raises(RunError, match="not schedulable"):
        follow(emit_many, 1, driver_cpus=100)


def test_a_stopped_run_ends_after_its_round_and_goes_on_to_the_same_end(local_ray, tmp_path):
    undisturbed = load_config(None, (*LONG, "placement.backend=local"))
    whole = run_experiment(undisturbed, output=tmp_path / "whole").rounds
    config, interrupt, seen = load_config(None, LONG), Interrupt(), []

    def watch(event):
        assert isinstance(event, Progress)
        seen.append(event.round_index)
        interrupt.set()

    folder = tmp_path / "run"
    stopped = run_experiment(config, output=folder, watch=watch, interrupt=interrupt)
    last = seen[-1]
    assert last < ROUNDS - 1
    assert stopped.summary["status"] == "STOPPED"
    assert stopped.summary["rounds"] == last + 1
    newest = max(int(p.name.removeprefix("round_")) for p in (folder / "checkpoints").iterdir())
    assert newest == last
    resumed = run_experiment(config, resume=folder, watch=lambda e: seen.append(e.round_index))
    assert resumed.summary["status"] == "FINISHED"
    assert seen == list(range(ROUNDS))
    assert resumed.rounds["digest"].tolist() == whole["digest"].tolist()


def test_ctrl_c_ends_a_run_on_its_own_ray_cleanly(tmp_path):
    """As a terminal sends it: to the command and to the Ray processes of its group."""
    box = Sandbox(tmp_path)
    process = box.start(
        *(sys.executable, "-m", "selffl_ray", "run", "--output=run"),
        *("--set=training.num_rounds=5000", "--set=evaluation.every=10"),
        *("--set=placement.clients_per_actor=14", "--set=tracking.enabled=false"),
    )
    try:
        assert "round 10/5000" in process.stderr.readline()
        # The command, GCS, raylet, driver actor, client actor; not all of Ray's carry our mark.
        assert len(box.alive()) >= 5
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in err
        rounds = len(pd.read_parquet(tmp_path / "run" / "rounds.parquet"))
        assert out.splitlines()[0] == f"stopped after {rounds} rounds; go on with"
        assert out.splitlines()[1] == f"  selffl run --resume {tmp_path / 'run'}"
        assert (tmp_path / "run" / "checkpoints" / f"round_{rounds - 1}").is_dir()
        assert box.all_gone(within_s=15), box.alive()
    finally:
        box.end_all()
