"""Generated classification whose clients differ in their features and in their models.

Client k has a linear model and features of its own, and its labels are the classes that its model
gives the highest score:

    x ~ N(v_k, S),  S diagonal with S_jj = j ** -1.2,  v_k ~ N(B_k, 1),  B_k ~ N(0, beta)
    y = argmax(W_k x + b_k),  numbers of examples 50 + floor(exp(N(4, 2)))

``published``: W_k and b_k ~ N(u_k, 1), u_k ~ N(0, alpha), as in Li et al. 2020, "Federated
optimization in heterogeneous networks", Section 5.1 (Synthetic(alpha, beta)); alpha and beta are
standard deviations, as in the authors' code. **There alpha changes no label**: u_k is one number,
added to the scores of all classes alike, and the highest stays the highest. Models differ in any
case, by the 1 in N(u_k, 1), for alpha = 0 too.

``shared``: W_k = W + alpha D_k with one W ~ N(0, 1) for all and D_k ~ N(0, 1), and b_k likewise, so
that alpha does what it is said to do: with 0 all clients have the same model.

``iid``: one W and b for all, and v_k = B_k in every coordinate, the authors' Synthetic-IID with
beta = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import Dataset, Group, no_files
from selffl_ray.errors import ConfigError
from selffl_ray.registry import register_dataset
from selffl_ray.seeding import generator
from selffl_ray.tasks import DataShape

DECAY = 1.2
"""Exponent by which the variances of the features fall."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SyntheticLogisticConfig:
    """Options of ``data: {name: synthetic_logistic}``."""

    alpha: float = 1.0
    """Standard deviation between the clients' models; without effect in ``iid``, and on the labels
    of ``published``."""
    beta: float = 1.0
    """Standard deviation between the centres of the clients' features."""
    models: Literal["published", "shared", "iid"] = "published"
    """How the clients' models come about."""
    num_clients: int = 30
    dimension: int = 60
    """Features."""
    num_classes: int = 10
    max_examples: int | None = None
    """Clients have no more than that; the published sizes have a heavy tail."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"data.{name} must be >= 0, got {value}")
        for name, least in (("num_clients", 1), ("dimension", 1), ("num_classes", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name} must be >= {least}, got {getattr(self, name)}")
        if self.max_examples is not None and self.max_examples < 1:
            raise ConfigError(f"data.max_examples must be >= 1, got {self.max_examples}")


@register_dataset("synthetic_logistic", SyntheticLogisticConfig)
def synthetic_logistic(config: SyntheticLogisticConfig) -> Dataset:
    """Generated features with linear models that differ between clients: Synthetic(alpha, beta)."""

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        width = len(str(config.num_clients - 1))
        for client in range(config.num_clients):
            x, y = draw(config, seed, client)
            yield Group(f"client-{client:0{width}d}", x.astype(np.float32), y)

    return Dataset(
        name="synthetic_logistic",
        title=f"Synthetic({config.alpha:g}, {config.beta:g}), models {config.models}",
        licence="generated",
        shape=DataShape((config.dimension,), config.num_classes),
        find=no_files,
        read=read,
        natural=True,
        num_groups=lambda files: config.num_clients,
        depends_on_seed=True,
        defaults={"experiment": "synthetic_logistic", "model": {"name": "linear"}},
    )


def draw(
    config: SyntheticLogisticConfig, seed: int, client: int
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Features (N, dimension) and labels (N,) of one client."""
    rng = generator(seed, "data/synthetic_logistic", 0, str(client))
    own_models = generator(seed, "data/synthetic_logistic/models", 0, str(client))
    size = 50 + int(rng.lognormal(4.0, 2.0))
    if config.max_examples is not None:
        size = min(size, config.max_examples)
    centre_mean = config.beta * rng.standard_normal()
    spread = rng.standard_normal(config.dimension)
    centre = centre_mean + (0.0 if config.models == "iid" else spread)
    scale = np.arange(1, config.dimension + 1) ** (-DECAY / 2)
    x = centre + scale * rng.standard_normal((size, config.dimension))
    weights = _weights(config, seed, own_models)
    return x, np.argmax(x @ weights[:-1] + weights[-1], axis=1).astype(np.int64)


def _weights(config: SyntheticLogisticConfig, seed: int, own: np.random.Generator) -> Floats:
    """W and, as last row, b of one client: (dimension + 1, num_classes)."""
    shape = (config.dimension + 1, config.num_classes)
    if config.models == "published":
        mean: float = config.alpha * own.standard_normal()
        return mean + own.standard_normal(shape)
    shared: Floats = generator(seed, "data/synthetic_logistic/shared").standard_normal(shape)
    if config.models == "iid":
        return shared
    return shared + config.alpha * own.standard_normal(shape)
