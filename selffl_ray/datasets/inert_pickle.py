"""Read a pickle of numbers, lists and dicts without executing anything that it asks for.

Not even NumPy's own functions are called: a pickle may tell them that bytes are an array of
objects, which ends the process or worse. Stand-ins note what the pickle says of an array, and the
reader makes the array itself.
"""

from __future__ import annotations

import pickle
from io import BytesIO
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

BROKEN = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError,
          OverflowError, MemoryError)  # fmt: skip
"""What unpickling a file that is not as it was written may raise."""


def _text(value: str | bytes) -> str:
    """A string of Python 2 comes as bytes if the reader asked for bytes."""
    return value if isinstance(value, str) else value.decode("ascii")


class _Dtype:
    """Notes what a pickle says of an element type."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code, self.order = _text(code), "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])


class Array:
    """Notes what a pickle says of an array."""

    def __init__(self, *_: Any) -> None:
        self.shape: tuple[int, ...] = ()
        self.type, self.column_major, self.raw = "unknown", False, b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, self.column_major, self.raw = state
        self.type = dtype.order + dtype.code

    def numbers(self, *types: str) -> npt.NDArray[Any]:
        """The array, if its type is one of these (as in ``"<f8"``).

        Raises:
            ValueError: another type, or bytes that do not fill the shape.
        """
        if self.type not in types:
            wanted = " or ".join(np.dtype(t).name for t in types)
            raise ValueError(f"an array of type {self.type!r} instead of {wanted}")
        order: Literal["F", "C"] = "F" if self.column_major else "C"
        return np.frombuffer(self.raw, self.type).reshape(self.shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Knows the four names that arrays need (one of them has two homes), none of them as it is."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return STAND_INS[module, name]


def load(raw: bytes, *, encoding: str = "ASCII") -> Any:
    """What a pickle holds, with an ``Array`` for each array.

    Args:
        encoding: of Python 2's strings; ``"bytes"`` leaves them as bytes.

    Raises:
        one of BROKEN: not a pickle, truncated, or one that asks for anything else.
    """
    return _Unpickler(BytesIO(raw), encoding=encoding).load()
