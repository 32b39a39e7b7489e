"""Moves clients from hosts that measure slow to hosts that measure fast, where it pays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from selffl_ray.algorithms.base import Federation
from selffl_ray.balance import HORIZON, Proposal, evened, unmeasured, with_round
from selffl_ray.participation import RoundPlan
from selffl_ray.pool import ClientPool, RoundAnswers

logger = logging.getLogger(__name__)


class Rebalancer:
    """Watches the rounds of a run, and moves clients between them.

    Args:
        pool: whose clients are moved.
        tell: told the first move, in words.
    """

    def __init__(
        self, pool: ClientPool, federation: Federation, tell: Callable[[str], None]
    ) -> None:
        self._pool = pool
        self._tell = tell
        training, sizes = federation.training, federation.num_examples_M.tolist()
        self._examples_M = federation.num_examples_M
        self._steps_M = np.asarray([training.steps(n) for n in sizes], np.float64)
        lengths_M = np.asarray([training.batch_length(n) for n in sizes], np.float64)
        self._measured = unmeasured(self._steps_M * lengths_M)
        # Until a move was timed: what reading the examples took at first.
        self._example_s = pool.load_s / max(1, int(self._examples_M.sum()))
        self.num_moved = 0

    def take(self, answers: RoundAnswers) -> None:
        """Learn from a round; not from one with failures, where clients were asked again."""
        index = answers.accepted
        if answers.faults or not len(index):
            return
        gradients = np.asarray([answers.gradients[i] for i in index.tolist()], np.float64)
        factor = np.maximum(gradients, 1.0) / np.maximum(self._steps_M[index], 1.0)
        seconds_H = np.full(self._pool.transport.num_hosts, np.nan)
        seconds_H[list(answers.host_seconds)] = list(answers.host_seconds.values())
        self._measured = with_round(self._measured, self._homes_M, index, factor, seconds_H)

    def move(self, plan: RoundPlan, rounds_left: int) -> None:
        """Move clients before a round, if the rounds that are left save more than that takes.

        Raises:
            StateLostError: a host was lost meanwhile.
        """
        found = evened(self._measured, self._homes_M, self._pool.kinds)
        if found is None or not self._pays(found, plan, rounds_left):
            return
        moved = np.flatnonzero(found.homes_M != self._homes_M)
        began = time.perf_counter()
        self._pool.move(moved, found.homes_M[moved])
        seconds = time.perf_counter() - began
        self._example_s = seconds / max(1, int(self._examples_M[moved].sum()))
        # What was measured with other clients at home says little about these.
        self._measured = self._measured._replace(rates=())
        logger.info("round %d: %d clients moved in %.3f s", plan.round_index, len(moved), seconds)
        if not self.num_moved:
            self._tell(
                f"round {plan.round_index}: {len(moved)} clients moved to hosts that are faster "
                f"(to save {found.saved_s:.2g} s of a round); later moves are not told, "
                "placement.rebalance: false leaves clients where they are"
            )
        self.num_moved += len(moved)

    @property
    def _homes_M(self) -> np.ndarray:
        return self._pool.homes[: len(self._steps_M)]

    def _pays(self, found: Proposal, plan: RoundPlan, rounds_left: int) -> bool:
        work_M = self._measured.work_M
        share = work_M[plan.cohort].sum() / work_M.sum()
        moved = found.homes_M != self._homes_M
        cost_s = self._example_s * self._examples_M[moved].sum()
        return bool(found.saved_s * share * min(rounds_left, HORIZON) > cost_s)
