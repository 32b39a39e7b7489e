"""Arrays as Arrow columns and back, without a copy on the way back, and without pandas."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]


def as_column(values: Array) -> pa.Array:
    """(N, ...) as a primitive column, or as fixed-size lists of the flattened examples."""
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 1:
        return column
    return pa.FixedSizeListArray.from_arrays(column, int(np.prod(values.shape[1:])))


def flat(column: pa.Array) -> Array:
    """What :func:`as_column` made, flattened."""
    return numbers(column.flatten() if pa.types.is_fixed_size_list(column.type) else column)


def numbers(values: pa.Array) -> Array:
    """A column of numbers without gaps as the bytes that it lies in.

    Its own ``to_numpy`` and ``to_pandas_dtype`` import pandas, which is 25 MB in every host.
    """
    is_real, is_signed = pa.types.is_floating(values.type), pa.types.is_signed_integer(values.type)
    letter = "f" if is_real else "i" if is_signed else "u"
    kind = np.dtype(f"{letter}{values.type.bit_width // 8}")
    if not len(values):
        return np.empty(0, kind)
    _, data = values.buffers()
    return np.frombuffer(data, kind, len(values), values.offset * kind.itemsize)
