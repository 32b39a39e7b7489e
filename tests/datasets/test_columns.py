"""Arrow columns: what goes in comes out, also of a part of a column, and nothing is copied."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from selffl_ray.datasets.columns import as_column, flat, numbers


@pytest.mark.parametrize("kind", ["f4", "f8", "i8", "i4", "i2", "u1", "f2"])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 4), (0, 3), (0,)])
def test_examples_come_back_as_they_were(kind, shape):
    values = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    column = as_column(values)
    assert len(column) == shape[0]
    np.testing.assert_array_equal(flat(column).reshape(shape), values)
    assert flat(column).dtype == values.dtype


def test_a_slice_gives_its_own_rows_and_shares_the_columns_memory():
    column = as_column(np.arange(12, dtype=np.int64))
    part = numbers(column.slice(4, 3))
    assert part.tolist() == [4, 5, 6]
    assert np.shares_memory(part, numbers(column))


def test_text_is_not_taken_for_numbers():
    with pytest.raises((ValueError, pa.ArrowException)):
        numbers(pa.array(["a", "b"]))
