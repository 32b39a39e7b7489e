"""Calibration of the intra-client estimators in linear regression, where gradients must be fitted.

x ~ N(0, I) with 8 coordinates, y = x theta + N(0, 1), so that a client's local optimum, the
least-squares solution, has variance 1 / (n - 9) a coordinate over draws of x and y. The estimators
observe a stack of 200 clients that ``local_sgd`` trains. Figures: method specification, 5.1, which
does not tell batch, rate, steps, start, or where gradients are taken, so the pattern is what can be
compared. Its rescaled over its plain trajectory figures fix 2 batch / rate near 400; batches of 20
at rate 0.1 for 200 steps from the true parameters are our choice. Gradients are taken at each
client's own optimum (a client that has fitted its data, as in the text's explanation) and also at
the true parameters. The text's split-half figure at 400 examples leaves no room for batch noise, so
it stands beside halves trained to the end on full batches; those of batches of 20 are shown too.

Shape letters: C clients of a stack, N examples, P coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from analysis import calibration_base as base
from analysis.calibration_base import Figure, Floats
from selffl_ray.estimators.intra_base import IntraContext, IntraEstimator, Observed
from selffl_ray.gradients import RowEngine
from selffl_ray.models.linear import LinearConfig, linear
from selffl_ray.registry import Component, intra_estimators
from selffl_ray.seeding import generator
from selffl_ray.tasks import REGRESSION, DataShape
from selffl_ray.training import Rows, Stack, TrainingConfig, local_sgd, observe_tail, start_tail

DIMENSION = 8
SIZES = (25, 100, 400)
NUM_ROUNDS = 5
"""Window of ``round_window``."""
TRAINING = TrainingConfig(
    batch_size=20, learning_rate=0.1, num_local_steps=200, sampling="replacement"
)
MODEL = linear(LinearConfig(bias=False, dtype="float64"), DataShape((DIMENSION,), 1))
CHUNKS = "gradient_chunks, J=5"
AT_OPTIMUM = "gradients at the own optimum"
FROM_TRUTH = "start and gradients at the true parameters"
FULL_BATCHES = "full batches, to the end"
FULL_RATE = 0.3
FULL_STEPS = {25: 1000, 100: 100, 400: 100}
"""By number of examples: halves of 12 examples in 8 coordinates are badly conditioned."""
SPECIFICATION: Mapping[tuple[str, str], tuple[float, float, float]] = {
    ("trajectory", FROM_TRUTH): (0.02, 0.17, 0.78),
    ("trajectory_rescaled", FROM_TRUTH): (0.35, 0.70, 0.78),
    ("gradient", AT_OPTIMUM): (0.45, 0.81, 0.95),
    (CHUNKS, AT_OPTIMUM): (0.44, 0.81, 0.88),
    ("fisher", AT_OPTIMUM): (1.32, 1.13, 1.02),
    ("split_half", FULL_BATCHES): (2.2, 1.3, 0.95),
}
"""Estimate over true variance at n = 25, 100 and 400."""
RELATIVE_TOLERANCE = 0.15


def clients(num_examples: int, count: int, seed: int, round_index: int = 0) -> Stack:
    """A stack of clients whose true parameters are all 0."""
    rng = generator(seed, "calibration/regression", 0, str(num_examples))
    x_NP = rng.standard_normal((count * num_examples, DIMENSION)).astype(np.float32)
    noise_N = rng.standard_normal(len(x_NP))
    pair = torch.from_numpy(np.stack([noise_N, np.ones_like(noise_N)], axis=1))
    # The layout of the regression task: both roles, then target and weight, of one output.
    y = pair.view(-1, 1, 2, 1).expand(-1, 2, -1, -1).contiguous()
    num_C = torch.full((count,), num_examples)
    return Stack(
        tuple(f"client-{c}" for c in range(count)),
        Rows(torch.from_numpy(x_NP), y, torch.arange(count) * num_examples, num_C),
        TRAINING.batch_size,
        RowEngine(MODEL, REGRESSION, torch.device("cpu")),
        TRAINING,
        seed,
        round_index,
        TRAINING.learning_rate,
    )


def optima(stack: Stack) -> Tensor:
    """Least-squares solutions, (C, P) float64."""
    count = stack.num_clients
    x_CNP = stack.train.x.double().view(count, -1, DIMENSION)
    y_CN1 = stack.train.y[:, 1, 0].view(count, -1, 1)
    return torch.linalg.lstsq(x_CNP, y_CN1).solution.squeeze(2)


def true_variance(num_examples: int) -> float:
    """Of the least-squares solution, over draws of x and noise: E (x'x)^-1 = I / (n - P - 1)."""
    return 1.0 / (num_examples - DIMENSION - 1)


def train(stack: Stack) -> Observed:
    """A round of all clients from the true parameters, as an estimator sees it."""
    start_P = torch.zeros(DIMENSION, dtype=torch.float64)
    start_CP = start_P.expand(stack.num_clients, -1)
    trained = local_sgd(
        stack,
        start=start_CP,
        observe=observe_tail,
        seen=start_tail(start_CP, stack.num_clients, squares=True),
    )
    return Observed(
        stack,
        start_P,
        start_CP,
        trained.params_CP,
        trained.seen,
        trained.num_steps_C,
        torch.full((stack.num_clients,), stack.learning_rate, dtype=torch.float64),
        torch.zeros((stack.num_clients, 1), dtype=torch.float64),
    )


def estimators() -> dict[str, IntraEstimator]:
    """All of them, with their default options but five chunks."""
    context = IntraContext(MODEL.spec.groups("model"), 1.0, 1, None)
    made = {}
    for name in base.INTRA:
        if name == "gradient_chunks":
            five = intra_estimators.get(name).config_type(num_chunks=5)
            made[CHUNKS] = intra_estimators.make(Component(name, five), context)
        else:
            made[name] = intra_estimators.make(Component(name), context)
    return made


def variances(num_examples: int, count: int, seed: int) -> dict[tuple[str, str], Floats]:
    """Every estimator's variances, (C,), by its name and variant."""
    made = estimators()
    memory = {
        name: one.init_memory(count, torch.zeros(DIMENSION, dtype=torch.float64))
        for name, one in made.items()
    }
    for round_index in range(NUM_ROUNDS):
        observed = train(clients(num_examples, count, seed, round_index))
        memory = {name: one.remember(memory[name], observed) for name, one in made.items()}
    optima_CP = optima(observed.stack)
    found = {}
    for name, one in made.items():
        found[name, FROM_TRUTH] = one.estimate(memory[name], observed).var_CG[:, 0].numpy()
        if name in (CHUNKS, "gradient", "fisher"):
            rows = [
                one.estimate(memory[name], _alone(observed, row, optima_CP[row])).var_CG[0, 0]
                for row in range(count)
            ]
            found[name, AT_OPTIMUM] = torch.stack(rows).numpy()
    full = made["split_half"].estimate(memory["split_half"], _full_batches(observed))
    found["split_half", FULL_BATCHES] = full.var_CG[:, 0].numpy()
    return found


def _full_batches(observed: Observed) -> Observed:
    """The round as training on all examples at once, long enough to reach the optima."""
    stack = observed.stack
    length = int(stack.train.num_C.max())
    training = replace(TRAINING, batch_size=length, sampling="epoch")
    return observed._replace(
        stack=replace(stack, training=training, batch_length=length),
        steps_C=torch.full_like(observed.steps_C, FULL_STEPS[length]),
        rate_C=torch.full_like(observed.rate_C, FULL_RATE),
    )


def _alone(observed: Observed, row: int, global_P: Tensor) -> Observed:
    """One client's round, with its own point as the global model."""
    pick, stack = slice(row, row + 1), observed.stack
    alone = replace(
        stack, client_ids=stack.client_ids[pick], train=stack.train.select(slice(row, row + 1))
    )
    return observed._replace(
        stack=alone,
        global_P=global_P,
        start_CP=observed.start_CP[pick],
        upload_CP=observed.upload_CP[pick],
        tail=None,
        steps_C=observed.steps_C[pick],
        rate_C=observed.rate_C[pick],
        retained_CG=observed.retained_CG[pick],
    )


def figures(count: int, seed: int = 0) -> list[Figure]:
    """Mean of estimate over true variance, for every estimator and number of examples."""
    rows = []
    for place, num_examples in enumerate(SIZES):
        for (name, point), var_C in variances(num_examples, count, seed).items():
            value, error = base.mean(var_C / true_variance(num_examples))
            expected = SPECIFICATION.get((name, point), (math.nan,) * 3)[place]
            rows.append(
                Figure(
                    part="regression",
                    estimator=name,
                    variant=point,
                    quantity="ratio",
                    value=value,
                    error=error,
                    num_examples=num_examples,
                    specification=expected,
                    tolerance=max(RELATIVE_TOLERANCE * expected, 0.01),
                )
            )
    return rows
