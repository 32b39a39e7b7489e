"""Heights of stacks where the user leaves them open."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from selffl_ray.experiment import fit_stacks
from selffl_ray.flat import ParamSpec
from selffl_ray.gradients import RowEngine
from selffl_ray.models.base import Model, lift
from selffl_ray.stacking import (
    COPIES,
    _kept_bytes,
    blank_batch,
    row_bytes,
    stack_on_cpu,
    stack_on_gpu,
)
from selffl_ray.tasks import CLASSIFICATION, DataShape
from tests.runtime.placements import prepared_with
from tests.test_digests_local import CNN, DIGITS

SHAPE = DataShape((6,), 3)
RESNET = (*DIGITS[:-1], "model={name: resnet, channels: [8, 16], blocks: 1}")
GAUSSIAN = (
    "data={name: gaussian, num_clients: 4, dimension: 12, num_examples: [300, 700]}",
    "model.name=linear",
)


def model_of(num_params, *, stacks_on_cpu=True, forward=None):
    spec = ParamSpec(("w",), ((num_params,),))
    return Model(spec, SHAPE, lambda leaves, x: x, lambda rng: None, stacks_on_cpu, forward)


@pytest.mark.parametrize(
    ("num_params", "height"),
    [(79_510, 13), (100, 20), (10**6, 4), (2**20 // 7, 7), (2**20 // 7 + 1, 6)],
)
def test_a_stack_on_a_processor_fits_four_mebibytes_within_4_and_20_rows(num_params, height):
    assert stack_on_cpu(model_of(num_params)) == height


@pytest.mark.parametrize(
    ("num_params", "height"), [(79_510, 26), (100, 64), (10**6, 4), (2**21 // 7 + 1, 6)]
)
def test_with_a_backward_pass_of_its_own_it_fits_eight_within_4_and_64(num_params, height):
    own = model_of(num_params, forward=lambda leaves, x: (x, lambda grad, out: None))
    assert stack_on_cpu(own) == height


def test_convolutions_go_one_by_one_on_a_processor():
    assert stack_on_cpu(model_of(100, stacks_on_cpu=False)) == 1


def test_a_row_takes_what_the_backward_pass_needs_twice_and_copies_of_its_parameters():
    """Of tanh(x): its value, (B, 6), beside what the loss keeps: (B, 3) of log-softmax, labels."""

    class Squash(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return torch.tanh(x + self.shift)[:, :3]

    model = lift(Squash, SHAPE)
    sizes = [row_bytes(model, CLASSIFICATION, length) for length in (100, 200)]
    assert sizes[1] - sizes[0] >= 2 * 100 * 4 * (6 + 3)
    assert sizes[0] - (sizes[1] - sizes[0]) == pytest.approx(COPIES * 4 * 6, abs=64)


@pytest.mark.parametrize("settings", [CNN, DIGITS, RESNET], ids=["cnn", "mlp", "resnet"])
def test_what_short_batches_tell_of_a_long_one_is_what_it_keeps(settings):
    prepared = prepared_with(*settings)
    model, task = prepared.model, prepared.dataset.task
    copies = COPIES * 4 * model.spec.num_params
    assert row_bytes(model, task, 37) == 2 * _kept_bytes(model, task, 37) + copies


def test_a_stack_on_a_gpu_takes_half_of_the_memory_at_most():
    prepared = prepared_with(*CNN)
    task, model = prepared.dataset.task, prepared.model
    row = row_bytes(model, task, 32)
    assert stack_on_gpu(model, task, 32, 2 * 50 * row) == 50
    assert stack_on_gpu(model, task, 32, 2 * 50 * row - 1) == 49
    assert stack_on_gpu(model, task, 32, 1) == 1
    assert stack_on_gpu(model, task, 32, 10**15) == 1024


def test_the_size_is_fitted_to_gpus_only_where_all_have_one_and_it_is_left_open():
    left_open = prepared_with(*DIGITS)
    given = prepared_with(*DIGITS, "placement.stack_size=3")
    assert fit_stacks(left_open, [10**10, 10**10]).run_spec.stack_size == 1024
    for prepared, memory in ((left_open, []), (left_open, [10**10, 0]), (given, [10**10])):
        assert fit_stacks(prepared, memory) is prepared


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        # Of a client's test examples, at most 64 as its model is evaluated on them together.
        ((*CNN, "training.batch_size=10"), 64),
        ((*GAUSSIAN, "training.batch_size=32"), 256),
        ((*GAUSSIAN, "training.batch_size=300"), 300),
    ],
)
def test_the_smallest_share_counts_and_the_longest_batch_of_training_and_evaluation(
    settings, length
):
    prepared = prepared_with(*settings)
    row = row_bytes(prepared.model, prepared.dataset.task, length)
    assert fit_stacks(prepared, [20 * row, 200 * row]).run_spec.stack_size == 10
    assert fit_stacks(prepared, [20 * row - 1]).run_spec.stack_size == 9


def test_a_blank_batch_is_what_the_model_and_the_task_take():
    for settings in (DIGITS, GAUSSIAN):
        prepared = prepared_with(*settings)
        x, y, weight = blank_batch(prepared.model, prepared.dataset.task, 2, 5)
        theta = torch.zeros((2, prepared.model.spec.num_params), dtype=weight.dtype)
        outputs = RowEngine(prepared.model, prepared.dataset.task, torch.device("cpu")).outputs(
            theta, x
        )
        assert prepared.dataset.task.loss(outputs, y).shape == (2, 5) == weight.shape
