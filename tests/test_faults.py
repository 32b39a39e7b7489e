"""What follows from failures: the decision as a table."""

from __future__ import annotations

import pytest

from selffl_ray.errors import ConfigError
from selffl_ray.faults import Abort, FaultsConfig, Proceed, Replace, Retry, decide, outcome_of
from selffl_ray.messages import ClientFailure


def failures(mendable: int, hopeless: int = 0) -> list[ClientFailure]:
    """The first clients fail so that asking again may help, the next ones for good."""
    return [
        ClientFailure(i, "local_update", f"cause {i}", "raised" if i < mendable else "diverged")
        for i in range(mendable + hopeless)
    ]


@pytest.mark.parametrize(
    ("share", "asked", "failing", "attempt", "expected"),
    [
        # Everybody answered.
        (0.5, 10, failures(0), 0, Proceed()),
        (1.0, 10, failures(0), 0, Proceed()),
        (1.0, 1, failures(0), 5, Proceed()),
        # Failures that may pass are asked again, as long as attempts are left.
        (0.5, 10, failures(2), 0, Retry((0, 1))),
        (0.5, 10, failures(2), 1, Retry((0, 1))),
        (0.5, 10, failures(10), 0, Retry(tuple(range(10)))),
        # Hopeless ones are not asked again, even beside others.
        (0.5, 10, failures(1, 3), 0, Retry((0,))),
        (0.5, 10, failures(0, 3), 0, Proceed()),
        # No attempt is left: enough answered, or not.
        (0.5, 10, failures(5), 2, Proceed()),
        (0.5, 10, failures(6), 2, Abort),
        (0.5, 10, failures(0, 6), 0, Abort),
        (0.5, 3, failures(1), 2, Proceed()),
        (0.5, 3, failures(2), 2, Abort),
        (1.0, 10, failures(1), 2, Abort),
        # One at least must answer, however small the share.
        (0.01, 10, failures(9), 2, Proceed()),
        (0.01, 10, failures(10), 2, Abort),
        # 0.55 * 100 is 55.00000000000001: 55 are enough all the same.
        (0.55, 100, failures(45), 2, Proceed()),
        (0.55, 100, failures(46), 2, Abort),
    ],
)
def test_a_decision_follows_from_share_failures_and_attempt(
    share, asked, failing, attempt, expected
):
    decision = decide(FaultsConfig(min_participants=share), asked, failing, attempt)
    if expected is Abort:
        assert isinstance(decision, Abort)
    else:
        assert decision == expected


@pytest.mark.parametrize(
    ("attempt", "renewed", "retries", "expected"),
    [
        (0, (), 1, Retry((0,))),
        (1, (), 1, Replace((0,))),
        # A fresh host did not help: its attempts, and then the round goes on without the client.
        (0, (0,), 1, Retry((0,))),
        (1, (0,), 1, Proceed()),
        (0, (), 0, Proceed()),
    ],
)
def test_a_host_that_still_lacks_memory_is_replaced_once(attempt, renewed, retries, expected):
    found = [ClientFailure(0, "local_update", "cause", "memory")]
    assert decide(FaultsConfig(max_retries=retries), 4, found, attempt, renewed) == expected


def test_what_a_decision_means_for_a_client():
    assert outcome_of(Retry((1,)), 1) == "retried"
    assert outcome_of(Replace((1,)), 1) == "replaced"
    assert outcome_of(Retry((1,)), 2) == outcome_of(Proceed(), 1) == "left out"
    assert outcome_of(Abort(""), 1) == "aborted"


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_round_is_asked_for_again_exactly_max_retries_times(retries):
    config, attempts = FaultsConfig(max_retries=retries), 0
    while isinstance(decide(config, 4, failures(1), attempts), Retry):
        attempts += 1
    assert attempts == retries


def test_an_abort_says_how_many_answered_and_how_many_must():
    decision = decide(FaultsConfig(min_participants=0.6), 10, failures(0, 7), 0)
    assert isinstance(decision, Abort)
    assert "only 3 of 10 clients answered" in decision.reason
    assert "faults.min_participants asks for 6" in decision.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_participants": 0.0}, r"faults.min_participants must lie in \(0, 1\], got 0.0"),
        ({"min_participants": 1.1}, r"faults.min_participants must lie in \(0, 1\], got 1.1"),
        ({"min_participants": float("nan")}, "faults.min_participants"),
        ({"max_retries": -1}, "faults.max_retries must be >= 0, got -1"),
        ({"client_timeout_s": 0.0}, "faults.client_timeout_s must be > 0, got 0.0"),
        ({"client_timeout_s": float("nan")}, "faults.client_timeout_s"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FaultsConfig(**options)
