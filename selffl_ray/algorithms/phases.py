"""What the methods share that train a model's head and body one after the other.

The head is the last layers, the body all others. In a round the head is trained first with the body
frozen, then the body with the head frozen.

Budget: the published scripts of such methods let them take several times the steps of FedAvg. Here
the two phases share the steps of a round, half of them each (the head has the odd one), so that
the defaults cost what FedAvg costs. One number given leaves the rest of the round's steps to the
other phase; both given may cost more or less. A phase without coordinates is left out and its steps
go to the other, so that a model that is all head, or has none, is trained as by ``local_sgd``.

Batches: the first phase draws from the stream ``train``, as every method does, and the second from
a stream of its own: each sees batches of all of a client's examples.

Shape letters: C clients of a stack, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selffl_ray.algorithms.base import Federation
from selffl_ray.algorithms.fedavg import AveragingConfig
from selffl_ray.errors import ConfigError
from selffl_ray.training import Stack, Trained


@dataclass(frozen=True, kw_only=True)
class PhasedConfig(AveragingConfig):
    """Options of every method that trains head and body one after the other."""

    head_layers: int = 1
    """Layers of the head, counted from the output."""
    head_steps: int | None = None
    """Steps of the head a round, >= 1; null: what body_steps leaves, or half of the round's."""
    body_steps: int | None = None
    """Steps of the body a round, >= 1; null: what head_steps leaves, or half of the round's."""

    def __post_init__(self) -> None:
        for name in ("head_steps", "body_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"method.{name} must be >= 1, got {value}; null takes what the other phase "
                    "leaves of the round's steps"
                )

    def split(self, steps_C: Tensor) -> tuple[Tensor, Tensor]:
        """Steps of head and body of clients whose round has so many: (C,) each."""
        head, body = self.head_steps, self.body_steps
        if head is None and body is None:
            return steps_C - steps_C // 2, steps_C // 2
        head_C = (steps_C - (body or 0)).clamp(min=0) if head is None else head
        body_C = (steps_C - (head or 0)).clamp(min=0) if body is None else body
        return torch.as_tensor(head_C).expand_as(steps_C), torch.as_tensor(body_C).expand_as(
            steps_C
        )


class Phase(NamedTuple):
    """One part of a round: what is trained (P,) bool, for how long (C,), on which batches."""

    trainable: Tensor
    steps_C: Tensor
    stream: str
    is_head: bool


def phases(config: PhasedConfig, stack: Stack, head_P: Tensor) -> list[Phase]:
    """The phases of a round that have something to train.

    Args:
        head_P: (P,) bool, the coordinates of the head.
    """
    head_P = head_P.to(stack.engine.device)
    head_C, body_C = config.split(stack.num_steps_C)
    if bool(head_P.all()) or not bool(head_P.any()):
        return [Phase(torch.ones_like(head_P), head_C + body_C, "train", bool(head_P.all()))]
    return [
        Phase(head_P, head_C, "train", True),
        Phase(~head_P, body_C, "train/body", False),
    ]


def alternate(
    plan: list[Phase],
    start: Tensor,
    train: Callable[[Phase, Tensor, Any], Trained],
    carry: Any = None,
) -> Trained:
    """Train phase by phase.

    Args:
        start: (C, P), not changed.
        train: (phase, start (C, P), carry) -> what the loop leaves; the next phase goes on from
            there.

    Returns:
        The last rows and carry, the mean loss over all steps, and the number of steps.
    """
    loss_C = torch.zeros(len(start), dtype=torch.float64)
    steps_C = torch.zeros(len(start), dtype=torch.int64)
    for phase in plan:
        trained = train(phase, start, carry)
        start, carry = trained.params_CP, trained.carry
        loss_C = loss_C + trained.loss_C * trained.num_steps_C
        steps_C = steps_C + trained.num_steps_C
    return Trained(start, carry, None, loss_C / steps_C.clamp(min=1), steps_C)


def check_phases(config: PhasedConfig, federation: Federation, head_P: Tensor) -> tuple[str, ...]:
    """Cautions about clients whose round leaves a phase without steps.

    Raises:
        ConfigError: no client has a step for one of the phases.
    """
    if bool(head_P.all()) or not bool(head_P.any()):
        return ()
    rounds_M = torch.tensor([federation.training.steps(int(n)) for n in federation.num_examples_M])
    found = []
    for part, other, steps_M in zip(
        ("head", "body"), ("body", "head"), config.split(rounds_M), strict=True
    ):
        without = int((steps_M < 1).sum())
        if without == len(rounds_M):
            given = getattr(config, f"{other}_steps")
            raise ConfigError(
                f"method.{other}_steps ({given}) leaves the {part} none of a round's "
                f"{int(rounds_M.max())} steps; give method.{part}_steps too, or more local steps"
            )
        if without:
            found.append(
                f"the rounds of {without} of {len(rounds_M)} clients are too short for a step of "
                f"the {part}"
            )
    return tuple(found)
