"""The one evaluation loop and the metrics made from it.

A client's examples are cut into chunks whose padded lengths depend on their number only, so that a
score has the same bits wherever the client is evaluated.

Metrics of a split (``<score>`` is ``accuracy``, or ``mse`` for regression):

``<split>/global_<score>``             the server's model on the union of the clients' examples
``<split>/global_<score>_on_clients``  the same, judged as if it were each client's own model
``<split>/local_<score>``              each client's personalized model, weighted by examples
``<split>/local_<score>_mean|_std|_worst10|_best10``  over clients, unweighted; worst 10 % is the
                                       mean of the ceil(0.1 M) lowest (highest for an error)
``<split>/clients_harmed_vs_global``   share of clients whose personalized model is worse on their
                                       own examples than the global one
``<split>/global_loss``, ``<split>/local_loss``

A metric that was not measured is absent.

Shape letters: C rows of a stack, B examples of a chunk, M clients.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selffl_ray.errors import ConfigError
from selffl_ray.gradients import RowEngine
from selffl_ray.tasks import Role, Task
from selffl_ray.training import Rows

CHUNK = 256
"""Longest chunk; a client's last one is padded to a power of two."""
SLAB_BYTES = 32 * 2**20
"""Inputs of chunks that are evaluated together on a processor: they are much longer than batches,
for which the height of a stack is meant."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The ``evaluation`` part of an experiment."""

    every: int = 5
    """Evaluate after every so many rounds."""
    last: int = 1
    """Evaluate after each of the last so many rounds; final metrics are the mean over them."""
    splits: tuple[float, float, float] | None = None
    """Shares of train, validation and test in each client's own examples; the data set's usual
    ones if not given."""
    new_clients: float = 0.0
    """Share of the clients that never train: they are adapted to and tested as new."""
    max_clients: int | None = None
    """Evaluate a fixed sample of so many clients, the same for every method; all by default."""
    score_test: bool = True
    """Score test examples and new clients; false keeps them sealed while something is selected."""

    def __post_init__(self) -> None:
        for name in ("every", "last", "max_clients"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluation.{name} must be >= 1, got {value}")
        if self.splits is not None:
            good = all(0 <= share <= 1 for share in self.splits)
            if not good or self.splits[0] == 0 or abs(sum(self.splits) - 1) > 1e-6:
                raise ConfigError(
                    "evaluation.splits must be shares of train, val and test that sum to 1, with "
                    f"some for training, got {list(self.splits)}"
                )
        if not 0 <= self.new_clients < 1:
            raise ConfigError(f"evaluation.new_clients must lie in [0, 1), got {self.new_clients}")

    def rounds(self, num_rounds: int) -> frozenset[int]:
        """Indices of the rounds after which to evaluate."""
        last = range(max(0, num_rounds - self.last), num_rounds)
        return frozenset((*range(self.every - 1, num_rounds, self.every), *last))


class Chunk(NamedTuple):
    """Chunks of one padded length: the row of each, its first example, its number of examples."""

    length: int
    row: Tensor
    start: Tensor
    num: Tensor


def chunks_by_length(num_C: Tensor) -> list[Chunk]:
    """Cut every row's examples into chunks of 256 and one padded rest, grouped by length."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for row, examples in enumerate(num_C.tolist()):
        for start in range(0, examples, CHUNK):
            num = min(CHUNK, examples - start)
            length = 1 << (num - 1).bit_length()
            found.setdefault(length, []).append((row, start, num))
    return [Chunk(length, *torch.tensor(at).unbind(1)) for length, at in sorted(found.items())]


def score_rows(
    engine: RowEngine, theta_CP: Tensor, rows: Rows, role: Role, stack_size: int
) -> tuple[Tensor, Tensor]:
    """Sums of score and loss over each client's examples: (C,), (C,) float64.

    Args:
        theta_CP: one row of parameters a client, or (1, P) for all.
        stack_size: chunks evaluated together at most.
    """
    score_C = torch.zeros(len(rows.num_C), dtype=torch.float64)
    loss_C = torch.zeros_like(score_C)
    most = sys.maxsize if rows.x.device.type != "cpu" else SLAB_BYTES
    each = rows.x[:1].nbytes
    for chunk in chunks_by_length(rows.num_C):
        height = min(stack_size, max(1, most // (chunk.length * each)))
        for row, index_CB, inside_CB in _slabs(chunk, height):
            theta = theta_CP if theta_CP.shape[0] == 1 else theta_CP[row]
            x, y = rows.select(row).take(index_CB.to(rows.x.device))
            outputs = engine.outputs(theta, x)
            inside = inside_CB.to(outputs.device)
            for total_C, values_CB in (
                (score_C, engine.task.score(outputs, y, role)),
                (loss_C, engine.task.loss(outputs, y)),
            ):
                summed = torch.where(inside, values_CB, 0.0).sum(1)
                total_C.index_add_(0, row, summed.double().cpu())
    return score_C, loss_C


def _slabs(chunk: Chunk, height: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, positions, mask) of up to ``height`` chunks of one length."""
    offset = torch.arange(chunk.length)
    for at in range(0, len(chunk.row), height):
        pick = slice(at, at + height)
        inside = offset < chunk.num[pick].unsqueeze(1)
        index = torch.where(inside, chunk.start[pick].unsqueeze(1) + offset, 0)
        yield chunk.row[pick], index, inside


class ClientScores(NamedTuple):
    """Sums over one split's examples of each evaluated client, ascending by client index.

    NaN where there is no model to judge (a method without a global model).
    """

    client_index: npt.NDArray[np.int64]
    num_examples: npt.NDArray[np.int64]
    global_score: Floats
    global_score_on_clients: Floats
    global_loss: Floats
    local_score: Floats
    local_loss: Floats


def score_clients(
    engine: RowEngine,
    client_index: Sequence[int],
    rows: Rows,
    *,
    personal_CP: Tensor | None,
    global_1P: Tensor | None,
    stack_size: int,
) -> ClientScores:
    """Scores of a stack of clients on one split.

    Args:
        rows: the split's examples of these clients, in their order.
        personal_CP: what each predicts with; None is the global model.
        global_1P: (1, P), or None where a method has no global model.
    """
    nothing = torch.full((len(client_index),), torch.nan, dtype=torch.float64)
    judged, judged_own, loss = nothing, nothing, nothing
    if global_1P is not None:
        judged, loss = score_rows(engine, global_1P, rows, "global", stack_size)
        judged_own = judged
        if engine.task.roles_differ:
            judged_own, _ = score_rows(engine, global_1P, rows, "local", stack_size)
    local, local_loss = judged_own, loss
    if personal_CP is not None:
        local, local_loss = score_rows(engine, personal_CP, rows, "local", stack_size)
    columns = (rows.num_C, judged, judged_own, loss, local, local_loss)
    return ClientScores(np.asarray(client_index, np.int64), *(c.numpy() for c in columns))


def join_scores(parts: Sequence[ClientScores]) -> ClientScores:
    """All rows of several hosts or stacks, ascending by client index."""
    order = np.argsort(np.concatenate([p.client_index for p in parts]), kind="stable")
    columns = [np.concatenate(same)[order] for same in zip(*parts, strict=True)]
    return ClientScores._make(columns)


def split_metrics(scores: ClientScores, split: str, task: Task) -> dict[str, float]:
    """The metrics of one split, by the names that the module lists; NaN ones are left out."""
    total = int(scores.num_examples.sum())
    if total == 0:
        return {}
    name = task.score_name
    metrics = {
        f"global_{name}": scores.global_score.sum() / total,
        f"global_{name}_on_clients": scores.global_score_on_clients.sum() / total,
        "global_loss": scores.global_loss.sum() / total,
        f"local_{name}": scores.local_score.sum() / total,
        "local_loss": scores.local_loss.sum() / total,
    }
    has = scores.num_examples > 0
    num = scores.num_examples[has]
    local_M = scores.local_score[has] / num
    metrics |= {f"local_{name}{k}": v for k, v in _spread(local_M, task.higher_is_better).items()}
    global_M = scores.global_score_on_clients[has] / num
    if not np.isnan(global_M + local_M).any():
        worse_M = local_M < global_M if task.higher_is_better else local_M > global_M
        metrics["clients_harmed_vs_global"] = worse_M.mean()
    return {f"{split}/{k}": float(v) for k, v in metrics.items() if not math.isnan(v)}


SPREADS = ("_mean", "_std", "_worst10", "_best10")


def metric_names(score_name: str) -> tuple[str, ...]:
    """All names that :func:`split_metrics` can give, without the split."""
    scores = [f"{who}_{score_name}" for who in ("global", "local")]
    spreads = [f"local_{score_name}{end}" for end in SPREADS]
    others = (f"global_{score_name}_on_clients", "global_loss", "local_loss")
    return (*scores, *spreads, *others, "clients_harmed_vs_global")


def _spread(values_M: Floats, higher_is_better: bool) -> dict[str, float]:
    if np.isnan(values_M).any():  # sorting would put the worst client of all beyond the best
        return {}
    tenth = math.ceil(0.1 * len(values_M))
    ordered = np.sort(values_M if higher_is_better else -values_M) * (1 if higher_is_better else -1)
    found = (values_M.mean(), values_M.std(), ordered[:tenth].mean(), ordered[-tenth:].mean())
    return {end: float(value) for end, value in zip(SPREADS, found, strict=True)}
