"""What the intra-client estimators share: what they see of a round, and gradients in pieces.

An estimator returns a vector and a variance for each client *on one scale*: the inter-client
estimator reads those vectors, and a variance of gradients says nothing about a spread of models.
NaN is an unknown variance; such a client is left out of the inter-client estimate.

Shape letters: C clients of a stack, A some of them, P parameters, G parameter groups, J chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selffl_ray.evaluation import CHUNK
from selffl_ray.flat import Groups
from selffl_ray.seeding import generator
from selffl_ray.training import Stack, Tail

CACHE_BYTES = 4 * 2**20
"""What a gradient of some chunks works on should fit into so much of a CPU's cache."""

EXAMPLES_AT_ONCE = 32
"""Per-example gradients held in memory together."""


class Evidence(NamedTuple):
    """What a client tells about itself on a probe: (C, P) vectors and (C, G) float64 variances."""

    vector_CP: Tensor
    var_CG: Tensor


class Observed(NamedTuple):
    """A stack's round as an estimator sees it.

    global_P: the global model, the same point for every client; start_CP and upload_CP: where the
    clients' training began and ended; tail: sums over the iterates, if the estimator watches;
    steps_C, rate_C: what was trained; retained_CG: the share of the start that the upload retains.
    """

    stack: Stack
    global_P: Tensor
    start_CP: Tensor
    upload_CP: Tensor
    tail: Tail | None
    steps_C: Tensor
    rate_C: Tensor
    retained_CG: Tensor


@dataclass(frozen=True)
class IntraContext:
    """What an estimator may know beside its options.

    curvature: assumed curvature of the loss; known_var: true variance of each client, synthetic
    data only; num_outputs: K of the model.
    """

    groups: Groups
    curvature: float
    num_outputs: int
    known_var: Mapping[str, float] | None


class NoMemory(NamedTuple):
    """State of an estimator that remembers nothing between rounds."""


def no_memory(num_clients: int, start_P: Tensor) -> NoMemory:
    """``init_memory`` of such an estimator."""
    return NoMemory()


def keep_nothing(memory: NoMemory, observed: Observed) -> NoMemory:
    """``remember`` of such an estimator."""
    return memory


@dataclass(frozen=True, kw_only=True)
class IntraEstimator:
    """An estimator as the algorithm uses it.

    estimate: (memory, observed) -> evidence, on probe rounds, after ``remember``.
    remember: (memory, observed) -> memory, after every local update.
    init_memory: (C, start_P) -> memory rows.
    watches: the iterates of the round are summed (``observed.tail``).
    on_params: the vectors are parameters (not gradients); they are then compared about the global
        model, so that large common parts do not cancel.
    exact: the variances are true ones, not estimates.
    """

    estimate: Callable[[Any, Observed], Evidence]
    remember: Callable[[Any, Observed], Any] = keep_nothing
    init_memory: Callable[[int, Tensor], Any] = no_memory
    watches: bool = False
    on_params: bool = False
    exact: bool = False


def deshrunk_uploads(observed: Observed, groups: Groups) -> tuple[Tensor, Tensor]:
    """Uploads with early stopping undone, and (C, G) bool: where it could be (S <= 0.9)."""
    good_CG = observed.retained_CG <= 0.9
    keep_CG = torch.where(good_CG, 1.0 - observed.retained_CG, 1.0)
    moved_CP = observed.upload_CP - observed.start_CP
    return observed.start_CP + moved_CP / groups.spread(keep_CG).to(moved_CP), good_CG


class ChunkGradients(NamedTuple):
    """Mean gradient of one chunk of the clients ``rows`` (positions in the stack).

    share_A: examples of the chunk over examples of the client; num_chunks: J of these clients;
    grad_AP: overwritten when the next one is asked for.
    """

    rows: Tensor
    num_chunks: int
    share_A: Tensor
    grad_AP: Tensor


def chunk_gradients(stack: Stack, theta_P: Tensor, num_chunks: int) -> Iterator[ChunkGradients]:
    """Gradients at theta of min(num_chunks, n) disjoint chunks that cover each client's data.

    Chunk j holds places floor(n j / J) to floor(n (j + 1) / J) - 1 of a fixed random order: in
    recording order chunks differ by what was recorded, not by chance.
    """
    alike: dict[tuple[int, int, int], list[int]] = {}
    for row, examples in enumerate(stack.train.num_C.tolist()):
        count = min(num_chunks, examples)
        longest = math.ceil(examples / count)
        pieces = math.ceil(longest / CHUNK)
        length = 1 << (math.ceil(longest / pieces) - 1).bit_length()
        alike.setdefault((count, pieces, length), []).append(row)
    for (count, pieces, length), members in alike.items():
        for few in np.array_split(members, math.ceil(len(members) / _rows_at_once(stack, length))):
            orders = [_random_order(stack, row) for row in few.tolist()]
            rows = torch.from_numpy(few)
            scratch_AP = theta_P.new_empty((len(few), len(theta_P)))
            for j in range(count):
                chunks = [o[len(o) * j // count : len(o) * (j + 1) // count] for o in orders]
                share = [len(c) / len(o) for c, o in zip(chunks, orders, strict=True)]
                _chunk_gradient(
                    stack, theta_P, rows, chunks, out_AP=scratch_AP, pieces=pieces, length=length
                )
                share_A = torch.tensor(share, dtype=torch.float64)
                yield ChunkGradients(rows, count, share_A, scratch_AP)


def _rows_at_once(stack: Stack, length: int) -> int:
    """Clients whose chunks and gradients fit a processor's cache together; on a GPU all."""
    if stack.engine.device.type != "cpu":
        return stack.num_clients
    example = stack.train.x[:1].nbytes
    gradient = stack.spec.num_params * stack.spec.dtype.itemsize
    return max(1, CACHE_BYTES // (length * example + gradient))


def _random_order(stack: Stack, row: int) -> np.ndarray:
    rng = generator(stack.seed, "chunks", 0, stack.client_ids[row])
    return rng.permutation(int(stack.train.num_C[row]))


def _chunk_gradient(
    stack: Stack,
    theta_P: Tensor,
    rows: Tensor,
    chunks: list[np.ndarray],
    *,
    out_AP: Tensor,
    pieces: int,
    length: int,
) -> None:
    """Mean gradient of one chunk a client, computed in pieces of one padded length."""
    part_AP = out_AP
    train = stack.train.select(rows)
    for piece in range(pieces):
        index = np.zeros((len(rows), length), dtype=np.int64)
        weight = np.zeros((len(rows), length))
        for row, chunk in enumerate(chunks):
            part = chunk[len(chunk) * piece // pieces : len(chunk) * (piece + 1) // pieces]
            index[row, : len(part)] = part
            weight[row, : len(part)] = 1.0 / len(chunk)
        x, y = train.take(torch.from_numpy(index).to(train.x.device))
        weights = torch.from_numpy(weight).to(theta_P)
        theta_AP = theta_P.expand(len(rows), -1)
        stack.engine.loss_and_grad(theta_AP, x, y, weights, part_AP)
        if piece == 0:
            part_AP = torch.empty_like(out_AP) if pieces > 1 else out_AP
        else:
            out_AP += part_AP


def example_gradients(stack: Stack, theta_P: Tensor, row: int) -> Iterator[Tensor]:
    """Per-example gradients at theta of one client, (E, P) at a time with E <= 32."""
    train = stack.train.select([row])
    for start in range(0, int(train.num_C[0]), EXAMPLES_AT_ONCE):
        end = min(start + EXAMPLES_AT_ONCE, int(train.num_C[0]))
        x, y = train.take(torch.arange(start, end, device=train.x.device).unsqueeze(0))
        weight = torch.ones((end - start, 1)).to(theta_P)
        theta_EP = theta_P.expand(end - start, -1)
        yield stack.engine.loss_and_grad(theta_EP, x[0].unsqueeze(1), y[0].unsqueeze(1), weight)[1]
