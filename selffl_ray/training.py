"""The one local-SGD loop, over a stack of clients, and the batches that it draws.

Clients of a stack may differ in number of examples, of steps and in learning rate. A row that has
finished is left out of the gradient and keeps its parameters untouched (selected, never multiplied
by zero). Each client draws its batches from its own stream, so a row's numbers do not depend on
its neighbours.

Shape letters: C clients of a stack, P parameters, B examples of a batch, S steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selffl_ray.flat import ParamSpec
from selffl_ray.gradients import RowEngine
from selffl_ray.seeding import generator

# Whoever trains a stack needs both: its home is there, and it is a name of this module too.
from selffl_ray.training_config import TrainingConfig as TrainingConfig  # noqa: PLC0414


class Rows(NamedTuple):
    """Examples of several clients, one client after the other.

    x, y: (N, ...) of all, on the device of the model; start_C, num_C: where each client's lie,
    int64 on the CPU.
    """

    x: Tensor
    y: Tensor
    start_C: Tensor
    num_C: Tensor

    def take(self, index_CB: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at (C, B) positions within each client's own rows."""
        # Waiting for the copy would have each batch wait for the device.
        start_C = self.start_C.to(index_CB.device, non_blocking=True)
        return self.lying_at(index_CB + start_C.unsqueeze(1))

    def lying_at(self, place_CB: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at (C, B) positions among those of all clients."""
        at, shape = place_CB.flatten(), place_CB.shape
        x = self.x.index_select(0, at).view(*shape, *self.x.shape[1:])
        return x, self.y.index_select(0, at).view(*shape, *self.y.shape[1:])

    def select(self, pick: Sequence[int] | Tensor | slice) -> Rows:
        """The same examples with some of the clients."""
        at = pick if isinstance(pick, slice) else torch.as_tensor(pick, dtype=torch.int64)
        return self._replace(start_C=self.start_C[at], num_C=self.num_C[at])


@dataclass(frozen=True)
class Stack:
    """All that a local update may see of the clients it trains.

    client_ids: C names; train: their training examples; engine: the model on its device;
    learning_rate: this round's, after the schedule; batch_length: padded length of a batch, the
    same for all clients of a stack (see :meth:`TrainingConfig.batch_length`); most_steps: steps
    after which each client must stop in any of its loops, where simulated time is short.
    """

    client_ids: tuple[str, ...]
    train: Rows
    batch_length: int
    engine: RowEngine
    training: TrainingConfig
    seed: int
    round_index: int
    learning_rate: float
    most_steps: tuple[int, ...] | None = None

    @property
    def num_clients(self) -> int:
        """C."""
        return len(self.client_ids)

    @property
    def spec(self) -> ParamSpec:
        """Layout of a row of parameters."""
        return self.engine.model.spec

    @property
    def num_steps_C(self) -> Tensor:
        """Steps a round by the training options, as far as time allows: (C,) int64."""
        return self.in_time(torch.tensor([self.training.steps(int(n)) for n in self.train.num_C]))

    def in_time(self, steps_C: Tensor) -> Tensor:
        """So many steps, or those that each client has the time for."""
        if self.most_steps is None:
            return steps_C
        return torch.minimum(steps_C, torch.tensor(self.most_steps))


class Batch(NamedTuple):
    """One batch of each active client: x (A, B, ...), y (A, B, ...), weight (A, B)."""

    x: Tensor
    y: Tensor
    weight: Tensor


class BatchPlan(NamedTuple):
    """Batches of all steps of one stream: positions (C, S, B), number of real examples (C, S)."""

    index_CSB: Tensor
    num_CS: Tensor


class _Batches(NamedTuple):
    """Batches of all steps as a step wants them: positions among all rows and weights (C, S, B)."""

    place_CSB: Tensor
    weight_CSB: Tensor


def plan_batches(stack: Stack, stream: str, steps_C: Tensor) -> BatchPlan:
    """Draw every batch of a stream beforehand.

    A client's batches depend on (seed, stream, round, client) only, so two methods, or two runs
    with different placements, train on the same ones. Padding points at the client's row 0 and
    gets no weight.
    """
    steps, length = int(steps_C.max()), stack.batch_length
    index = np.zeros((stack.num_clients, steps, length), dtype=np.int64)
    num = np.ones((stack.num_clients, steps), dtype=np.int64)
    # Lists: a tensor's numbers one by one would take as long as the draws of a small client.
    sizes = zip(stack.client_ids, stack.train.num_C.tolist(), steps_C.tolist(), strict=True)
    for row, (client_id, examples, own) in enumerate(sizes):
        if own == 0:
            continue
        rng = generator(stack.seed, f"batches/{stream}", stack.round_index, client_id)
        if stack.training.sampling == "replacement":
            index[row, :own] = rng.integers(examples, size=(own, length))
            num[row, :own] = length
        else:
            _fill_epochs(rng, examples, index[row, :own], num[row, :own])
    device = stack.train.x.device
    return BatchPlan(torch.from_numpy(index).to(device), torch.from_numpy(num).to(device))


def _fill_epochs(
    rng: np.random.Generator, examples: int, index_SB: np.ndarray, num_S: np.ndarray
) -> None:
    """Batches cut from one permutation after the other; the last of each may be short.

    Args:
        index_SB, num_S: what is filled, contiguous: positions, 0 before, and numbers of examples.
    """
    steps, length = index_SB.shape
    per_epoch = math.ceil(examples / length)
    whole, more = divmod(steps, per_epoch)
    order = np.arange(examples, dtype=np.int64)[None].repeat(whole + (more > 0), axis=0)
    rng.permuted(order, axis=1, out=order)
    cut = whole * per_epoch
    index_SB[:cut].reshape(whole, per_epoch * length)[:, :examples] = order[:whole]
    if more:
        index_SB[cut:] = order[whole, : more * length].reshape(more, length)
    num_S[:] = length
    num_S[per_epoch - 1 :: per_epoch] = examples - (per_epoch - 1) * length


def _batches(stack: Stack, plan: BatchPlan) -> _Batches:
    """What every step needs of a plan, found at once instead of step by step."""
    device = plan.index_CSB.device
    inside_CSB = torch.arange(stack.batch_length, device=device) < plan.num_CS.unsqueeze(2)
    return _Batches(
        plan.index_CSB + stack.train.start_C.to(device)[:, None, None],
        inside_CSB.to(stack.spec.dtype) / plan.num_CS.unsqueeze(2),
    )


class Step:
    """One step of the loop, as callbacks see it.

    index: from 0; pick: the rows that take this step; num_steps_C: steps of each row in all.
    """

    def __init__(self, stack: Stack, stream: str, steps_C: Tensor) -> None:
        self._stack = stack
        self._stream = stream
        self._batches: dict[str, _Batches] = {}
        self._scratch_CP: Tensor | None = None
        self._ascending = sorted(steps_C.tolist())
        self._longest_first = steps_C.tolist() == self._ascending[::-1]
        self.num_steps_C = steps_C
        self.index = 0
        self.pick: slice | Tensor = slice(None)
        self.loss_A = torch.zeros(0)

    def advance(self, index: int) -> None:
        """Go to a step. The active rows are a slice where they come first, else positions."""
        self.index = index
        # Lists, because operations on tensors of a few numbers would take a tenth of a small step.
        count = len(self._ascending) - bisect_right(self._ascending, index)
        first = self._longest_first or bool(self.active_C[:count].all())
        self.pick = slice(0, count) if first else self.active_C.nonzero().flatten()
        self.loss_A = torch.zeros(count, device=self._stack.train.x.device)

    @property
    def active_C(self) -> Tensor:
        """Rows that take this step: (C,) bool."""
        return self.num_steps_C > self.index

    def batch(self, stream: str | None = None) -> Batch:
        """This step's batch of the active rows; other names are independent streams."""
        name = stream or self._stream
        if name not in self._batches:
            plan = plan_batches(self._stack, name, self.num_steps_C)
            self._batches[name] = _batches(self._stack, plan)
        place_CSB, weight_CSB = self._batches[name]
        x, y = self._stack.train.lying_at(place_CSB[self.pick, self.index])
        return Batch(x, y, weight_CSB[self.pick, self.index])

    def active_grad(self, theta_CP: Tensor, batch: Batch | None = None) -> Tensor:
        """Mean-loss gradient of the active rows only, (A, P); overwritten by the next call."""
        return self.grad_at(theta_CP[self.pick], batch)

    def grad_at(self, theta_AP: Tensor, batch: Batch | None = None) -> Tensor:
        """The same at parameters of the active rows, (A, P); overwritten by the next call."""
        at = batch if batch is not None else self.batch()
        if self._scratch_CP is None:
            shape = (self._stack.num_clients, theta_AP.shape[1])
            self._scratch_CP = theta_AP.new_empty(shape)
        loss_A, grad_AP = self._stack.engine.loss_and_grad(
            theta_AP, at.x, at.y, at.weight, self._scratch_CP[: len(theta_AP)]
        )
        self.loss_A = loss_A
        return grad_AP


Direction = Callable[[Any, Tensor, Step], tuple[Any, Tensor]]
Observe = Callable[[Any, Tensor, Step], Any]
ExtraGrad = Callable[[Tensor, slice | Tensor], Tensor]


class Trained(NamedTuple):
    """What the loop leaves: rows, what the callbacks carried, and two numbers for the tables."""

    params_CP: Tensor
    carry: Any
    seen: Any
    loss_C: Tensor
    """Mean batch loss over a row's steps, float64; a step that asked for no gradient counts 0."""
    num_steps_C: Tensor


def local_sgd(
    stack: Stack,
    *,
    start: Tensor,
    steps_C: Tensor | None = None,
    rate_C: Tensor | float | None = None,
    stream: str = "train",
    trainable: Tensor | None = None,
    extra_grad: ExtraGrad | None = None,
    after_step: Callable[[Tensor], Tensor] | None = None,
    direction: Direction | None = None,
    carry: Any = None,
    observe: Observe | None = None,
    seen: Any = None,
) -> Trained:
    """Train every client of a stack by SGD on its own data.

    Args:
        start: (P,) for all, or (C, P); not changed.
        steps_C: (C,) steps of each client; the training options' by default. Fewer are made where
            time is short: ``Trained.num_steps_C`` says how many.
        rate_C: learning rate, one or (C,); this round's by default.
        stream: name of the batch stream; the same name gives two methods the same batches.
        trainable: (P,) bool; other coordinates keep their values, and their gradient does not
            count when it is clipped. All by default.
        extra_grad: (theta_AP of the active rows, which rows these are) -> (A, P) added to the
            gradient, for penalties.
        after_step: theta_CT -> (C, T) replaces the trainable coordinates of the rows after each
            step, for proximal steps.
        direction: (carry, theta_CP, step) -> (carry, gradient of the active rows (A, P)), for
            gradients taken elsewhere. The loop overwrites what it is given, and does not look at
            coordinates that are not trainable.
        observe: (seen, theta_CP, step) -> seen, called after each step. The tensor is the loop's
            own and changes with the next step: copy what must stay.

    Momentum, weight decay and clipping follow the training options in the order gradient (with
    extra_grad), clipping, weight decay, momentum; momentum starts from 0 in every call.
    """
    config, count = stack.training, stack.num_clients
    steps_C = stack.num_steps_C if steps_C is None else stack.in_time(steps_C.to(torch.int64))
    theta_CP = start.expand(count, -1).clone()
    rate = stack.learning_rate if rate_C is None else rate_C
    # Not by way of float32, which would cost a float64 model its last digits.
    rate_C1 = torch.as_tensor(rate, dtype=torch.float64).to(theta_CP).expand(count).unsqueeze(1)
    velocity_CP = torch.zeros_like(theta_CP) if config.momentum else None
    loss_C = torch.zeros(count, dtype=torch.float64, device=theta_CP.device)
    parts = [slice(0, theta_CP.shape[1])] if trainable is None else _runs(trainable)
    step = Step(stack, stream, steps_C)
    for index in range(int(steps_C.max())):
        step.advance(index)
        pick = step.pick
        carry, grad_AP = (direction or _own_gradient)(carry, theta_CP, step)
        if extra_grad is not None:
            grad_AP += extra_grad(theta_CP[pick], pick)
        _regularise(config, theta_CP[pick], grad_AP, trainable)
        if velocity_CP is not None:
            grad_AP += velocity_CP[pick] * config.momentum
            velocity_CP[pick] = grad_AP
        for part in parts:
            subtract(theta_CP, (pick, part), grad_AP[:, part].mul_(rate_C1[pick]))
        if after_step is not None:
            _replace(theta_CP, pick, parts, after_step)
        loss_C[pick] += step.loss_A
        if observe is not None:
            seen = observe(seen, theta_CP, step)
    return Trained(theta_CP, carry, seen, loss_C.cpu() / steps_C.clamp(min=1), steps_C)


def _own_gradient(carry: Any, theta_CP: Tensor, step: Step) -> tuple[Any, Tensor]:
    """The direction of plain SGD."""
    return carry, step.active_grad(theta_CP)


def _regularise(
    config: TrainingConfig, theta_AP: Tensor, grad_AP: Tensor, trainable: Tensor | None
) -> None:
    """Clipping, then weight decay, into the gradient."""
    if config.clip_norm is not None:
        square_AP = grad_AP * grad_AP
        if trainable is not None:
            square_AP = torch.where(trainable, square_AP, 0.0)
        norm_A1 = square_AP.sum(1, keepdim=True).sqrt()
        grad_AP *= config.clip_norm / norm_A1.clamp(min=config.clip_norm)
    if config.weight_decay:
        grad_AP += config.weight_decay * theta_AP


def subtract(theta_CP: Tensor, at: tuple[slice | Tensor, slice], change: Tensor) -> None:
    """Subtract in place at some rows and a stretch of coordinates.

    ``theta[at] -= change`` would write a part that is a view a second time, onto itself.
    """
    if isinstance(at[0], slice):
        theta_CP[at].sub_(change)
    else:
        theta_CP[at] -= change


def _replace(
    theta_CP: Tensor,
    pick: slice | Tensor,
    parts: list[slice],
    after_step: Callable[[Tensor], Tensor],
) -> None:
    """Apply ``after_step`` to the stretches ``parts`` of the active rows."""
    taken = [theta_CP[:, part] for part in parts]
    moved_CT = after_step(taken[0] if len(taken) == 1 else torch.cat(taken, dim=1))
    done = 0
    for part in parts:
        size = part.stop - part.start
        theta_CP[pick, part] = moved_CT[pick, done : done + size]
        done += size


def _runs(mask_P: Tensor) -> list[slice]:
    """Where a mask is set, as stretches without a gap: layers lie together in a row."""
    edge = np.flatnonzero(np.diff(mask_P.cpu().numpy(), prepend=False, append=False))
    return [slice(int(start), int(stop)) for start, stop in edge.reshape(-1, 2)]


class Tail(NamedTuple):
    """Running sums over a row's iterates in the second half of its steps."""

    sum_CP: Tensor
    square_CP: Tensor | None
    origin: Tensor


def start_tail(start: Tensor, num_clients: int, *, squares: bool = False) -> Tail:
    """Empty sums; iterates are counted from ``start`` so that squares do not cancel."""
    zero_CP = torch.zeros((num_clients, start.shape[-1]), dtype=start.dtype, device=start.device)
    return Tail(zero_CP, zero_CP.double() if squares else None, start)


def observe_tail(tail: Tail, theta_CP: Tensor, step: Step) -> Tail:
    """Add the iterate of every active row that is past half of its steps."""
    take_C = step.active_C & (step.index + 1 > step.num_steps_C // 2)
    if not bool(take_C.any()):
        return tail
    away_CP = theta_CP - tail.origin
    if not bool(take_C.all()):
        away_CP = torch.where(
            take_C.to(away_CP.device, non_blocking=True).unsqueeze(1), away_CP, 0.0
        )
    square_CP = None if tail.square_CP is None else tail.square_CP + away_CP.double().square()
    return Tail(tail.sum_CP + away_CP, square_CP, tail.origin)


def tail_counts(num_steps_C: Tensor) -> Tensor:
    """Iterates that a tail of so many steps holds: (C,)."""
    return num_steps_C - num_steps_C // 2


def tail_mean(tail: Tail, num_steps_C: Tensor) -> Tensor:
    """Mean of the second half of a row's iterates: (C, P); the start where no step was taken."""
    count_C1 = tail_counts(num_steps_C).clamp(min=1).unsqueeze(1).to(tail.sum_CP)
    return tail.origin + tail.sum_CP / count_C1
