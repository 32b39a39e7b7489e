"""Nested NamedTuples of tensors: structure is kept, rows come apart and together again."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selffl_ray import trees


class Empty(NamedTuple):
    pass


class Inner(NamedTuple):
    first_C: Any
    second_CP: Any


class Outer(NamedTuple):
    inner: Any
    plain_CP: Any
    nothing: Any


def tree(num_clients=4, seed=0):
    rng = np.random.default_rng(seed)
    inner = Inner(torch.arange(num_clients), torch.from_numpy(rng.normal(size=(num_clients, 2))))
    plain = torch.from_numpy(rng.normal(size=(num_clients, 3))).float()
    return Outer(inner, plain, Empty())


def assert_same(one, other):
    assert [name for name, _ in trees.leaves(one)] == [name for name, _ in trees.leaves(other)]
    for (_, a), (_, b) in zip(trees.leaves(one), trees.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_mapping_keeps_the_structure_and_the_types():
    mapped = trees.map_tree(lambda leaf: leaf.shape, tree())
    # A shape is itself a tuple: a result is not taken apart.
    assert mapped == Outer(Inner((4,), (4, 2)), (4, 3), Empty())
    assert type(mapped) is Outer
    assert type(mapped.inner) is Inner
    assert type(mapped.nothing) is Empty


def test_mapping_pairs_the_leaves_of_several_trees():
    one, other = tree(seed=1), tree(seed=2)
    added = trees.map_tree(torch.add, one, other)
    assert torch.equal(added.inner.second_CP, one.inner.second_CP + other.inner.second_CP)
    assert torch.equal(added.plain_CP, one.plain_CP + other.plain_CP)


def test_trees_of_different_shape_cannot_be_mapped_together():
    with pytest.raises(ValueError, match="zip"):
        trees.map_tree(torch.add, tree(), tree().inner)


def test_a_bare_tensor_is_a_tree_of_one_leaf():
    leaf = torch.ones(3)
    assert torch.equal(trees.map_tree(torch.neg, leaf), -leaf)
    assert torch.equal(trees.take_rows(leaf, slice(1)), leaf[:1])
    assert dict(trees.leaves(leaf)) == {"": leaf}


def test_leaves_are_named_by_their_fields_in_order():
    built = tree()
    named = list(trees.leaves(built))
    assert [name for name, _ in named] == ["inner.first_C", "inner.second_CP", "plain_CP"]
    assert named[1][1] is built.inner.second_CP
    assert next(trees.leaves(built, "server"))[0] == "server.inner.first_C"


def test_a_tree_without_fields_has_no_leaves_and_survives_everything():
    for function in (
        lambda t: trees.take_rows(t, slice(0, 1)),
        lambda t: trees.concatenate([t, t]),
        trees.to_arrays,
        trees.to_tensors,
    ):
        assert type(function(Empty())) is Empty
    assert list(trees.leaves(Empty())) == []


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0, 3])])
def test_rows_are_taken_of_every_leaf(rows):
    built, taken = tree(), trees.take_rows(tree(), rows)
    for (_, leaf), (_, part) in zip(trees.leaves(built), trees.leaves(taken), strict=True):
        assert torch.equal(part, leaf[rows])


def test_concatenation_puts_rows_that_were_cut_back_together():
    built = tree()
    parts = [trees.take_rows(built, part) for part in (slice(0, 1), slice(1, 3), slice(3, 4))]
    assert_same(trees.concatenate(parts), built)
    assert trees.concatenate([built]) is built
    swapped = trees.concatenate([parts[2], parts[0]])
    assert swapped.inner.first_C.tolist() == [3, 0]


@given(wanted=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=9))
def test_rows_of_several_trees_are_picked_in_the_order_asked_for(wanted):
    built = [tree(seed=seed) for seed in range(3)]
    rows = [trees.take_rows(built[at], slice(row, row + 1)) for at, row in wanted]
    picked = trees.pick_rows([(built[at], row) for at, row in wanted])
    assert_same(picked, trees.concatenate(rows))
    assert type(picked.nothing) is Empty


def test_picked_rows_are_copies():
    built = tree()
    picked = trees.pick_rows([(built, 2)])
    picked.plain_CP.zero_()
    assert built.plain_CP[2].any()


def test_arrays_and_back_is_the_same_tree():
    built = tree()
    arrays = trees.to_arrays(built)
    assert all(isinstance(leaf, np.ndarray) for _, leaf in trees.leaves(arrays))
    assert_same(trees.to_tensors(arrays), built)
    assert_same(trees.to_tensors(arrays, torch.device("cpu")), built)


def test_a_tensor_with_a_graph_can_become_an_array():
    assert trees.to_arrays(Inner(torch.ones(2, requires_grad=True), torch.zeros(2))).first_C[0] == 1


def test_tensors_are_copies_of_read_only_arrays():
    """Arrays from shared memory are read-only, and torch warns about, and would write to, them."""
    arrays = trees.to_arrays(tree())
    for _, leaf in trees.leaves(arrays):
        leaf.setflags(write=False)
    tensors = trees.to_tensors(arrays)
    before = trees.map_tree(np.copy, arrays)
    for _, leaf in trees.leaves(tensors):
        leaf.add_(1)
    for (_, array), (_, copy) in zip(trees.leaves(arrays), trees.leaves(before), strict=True):
        np.testing.assert_array_equal(array, copy)
