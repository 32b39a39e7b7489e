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
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selffl_ray.algorithms.partial import join
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
        self._count, self._size = count, int(head_P.sum())
        # Positions, because a mask is searched anew whenever it picks.
        self._head_H = head_P.nonzero().flatten().to(stack.engine.device)
        seed, now = stack.seed, stack.round_index
        self._rngs = [generator(seed, "pfedvem/draws", now, i) for i in stack.client_ids]

    def gradient(self, std_CH: Tensor, theta_CP: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Means over the draws of the gradient (C, P), and of eps times that of the head (C, H).

        All draws of a step see the same batch.
        """
        pairs = math.ceil(self._count / 2)
        eps = np.zeros((pairs, len(std_CH), self._size))
        for row in np.flatnonzero(step.active_C.numpy()):
            eps[:, row] = self._rngs[row].standard_normal((pairs, self._size))
        half = torch.from_numpy(eps).to(theta_CP)
        grad_CP, slope_CH, losses = torch.zeros_like(theta_CP), torch.zeros_like(std_CH), []
        drawn_CP, batch = theta_CP.clone(), step.batch()
        mean_CH = theta_CP.index_select(1, self._head_H)
        for eps_CH in torch.cat([half, -half])[: self._count]:
            drawn_CP.index_copy_(1, self._head_H, torch.addcmul(mean_CH, std_CH, eps_CH))
            one_AP = step.active_grad(drawn_CP, batch)
            grad_CP[step.pick] = grad_CP[step.pick].add_(one_AP, alpha=1 / self._count)
            one_AH = one_AP.index_select(1, self._head_H)
            slope_CH[step.pick] += eps_CH[step.pick] * one_AH / self._count
            losses.append(step.loss_A)
        step.loss_A = torch.stack(losses).mean(0)
        return grad_CP, slope_CH


def trainer(stack: Stack, draws: Draws, prior: Prior) -> Callable[[Phase, Tensor, Tensor], Trained]:
    """What trains one phase of a round.

    Returns:
        (phase, start (C, P), log deviations (C, H)) -> trained rows, and as their carry the log
        deviations, which only the phase of the head moves.
    """
    rate = stack.learning_rate
    num_C1 = stack.train.num_C.to(prior.var_C).unsqueeze(1)
    pull_C1 = (rate / (num_C1 * prior.var_C.unsqueeze(1))).to(prior.mean_H)
    num_C1, var_C1 = num_C1.to(prior.mean_H), prior.var_C.to(prior.mean_H).unsqueeze(1)

    def of_head(log_std_CH: Tensor, theta_CP: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        std_CH = log_std_CH.exp()
        grad_CP, slope_CH = draws.gradient(std_CH, theta_CP, step)
        change_CH = rate * (std_CH * slope_CH + (std_CH.square() / var_C1 - 1) / num_C1)
        moved_CH = log_std_CH.clone()
        moved_CH[step.pick] -= change_CH[step.pick].clamp(-MOST_CHANGE, MOST_CHANGE)
        return moved_CH, grad_CP

    def of_body(log_std_CH: Tensor, theta_CP: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        return log_std_CH, draws.gradient(log_std_CH.exp(), theta_CP, step)[0]

    def train(phase: Phase, start: Tensor, log_std_CH: Tensor) -> Trained:
        def to_prior(theta_CP: Tensor) -> Tensor:
            mean_CH = theta_CP[:, phase.trainable]
            return join(
                phase.trainable, (mean_CH + pull_C1 * prior.mean_H) / (1 + pull_C1), theta_CP
            )

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
