"""Local SGD against plain torch loops, and the promise that a row does not feel its neighbours."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selffl_ray import ExperimentConfig
from selffl_ray.config import DataConfig
from selffl_ray.errors import ConfigError
from selffl_ray.evaluation import EvaluationConfig
from selffl_ray.experiment import prepare_experiment, write_params
from selffl_ray.gradients import RowEngine
from selffl_ray.models.build import ModelConfig, build_model, start_params
from selffl_ray.models.linear import LinearConfig
from selffl_ray.models.mlp import MLPConfig
from selffl_ray.participation import plan_rounds
from selffl_ray.registry import Component
from selffl_ray.seeding import generator
from selffl_ray.stopping import StopConfig
from selffl_ray.tasks import CLASSIFICATION, DataShape
from selffl_ray.training import (
    Rows,
    Stack,
    Step,
    TrainingConfig,
    local_sgd,
    observe_tail,
    plan_batches,
    start_tail,
    tail_counts,
    tail_mean,
)

INPUTS, HIDDEN, CLASSES = 6, 5, 4
SHAPE = DataShape((INPUTS,), CLASSES)
ENGINES = {
    name: RowEngine(
        build_model(ModelConfig(component=Component(name, options)), SHAPE),
        CLASSIFICATION,
        torch.device("cpu"),
    )
    for name, options in (("mlp", MLPConfig(hidden=(HIDDEN,))), ("linear", LinearConfig()))
}
DOUBLE = RowEngine(
    build_model(ModelConfig(component=Component("linear", LinearConfig(dtype="float64"))), SHAPE),
    CLASSIFICATION,
    torch.device("cpu"),
)


def examples(client_id, number):
    """A client's own data, whoever stands beside it."""
    rng = generator(11, "examples", 0, client_id)
    x = rng.normal(size=(number, INPUTS)).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(rng.integers(CLASSES, size=number))


def stack_of(clients, training=None, *, engine=None, seed=3, round_index=2):
    """A stack from {client id: number of examples}."""
    training = training or TrainingConfig(batch_size=4, learning_rate=0.3)
    lengths = {training.batch_length(n) for n in clients.values()}
    assert len(lengths) == 1, "clients of a stack share their batch length"
    data = [examples(c, n) for c, n in clients.items()]
    num_C = torch.tensor(list(clients.values()))
    return Stack(
        tuple(clients),
        Rows(
            torch.cat([x for x, _ in data]),
            torch.cat([y for _, y in data]),
            torch.cumsum(num_C, 0) - num_C,
            num_C,
        ),
        lengths.pop(),
        engine or ENGINES["mlp"],
        training,
        seed,
        round_index,
        training.learning_rate,
    )


def start_of(stack):
    """A start away from zero, so that weight decay moves it."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(scale=0.5, size=stack.spec.num_params)).to(stack.spec.dtype)


class PlainNet(nn.Module):
    """The same networks as nn.Modules, with their weights read from a flat vector by name."""

    def __init__(self, spec, theta_P):
        super().__init__()
        named = spec.named(theta_P)
        layers = []
        for name in spec.layers:
            weight, bias = named[f"{name}.weight"], named[f"{name}.bias"]
            layer = nn.Linear(*weight.shape, dtype=weight.dtype)
            with torch.no_grad():
                layer.weight.copy_(weight.T)
                layer.bias.copy_(bias)
            layers.append(layer)
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x.relu() if index else x)
        return x

    def flat(self):
        parts = [p for layer in self.layers for p in (layer.weight.T, layer.bias)]
        return torch.cat([p.detach().reshape(-1) for p in parts])


def plain_sgd(stack, client, start_P, num_steps, rate, *, penalty=None, frozen=()):
    """One client alone: torch's own modules, optimiser and clipping; returns model and losses."""
    config = stack.training
    net = PlainNet(stack.spec, start_P)
    for name in frozen:
        net.layers[stack.spec.layers.index(name)].requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(
        trained, lr=rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    plan = plan_batches(stack, "train", torch.full((stack.num_clients,), num_steps))
    x, y = examples(stack.client_ids[client], int(stack.train.num_C[client]))
    losses = []
    for step in range(num_steps):
        at = plan.index_CSB[client, step, : plan.num_CS[client, step]]
        loss = F.cross_entropy(net(x[at].to(stack.spec.dtype)), y[at])
        losses.append(loss.item())
        if penalty is not None:
            loss = loss + penalty(net)
        optimiser.zero_grad()
        loss.backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained, config.clip_norm)
        optimiser.step()
    return net.flat(), losses


def assert_rows_equal_plain_loops(stack, trained, start, steps, rates, **options):
    # torch's clipping divides by the norm + 1e-6.
    rtol, atol = (1e-5, 1e-6) if stack.spec.dtype == torch.float64 else (1e-3, 2e-5)
    for client in range(stack.num_clients):
        expected_P, losses = plain_sgd(
            stack, client, start.expand(stack.num_clients, -1)[client], steps[client],
            rates[client], **options,
        )  # fmt: skip
        torch.testing.assert_close(trained.params_CP[client], expected_P, rtol=rtol, atol=atol)
        mean = np.mean(losses) if losses else 0.0
        assert float(trained.loss_C[client]) == pytest.approx(mean, rel=1e-4)


CLIENTS = {"a": 10, "b": 7, "c": 23, "d": 4}

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.8},
    "weight_decay": {"weight_decay": 0.1},
    "clip_norm": {"clip_norm": 0.3},
    "all": {"momentum": 0.8, "weight_decay": 0.1, "clip_norm": 0.3},
    "replacement": {"sampling": "replacement", "momentum": 0.5},
}


# -- against torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("engine", [ENGINES["mlp"], DOUBLE], ids=["mlp", "linear64"])
def test_training_equals_torchs_sgd_client_by_client(engine, options):
    training = TrainingConfig(batch_size=4, learning_rate=0.2, num_local_steps=7, **options)
    stack = stack_of(CLIENTS, training, engine=engine)
    start = start_of(stack)
    trained = local_sgd(stack, start=start)
    assert_rows_equal_plain_loops(stack, trained, start, [7] * 4, [0.2] * 4)


@pytest.mark.parametrize("name", ["momentum", "weight_decay", "clip_norm"])
def test_every_option_of_the_optimiser_moves_the_result_by_ten_percent(name):
    plain = TrainingConfig(batch_size=4, learning_rate=0.2, num_local_steps=7)
    other = TrainingConfig(batch_size=4, learning_rate=0.2, num_local_steps=7, **OPTIONS[name])
    start = start_of(stack_of(CLIENTS, plain))
    moved = [local_sgd(stack_of(CLIENTS, c), start=start).params_CP - start for c in (plain, other)]
    assert (moved[1] - moved[0]).norm() > 0.1 * moved[0].norm()


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_clients_may_differ_in_start_steps_and_learning_rate(options):
    stack = stack_of(CLIENTS, TrainingConfig(batch_size=4, **options), engine=DOUBLE)
    steps, rates = [3, 8, 1, 5], [0.3, 0.05, 0.5, 0.1]
    start = torch.stack([start_of(stack) * (1 + c) for c in range(4)])
    before = start.clone()
    trained = local_sgd(stack, start=start, steps_C=torch.tensor(steps), rate_C=torch.tensor(rates))
    assert_rows_equal_plain_loops(stack, trained, start, steps, rates)
    assert trained.num_steps_C.tolist() == steps
    assert torch.equal(start, before)


def test_steps_and_learning_rate_are_the_training_options_unless_given():
    epochs = TrainingConfig(batch_size=4, learning_rate=0.2, num_local_epochs=2)
    stack = stack_of(CLIENTS, epochs, engine=DOUBLE)
    start = start_of(stack)
    trained = local_sgd(stack, start=start)
    assert_rows_equal_plain_loops(stack, trained, start, [6, 4, 12, 2], [0.2] * 4)
    halved = local_sgd(stack, start=start, rate_C=0.1)
    assert_rows_equal_plain_loops(stack, halved, start, [6, 4, 12, 2], [0.1] * 4)


# -- rows on their own ----------------------------------------------------------------------------


def test_a_finished_row_keeps_its_bits_under_momentum_and_weight_decay():
    stack = stack_of(CLIENTS, TrainingConfig(batch_size=4, **OPTIONS["all"]))
    start = start_of(stack)
    short = local_sgd(stack, start=start, steps_C=torch.tensor([2, 2, 2, 2]))
    mixed = local_sgd(stack, start=start, steps_C=torch.tensor([2, 9, 0, 2]))
    assert torch.equal(mixed.params_CP[[0, 3]], short.params_CP[[0, 3]])
    assert torch.equal(mixed.params_CP[2], start)
    assert not torch.equal(mixed.params_CP[1], short.params_CP[1])


@pytest.mark.parametrize("steps", [[6, 6, 6, 6], [2, 6, 4, 6], [6, 2, 1, 6]])
def test_a_nan_in_one_row_touches_no_other(steps):
    training = TrainingConfig(batch_size=4, **OPTIONS["all"])
    healthy, sick = stack_of(CLIENTS, training), stack_of(CLIENTS, training)
    sick.train.x[10:17] = math.nan  # client b's
    start, steps_C = start_of(healthy), torch.tensor(steps)
    good = local_sgd(healthy, start=start, steps_C=steps_C)
    bad = local_sgd(sick, start=start, steps_C=steps_C)
    assert torch.equal(bad.params_CP[[0, 2, 3]], good.params_CP[[0, 2, 3]])
    assert torch.equal(bad.loss_C[[0, 2, 3]], good.loss_C[[0, 2, 3]])
    assert bad.params_CP[1].isnan().any()
    assert bad.loss_C[1].isnan()


def test_a_nan_start_stays_in_its_row_whether_that_row_trains_or_not():
    stack = stack_of(CLIENTS, TrainingConfig(batch_size=4, **OPTIONS["all"]))
    start = start_of(stack).expand(4, -1).clone()
    good = local_sgd(stack, start=start, steps_C=torch.tensor([0, 3, 3, 3]))
    start[:2] = math.nan
    bad = local_sgd(stack, start=start, steps_C=torch.tensor([0, 3, 3, 3]))
    assert torch.equal(bad.params_CP[2:], good.params_CP[2:])
    assert bad.params_CP[:2].isnan().all()


sizes = st.integers(4, 30)
steps_of = st.integers(0, 7)


@settings(max_examples=25)
@given(
    clients=st.lists(st.tuples(sizes, steps_of), min_size=1, max_size=7),
    order=st.randoms(use_true_random=False),
    options=st.sampled_from([OPTIONS["plain"], OPTIONS["all"], OPTIONS["replacement"]]),
    name=st.sampled_from(["mlp", "linear"]),
)
def test_rows_are_bit_equal_to_stacks_of_one(clients, order, options, name):
    training = TrainingConfig(batch_size=4, learning_rate=0.3, **options)
    named = [(f"client {i}", *pair) for i, pair in enumerate(clients)]
    order.shuffle(named)
    stack = stack_of({c: n for c, n, _ in named}, training, engine=ENGINES[name])
    start = start_of(stack)
    together = local_sgd(stack, start=start, steps_C=torch.tensor([s for *_, s in named]))
    for row, (client_id, number, steps) in enumerate(named):
        one = stack_of({client_id: number}, training, engine=ENGINES[name])
        alone = local_sgd(one, start=start, steps_C=torch.tensor([steps]))
        assert torch.equal(together.params_CP[row], alone.params_CP[0])
        assert torch.equal(together.loss_C[row], alone.loss_C[0])


def test_a_client_too_small_for_a_batch_is_bit_equal_to_a_stack_of_one():
    training = TrainingConfig(batch_size=32, learning_rate=0.3)
    clients = {"p": 5, "q": 8, "r": 7}  # all padded to 8
    together = local_sgd(stack_of(clients, training), start=start_of(stack_of(clients, training)))
    for row, (client_id, number) in enumerate(clients.items()):
        one = stack_of({client_id: number}, training)
        alone = local_sgd(one, start=start_of(one))
        assert torch.equal(together.params_CP[row], alone.params_CP[0])


def test_no_steps_at_all_leave_the_start():
    stack = stack_of(CLIENTS)
    start = start_of(stack)
    trained = local_sgd(stack, start=start, steps_C=torch.zeros(4, dtype=torch.int64))
    assert torch.equal(trained.params_CP, start.expand(4, -1))
    assert trained.loss_C.tolist() == [0.0] * 4


# -- callbacks ------------------------------------------------------------------------------------


def test_extra_grad_is_the_gradient_of_a_penalty_taken_before_clipping():
    mu = 2.0
    stack = stack_of(CLIENTS, TrainingConfig(batch_size=4, **OPTIONS["all"]), engine=DOUBLE)
    start = start_of(stack)
    steps, rates = [3, 8, 1, 5], [0.2] * 4

    def penalty(net):
        origin = PlainNet(stack.spec, start)
        pairs = zip(net.parameters(), origin.parameters(), strict=True)
        return mu / 2 * sum(((p - q.detach()) ** 2).sum() for p, q in pairs)

    def pull(theta_AP, active):
        assert torch.equal(torch.arange(4)[active], (steps_C > taken[-1]).nonzero().flatten())
        assert len(theta_AP) == int((steps_C > taken[-1]).sum())
        taken.append(taken[-1] + 1)
        return mu * (theta_AP - start)

    steps_C, taken = torch.tensor(steps), [0]
    trained = local_sgd(stack, start=start, steps_C=steps_C, rate_C=0.2, extra_grad=pull)
    assert taken[-1] == max(steps)
    assert_rows_equal_plain_loops(stack, trained, start, steps, rates, penalty=penalty)
    free = local_sgd(stack, start=start, steps_C=steps_C, rate_C=0.2)
    held = (trained.params_CP - start).norm()
    assert held < 0.9 * (free.params_CP - start).norm()


def test_direction_takes_the_gradient_elsewhere_and_hands_its_carry_on():
    """Lookahead gradients on a second stream of batches, and a carry that sums the iterates."""
    config = TrainingConfig(batch_size=4, learning_rate=0.2)
    stack = stack_of(CLIENTS, config, engine=DOUBLE)
    start, steps_C = start_of(stack), torch.tensor([3, 6, 1, 4])

    def lookahead(carry, theta_CP, step):
        second_AP = step.active_grad(theta_CP, step.batch("second"))
        ahead_AP = theta_CP[step.pick] - 0.5 * second_AP
        return carry + theta_CP * (step.index + 1), step.grad_at(ahead_AP)

    trained = local_sgd(
        stack,
        start=start,
        steps_C=steps_C,
        direction=lookahead,
        carry=torch.zeros(4, stack.spec.num_params, dtype=torch.float64),
    )
    first, second = (plan_batches(stack, stream, steps_C) for stream in ("train", "second"))

    def grad(client, theta_P, plan, step):
        at = plan.index_CSB[client, step, : plan.num_CS[client, step]]
        x, y = examples(stack.client_ids[client], int(stack.train.num_C[client]))
        net = PlainNet(stack.spec, theta_P)
        F.cross_entropy(net(x[at].double()), y[at]).backward()
        parts = [g for la in net.layers for g in (la.weight.grad.T, la.bias.grad)]
        return torch.cat([p.reshape(-1) for p in parts])

    for client, own in enumerate(steps_C.tolist()):
        theta_P, carry_P = start, torch.zeros_like(start)
        for step in range(6):
            carry_P = carry_P + theta_P * (step + 1)
            if step < own:
                ahead_P = theta_P - 0.5 * grad(client, theta_P, second, step)
                theta_P = theta_P - 0.2 * grad(client, ahead_P, first, step)
        torch.testing.assert_close(trained.params_CP[client], theta_P)
        torch.testing.assert_close(trained.carry[client], carry_P)


def test_a_direction_may_ask_for_no_gradient_and_then_reports_no_loss():
    stack = stack_of(CLIENTS)
    start = start_of(stack)
    halve = lambda carry, theta_CP, step: (carry, theta_CP[step.pick].clone())  # noqa: E731
    steps_C = torch.tensor([3, 1, 0, 2])
    trained = local_sgd(stack, start=start, steps_C=steps_C, rate_C=0.5, direction=halve)
    torch.testing.assert_close(trained.params_CP, start * 0.5 ** steps_C.unsqueeze(1))
    assert trained.loss_C.tolist() == [0.0] * 4


def test_the_loops_own_gradient_is_the_default_direction():
    stack = stack_of(CLIENTS, TrainingConfig(batch_size=4, **OPTIONS["all"]))
    start, steps_C = start_of(stack), torch.tensor([3, 6, 1, 4])
    own = local_sgd(stack, start=start, steps_C=steps_C)
    asked = local_sgd(
        stack,
        start=start,
        steps_C=steps_C,
        direction=lambda carry, theta_CP, step: (carry, step.active_grad(theta_CP)),
    )
    assert torch.equal(own.params_CP, asked.params_CP)
    assert torch.equal(own.loss_C, asked.loss_C)


def test_after_step_replaces_the_active_rows_after_every_step():
    """The proximal step of |theta|_1 / 20 against a plain loop; finished rows are left alone."""
    stack = stack_of(CLIENTS, engine=DOUBLE)
    start, steps_C = start_of(stack), torch.tensor([2, 5, 0, 5])
    trained = local_sgd(
        stack, start=start, steps_C=steps_C, rate_C=0.2, after_step=lambda t: F.softshrink(t, 0.05)
    )
    for client, own in enumerate(steps_C.tolist()):
        theta_P = start
        for step in range(own):
            moved = local_sgd(
                stack,
                start=theta_P,
                steps_C=torch.full((4,), step + 1),
                rate_C=0.2,
                direction=lambda c, t, s, now=step: (
                    c,
                    s.active_grad(t) if s.index == now else 0 * t[s.pick],
                ),
            )
            theta_P = F.softshrink(moved.params_CP[client], 0.05)
        torch.testing.assert_close(trained.params_CP[client], theta_P)
    assert torch.equal(trained.params_CP[2], start)
    assert (trained.params_CP[1] == 0).any()


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("after", [None, lambda t: t], ids=["", "after_step"])
def test_frozen_coordinates_keep_their_bits_and_do_not_count_in_the_clipped_norm(options, after):
    training = TrainingConfig(batch_size=4, learning_rate=0.2, num_local_steps=6, **options)
    stack = stack_of(CLIENTS, training)
    start, body = start_of(stack), stack.spec.mask(["hidden0"])
    trained = local_sgd(stack, start=start, trainable=~body, after_step=after)
    assert torch.equal(trained.params_CP[:, body], start[body].expand(4, -1))
    assert_rows_equal_plain_loops(stack, trained, start, [6] * 4, [0.2] * 4, frozen=["hidden0"])


def test_after_step_cannot_move_frozen_coordinates():
    stack = stack_of(CLIENTS)
    start, body = start_of(stack), stack.spec.mask(["hidden0"])
    trained = local_sgd(stack, start=start, trainable=~body, after_step=lambda t: t * 0.5)
    assert torch.equal(trained.params_CP[:, body], start[body].expand(4, -1))


def test_observe_sees_every_iterate_after_its_step():
    stack = stack_of(CLIENTS)
    start, steps_C = start_of(stack), torch.tensor([2, 5, 0, 5])

    def note(seen, theta_CP, step):
        return [*seen, (step.index, step.active_C.tolist(), theta_CP.clone())]

    trained = local_sgd(stack, start=start, steps_C=steps_C, observe=note, seen=[])
    assert [index for index, *_ in trained.seen] == [0, 1, 2, 3, 4]
    assert [sum(active) for _, active, _ in trained.seen] == [3, 3, 2, 2, 2]
    for index, active, theta_CP in trained.seen:
        so_far = local_sgd(stack, start=start, steps_C=steps_C.clamp(max=index + 1))
        assert torch.equal(theta_CP, so_far.params_CP)
        assert active == (steps_C > index).tolist()


@settings(max_examples=15)
@given(steps=st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_tail_holds_mean_and_squares_of_the_second_half_of_the_iterates(steps):
    stack = stack_of(CLIENTS, engine=DOUBLE)
    start, steps_C = start_of(stack), torch.tensor(steps)
    tail = start_tail(start, 4, squares=True)
    trained = local_sgd(stack, start=start, steps_C=steps_C, observe=observe_tail, seen=tail)
    every = local_sgd(
        stack,
        start=start,
        steps_C=steps_C,
        observe=lambda seen, theta_CP, step: [*seen, theta_CP.clone()],
        seen=[],
    ).seen
    mean_CP = tail_mean(trained.seen, steps_C)
    counts = tail_counts(steps_C)
    for client, own in enumerate(steps):
        iterates = [theta_CP[client] for theta_CP in every[own // 2 : own]]
        assert len(iterates) == int(counts[client])
        if not iterates:
            assert torch.equal(mean_CP[client], start)
            continue
        torch.testing.assert_close(mean_CP[client], torch.stack(iterates).mean(0))
        squares_P = sum((theta_P - start) ** 2 for theta_P in iterates)
        torch.testing.assert_close(trained.seen.square_CP[client], squares_P)
    assert not tail.sum_CP.any(), "the tail that was passed in is not changed"


def test_squares_of_a_tail_do_not_cancel_far_from_zero():
    """Counted from the start, a spread of 1e-3 around 1e4 survives in float32."""
    start = torch.full((2,), 1e4)
    tail = start_tail(start, 1, squares=True)
    step = Step(stack_of({"a": 4}), "train", torch.tensor([1]))
    step.advance(0)
    seen = observe_tail(tail, start[None] + 2**-9, step)
    torch.testing.assert_close(seen.square_CP, torch.full((1, 2), 2.0**-18, dtype=torch.float64))


def test_batches_and_gradients_are_made_on_the_device_of_the_examples():
    """``meta`` stands in for a GPU: it refuses tensors of two devices just the same."""
    stack = stack_of(CLIENTS)
    rows = stack.train._replace(x=stack.train.x.to("meta"), y=stack.train.y.to("meta"))
    engine = RowEngine(stack.engine.model, CLASSIFICATION, torch.device("meta"))
    step = Step(replace(stack, train=rows, engine=engine), "train", torch.tensor([1, 2, 0, 2]))
    theta_CP = torch.empty(4, stack.spec.num_params, device="meta")
    for index, active in ((0, 3), (1, 2)):
        step.advance(index)
        assert step.batch().x.shape == (active, 4, INPUTS)
        grad_AP = step.active_grad(theta_CP)
        assert grad_AP.shape == (active, stack.spec.num_params)
        assert grad_AP.device.type == "meta"


# -- batches --------------------------------------------------------------------------------------


def batches_of(stack, client=0, stream="train", steps=12):
    plan = plan_batches(stack, stream, torch.full((stack.num_clients,), steps))
    return [plan.index_CSB[client, s, : plan.num_CS[client, s]].tolist() for s in range(steps)]


@settings(max_examples=50)
@given(number=st.integers(1, 40), batch_size=st.integers(1, 12), epochs=st.integers(1, 4))
def test_an_epoch_covers_each_example_once_in_batches_of_which_the_last_may_be_short(
    number, batch_size, epochs
):
    stack = stack_of({"a": number}, TrainingConfig(batch_size=batch_size))
    per_epoch = math.ceil(number / batch_size)
    found = batches_of(stack, steps=epochs * per_epoch)
    for epoch in range(epochs):
        own = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for batch in own for i in batch) == list(range(number))
        assert {len(batch) for batch in own[:-1]} <= {batch_size}
        assert len(own[-1]) == number - (per_epoch - 1) * batch_size


@settings(max_examples=40)
@given(number=st.integers(1, 40), batch_size=st.integers(1, 12), steps=st.integers(1, 25))
def test_fewer_steps_are_the_first_of_more_also_within_an_epoch(number, batch_size, steps):
    stack = stack_of({"a": number}, TrainingConfig(batch_size=batch_size))
    assert batches_of(stack, steps=steps) == batches_of(stack, steps=steps + 30)[:steps]


def test_epochs_are_shuffled_anew():
    found = batches_of(stack_of({"a": 12}, TrainingConfig(batch_size=12)), steps=3)
    assert len({tuple(batch) for batch in found}) == 3


@settings(max_examples=30)
@given(number=st.integers(1, 40), batch_size=st.integers(1, 12))
def test_batches_with_replacement_are_always_full(number, batch_size):
    training = TrainingConfig(batch_size=batch_size, sampling="replacement")
    found = batches_of(stack_of({"a": number}, training), steps=9)
    assert {len(batch) for batch in found} == {batch_size}
    assert all(0 <= i < number for batch in found for i in batch)


def test_batches_with_replacement_reach_every_example_and_repeat_some():
    training = TrainingConfig(batch_size=10, sampling="replacement")
    found = batches_of(stack_of({"a": 10}, training), steps=12)
    assert {i for batch in found for i in batch} == set(range(10))
    assert any(len(set(batch)) < 10 for batch in found)


def test_padding_has_no_weight_and_a_short_batch_is_a_mean_over_its_own_size():
    training = TrainingConfig(batch_size=4)
    stack = stack_of({"a": 6, "b": 9}, training)
    step = Step(stack, "train", torch.tensor([3, 3]))
    for index, lengths in enumerate([(4, 4), (2, 4), (4, 1)]):
        step.advance(index)
        batch = step.batch()
        assert batch.x.shape == (2, 4, INPUTS)
        for client, length in enumerate(lengths):
            expected = [1 / length] * length + [0] * (4 - length)
            assert batch.weight[client].tolist() == pytest.approx(expected)


def test_a_stream_has_the_same_batches_for_whoever_asks_and_however_many():
    stack, alone = stack_of(CLIENTS), stack_of({"c": CLIENTS["c"]})
    assert batches_of(stack, client=2) == batches_of(stack, client=2)
    assert batches_of(stack, client=2) == batches_of(alone)
    for sampling in ("epoch", "replacement"):
        training = TrainingConfig(batch_size=4, sampling=sampling)
        some = batches_of(stack_of({"c": 10}, training), steps=5)
        assert batches_of(stack_of({"c": 10}, training), steps=11)[:5] == some


def test_streams_differ_by_name_round_client_and_seed():
    clients = {"a": 30, "b": 30}
    streams = [
        batches_of(stack_of(clients)),
        batches_of(stack_of(clients), client=1),
        batches_of(stack_of(clients), stream="personal"),
        batches_of(stack_of(clients, seed=4)),
        batches_of(stack_of(clients, round_index=3)),
    ]
    assert len({str(stream) for stream in streams}) == 5


def test_training_on_another_stream_gives_another_result():
    stack = stack_of(CLIENTS)
    first, other = (
        local_sgd(stack, start=start_of(stack), stream=name).params_CP for name in ("train", "own")
    )
    assert (first - other).norm() > 0.1 * (first - start_of(stack)).norm()


@pytest.mark.parametrize(
    ("number", "sampling", "length"),
    [(1, "epoch", 1), (2, "epoch", 2), (3, "epoch", 4), (5, "epoch", 8), (17, "epoch", 20),
     (19, "epoch", 20), (20, "epoch", 20), (21, "epoch", 20), (900, "epoch", 20),
     (1, "replacement", 20), (900, "replacement", 20)],
)  # fmt: skip
def test_batch_length_is_the_batch_size_or_the_next_power_of_two_of_a_small_client(
    number, sampling, length
):
    assert TrainingConfig(batch_size=20, sampling=sampling).batch_length(number) == length


# -- options --------------------------------------------------------------------------------------


def test_learning_rates_follow_the_schedule_over_the_rounds():
    def rates(schedule):
        config = TrainingConfig(num_rounds=8, learning_rate=0.4, schedule=schedule)
        return [config.rate(r) for r in range(8)]

    assert rates("constant") == [0.4] * 8
    assert rates("linear") == pytest.approx([0.4 * (1 - r / 8) for r in range(8)])
    assert rates("cosine") == pytest.approx([0.4 * np.cos(np.pi * r / 16) ** 2 for r in range(8)])
    assert rates("step") == pytest.approx([0.4] * 4 + [0.04] * 2 + [0.004] * 2)


def test_number_of_local_steps_is_20_or_as_given_or_whole_passes():
    assert TrainingConfig().steps(1000) == 20
    assert TrainingConfig(num_local_steps=3).steps(1000) == 3
    epochs = TrainingConfig(num_local_epochs=3, batch_size=10)
    assert [epochs.steps(n) for n in (1, 10, 11, 1000)] == [3, 3, 6, 300]


def test_rounds_and_participation_rate_shape_the_plan():
    plans = plan_rounds(
        0, TrainingConfig(num_rounds=7, participation_rate=0.5), dict.fromkeys("abcdefghij", 9)
    )
    assert [len(plan.cohort) for plan in plans] == [5] * 7


def test_batch_size_and_sampling_change_what_is_learned():
    start = start_of(stack_of(CLIENTS))
    results = [
        local_sgd(stack_of({"c": 23}, TrainingConfig(**options)), start=start).params_CP - start
        for options in (
            {"batch_size": 4},
            {"batch_size": 8},
            {"batch_size": 4, "sampling": "replacement"},
        )
    ]
    for other in results[1:]:
        assert (other - results[0]).norm() > 0.1 * results[0].norm()


def test_start_from_replaces_the_drawn_start(tmp_path):
    data = DataConfig(component=Component("gaussian"))
    config = ExperimentConfig(
        data=data,
        model=ModelConfig(component=Component("linear", LinearConfig(bias=False))),
        method=Component("fedavg"),
        evaluation=EvaluationConfig(splits=(1.0, 0.0, 0.0)),
    )
    drawn = prepare_experiment(config)
    warm = torch.arange(20.0)
    write_params(tmp_path / "warm.safetensors", warm, drawn.model.spec)
    training = TrainingConfig(start_from=str(tmp_path / "warm.safetensors"))
    warmed = prepare_experiment(
        ExperimentConfig(
            data=data,
            model=config.model,
            method=config.method,
            evaluation=config.evaluation,
            training=training,
        )
    )
    np.testing.assert_array_equal(warmed.run_spec.start_params, warm.numpy())
    np.testing.assert_array_equal(drawn.run_spec.start_params, start_params(drawn.model, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rounds": 0}, "training.num_rounds must be >= 1, got 0"),
        ({"batch_size": 0}, "training.batch_size must be >= 1, got 0"),
        ({"num_local_steps": 0}, "training.num_local_steps must be >= 1, got 0"),
        ({"num_local_epochs": -1}, "training.num_local_epochs must be >= 1, got -1"),
        ({"num_local_steps": 5, "num_local_epochs": 2}, "exclude each other; keep one"),
        ({"participation_rate": 0.0}, r"participation_rate must lie in \(0, 1\], got 0.0"),
        ({"participation_rate": 1.1}, r"participation_rate must lie in \(0, 1\], got 1.1"),
        ({"learning_rate": 0.0}, "training.learning_rate must be > 0, got 0.0; usual values"),
        ({"learning_rate": math.nan}, "training.learning_rate must be > 0, got nan"),
        ({"learning_rate": math.inf}, "training.learning_rate must be > 0, got inf"),
        ({"momentum": 1.0}, r"training.momentum must lie in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"training.momentum must lie in \[0, 1\), got -0.1"),
        ({"weight_decay": -1.0}, "training.weight_decay must be >= 0, got -1.0"),
        ({"weight_decay": math.inf}, "training.weight_decay must be >= 0, got inf"),
        ({"clip_norm": 0.0}, "training.clip_norm must be > 0, got 0.0; null switches it off"),
        ({"clip_norm": math.inf}, "training.clip_norm must be > 0, got inf; null"),
    ],
)
def test_a_wrong_training_option_is_named_with_its_value(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "test/local_accuracy"}, "must be a validation metric .* select on them"),
        ({"patience": 0}, "training.stop.patience must be >= 1, got 0"),
        ({"seconds": 0.0}, "training.stop.seconds must be > 0, got 0.0"),
        ({"seconds": math.nan}, "training.stop.seconds must be > 0, got nan"),
    ],
)
def test_a_wrong_stop_option_is_named_with_its_value(options, message):
    with pytest.raises(ConfigError, match=message):
        StopConfig(**options)


# -- steps that time allows ------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["epoch", "replacement"])
def test_a_client_short_of_time_makes_the_first_steps_of_its_round_and_no_more(sampling):
    training = TrainingConfig(num_local_steps=9, batch_size=4, momentum=0.5, sampling=sampling)
    stack = stack_of(CLIENTS, training)
    start, most = start_of(stack), tuple(range(1, len(CLIENTS) + 1))
    short = replace(stack, most_steps=most)
    assert short.num_steps_C.tolist() == list(most)
    found = local_sgd(short, start=start)
    wanted = local_sgd(stack, start=start, steps_C=torch.tensor(most))
    assert torch.equal(found.params_CP, wanted.params_CP)
    assert found.num_steps_C.tolist() == list(most)
    # Steps that a method plans by itself are cut at the same number, never made longer.
    planned = local_sgd(short, start=start, steps_C=torch.full((len(CLIENTS),), 2))
    assert planned.num_steps_C.tolist() == [min(2, k) for k in most]
