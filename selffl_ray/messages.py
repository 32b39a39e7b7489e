"""What the driver asks hosts, and what they answer. All of it travels between processes.

Arrays are NumPy on the way; indices are those of the federation: M clients that take part, then
the new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.algorithms.base import Federation
from selffl_ray.evaluation import ClientScores
from selffl_ray.models.build import ModelConfig
from selffl_ray.participation import RoundPlan
from selffl_ray.registry import Component
from selffl_ray.training import TrainingConfig

Indices = npt.NDArray[np.int64]
Split = str


@dataclass(frozen=True)
class DataSpec:
    """Which data a host reads: everything that names a store, and the digest that it must have."""

    dataset: Component
    source: str | None
    seed: int
    root: str
    digest: str


@dataclass(frozen=True)
class RunSpec:
    """One run of one method: everything that a host needs to build its half.

    state_folder: where hosts keep their clients' state on disk; None keeps it in memory.
    """

    method: Component
    model: ModelConfig
    training: TrainingConfig
    federation: Federation
    seed: int
    start_params: npt.NDArray[Any]
    stack_size: int
    state_folder: str | None = None


class Commit(NamedTuple):
    """The clients of a round whose updates count."""

    round_index: int
    accepted: Indices


Commits = tuple[Commit, ...]


FailureKind = Literal["raised", "memory", "diverged", "shape"]
"""It raised an error, ran out of memory, gave an update that is not finite or too large, or one of
another shape than the others."""


class ClientFailure(NamedTuple):
    """A client that gave no update that can be used: why, in words and as a kind."""

    client_index: int
    stage: str
    cause: str
    kind: FailureKind


class LocalRequest(NamedTuple):
    """A round for some clients of a host; rows and shares are in the order of ``client_index``."""

    plan: RoundPlan
    client_index: Indices
    per_client: Any
    mean_shares: tuple[npt.NDArray[np.float64], ...]


Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape, without the client axis, of every leaf of an update's payload and report."""


class LocalAnswer(NamedTuple):
    """Reports of the clients that answered (ascending), partial means, and failures.

    shapes: of the updates, the same for all of them; None if nobody answered.
    """

    client_index: Indices
    reports: Any
    loss: npt.NDArray[np.float64]
    gradients: Indices
    means: tuple[npt.NDArray[np.int64], ...]
    failures: tuple[ClientFailure, ...]
    shapes: Shapes | None
    seconds: float
    memory_bytes: int


class ReduceRequest(NamedTuple):
    """A Total: client indices and their weights."""

    which: int
    client_index: Indices
    weight: npt.NDArray[np.float64]


class EvalRequest(NamedTuple):
    """Clients to evaluate, and for each split whether it is wanted."""

    plan: RoundPlan
    client_index: Indices
    per_client: Any
    splits: tuple[Split, ...]


class EvalAnswer(NamedTuple):
    """Scores by split, gradients spent on personalization, and seconds."""

    scores: dict[Split, ClientScores]
    gradients: int
    seconds: float


class StateRows(NamedTuple):
    """Committed state rows of some clients, for checkpoints."""

    client_index: Indices
    state: Any
