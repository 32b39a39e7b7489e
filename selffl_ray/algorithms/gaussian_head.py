"""Training a model whose head is a Gaussian: a mean and a deviation a coordinate, moved by SGD.

With f the mean loss of a client of n examples, the head h = mu + sigma eps, s = log sigma, the
prior N(mu_0, rho^2 I), and the mean over draws of eps, a step of the head is that of
E f(h) + KL(N(mu, diag(sigma^2)), prior) / n:

    s  <- s - eta (sigma mean(eps g(h)) + (sigma^2 / rho^2 - 1) / n)
    mu <- (mu - eta mean(g(h)) + a mu_0) / (1 + a),  a = eta / (n rho^2)

and one of the body is that of E f(h). On a quadratic loss of curvature c the steps settle at
sigma^2 = 1 / (n c + 1 / rho^2) and at the mean weighted by precision: the exact posterior.

Three choices. The pull to mu_0 is taken implicitly, as a proximal step: the same fixed point, and
no divergence however small rho is. Draws come in pairs +eps and -eps: the mean gradient of a
quadratic loss is then exact, and the noise of any other is of higher order in sigma. A step changes
sigma by a factor of 2 at most, so that one large draw cannot make it vanish.

Source of the reparametrised gradient: Blundell et al. 2015, "Weight uncertainty in neural
networks", section 3.2.

Shape letters: C clients of a stack, P parameters, H coordinates of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selffl_ray.algorithms.phases import Phase
from selffl_ray.seeding import generator
from selffl_ray.training import Stack, Step, Trained, local_sgd

MOST_CHANGE = math.log(2)
"""Largest change of a log deviation in one step."""


class Prior(NamedTuple):
    """What pulls at a stack's heads: one centre (H,), and the variance around it (C,)."""

    mean_H: Tensor
    var_C: Tensor


class Draws:
    """Heads drawn from Gaussians, each client's from its own stream of a round.

    Args:
        count: heads a gradient, in pairs; an odd number leaves the last one without partner.
        head_P: (P,) bool.
    """

    def __init__(self, count: int, head_P: Tensor, stack: Stack) -> None:
        self.count = count
        # Positions, because a mask is searched anew whenever it picks.
        self.head_H = head_P.nonzero().flatten().to(stack.engine.device)
        seed, now = stack.seed, stack.round_index
        self._rngs = [generator(seed, "pfedvem/draws", now, i) for i in stack.client_ids]

    def each(self, std_CH: Tensor, theta_CP: Tensor, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        """For each draw, eps (A, H) of the active rows and the gradient there (A, P).

        All draws of a step see the same batch. The gradient is overwritten by the next draw. Until
        the draws are taken, the heads of theta are the drawn ones: a copy of whole models costs as
        much as a gradient.
        """
        theta_AP, std_AH = theta_CP[step.pick], std_CH[step.pick]
        half, batch = self._eps(step).to(theta_AP), step.batch()
        mean_AH, losses = theta_AP.index_select(1, self.head_H), []
        for eps_AH in torch.cat([half, -half])[: self.count]:
            theta_AP.index_copy_(1, self.head_H, torch.addcmul(mean_AH, std_AH, eps_AH))
            grad_AP = step.grad_at(theta_AP, batch)
            losses.append(step.loss_A)
            yield eps_AH, grad_AP
        theta_AP.index_copy_(1, self.head_H, mean_AH)
        step.loss_A = torch.stack(losses).mean(0)

    def _eps(self, step: Step) -> Tensor:
        """One of each pair of draws for the active rows, (pairs, A, H) float64."""
        pairs = math.ceil(self.count / 2)
        rows = np.flatnonzero(step.active_C.numpy())
        drawn = [self._rngs[row].standard_normal((pairs, len(self.head_H))) for row in rows]
        return torch.from_numpy(np.stack(drawn, axis=1))


def trainer(stack: Stack, draws: Draws, prior: Prior) -> Callable[[Phase, Tensor, Tensor], Trained]:
    """What trains one phase of a round.

    Returns:
        (phase, start (C, P), log deviations (C, H)) -> trained rows, and as their carry the log
        deviations, which only the phase of the head moves.
    """
    rate, count = stack.learning_rate, draws.count
    num_C1 = stack.train.num_C.to(prior.var_C).unsqueeze(1)
    pull_C1 = (rate / (num_C1 * prior.var_C.unsqueeze(1))).to(prior.mean_H)
    num_C1, var_C1 = num_C1.to(prior.mean_H), prior.var_C.to(prior.mean_H).unsqueeze(1)

    def of_head(log_std_CH: Tensor, theta_CP: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        std_CH, pick = log_std_CH.exp(), step.pick
        slope_AH, mean_AH = torch.zeros_like(std_CH[pick]), torch.zeros_like(std_CH[pick])
        for eps_AH, grad_AP in draws.each(std_CH, theta_CP, step):
            head_AH = grad_AP.index_select(1, draws.head_H)
            mean_AH.add_(head_AH, alpha=1 / count)
            slope_AH += eps_AH * head_AH / count
        pull_AH = (std_CH.square() / var_C1 - 1)[pick] / num_C1[pick]
        change_AH = rate * (std_CH[pick] * slope_AH + pull_AH)
        moved_CH = log_std_CH.clone()
        moved_CH[pick] -= change_AH.clamp(-MOST_CHANGE, MOST_CHANGE)
        # The loop does not look at the body's coordinates, which hold the last draw's.
        return moved_CH, grad_AP.index_copy_(1, draws.head_H, mean_AH)

    def to_prior(mean_CH: Tensor) -> Tensor:
        return (mean_CH + pull_C1 * prior.mean_H) / (1 + pull_C1)

    def of_body(log_std_CH: Tensor, theta_CP: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        each = draws.each(log_std_CH.exp(), theta_CP, step)
        mean_AP = next(each)[1] * (1 / count)
        for _, grad_AP in each:
            mean_AP.add_(grad_AP, alpha=1 / count)
        return log_std_CH, mean_AP

    def train(phase: Phase, start: Tensor, log_std_CH: Tensor) -> Trained:
        return local_sgd(
            stack,
            start=start,
            steps_C=phase.steps_C,
            stream=phase.stream,
            trainable=phase.trainable,
            direction=of_head if phase.is_head else of_body,
            carry=log_std_CH,
            after_step=to_prior if phase.is_head else None,
        )

    return train
