"""Errors travel between processes whole, and those of the user's own making are told apart."""

from __future__ import annotations

import inspect
import pickle

import pytest

from selffl_ray import errors

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if found.__module__ == errors.__name__
]


ARGUMENTS = {errors.ClientError: ("loss is NaN", "client-03", 17, "evaluate")}


def example(error_type):
    """An instance whose arguments are all different."""
    return error_type(*ARGUMENTS.get(error_type, ("mu must be >= 0, got -1",)))


def test_every_class_is_listed():
    assert {"SelfFLError", "UsageError", "ClientError", "RunError"} <= {c.__name__ for c in CLASSES}


@pytest.mark.parametrize("error_type", CLASSES)
def test_an_error_unpickles_with_its_message_and_fields(error_type):
    error = example(error_type)
    error.add_note("seen by host 2")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol))
        assert type(back) is error_type
        assert back.args == error.args
        assert str(back) == str(error)
        assert vars(back) == vars(error)


@pytest.mark.parametrize("error_type", [c for c in CLASSES if c is not errors.ClientError])
def test_an_error_shows_its_message_as_given(error_type):
    assert str(example(error_type)) == "mu must be >= 0, got -1"


def test_a_clients_error_names_client_round_and_stage():
    error = pickle.loads(pickle.dumps(example(errors.ClientError)))
    assert (error.message, error.client_id) == ("loss is NaN", "client-03")
    assert (error.round_index, error.stage) == (17, "evaluate")
    assert str(error) == "client 'client-03', round 17, evaluate: loss is NaN"


@pytest.mark.parametrize("error_type", CLASSES)
def test_one_except_clause_catches_all_of_them(error_type):
    with pytest.raises(errors.SelfFLError):
        raise example(error_type)


def test_usage_errors_are_those_that_are_found_before_a_run_starts():
    family = {c.__name__ for c in CLASSES if issubclass(c, errors.UsageError)}
    assert family == {
        "UsageError",
        "ConfigError",
        "DataError",
        "ModelError",
        "PlacementError",
        "CheckpointError",
    }
