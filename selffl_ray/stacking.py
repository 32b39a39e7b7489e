"""How many clients train together in one stack, where the user leaves it open.

On a processor the parameters of a stack should fit its cache. A GPU is filled by tall stacks, as
far as its memory allows. Results do not depend on it on a processor, and within rounding on a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selffl_ray.gradients import RowEngine
from selffl_ray.models.base import Model
from selffl_ray.tasks import REGRESSION, Task


class Room(NamedTuple):
    """What a stack may take on a processor: so much cache for its parameters, so many rows."""

    cache_bytes: int
    most: int


OWN_PASS = Room(8 * 2**20, 64)
"""Of a model with a backward pass of its own; lower stacks pay more calls, taller ones leave the
cache."""
AUTOMATIC = Room(4 * 2**20, 20)
"""Of other models: automatic differentiation keeps more of each row, 12 MiB of a recurrent one."""
MOST_ON_GPU = 1024
GPU_SHARE = 0.5
"""Part of an actor's device memory for a stack; the rest is for data, states and updates."""
SHORT = (2, 4)
"""Batches whose memory is counted."""
COPIES = 12
"""Rows of parameters that a step may hold beside each other, those of methods with several models
and of estimators included."""


def stack_on_cpu(model: Model) -> int:
    """Clients in a stack on a processor."""
    if not model.stacks_on_cpu:
        return 1
    room = AUTOMATIC if model.forward is None else OWN_PASS
    fits = room.cache_bytes // (model.spec.dtype.itemsize * model.spec.num_params)
    return int(np.clip(fits, 4, room.most))


def stack_on_gpu(model: Model, task: Task, batch_length: int, memory_bytes: int) -> int:
    """Clients in a stack on a GPU.

    Args:
        batch_length: examples of the largest batch; memory_bytes: an actor's share of the device's.
    """
    fits = int(GPU_SHARE * memory_bytes) // row_bytes(model, task, batch_length)
    return int(np.clip(fits, 1, MOST_ON_GPU))


def row_bytes(model: Model, task: Task, batch_length: int) -> int:
    """Memory that a row of a stack takes at most in a step.

    Counted on a processor: what one row's forward pass keeps for the backward pass, twice because
    that makes as much again on its way, and copies of the parameters. What is kept grows with the
    batch by the same amount an example, so two short batches tell that of a long one.
    """
    few, more = (_kept_bytes(model, task, length) for length in SHORT)
    each = (more - few) // (SHORT[1] - SHORT[0])
    kept = few + each * (batch_length - SHORT[0])
    return 2 * kept + COPIES * model.spec.num_params * model.spec.dtype.itemsize


def _kept_bytes(model: Model, task: Task, batch_length: int) -> int:
    """What the forward pass of one row keeps."""
    x, y, weight = blank_batch(model, task, 1, batch_length)
    theta = torch.zeros((1, model.spec.num_params), dtype=model.spec.dtype)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views of one storage are kept once.
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # Only automatic differentiation tells what it keeps; a model's own pass must not keep more.
    engine = RowEngine(dataclasses.replace(model, forward=None), task, torch.device("cpu"))
    # The first call of a shape also tries out heights, which is not a row's.
    engine.loss_and_grad(theta, x, y, weight)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.loss_and_grad(theta, x, y, weight)
    return sum(kept.values())


def blank_batch(
    model: Model, task: Task, rows: int, batch_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Examples, targets and weights of the shapes that a step of so many rows sees, all alike."""
    shape = model.shape
    x = torch.zeros((rows, batch_length, *shape.input_shape))
    if shape.num_tokens is not None:
        x = x.long()
    y = torch.zeros((rows, batch_length), dtype=torch.int64)
    if task is REGRESSION:
        y = torch.zeros((rows, batch_length, 2, 2, shape.num_outputs), dtype=model.spec.dtype)
    weight = torch.full((rows, batch_length), 1.0 / batch_length, dtype=model.spec.dtype)
    return x, y, weight
