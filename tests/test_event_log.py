"""``events.jsonl``: what went wrong outlives a kill, and stands in the tables once."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from selffl_ray.api import run_experiment
from selffl_ray.config import load_config
from selffl_ray.event_log import EventLog
from selffl_ray.events import Event, EventBook

ROOT = Path(__file__).parents[1]


def event(round_index: int, client: str | None = "a", **changes: object) -> Event:
    kind = "raised" if client else "silent"
    one = Event(round_index, 0, kind, client, 1, "cause", 0, "process 1", 5, "retried")  # type: ignore[arg-type]
    return one._replace(**changes)


def read(log: EventLog) -> list[Event]:
    return [Event(**row) for row in log.read()]


def test_each_event_is_on_the_disk_as_it_is_added_and_goes_when_it_is_held_elsewhere(tmp_path):
    log = EventLog(tmp_path)
    assert read(log) == []
    for number in range(3):
        log.add(event(number))
        assert len((tmp_path / "events.jsonl").read_text().splitlines()) == number + 1
    assert read(EventLog(tmp_path)) == [event(0), event(1), event(2)]
    log.keep([event(2)])
    log.add(event(3))
    assert read(log) == [event(2), event(3)]
    log.keep([])
    assert list(tmp_path.iterdir()) == []


def test_of_the_same_event_the_newest_line_counts(tmp_path):
    log = EventLog(tmp_path)
    replayed = event(1, memory_bytes=7, outcome="left out", host=3)
    for one in (event(1), event(1, client="b"), replayed):
        log.add(one)
    assert read(log) == [replayed, event(1, client="b")]


def test_a_line_that_was_cut_anywhere_takes_no_other_event_along(tmp_path, caplog):
    log = EventLog(tmp_path)
    log.add(event(0))
    first = log.path.read_bytes()
    log.add(event(1, cause="é"))
    whole = log.path.read_bytes()
    for cut in range(len(first), len(whole)):
        log.path.write_bytes(whole[:cut])
        # Without its end of line an event is whole.
        lost = len(first) < cut < len(whole) - 1
        kept = [event(0), event(1, cause="é")][: 1 if cut < len(whole) - 1 else 2]
        caplog.clear()
        assert read(log) == kept
        log.add(event(2))
        assert read(log) == [*kept, event(2)]
        assert lost == any("broken" in r.getMessage() for r in caplog.records), cut


def test_what_is_no_event_is_said_and_left_out(tmp_path, caplog):
    log = EventLog(tmp_path)
    good = event(0)._asdict()
    bad = [
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"null",
        *(json.dumps(good | {k: [1]}).encode() for k in good),
        json.dumps({k: v for k, v in good.items() if k != "cause"}).encode(),
    ]
    log.path.write_bytes(b"\n".join([*bad, json.dumps(good).encode()]))
    assert read(log) == [event(0)]
    assert f"{len(bad)} of {len(bad) + 1} lines are broken" in caplog.text


def test_a_log_that_cannot_be_written_is_said_once_and_nothing_ends(tmp_path, caplog):
    log = EventLog(tmp_path)
    log.path.mkdir()
    with caplog.at_level(logging.WARNING):
        log.add(event(0))
        log.add(event(1))
        log.keep([])
    assert [r.getMessage().count("cannot be written") for r in caplog.records] == [1]
    assert log.read() == []


def test_the_same_failure_on_another_number_of_hosts_is_one_event():
    book = EventBook()
    for host in (0, 3):
        book.note(event(2, host=host))
    assert book.of(2) == [event(2, host=3)]


def test_losses_that_read_the_same_are_numbered_and_none_replaces_another():
    """A host that is silent again once another driver actor has begun to count anew."""
    book = EventBook()
    book.recall([event(2, None, attempt=1)._asdict(), event(2, None, attempt=2)._asdict()], -1)
    assert book.note(event(2, None, attempt=1)).attempt == 3
    assert [e.attempt for e in book.of(2)] == [1, 2, 3]


def test_events_up_to_a_kill_stand_once_in_the_table_of_the_run_that_goes_on(tmp_path):
    """A client that raises once, before a checkpoint and after it, and one whose NaN comes back."""
    (tmp_path / "notes").mkdir()
    strikes = ["1 form-05 raised", "3 form-03 raised", "4 form-00 diverged"]
    settings = [
        "plugins=[tests.runtime.doomed]",
        "placement.backend=local",
        # In a stack a client that raises is tried once more alone.
        "placement.stack_size=1",
        "tracking.enabled=false",
        "training.num_rounds=6",
        "training.num_local_steps=2",
        "model.hidden=[4]",
        "checkpoint.every=3",
        f"method={{name: doomed, notes: '{tmp_path / 'notes'}', strikes: {json.dumps(strikes)}}}",
    ]
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "selffl_ray", "run", "--output", str(folder)]
    command += [f"--set={one}" for one in (*settings, "method.dies=5")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["round_2"]
    # That of the first round is in the table, which the checkpoint counts on.
    left = [(e.round_index, e.kind, e.client_id) for e in read(EventLog(folder))]
    assert left == [(3, "raised", "form-03"), (4, "diverged", "form-00")]
    with (folder / "events.jsonl").open("ab") as file:
        os.write(file.fileno(), b'{"round_index": 4, "att')
    config = load_config(folder / "config.yaml", (), folder=ROOT)
    run = run_experiment(config, resume=folder)
    quiet = load_config(None, (*settings, "method.quiet=true"), folder=ROOT)
    assert (
        run.rounds["digest"].tolist()
        == run_experiment(quiet, output=tmp_path / "quiet").rounds["digest"].tolist()
    )
    found = [
        [(e["kind"], e["client_id"], e["outcome"]) for e in json.loads(text)]
        for text in run.rounds["events"]
    ]
    assert found == [
        [],
        [("raised", "form-05", "retried")],
        [],
        [("raised", "form-03", "retried")],
        [("diverged", "form-00", "left out")],
        [],
    ]
    assert run.rounds["faults"].tolist() == [0, 1, 0, 1, 1, 0]
    assert "events" not in run.summary
    assert not (folder / "events.jsonl").exists()
