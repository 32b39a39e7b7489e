"""The one local-SGD loop, over a stack of clients, and the batches that it draws.

Clients of a stack may differ in number of examples, of steps and in learning rate. A row that has
finished is left out of the gradient and keeps its parameters untouched (selected, never multiplied
by zero). Each client draws its batches from its own stream, so a row's numbers do not depend on
its neighbours.

Shape letters: C clients of a stack, P parameters, B examples of a batch, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selffl_ray.errors import ConfigError
from selffl_ray.flat import ParamSpec
from selffl_ray.gradients import RowEngine
from selffl_ray.seeding import generator
from selffl_ray.stopping import StopConfig

Schedule = Literal["constant", "linear", "cosine", "step"]

CHANGEABLE = (
    "learning_rate",
    "num_local_steps",
    "num_local_epochs",
    "batch_size",
    "momentum",
    "weight_decay",
    "clip_norm",
)
"""Options that may change between rounds: each round's local training begins afresh."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How every client trains, whatever the method."""

    num_rounds: int = 30
    participation_rate: float = 1.0
    """Share of the clients asked in a round, in (0, 1]; at least one is."""
    batch_size: int = 20
    learning_rate: float = 0.3
    num_local_steps: int | None = None
    """SGD steps a round; 20 if neither this nor num_local_epochs is given."""
    num_local_epochs: int | None = None
    """Passes over the client's own data a round, instead of a number of steps."""
    sampling: Literal["epoch", "replacement"] = "epoch"
    """Batches cut from a fresh permutation each epoch (the last one may be short), or drawn with
    replacement (always full)."""
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Largest Euclidean norm of a client's gradient; null is no clipping."""
    schedule: Schedule = "constant"
    """Learning rate over rounds: constant, falling linearly or as a half cosine to 0, or a tenth
    after half and again after three quarters of the rounds."""
    start_from: str | None = None
    """safetensors file with the start of the global model, as the run's models/ folder has it."""
    stop: StopConfig = field(default_factory=StopConfig)

    def __post_init__(self) -> None:
        self._check_counts()
        if self.num_local_steps is not None and self.num_local_epochs is not None:
            raise ConfigError(
                f"training.num_local_steps ({self.num_local_steps}) and num_local_epochs "
                f"({self.num_local_epochs}) exclude each other; keep one"
            )
        if self.num_local_steps is None and self.num_local_epochs is None:
            object.__setattr__(self, "num_local_steps", 20)
        if not 0 < self.participation_rate <= 1:
            raise ConfigError(
                f"training.participation_rate must lie in (0, 1], got {self.participation_rate}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                f"training.learning_rate must be > 0, got {self.learning_rate}; usual values are "
                "0.01 to 0.3"
            )
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"training.momentum must lie in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"training.weight_decay must be >= 0, got {self.weight_decay}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ConfigError(
                f"training.clip_norm must be > 0, got {self.clip_norm}; null switches it off"
            )

    def _check_counts(self) -> None:
        for name in ("num_rounds", "batch_size", "num_local_steps", "num_local_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.{name} must be >= 1, got {value}")

    def rate(self, round_index: int) -> float:
        """Learning rate of a round under the schedule."""
        done = round_index / self.num_rounds
        factor = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
            "step": 0.1 ** ((done >= 0.5) + (done >= 0.75)),
        }[self.schedule]
        return self.learning_rate * factor

    def steps(self, num_examples: int) -> int:
        """Local steps a round of a client with that many training examples."""
        if self.num_local_epochs is None:
            assert self.num_local_steps is not None
            return self.num_local_steps
        return self.num_local_epochs * math.ceil(num_examples / self.batch_size)

    def batch_length(self, num_examples: int) -> int:
        """Rows of a client's padded batch: a constant of the client, whatever its neighbours.

        The batch size, or for a client that never fills one the next power of two.
        """
        if self.sampling == "replacement" or num_examples >= self.batch_size:
            return self.batch_size
        return min(self.batch_size, 1 << max(0, num_examples - 1).bit_length())


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
        at = (index_CB + self.start_C.to(index_CB.device).unsqueeze(1)).flatten()
        shape = index_CB.shape
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
    same for all clients of a stack (see :meth:`TrainingConfig.batch_length`).
    """

    client_ids: tuple[str, ...]
    train: Rows
    batch_length: int
    engine: RowEngine
    training: TrainingConfig
    seed: int
    round_index: int
    learning_rate: float

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
        """Steps a round by the training options: (C,) int64."""
        return torch.tensor([self.training.steps(int(n)) for n in self.train.num_C])


class Batch(NamedTuple):
    """One batch of each active client: x (A, B, ...), y (A, B, ...), weight (A, B)."""

    x: Tensor
    y: Tensor
    weight: Tensor


class BatchPlan(NamedTuple):
    """Batches of all steps of one stream: positions (C, S, B), number of real examples (C, S)."""

    index_CSB: Tensor
    num_CS: Tensor


def plan_batches(stack: Stack, stream: str, steps_C: Tensor) -> BatchPlan:
    """Draw every batch of a stream beforehand.

    A client's batches depend on (seed, stream, round, client) only, so two methods, or two runs
    with different placements, train on the same ones. Padding points at the client's row 0 and
    gets no weight.
    """
    steps, length = int(steps_C.max()), stack.batch_length
    index = np.zeros((stack.num_clients, steps, length), dtype=np.int64)
    num = np.ones((stack.num_clients, steps), dtype=np.int64)
    for row, client_id in enumerate(stack.client_ids):
        examples, own = int(stack.train.num_C[row]), int(steps_C[row])
        if own == 0:
            continue
        rng = generator(stack.seed, f"batches/{stream}", stack.round_index, client_id)
        if stack.training.sampling == "replacement":
            index[row, :own] = rng.integers(examples, size=(own, length))
            num[row, :own] = length
        else:
            index[row, :own], num[row, :own] = _epochs(rng, examples, length, own)
    device = stack.train.x.device
    return BatchPlan(torch.from_numpy(index).to(device), torch.from_numpy(num).to(device))


def _epochs(
    rng: np.random.Generator, examples: int, length: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Batches cut from one permutation after the other; the last of each may be short."""
    per_epoch = math.ceil(examples / length)
    epochs = math.ceil(steps / per_epoch)
    order = np.tile(np.arange(examples), (epochs, 1))
    rng.permuted(order, axis=1, out=order)
    padded = np.zeros((epochs, per_epoch * length), dtype=np.int64)
    padded[:, :examples] = order
    num = np.full((epochs, per_epoch), length, dtype=np.int64)
    num[:, -1] = examples - (per_epoch - 1) * length
    return padded.reshape(-1, length)[:steps], num.reshape(-1)[:steps]


class Step:
    """One step of the loop, as callbacks see it.

    index: from 0; active_C: rows that take this step; num_steps_C: steps of each row in all.
    """

    def __init__(self, stack: Stack, stream: str, steps_C: Tensor) -> None:
        self._stack = stack
        self._stream = stream
        self._plans: dict[str, BatchPlan] = {}
        self._scratch_CP: Tensor | None = None
        self.num_steps_C = steps_C
        self.index = 0
        self.active_C = steps_C > 0
        self.pick: slice | Tensor = slice(None)
        self.loss_A = torch.zeros(0)

    def advance(self, index: int) -> None:
        """Go to a step. The active rows are a slice where they come first, else positions."""
        self.index = index
        self.active_C = self.num_steps_C > index
        count = int(self.active_C.sum())
        first = bool(self.active_C[:count].all())
        self.pick = slice(0, count) if first else self.active_C.nonzero().flatten()
        self.loss_A = torch.zeros(count)

    def batch(self, stream: str | None = None) -> Batch:
        """This step's batch of the active rows; other names are independent streams."""
        name = stream or self._stream
        if name not in self._plans:
            self._plans[name] = plan_batches(self._stack, name, self.num_steps_C)
        plan, rows = self._plans[name], self._stack.train
        index_AB, num_A = plan.index_CSB[self.pick, self.index], plan.num_CS[self.pick, self.index]
        x, y = rows.select(self.pick).take(index_AB)
        inside = torch.arange(index_AB.shape[1], device=x.device) < num_A.unsqueeze(1)
        weight = inside.to(self._stack.spec.dtype) / num_A.unsqueeze(1)
        return Batch(x, y, weight)

    def active_grad(self, theta_CP: Tensor, batch: Batch | None = None) -> Tensor:
        """Mean-loss gradient of the active rows only, (A, P); overwritten by the next call."""
        at = batch if batch is not None else self.batch()
        if self._scratch_CP is None:
            self._scratch_CP = torch.empty_like(theta_CP)
        theta_AP = theta_CP[self.pick]
        loss_A, grad_AP = self._stack.engine.loss_and_grad(
            theta_AP, at.x, at.y, at.weight, self._scratch_CP[: len(theta_AP)]
        )
        self.loss_A = loss_A
        return grad_AP

    def grad(self, theta_CP: Tensor, batch: Batch | None = None) -> Tensor:
        """Mean-loss gradient at theta, (C, P); zero for finished rows."""
        if bool(self.active_C.all()):
            return self.active_grad(theta_CP, batch).clone()
        grad_CP = torch.zeros_like(theta_CP)
        grad_CP[self.pick] = self.active_grad(theta_CP, batch)
        return grad_CP


Direction = Callable[[Any, Tensor, Step], tuple[Any, Tensor]]
Observe = Callable[[Any, Tensor, Step], Any]


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
    extra_grad: Callable[[Tensor], Tensor] | None = None,
    after_step: Callable[[Tensor], Tensor] | None = None,
    direction: Direction | None = None,
    carry: Any = None,
    observe: Observe | None = None,
    seen: Any = None,
) -> Trained:
    """Train every client of a stack by SGD on its own data.

    Args:
        start: (P,) for all, or (C, P); not changed.
        steps_C: (C,) steps of each client; the training options' by default.
        rate_C: learning rate, one or (C,); this round's by default.
        stream: name of the batch stream; the same name gives two methods the same batches.
        trainable: (P,) bool; other coordinates keep their values, and their gradient does not
            count when it is clipped. All by default.
        extra_grad: theta_CP -> (C, P) added to the gradient, for penalties.
        after_step: theta_CP -> (C, P) replaces the rows after each step, for proximal steps.
        direction: (carry, theta_CP, step) -> (carry, gradient), for gradients taken elsewhere.
        observe: (seen, theta_CP, step) -> seen, called after each step. The tensor is the loop's
            own and changes with the next step: copy what must stay.

    Momentum, weight decay and clipping follow the training options in the order gradient (with
    extra_grad), clipping, weight decay, momentum; momentum starts from 0 in every call.
    """
    config, count = stack.training, stack.num_clients
    steps_C = stack.num_steps_C if steps_C is None else steps_C.to(torch.int64)
    theta_CP = start.expand(count, -1).clone()
    rate = stack.learning_rate if rate_C is None else rate_C
    # Not by way of float32, which would cost a float64 model its last digits.
    rate_C1 = torch.as_tensor(rate, dtype=torch.float64).to(theta_CP).expand(count).unsqueeze(1)
    velocity_CP = torch.zeros_like(theta_CP) if config.momentum else None
    loss_C = torch.zeros(count, dtype=torch.float64)
    step = Step(stack, stream, steps_C)
    for index in range(int(steps_C.max())):
        step.advance(index)
        pick = step.pick
        if direction is None:
            grad_AP = step.active_grad(theta_CP)
        else:
            carry, grad_CP = direction(carry, theta_CP, step)
            grad_AP = grad_CP[pick].clone()
        if extra_grad is not None:
            grad_AP += extra_grad(theta_CP)[pick]
        _regularise(config, theta_CP[pick], grad_AP, trainable)
        if velocity_CP is not None:
            grad_AP += velocity_CP[pick] * config.momentum
            velocity_CP[pick] = grad_AP
        _move(theta_CP, pick, grad_AP.mul_(rate_C1[pick]), trainable, after_step)
        loss_C[pick] += step.loss_A.cpu()
        if observe is not None:
            seen = observe(seen, theta_CP, step)
    return Trained(theta_CP, carry, seen, loss_C / steps_C.clamp(min=1), steps_C)


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


def _move(
    theta_CP: Tensor,
    pick: slice | Tensor,
    change_AP: Tensor,
    trainable: Tensor | None,
    after_step: Callable[[Tensor], Tensor] | None,
) -> None:
    """Subtract the change from the active rows of theta, except at frozen coordinates."""
    if trainable is not None:
        change_AP = torch.where(trainable, change_AP, 0.0)
    if after_step is None and isinstance(pick, slice):
        theta_CP[pick].sub_(change_AP)
        return
    moved_CP = theta_CP.clone()
    moved_CP[pick] -= change_AP
    if after_step is not None:
        moved_CP = after_step(moved_CP)
        if trainable is not None:
            moved_CP = torch.where(trainable, moved_CP, theta_CP)
    theta_CP[pick] = moved_CP[pick]


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
        away_CP = torch.where(take_C.to(away_CP.device).unsqueeze(1), away_CP, 0.0)
    square_CP = None if tail.square_CP is None else tail.square_CP + away_CP.double().square()
    return Tail(tail.sum_CP + away_CP, square_CP, tail.origin)


def tail_counts(num_steps_C: Tensor) -> Tensor:
    """Iterates that a tail of so many steps holds: (C,)."""
    return num_steps_C - num_steps_C // 2


def tail_mean(tail: Tail, num_steps_C: Tensor) -> Tensor:
    """Mean of the second half of a row's iterates: (C, P); the start where no step was taken."""
    count_C1 = tail_counts(num_steps_C).clamp(min=1).unsqueeze(1).to(tail.sum_CP)
    return tail.origin + tail.sum_CP / count_C1
