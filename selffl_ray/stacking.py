"""How many clients train together in one stack, where the user leaves it open.

On a processor the parameters of a stack should fit its cache. A GPU is filled by tall stacks, as
far as its memory allows. Results do not depend on it on a processor, and within rounding on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from selffl_ray.gradients import RowEngine
from selffl_ray.models.base import Model
from selffl_ray.tasks import REGRESSION, Task

CACHE_BYTES = 4 * 2**20
"""A stack's parameters should fit into so much of a processor's cache."""
MOST_ON_CPU = 20
"""Taller stacks gain nothing on a processor."""
MOST_ON_GPU = 1024
GPU_SHARE = 0.5
"""Part of an actor's device memory for a stack; the rest is for data, states and updates."""
COPIES = 12
"""Rows of parameters that a step may hold beside each other, those of methods with several models
and of estimators included."""


def stack_on_cpu(model: Model) -> int:
    """Clients in a stack on a processor."""
    if not model.stacks_on_cpu:
        return 1
    fits = CACHE_BYTES // (model.spec.dtype.itemsize * model.spec.num_params)
    return int(np.clip(fits, 4, MOST_ON_CPU))


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
    that makes as much again on its way, and copies of the parameters.
    """
    x, y, weight = blank_batch(model, task, 1, batch_length)
    theta = torch.zeros((1, model.spec.num_params), dtype=model.spec.dtype)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views of one storage are kept once.
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    engine = RowEngine(model, task, torch.device("cpu"))
    # The first call of a shape also tries out heights, which is not a row's.
    engine.loss_and_grad(theta, x, y, weight)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.loss_and_grad(theta, x, y, weight)
    return 2 * sum(kept.values()) + COPIES * theta.nbytes


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
