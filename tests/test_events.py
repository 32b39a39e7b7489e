"""What went wrong: kinds, who is refused when shapes differ, and events that stand once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from selffl_ray.events import Event, EventBook, Whereabouts
from selffl_ray.messages import LocalAnswer, Shapes
from selffl_ray.tables import RunTables
from selffl_ray.updates import agreeing, failure_kind
from tests.test_tables import record

RIGHT: Shapes = (("payload.params_CP", (10,)),)
WRONG: Shapes = (("payload.params_CP", (9,)),)


def answer(clients: list[int], shapes: Shapes | None) -> LocalAnswer:
    index = np.asarray(clients, np.int64)
    means = (np.zeros(1, np.int64),)
    return LocalAnswer(index, (), index + 0.5, index, means, (), shapes, 0.1, 1)


def refused(found: dict[int, LocalAnswer]) -> list[int]:
    return sorted(f.client_index for a in found.values() for f in a.failures if f.kind == "shape")


@pytest.mark.parametrize(
    ("answers", "taken", "expected"),
    [
        ({0: answer([0], RIGHT), 1: answer([1], RIGHT)}, None, []),
        ({0: answer([0], RIGHT), 1: answer([1], WRONG), 2: answer([2], RIGHT)}, None, [1]),
        # Clients count, not hosts.
        ({0: answer([0, 1, 2], RIGHT), 1: answer([3], WRONG), 2: answer([4], WRONG)}, None, [3, 4]),
        # Nobody can be trusted.
        ({0: answer([0], RIGHT), 1: answer([1], WRONG)}, None, [0, 1]),
        # What was taken in an earlier attempt decides.
        ({0: answer([0, 1], WRONG), 1: answer([2], RIGHT)}, RIGHT, [0, 1]),
        # A host whose clients all failed has no shape.
        ({0: answer([], None), 1: answer([1], RIGHT)}, None, []),
    ],
)
def test_updates_of_another_shape_than_most_are_refused(answers, taken, expected):
    found = agreeing(answers, taken)
    assert refused(found) == expected
    for one in found.values():
        if any(f.kind == "shape" for f in one.failures):
            assert (one.reports, one.means, len(one.client_index)) == (None, (), 0)


def test_a_refused_shape_is_said_with_the_right_one():
    found = agreeing({h: answer([h], WRONG if h == 1 else RIGHT) for h in range(3)})
    assert found[1].failures[0].cause == (
        "its update's payload.params_CP has shape (9,), expected (10,)"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("no"), "raised"),
        (MemoryError(), "memory"),
        (RuntimeError("the shape is wrong"), "raised"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory"),
    ],
)
def test_an_error_is_told_from_a_lack_of_memory(error, kind):
    assert failure_kind(error)[1] == kind


def test_what_torch_says_when_memory_is_refused_is_a_lack_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert failure_kind(caught.value)[1] == "memory"


def event(round_index: int, attempt: int = 0, kind: str = "raised", client: str = "a") -> Event:
    where = (0, "process 1", 5)
    return Event(round_index, attempt, kind, client, 1, "cause", *where, "retried")  # type: ignore[arg-type]


def test_an_event_that_comes_back_in_a_replayed_round_stands_there_once():
    book = EventBook()
    for one in (event(3), event(3, attempt=1), event(4), event(3), event(3, client="b")):
        book.note(one)
    assert book.of(3) == [event(3), event(3, attempt=1), event(3, client="b")]
    # What no row has is not forgotten.
    book.forget(3)
    assert len(book.outside_rows()) == 4
    assert len(book.for_row(3)) == 3
    assert book.outside_rows() == [event(4)]
    book.forget(3)
    assert book.of(3) == []
    assert book.of(4) == [event(4)]


def test_events_of_rounds_that_are_done_again_are_taken_over_from_the_tables(tmp_path):
    tables = RunTables(tmp_path, ["a", "b", "c"], "accuracy")
    for index in range(4):
        one = record(index, x__y=1.0)
        one.events = [event(index, kind="memory")]
        tables.add(one)
    tables.flush()
    book = EventBook()
    book.recall(RunTables(tmp_path, ["a", "b", "c"], "accuracy").restore(1), 1)
    assert [book.of(index) for index in range(4)] == [
        [],
        [],
        [event(2, kind="memory")],
        [event(3, kind="memory")],
    ]
    assert pd.read_parquet(tmp_path / "rounds.parquet")["events"].str.startswith('[{"round').all()


def test_whereabouts_tell_host_place_and_memory():
    assert str(Whereabouts(3, "node 1a2b", 2**30)) == (
        "host 3, node 1a2b, last memory reading 1024 MiB"
    )
    assert str(Whereabouts(3, "node 1a2b", None)).endswith("last memory reading unknown")
