"""The two-level Gaussian model itself, as data with a known truth.

theta_m ~ N(0, inter_var I) around the global parameters 0, and an example of client m is
N(theta_m, noise_var_m I). With a linear model of one constant input and no bias the model *is* a
vector of parameters, the loss of an example z is 1/2 |theta - z|^2 (curvature 1), and a client's
local optimum y_m is the mean of its n_m examples, with variance intra_var_m = noise_var_m / n_m.

Metrics are squared errors a coordinate against the truth: ``global_mse`` against the global
parameters 0, ``local_mse`` against theta_m. With ``optima: identity`` nothing is drawn: there are
as many coordinates as clients, y_m is the m-th unit vector, and a model that mixes the optima with
weights p *is* p. The metrics are then the exact expected squared errors of that mixture over all
draws, so closed forms can be checked by running the system, without Monte Carlo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import TEST, TRAIN, Dataset, Group, KnownVariances, no_files
from selffl_ray.errors import ConfigError
from selffl_ray.registry import register_dataset
from selffl_ray.seeding import generator
from selffl_ray.tasks import REGRESSION, DataShape

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """Options of ``data: {name: gaussian}``."""

    num_clients: int = 10
    dimension: int = 20
    """Coordinates of the parameters; with ``optima: identity`` it is the number of clients."""
    num_examples: tuple[int, ...] = (10, 1000)
    """Training examples: one number for all, two for a geometric range, or one for each client."""
    noise_var: float = 10.0
    """Variance of one example a coordinate; a client's intra_var is this over its examples."""
    intra_var: tuple[float, ...] | None = None
    """Instead of noise_var: the variance of each client's local optimum, one number or one each."""
    inter_var: float | None = None
    """Variance between clients a coordinate."""
    inter_ratio: float = 1.0
    """Used without inter_var: inter_var as a multiple of the mean intra_var."""
    optima: Literal["drawn", "identity"] = "drawn"

    def __post_init__(self) -> None:
        if self.num_clients < 1 or self.dimension < 1:
            raise ConfigError(
                f"data.num_clients and data.dimension must be >= 1, got {self.num_clients} and "
                f"{self.dimension}"
            )
        if not 0 <= self.noise_var < math.inf or not 0 <= self.inter_ratio < math.inf:
            raise ConfigError(
                f"data.noise_var and data.inter_ratio must be >= 0, got {self.noise_var} and "
                f"{self.inter_ratio}"
            )
        if self.inter_var is not None and not 0 <= self.inter_var < math.inf:
            raise ConfigError(f"data.inter_var must be >= 0, got {self.inter_var}")
        if self.optima == "identity" and self.dimension not in (20, self.num_clients):
            raise ConfigError(
                f"data.optima identity has one coordinate a client ({self.num_clients}); leave out "
                f"data.dimension (got {self.dimension})"
            )
        if (self.num_examples_M < 1).any():
            raise ConfigError(f"data.num_examples must be >= 1, got {list(self.num_examples)}")
        if not all(0 <= var < math.inf for var in self.intra_var_M):
            raise ConfigError(f"data.intra_var must be >= 0, got {list(self.intra_var or ())}")

    @property
    def num_examples_M(self) -> npt.NDArray[np.int64]:
        """Training examples of each client."""
        given, count = self.num_examples, self.num_clients
        if len(given) == 1:
            return np.full(count, given[0], dtype=np.int64)
        if len(given) == count:
            return np.asarray(given, dtype=np.int64)
        if len(given) == 2 and min(given) > 0:
            return np.round(np.geomspace(given[0], given[1], count)).astype(np.int64)
        raise ConfigError(
            f"data.num_examples must hold 1, 2 or num_clients={count} positive numbers, got "
            f"{list(given)}"
        )

    @property
    def intra_var_M(self) -> Floats:
        """Variance of each client's local optimum a coordinate."""
        if self.intra_var is None:
            return self.noise_var / self._exact_num_examples_M
        if len(self.intra_var) not in (1, self.num_clients):
            raise ConfigError(
                f"data.intra_var must hold 1 or num_clients={self.num_clients} numbers, got "
                f"{list(self.intra_var)}"
            )
        return np.resize(np.asarray(self.intra_var, dtype=np.float64), self.num_clients)

    @property
    def _exact_num_examples_M(self) -> Floats:
        """A geometric range before it is rounded to whole examples."""
        if len(self.num_examples) == 2 and self.num_clients != 2:
            return np.geomspace(self.num_examples[0], self.num_examples[1], self.num_clients)
        return self.num_examples_M.astype(np.float64)

    @property
    def known_inter_var(self) -> float:
        """Variance between clients a coordinate."""
        if self.inter_var is not None:
            return self.inter_var
        return self.inter_ratio * float(self.intra_var_M.mean())


@register_dataset("gaussian", GaussianConfig)
def gaussian(config: GaussianConfig) -> Dataset:
    """Draws from the two-level Gaussian model, with known variances and parameters."""
    outputs = config.num_clients if config.optima == "identity" else config.dimension
    make = _identity if config.optima == "identity" else _drawn

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        for client in range(config.num_clients):
            train_y, test_y = make(config, client, seed)
            y = np.concatenate([train_y, test_y])
            official = np.repeat([TRAIN, TEST], [len(train_y), len(test_y)]).astype(np.uint8)
            width = len(str(config.num_clients - 1))
            yield Group(f"client-{client:0{width}d}", np.ones((len(y), 1), np.float32), y, official)

    return Dataset(
        name="gaussian",
        title="Two-level Gaussian model with known truth",
        licence="generated",
        shape=DataShape((1,), outputs),
        find=no_files,
        read=read,
        task=REGRESSION,
        natural=True,
        num_groups=lambda files: config.num_clients,
        depends_on_seed=config.optima == "drawn",
        known=lambda: KnownVariances(config.known_inter_var, config.intra_var_M),
        defaults={
            "model": {"name": "linear", "bias": False},
            "training": {"learning_rate": 0.1},
            "evaluation": {"splits": [1.0, 0.0, 0.0]},
        },
    )


def _drawn(config: GaussianConfig, client: int, seed: int) -> tuple[Floats, Floats]:
    """Examples around a drawn theta_m, and one test example that is the truth."""
    rng = generator(seed, "data/gaussian", 0, str(client))
    scale = math.sqrt(config.known_inter_var)
    theta = scale * rng.standard_normal(config.dimension)
    size = int(config.num_examples_M[client])
    noise = rng.standard_normal((size, config.dimension))
    spread = math.sqrt(config.intra_var_M[client] * size)
    weight = np.full(config.dimension, 1.0 / config.dimension)
    train = _targets(theta + spread * noise, np.ones(config.dimension))
    truth = np.stack([[np.zeros_like(theta), weight], [theta, weight]])
    return train, truth[None]


def _identity(config: GaussianConfig, client: int, seed: int) -> tuple[Floats, Floats]:
    """All examples at a unit vector; two test examples whose mean is the expected squared error.

    Of a mixture p of the optima, sum_k p_k^2 (inter + intra_k) as an estimate of the global
    parameters, and (1 - p_m)^2 inter + p_m^2 intra_m + sum over k != m of p_k^2 (inter + intra_k)
    as an estimate of theta_m: squared distances to 0 and to the unit vector, with weights.
    """
    count, inter = config.num_clients, config.known_inter_var
    unit = np.eye(count)[client]
    train = _targets(np.tile(unit, (int(config.num_examples_M[client]), 1)), np.ones(count))
    total_var = inter + config.intra_var_M
    zero = np.zeros(count)
    # The mean over the two halves is taken, so each carries twice its weight.
    towards = 2 * np.where(unit == 1, inter, total_var)
    away = 2 * np.where(unit == 1, config.intra_var_M[client], 0.0)
    both = np.stack([[[zero, total_var], [unit, towards]], [[zero, total_var], [zero, away]]])
    return train, both


def _targets(values: Floats, weight: Floats) -> Floats:
    """(N, K) targets in the layout of the regression task, the same for both roles: (N,2,2,K)."""
    pair = np.stack([values, np.broadcast_to(weight, values.shape)], axis=1)
    return np.stack([pair, pair], axis=1)
