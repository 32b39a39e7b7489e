"""Adding up updates: those that have the clients' rows and one shape.

Nobody knows beforehand which shape a method's updates have, so the shape that most clients of a
round have is taken for the right one, first within a host and then among the hosts. If all agree on
a wrong one, the driver finds that the server's state would change its shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selffl_ray import trees
from selffl_ray.algorithms.base import Federation, Indices, Local, Mean
from selffl_ray.errors import is_lack_of_memory
from selffl_ray.flat import exact_sum, representable
from selffl_ray.messages import ClientFailure, FailureKind, LocalAnswer, Shapes


class Upload(NamedTuple):
    """What is sent of an update."""

    payload: Any
    report: Any


class ShapeError(Exception):
    """An update whose rows do not belong to the clients that were asked."""


def check_rows(local: Local, before: Any, num_clients: int) -> None:
    """Whether an update has a row for each client, and the state the form that it had.

    Raises:
        ShapeError: naming the part, its shape and the right one.
    """
    for name, leaf in trees.leaves(local):
        if leaf.ndim == 0 or len(leaf) != num_clients:
            rows = "no rows" if leaf.ndim == 0 else f"{len(leaf)} rows"
            raise ShapeError(f"its update's {name} has {rows}, expected {num_clients}")
    was, now = _shapes(before), _shapes(local.state)
    if was != now:
        raise ShapeError(shape_cause(now, was).replace("update", "state", 1))


def _shapes(tree: Any) -> Shapes:
    """Shapes of the leaves of a tree without the client axis."""
    return tuple((name, tuple(leaf.shape[1:])) for name, leaf in trees.leaves(tree))


class Tally:
    """Sums of a host's updates for the means, as they come in, separately for each shape.

    Updates are added up while they are in the cache, and nobody needs to keep them for that.

    Args:
        means: what is summed.
        client_index: everybody who may come in.
        shares: weights of these clients in each mean.
    """

    def __init__(
        self, means: Sequence[Mean], client_index: Indices, shares: Sequence[npt.NDArray[Any]]
    ) -> None:
        self._means = means
        self._at = {int(index): row for row, index in enumerate(client_index)}
        # Copied, because arrays that came from another process are read-only.
        self._shares = [torch.from_numpy(np.array(share)) for share in shares]
        self._members: dict[Shapes, list[int]] = {}
        self._totals: dict[Shapes, list[Tensor]] = {}
        self._errors: dict[Shapes, Exception] = {}

    def add(self, members: Sequence[int], local: Local) -> None:
        """Usable updates of some clients, a row each; of nobody, perhaps."""
        if not members:
            return
        shapes = _shapes(Upload(local.payload, local.report))
        at = torch.tensor([self._at[i] for i in members])
        self._members.setdefault(shapes, []).extend(members)
        try:
            parts = [
                exact_sum(mean.rows(local.payload), share[at])
                for mean, share in zip(self._means, self._shares, strict=True)
            ]
        except Exception as error:
            # Of a shape that is left out in the end nothing has to be possible.
            self._errors.setdefault(shapes, error)
            return
        if shapes in self._totals:
            # Nobody else has the sums, and new memory for each stack would leave the cache.
            parts = [old.add_(new) for old, new in zip(self._totals[shapes], parts, strict=True)]
        self._totals[shapes] = parts

    def majority(self) -> Usual:
        """The shapes that most clients' updates have, and a failure of each of the others.

        Raises:
            Exception: what came of adding up updates of these shapes.
        """
        if not self._members:
            return Usual([], None, [torch.empty(0, dtype=torch.int64) for _ in self._means], [])
        # Of equally many those of the first client, whatever order they trained in.
        usual = min(self._members, key=lambda s: (-len(self._members[s]), min(self._members[s])))
        if usual in self._errors:
            raise self._errors[usual]
        failures = [
            ClientFailure(i, "local_update", shape_cause(shapes, usual), "shape")
            for shapes, members in self._members.items()
            if shapes != usual
            for i in members
        ]
        return Usual(sorted(self._members[usual]), usual, self._totals[usual], failures)


class Usual(NamedTuple):
    """Clients whose updates can be added up, ascending, and their sums on the integer grid."""

    members: list[int]
    shapes: Shapes | None
    totals: list[Tensor]
    failures: list[ClientFailure]


def usable_rows(local: Local) -> Tensor:
    """(C,) bool: rows whose state and payload are finite and fit the exact sums."""
    good_C = torch.ones(len(local.loss_C), dtype=torch.bool)
    for part in (local.state, local.payload):
        for _, leaf in trees.leaves(part):
            if leaf.is_floating_point():
                good_C &= representable(leaf.flatten(1))
    return good_C


def failure_kind(error: Exception) -> tuple[str, FailureKind]:
    """An error of a client in words and as a kind."""
    if isinstance(error, ShapeError):
        return str(error), "shape"
    return repr(error), "memory" if is_lack_of_memory(error) else "raised"


def agreeing(
    found: Mapping[int, LocalAnswer], taken: Shapes | None = None
) -> dict[int, LocalAnswer]:
    """The answers, with updates of another shape than most clients' turned into failures.

    Sums of updates that do not fit each other would be wrong or impossible. Without a majority none
    can be trusted.

    Args:
        taken: shapes of updates that were taken in this round before.
    """
    votes: Counter[Shapes] = Counter()
    for answer in found.values():
        if answer.shapes is not None:
            votes[answer.shapes] += len(answer.client_index)
    if taken is None and votes:
        best, most = votes.most_common(1)[0]
        taken = best if 2 * most > votes.total() else None
    return {h: a if a.shapes in (None, taken) else _refused(a, taken) for h, a in found.items()}


def _refused(answer: LocalAnswer, taken: Shapes | None) -> LocalAnswer:
    """The answer without its updates."""
    assert answer.shapes is not None
    cause = "its update has a shape of its own, and no shape has a majority"
    if taken is not None:
        cause = shape_cause(answer.shapes, taken)
    failures = [
        ClientFailure(index, "local_update", cause, "shape")
        for index in answer.client_index.tolist()
    ]
    return answer._replace(
        client_index=answer.client_index[:0],
        reports=None,
        means=(),
        failures=(*answer.failures, *failures),
        shapes=None,
    )


def shape_cause(found: Shapes, expected: Shapes) -> str:
    """In words: what is wrong with an update's shapes."""
    if [name for name, _ in found] != [name for name, _ in expected]:
        return f"its update has {len(found)} parts, expected {len(expected)}"
    wrong = [(n, f, e) for (n, f), (_, e) in zip(found, expected, strict=True) if f != e]
    name, has, wants = wrong[0]
    return f"its update's {name} has shape {has}, expected {wants}"


def mean_shares(by: str, cohort: Indices, federation: Federation) -> npt.NDArray[np.float64]:
    """Weight of each client of the cohort in a Mean: sums to 1 if all of them answer."""
    if by == "uniform":
        return np.full(len(cohort), 1.0 / len(cohort))
    num = federation.num_examples_M[cohort].astype(np.float64)
    return np.asarray(num / num.sum())
