"""Two clients, each with a quadratic loss 1/2 |theta - y_m|^2, run on the real loop in float64.

Batches hold all of a client's examples, so a gradient is theta - y_m exactly and every round can be
worked out by hand. The clients have 8 and 24 examples: weights by examples and uniform ones differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from selffl_ray import trees
from selffl_ray.flat import ParamSpec
from selffl_ray.models.base import Model
from selffl_ray.registry import models, register_model
from tests.contract import harness

Floats = npt.NDArray[np.float64]

SIZES = np.array([8.0, 24.0])
SHARES = SIZES / SIZES.sum()
RATE, STEPS = 0.2, 3

SETTINGS = (
    "data={name: gaussian, num_clients: 2, num_examples: [8, 24], dimension: 3, inter_var: 4.0}",
    "model={name: linear, bias: false, dtype: float64}",
    f"training.learning_rate={RATE}",
    f"training.num_local_steps={STEPS}",
    "training.batch_size=64",
    "evaluation.every=1000",
)


def run(
    method: str, rounds: int, settings: Sequence[str] = (), *, participation: float = 1.0
) -> harness.Finished:
    """Train the two clients for some rounds; ``method`` as on the command line."""
    more = (f"training.num_rounds={rounds}", f"training.participation_rate={participation}")
    return harness.finish(harness.prepared_with(method, (*SETTINGS, *more, *settings)))


def optima(finished: harness.Finished) -> Floats:
    """y_m, the mean of each client's training examples: (2, 3)."""
    prepared = finished.prepared
    rows = [prepared.store.read(client.train).y for client in prepared.clients]
    return np.stack([y[:, 1, 0].mean(axis=0, dtype=np.float64) for y in rows])


def global_params(finished: harness.Finished, round_index: int = -1) -> Floats:
    """The server's model after a round: (3,)."""
    server = finished.records[round_index].server
    params = finished.prepared.algorithm.global_params(server)
    return np.asarray(params.numpy())


def states(finished: harness.Finished) -> Any:
    """The clients' states after the last round, as arrays with a row a client."""
    parts = finished.pool.export_states(changed_only=False)
    index = np.concatenate([part.client_index for part in parts])
    order = np.argsort(index)
    whole = trees.map_tree(lambda *same: np.concatenate(same), *[p.state for p in parts])
    return trees.map_tree(lambda leaf: leaf[order], whole)


def personal_params(finished: harness.Finished) -> Floats:
    """What each client predicts with after the last round: (2, 3), or (M, P) of another run."""
    prepared, last = finished.prepared, finished.records[-1]
    count = len(prepared.clients)
    everybody = last.plan.__class__(
        last.plan.round_index, np.arange(count, dtype=np.int64), last.plan.learning_rate
    )
    message = prepared.algorithm.broadcast(last.server, everybody)
    found = finished.pool.personal_models(everybody, message)
    if not found:
        return np.tile(global_params(finished), (count, 1))
    return np.stack([found[i] for i in range(count)])


def as_new_clients(finished: harness.Finished) -> harness.Finished:
    """The same run and server, with clients that were never seen: what they predict with adapts."""
    return finished._replace(pool=harness.open_pool(finished.prepared))


def change(found: Floats, base: Floats) -> float:
    """Distance over the length of the base."""
    return float(np.linalg.norm(found - base) / np.linalg.norm(base))


def descend(start: Floats, gradient: Any, steps: int = STEPS, rate: float = RATE) -> Floats:
    """Gradient descent written out."""
    at = np.array(start, dtype=np.float64)
    for _ in range(steps):
        at = at - rate * gradient(at)
    return at


# ---------------------------------------------------------------------------------------------
# The same clients with a model of two layers, a body of two coordinates and a head of one, that the
# outputs mix: outputs = MIX @ theta, the loss is 1/2 |MIX @ theta - y_m|^2.

MIX = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, -0.8], [0.5, 0.5, 1.0]])
BODY = np.array([True, True, False])
HEAD = ~BODY
BEGIN = np.array([0.3, -0.2, 0.5])

TWO_PARTS = ("model=two_parts",)


@dataclass(frozen=True, kw_only=True)
class TwoPartsConfig:
    """The test model has no options."""


def add_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the model ``two_parts`` for one test."""
    models.names()  # finds the built-in ones first
    monkeypatch.setattr(models, "_entries", dict(models._entries))
    spec = ParamSpec(("body.weight", "head.weight"), ((2,), (1,)), torch.float64)
    mix = torch.from_numpy(MIX)

    @register_model("two_parts", TwoPartsConfig)
    def two_parts(config, shape):
        def apply(leaves, x):
            theta_C3 = torch.cat(leaves, dim=1)
            outputs_C1K = (theta_C3.unsqueeze(1).unsqueeze(1) * mix).sum(-1)
            return outputs_C1K.expand(-1, x.shape[1], -1)

        return Model(spec, shape, apply, lambda rng: torch.from_numpy(BEGIN.copy()))


def mixed_gradient(theta: Floats, y: Floats) -> Floats:
    """Gradient of 1/2 |MIX @ theta - y|^2."""
    return MIX.T @ (MIX @ theta - y)


def partly_by_hand(
    finished: harness.Finished,
    own: npt.NDArray[np.bool_],
    train: Callable[[Floats, Callable[[Floats], Floats]], Floats],
    *,
    by_size: bool = True,
) -> tuple[list[Floats], Floats]:
    """Rounds of a method whose clients keep the coordinates ``own``, written out.

    train: (start, gradient) -> trained coordinates. Returns the global models after each round,
    and what each client predicts with at the end.
    """
    y_MP, at, found = optima(finished), BEGIN.copy(), []
    own_MH = np.tile(BEGIN[own], (2, 1))
    for record in finished.records:
        ends = []
        for m in record.plan.cohort:
            theta = at.copy()
            theta[own] = own_MH[m]
            ends.append(train(theta, lambda t, y=y_MP[m]: mixed_gradient(t, y)))
            own_MH[m] = ends[-1][own]
        weight = SIZES[record.plan.cohort] if by_size else np.ones(len(ends))
        at = weight / weight.sum() @ np.stack(ends)
        found.append(at)
    personal = np.tile(at, (2, 1))
    personal[:, own] = own_MH
    return found, personal
