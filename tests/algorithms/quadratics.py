"""Two clients, each with a quadratic loss 1/2 |theta - y_m|^2, run on the real loop in float64.

Batches hold all of a client's examples, so a gradient is theta - y_m exactly and every round can be
worked out by hand. The clients have 8 and 24 examples: weights by examples and uniform ones differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from selffl_ray import trees
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
    count = prepared.federation.num_clients
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
