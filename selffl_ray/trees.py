"""Nested NamedTuples of tensors: the messages and states of algorithms, taken apart by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def map_tree(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The same structure with the function applied to every leaf (and to those of the others)."""
    if isinstance(tree, tuple):
        parts = [map_tree(function, *same) for same in zip(tree, *others, strict=True)]
        return type(tree)(*parts)
    return function(tree, *others)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of every leaf; names are field names joined by dots."""
    if isinstance(tree, tuple):
        for name, part in zip(tree._fields, tree, strict=True):  # type: ignore[attr-defined]
            yield from leaves(part, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, tree


def take_rows(tree: Any, rows: Tensor | slice) -> Any:
    """The given rows of every leaf."""
    return map_tree(lambda leaf: leaf[rows], tree)


def concatenate(trees: Sequence[Any]) -> Any:
    """One tree with the rows of all, in order."""
    if len(trees) == 1:
        return trees[0]
    return map_tree(lambda *parts: torch.cat(parts), *trees)


def pick_rows(found: Sequence[tuple[Any, int]]) -> Any:
    """One tree of single rows, each of (a tree, its row there), in order; at least one.

    Trees that are the same object are taken together: a thousand rows of few trees cost what few
    operations do, and each row is copied once.
    """
    parts: dict[int, _Part] = {}
    for place, (tree, row) in enumerate(found):
        part = parts.setdefault(id(tree), _Part(tree, [], []))
        part.rows.append(row)
        part.places.append(place)
    # Tensors, made once: each leaf would make its own of a list, which takes longer than the rows.
    index = [(torch.tensor(part.places), torch.tensor(part.rows)) for part in parts.values()]
    if len(index) == 1:
        return take_rows(found[0][0], index[0][1])

    def placed(*leaves: Tensor) -> Tensor:
        out = leaves[0].new_empty((len(found), *leaves[0].shape[1:]))
        for leaf, (places, rows) in zip(leaves, index, strict=True):
            out[places] = leaf[rows]
        return out

    return map_tree(placed, *(part.tree for part in parts.values()))


class _Part(NamedTuple):
    """A tree, the rows of it that are wanted, and the place of each in the result."""

    tree: Any
    rows: list[int]
    places: list[int]


def to_arrays(tree: Any) -> Any:
    """Tensors as NumPy arrays on the CPU, for the way between processes."""
    return map_tree(lambda leaf: leaf.detach().cpu().numpy(), tree)


def to_tensors(tree: Any, device: torch.device | None = None) -> Any:
    """NumPy arrays as tensors; copied, because arrays from shared memory are read-only."""
    return map_tree(lambda leaf: torch.from_numpy(np.array(leaf)).to(device or "cpu"), tree)
