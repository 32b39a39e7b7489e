"""Errors meant for a user: each message says the rule, the value found, the place and the remedy.

Every constructor hands all of its arguments to ``Exception.__init__``, so that the errors unpickle
between Ray actors with their message intact.
"""

from __future__ import annotations

LONGEST_SHOWN = 120
"""Characters of a wrong value that a message shows."""


def shown(value: object) -> str:
    """A value in a message, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes no number of more than some thousand digits.
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or a GPU."""
    # NumPy's is a MemoryError; torch raises a RuntimeError, of its own kind on a GPU only.
    words = ("allocate memory", "out of memory")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, MemoryError)


class SelfFLError(Exception):
    """Base of all errors that this package raises on purpose."""


class UsageError(SelfFLError):
    """The request itself cannot be carried out; found before any actor starts (exit status 2)."""


class ConfigError(UsageError):
    """A configuration key or value is wrong."""


class DataError(UsageError):
    """A data file, store or partition is missing, broken or does not fit the request."""


class ModelError(UsageError):
    """A model cannot be used as a stack of clients."""


class PlacementError(UsageError):
    """The machines cannot hold the actors that the placement asks for."""


class VarianceError(SelfFLError):
    """A variance is negative, NaN, or leaves nothing to weigh."""


class CheckpointError(UsageError):
    """A checkpoint is missing, broken or of another schema."""


class RunError(SelfFLError):
    """A run that had started cannot go on (exit status 1)."""


class DriverLostError(RunError):
    """The process of a driver actor ended in the middle of its work."""


class ClientError(SelfFLError):
    """One client failed while training or evaluating.

    Args:
        message: cause, in words.
        client_id: the client that failed.
        round_index: round, from 0.
        stage: ``local_update``, ``reduce``, ``evaluate``, ...
    """

    def __init__(self, message: str, client_id: str, round_index: int, stage: str) -> None:
        super().__init__(message, client_id, round_index, stage)
        self.message = message
        self.client_id = client_id
        self.round_index = round_index
        self.stage = stage

    def __str__(self) -> str:
        return f"client {self.client_id!r}, round {self.round_index}, {self.stage}: {self.message}"
