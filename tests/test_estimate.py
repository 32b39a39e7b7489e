"""What a dry run says of a run on processors and on GPUs."""

from __future__ import annotations

import pytest

from selffl_ray import estimate
from selffl_ray.estimate import estimate_run
from selffl_ray.runtime.placement import ActorPlan, PlacementPlan
from selffl_ray.stacking import blank_batch
from tests.runtime.placements import prepared_with
from tests.test_digests_local import CNN, DIGITS

HALVES = (tuple(range(7)), tuple(range(7, 14)))


def lines(shares, *settings, base=CNN):
    actors = tuple(ActorPlan(c, 1, gpu) for c, gpu in zip(HALVES, shares, strict=True))
    return "\n".join(estimate_run(prepared_with(*base, *settings), PlacementPlan(actors, 0.1, "")))


@pytest.mark.parametrize("shares", [(0, 0), (0.5, 0)])
def test_time_and_stacks_are_those_of_processors_where_any_client_trains_on_one(shares):
    found = lines(shares)
    assert "stacks of up to 1\n" in found
    assert "training about " in found


@pytest.mark.parametrize(
    ("settings", "height"),
    [((), 4), (("training.participation_rate=1.0",), 7), (("placement.stack_size=2",), 2)],
)
def test_a_stack_is_no_taller_than_a_hosts_part_of_the_cohort(settings, height, monkeypatch):
    """Fourteen clients on two actors: what is said is what is timed."""
    timed = []

    def blank(model, task, rows, length):
        timed.append(rows)
        return blank_batch(model, task, rows, length)

    monkeypatch.setattr(estimate, "blank_batch", blank)
    assert f"stacks of up to {height}\n" in lines((0, 0), *settings, base=DIGITS)
    assert timed == [height]


def test_on_gpus_neither_is_taken_from_a_processor():
    found = lines((0.5, 0.5))
    assert "stacks as tall as the GPUs' memory allows" in found
    assert "training time on GPUs is not estimated" in found
    assert "training about" not in found


def test_what_is_given_is_said_on_gpus_too():
    assert "stacks of up to 3\n" in lines((0.5, 0.5), "placement.stack_size=3")
    assert "training about " in lines((0.5, 0.5), "placement.device=cpu")
