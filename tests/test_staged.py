"""Updates that wait for the driver: each client gets its own row back, whatever it came in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from selffl_ray.algorithms.base import Local
from selffl_ray.staged import Staged


class Seen(NamedTuple):
    number: Any


def update_of(*clients):
    """A row for each, whose numbers are told by the client."""
    own = torch.tensor(clients, dtype=torch.float64)
    rows = torch.stack([own, own + 0.5], dim=1)
    return Local(Seen(rows), Seen(-rows), Seen(10 * own), own / 8, own.long() + 3)


@pytest.fixture
def staged():
    """Three stacks of round 4, of which one client was trained again."""
    found = Staged()
    found.begin(4)
    found.put([7, 2], update_of(7, 2))
    found.put([5, 9, 1], update_of(5, 9, 1))
    found.put([9], update_of(9))
    return found


@pytest.mark.parametrize("asked", [[1, 2, 5, 7, 9], [9, 1], [7], [2, 7, 2]])
def test_an_answer_has_a_row_for_each_client_in_the_order_asked_for(staged, asked):
    told = staged.told(asked)
    np.testing.assert_array_equal(told.report.number, 10.0 * np.array(asked))
    np.testing.assert_array_equal(told.loss_C, np.array(asked) / 8)
    np.testing.assert_array_equal(told.gradients_C, np.array(asked) + 3)
    assert (told.loss_C.dtype, told.gradients_C.dtype) == (np.float64, np.int64)


def test_of_nobody_there_is_no_report(staged):
    told = staged.told([])
    assert told.report is None
    assert len(told.loss_C) == len(told.gradients_C) == 0


@pytest.mark.parametrize("client", [1, 2, 5, 7, 9])
def test_a_client_gets_its_own_row(staged, client):
    rows = torch.tensor([[client, client + 0.5]], dtype=torch.float64)
    assert torch.equal(staged.state(client).number, rows)
    assert torch.equal(staged.payload(client).number, -rows)
    local = staged.local(client)
    assert torch.equal(local.state.number, rows)
    assert local.loss_C.tolist() == [client / 8]


def test_another_round_begins_with_nothing(staged):
    staged.begin(4)
    assert sorted(staged) == [1, 2, 5, 7, 9]
    assert staged.has(5, 4)
    assert not staged.has(5, 3)
    assert not staged.has(6, 4)
    staged.begin(5)
    assert not list(staged)
    assert 5 not in staged
    assert not staged.has(5, 5)
