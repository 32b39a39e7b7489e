"""From a model's name and options to a stackable model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn

from selffl_ray.errors import ConfigError, ModelError
from selffl_ray.models.base import Model, has_batch_norm, lift
from selffl_ray.registry import Component, models
from selffl_ray.seeding import generator
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The ``model`` part of an experiment: a name, its options, and what any module may need."""

    component: Annotated[Component, models] = Component("mlp")
    convert_norm: Literal["group"] | None = None
    """Replace BatchNorm, whose running statistics no client may share, by GroupNorm."""


def build_model(config: ModelConfig, shape: DataShape) -> Model:
    """The model for data of a shape; a factory that returns an ``nn.Module`` is lifted.

    Raises:
        ModelError: a module that cannot be a row of a stack. ConfigError: a conversion without
            effect.
    """

    def make() -> Model | nn.Module:
        built = models.make(config.component, shape)
        if not isinstance(built, Model | nn.Module):
            raise ModelError(
                f"model {config.component.name!r} made a {type(built).__name__}; its factory must "
                "return a Model or a torch.nn.Module"
            )
        return built

    with torch.random.fork_rng(devices=[]):
        first = make()
    converts = config.convert_norm is not None
    if converts and not (isinstance(first, nn.Module) and has_batch_norm(first)):
        raise ConfigError(
            f"model.convert_norm: {config.component.name} has no BatchNorm to convert; leave it out"
        )
    if isinstance(first, nn.Module):

        def module() -> nn.Module:
            made = make()
            assert isinstance(made, nn.Module)
            return made

        return lift(module, shape, convert_norm=config.convert_norm)
    return first


def start_params(model: Model, seed: int) -> np.ndarray:
    """The start of training, (P,): drawn from the seed, the same for every method."""
    return model.init(generator(seed, "init")).numpy()
