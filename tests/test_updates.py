"""Updates as they come in: sums by shape, who has the majority, and hosts that keep no payloads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from selffl_ray import trees
from selffl_ray.algorithms.base import Empty, Local, Mean
from selffl_ray.flat import exact_sum
from selffl_ray.messages import Commit, LocalRequest
from selffl_ray.updates import Tally, mean_shares
from tests.contract.harness import open_pool, prepared_with, start


class Payload(NamedTuple):
    params_CP: torch.Tensor


MEANS = (Mean(lambda p: p.params_CP), Mean(lambda p: p.params_CP[:, :2], "uniform"))
SHARES = (np.array([0.1, 0.2, 0.3, 0.4]), np.full(4, 0.25))
for _share in SHARES:
    # As what comes from another process is.
    _share.setflags(write=False)
CLIENTS = np.array([3, 5, 8, 9])


def updates(count: int, width: int = 6, seed: int = 0) -> Local:
    rows_CP = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width)))
    one_C = torch.ones(count)
    return Local(Empty(), Payload(rows_CP.float()), Empty(), one_C, one_C.long())


def tally() -> Tally:
    return Tally(MEANS, CLIENTS, SHARES)


def test_stacks_in_any_order_give_the_sums_of_all_at_once():
    local, parts = updates(4), tally()
    for members, pick in (([9], [3]), ([8, 3], [2, 0]), ([], []), ([5], [1])):
        parts.add(members, trees.take_rows(local, torch.tensor(pick, dtype=torch.int64)))
    found = parts.majority()
    assert (found.members, found.failures) == ([3, 5, 8, 9], [])
    rows_CP = local.payload.params_CP
    assert torch.equal(found.totals[0], exact_sum(rows_CP, SHARES[0].tolist()))
    assert torch.equal(found.totals[1], exact_sum(rows_CP[:, :2], SHARES[1].tolist()))


def test_whoever_has_another_shape_than_most_is_left_out_by_name():
    parts = tally()
    parts.add([5], updates(1, width=7))
    parts.add([9, 3, 8], updates(3))
    found = parts.majority()
    assert found.members == [3, 8, 9]
    assert len(found.totals[0]) == 6
    (failure,) = found.failures
    assert (failure.client_index, failure.kind) == (5, "shape")
    assert "payload.params_CP has shape (7,), expected (6,)" in failure.cause


def test_a_shape_that_cannot_be_summed_takes_nobody_else_along():
    parts, odd = tally(), updates(1)
    parts.add([5], odd._replace(payload=Payload(odd.payload.params_CP[:, 0])))
    parts.add([9, 3, 8], updates(3))
    found = parts.majority()
    assert found.members == [3, 8, 9]
    assert [(f.client_index, f.kind) for f in found.failures] == [(5, "shape")]


def test_an_error_in_adding_up_what_most_have_is_raised():
    parts, odd = tally(), updates(3)
    parts.add([5, 8, 9], odd._replace(payload=Payload(odd.payload.params_CP[:, 0])))
    parts.add([3], updates(1))
    with pytest.raises(IndexError, match="out of range"):
        parts.majority()


@pytest.mark.parametrize("first", [True, False])
def test_of_two_shapes_that_are_as_frequent_the_first_clients_is_taken(first):
    parts = tally()
    for members, width in (([8, 9], 6), ([3, 5], 7))[:: 1 if first else -1]:
        parts.add(members, updates(2, width))
    assert parts.majority().members == [3, 5]


def test_nobody_has_sums_of_nothing():
    found = tally().majority()
    assert (found.members, found.shapes, found.failures) == ([], None, [])
    assert [len(total) for total in found.totals] == [0, 0]


def ask(method: str) -> tuple[Any, Any, LocalRequest]:
    """A host in this process before its first round, what it is sent, and the request."""
    prepared = prepared_with(method)
    pool = open_pool(prepared)
    plan = prepared.plans[0]
    message = prepared.algorithm.broadcast(start(prepared), plan)
    shares = tuple(
        mean_shares(m.by, plan.cohort, prepared.federation) for m in prepared.algorithm.means
    )
    request = LocalRequest(plan, plan.cohort, trees.to_arrays(message[1]), shares)
    return pool.transport._hosts[0], trees.to_arrays(message[0]), request


def same(one: Any, other: Any) -> bool:
    left, right = (dict(trees.leaves(answer.reports)) for answer in (one, other))
    return (
        left.keys() == right.keys()
        and all(np.array_equal(left[name], right[name]) for name in left)
        and all(map(np.array_equal, one.means, other.means))
        and all(
            np.array_equal(getattr(one, name), getattr(other, name))
            for name in ("client_index", "loss", "gradients")
        )
    )


@pytest.mark.parametrize(
    ("method", "keeps"), [("fedavg", False), ("apfl", False), ("pfedvem", True), ("selffl", False)]
)
def test_a_client_that_is_asked_twice_for_a_round_answers_the_same(method, keeps):
    host, shared, request = ask(method)
    assert host._algorithm.keeps_payloads == keeps
    first = host.local_update(shared, (), request)
    states = [dict(trees.leaves(host._staged.state(i))) for i in host._staged]
    assert same(first, host.local_update(shared, (), request))
    trained = [dict(trees.leaves(host._staged.state(i))) for i in host._staged]
    for one, other in zip(states, trained, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    # Some of them, as after a refusal: the others' updates stay what they were.
    half = request.client_index[::2]
    rows = np.arange(0, len(request.client_index), 2)
    part = request._replace(
        client_index=half,
        per_client=trees.map_tree(lambda leaf: leaf[rows], request.per_client),
        mean_shares=tuple(share[rows] for share in request.mean_shares),
    )
    again = host.local_update(shared, (), part)
    for name in ("client_index", "loss", "gradients"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name)[::2])
    told = dict(trees.leaves(again.reports))
    for name, leaf in trees.leaves(first.reports):
        np.testing.assert_array_equal(told[name], leaf[::2])
    host._commit((Commit(request.plan.round_index, request.client_index),))
    assert sorted(host._staged) == request.client_index.tolist()


def test_a_host_keeps_no_update_that_was_only_averaged():
    host, shared, request = ask("fedavg")
    host.local_update(shared, (), request)
    kept = [host._staged.payload(index) for index in host._staged]
    assert kept == [Empty()] * len(request.client_index)
