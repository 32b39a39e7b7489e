"""The same code on a CUDA device: stacks live there, agree with the CPU, and no step waits for it.

Bits differ from the CPU's (libraries choose kernels by size there), so results are compared within
rounding.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from selffl_ray import trees
from selffl_ray.driver import run_rounds
from selffl_ray.flat import digest
from selffl_ray.gradients import RowEngine
from selffl_ray.host import ClientHost
from selffl_ray.numerics import tf32_is_on
from selffl_ray.pool import ClientPool, LocalTransport
from selffl_ray.registry import algorithms
from selffl_ray.stacking import blank_batch, row_bytes
from selffl_ray.tasks import CLASSIFICATION
from selffl_ray.training import local_sgd, observe_tail, start_tail
from tests.contract.harness import as_allowed
from tests.runtime.placements import prepared_with
from tests.test_digests_local import CNN, DIGITS
from tests.test_moving import Restless

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"
    ),
    # What the mode misses, torch says once; what it finds, it raises.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

MODELS = {"mlp": DIGITS, "cnn": CNN}
RESNET = (
    *(setting for setting in DIGITS if not setting.startswith("model.")),
    "model.name=resnet",
    "model.channels=[8, 16]",
    "model.blocks=1",
)


def rounds_on(device, prepared):
    """Server's tensors and losses after every round, with all clients in one host."""
    pool = ClientPool(LocalTransport(1, torch.device(device)), [0] * len(prepared.clients))
    pool.load(prepared.data_spec, prepared.clients)
    pool.begin(prepared.run_spec, prepared.algorithm)
    from benchmarks.in_process import run_of

    start_P = torch.from_numpy(prepared.run_spec.start_params.copy())
    records = list(run_rounds(run_of(prepared, pool), prepared.algorithm.init(start_P)))
    params = [dict(trees.leaves(record.server)) for record in records]
    return params, [record.metrics["train/loss"] for record in records]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", algorithms.names())
def test_every_method_trains_on_the_device_as_on_the_cpu(method, model):
    prepared = prepared_with(*as_allowed(method, MODELS[model]), f"method={method}")
    (on_cpu, cpu_loss), (on_gpu, gpu_loss) = (rounds_on(d, prepared) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu_loss, cpu_loss, rtol=1e-3)
    for one, other in zip(on_cpu, on_gpu, strict=True):
        for name, leaf in one.items():
            found = other[name].cpu().double()
            assert torch.allclose(found, leaf.double(), rtol=1e-2, atol=1e-3, equal_nan=True), name


@pytest.mark.parametrize("method", ["fedavg", "ditto", "selffl"])
def test_clients_that_move_take_examples_and_state_along_on_the_device(method):
    prepared = prepared_with(*as_allowed(method, DIGITS), f"method={method}")
    transport = LocalTransport(2, torch.device("cuda"))
    pool = ClientPool(transport, [i % 2 for i in range(len(prepared.clients))])
    pool.load(prepared.data_spec, prepared.clients)
    pool.begin(prepared.run_spec, prepared.algorithm)
    mover = Restless(pool, prepared.federation, 0, print)
    from benchmarks.in_process import run_of

    run = dataclasses.replace(run_of(prepared, pool), rebalancer=mover)
    start_P = torch.from_numpy(prepared.run_spec.start_params.copy())
    records = run_rounds(run, prepared.algorithm.init(start_P))
    losses = [record.metrics["train/loss"] for record in records]
    assert mover.num_moved > len(losses)
    np.testing.assert_allclose(losses, rounds_on("cpu", prepared)[1], rtol=1e-3)
    for host in transport._hosts:
        assert {rows.x.device.type for rows in host._rows.values()} == {"cuda"}


def test_no_host_on_a_device_is_of_the_kind_of_another():
    """Bits depend on who shares a stack there, and moves depend on time."""
    transport = LocalTransport(3, torch.device("cuda"))
    assert len({transport.kind(host) for host in range(3)}) == 3


@pytest.mark.parametrize("model", [*MODELS, "resnet"])
def test_a_run_gives_the_same_bits_every_time(model):
    settings = MODELS.get(model, RESNET)
    prepared = prepared_with(*settings, "method=selffl")
    one, other = rounds_on("cuda", prepared), rounds_on("cuda", prepared)
    assert one[1] == other[1]
    for mine, yours in zip(one[0], other[0], strict=True):
        assert digest(mine.values()) == digest(yours.values())
    np.testing.assert_allclose(one[1], rounds_on("cpu", prepared)[1], rtol=1e-3)


def test_products_and_convolutions_keep_all_their_digits():
    """TF32 keeps ten bits of a factor: 1 + 2**-12 would be 1."""
    RowEngine(prepared_with(*DIGITS).model, CLASSIFICATION, torch.device("cuda"))
    assert not tf32_is_on()
    almost = torch.full((64, 64), 1 + 2.0**-12, device="cuda")
    assert float((almost @ torch.eye(64, device="cuda"))[0, 0]) == 1 + 2.0**-12
    picture = almost[None, None].expand(1, 16, 64, 64)
    kernel = torch.zeros((16, 16, 1, 1), device="cuda")
    kernel[:, 0] = 1.0
    assert float(torch.conv2d(picture, kernel)[0, 0, 0, 0]) == 1 + 2.0**-12


def test_a_stack_of_the_chosen_height_fits_its_part_of_the_memory():
    """What a row takes is counted on a processor: here it is measured."""
    for settings in (DIGITS, CNN, RESNET):
        prepared = prepared_with(*settings)
        model, task, cuda = prepared.model, prepared.dataset.task, torch.device("cuda")
        rows, length = 64, 32
        engine = RowEngine(model, task, cuda)
        batch = [part.to(cuda) for part in blank_batch(model, task, rows, length)]
        theta = torch.zeros((rows, model.spec.num_params), device=cuda)
        # The first call loads libraries.
        engine.loss_and_grad(theta, *batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.loss_and_grad(theta, *batch)
        took = torch.cuda.max_memory_allocated() - before + theta.nbytes
        assert took <= rows * row_bytes(model, task, length)


def stack_on_device():
    prepared = prepared_with(*DIGITS, "method=fedavg")
    host = ClientHost(torch.device("cuda"))
    host.load(prepared.data_spec, dict(enumerate(prepared.clients)))
    host.begin(prepared.run_spec)
    members = host._stacks(range(len(prepared.clients)))[0]
    assert len(members) > 1
    return host._stack(members, prepared.plans[0]), host._start_P


def test_examples_parameters_and_gradients_are_on_the_device():
    stack, start_P = stack_on_device()
    found = []

    def look(seen, theta_CP, step):
        batch = step.batch()
        found.extend((theta_CP, batch.x, batch.y, batch.weight, step.loss_A))
        return seen

    trained = local_sgd(stack, start=start_P, observe=look)
    assert {tensor.device.type for tensor in (*found, trained.params_CP)} == {"cuda"}


@pytest.mark.parametrize("watched", [False, True])
def test_no_step_waits_for_the_device(watched):
    """From the end of the first step to the end of the last: drawing batches comes before."""
    stack, start_P = stack_on_device()
    last = int(stack.num_steps_C.max()) - 1
    assert last > 1

    def look(seen, theta_CP, step):
        seen = observe_tail(seen, theta_CP, step) if watched else seen
        torch.cuda.set_sync_debug_mode("error" if step.index < last else "default")
        return seen

    tail = start_tail(start_P, stack.num_clients, squares=True) if watched else None
    try:
        local_sgd(stack, start=start_P, observe=look, seen=tail)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed():
    """The test above can fail: reading a number back is refused in that mode."""
    number = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            number.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
