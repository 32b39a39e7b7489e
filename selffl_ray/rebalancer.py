"""Moves clients from hosts that measure slow to hosts that measure fast, where it pays.

Only between hosts that give a client the same bits (see ``Transport.kind``): processors of one
type. A host with a GPU keeps its clients, because there bits depend on who shares a stack.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from selffl_ray.algorithms.base import Federation
from selffl_ray.balance import HORIZON, Proposal, evened, unmeasured, with_round
from selffl_ray.errors import SelfFLError
from selffl_ray.participation import RoundPlan
from selffl_ray.pool import ClientPool, RoundAnswers, StateLostError

logger = logging.getLogger(__name__)

AT_ONCE_BYTES = 64 * 2**20
"""States that pass through the driver together."""
STATE_BYTES_PER_S = 1e8
"""How fast states travel, as long as no move has been timed; slower than it was seen."""


class Rebalancer:
    """Watches the rounds of a run, and moves clients between them.

    Args:
        pool: whose clients are moved.
        state_bytes: what a client keeps between rounds.
        tell: told the first move, and a move that failed, in words.
    """

    def __init__(
        self,
        pool: ClientPool,
        federation: Federation,
        state_bytes: int,
        tell: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._tell = tell
        self._state_bytes = state_bytes
        training, sizes = federation.training, federation.num_examples_M.tolist()
        self._examples_M = federation.num_examples_M
        self._steps_M = np.asarray([training.steps(n) for n in sizes], np.float64)
        lengths_M = np.asarray([training.batch_length(n) for n in sizes], np.float64)
        self._measured = unmeasured(self._steps_M * lengths_M)
        self._seconds_over_predicted = 1.0
        self._given_up = False
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

        A run can do without: if a move fails, clients stay where they are from then on.

        Raises:
            StateLostError: a host was lost meanwhile.
        """
        if self._given_up:
            return
        found = evened(self._measured, self._homes_M, self._pool.kinds)
        if found is None or not self._pays(found, plan, rounds_left):
            return
        # What was measured with other clients at home says little about these.
        self._measured = self._measured._replace(rates=())
        moved = np.flatnonzero(found.homes_M != self._homes_M)
        try:
            self._do(moved, found.homes_M[moved])
        except (SelfFLError, OSError, MemoryError) as error:
            self._give_up(plan, str(error))
            return
        except StateLostError as error:
            self._give_up(plan, "; ".join(item.cause for item in error.lost))
            raise
        if self.num_moved == len(moved):
            self._tell(
                f"round {plan.round_index}: {len(moved)} clients moved to hosts that are faster "
                f"(to save {found.saved_s:.2g} s of a round); later moves are not told, "
                "placement.rebalance: false leaves clients where they are"
            )

    def _do(self, moved: npt.NDArray[np.int64], to: npt.NDArray[np.int64]) -> None:
        """Move clients, some at a time."""
        began = time.perf_counter()
        some = max(1, AT_ONCE_BYTES // max(1, self._state_bytes))
        for start in range(0, len(moved), some):
            part = slice(start, start + some)
            self._pool.move(moved[part], to[part])
            self.num_moved += len(moved[part])
        seconds = time.perf_counter() - began
        self._seconds_over_predicted = seconds / max(1e-9, self._predicted_s(moved))
        logger.info("%d clients moved in %.3f s", len(moved), seconds)

    def _give_up(self, plan: RoundPlan, why: str) -> None:
        self._given_up = True
        self._tell(
            f"round {plan.round_index}: clients could not be moved to hosts that are faster "
            f"({why}); they stay where they are from now on"
        )

    @property
    def _homes_M(self) -> npt.NDArray[np.int64]:
        return self._pool.homes[: len(self._steps_M)]

    def _predicted_s(self, moved: npt.NDArray[np.int64]) -> float:
        """Seconds that reading the examples took at first, and that states take to travel."""
        share = float(self._examples_M[moved].sum() / self._examples_M.sum())
        return share * self._pool.load_s + len(moved) * self._state_bytes / STATE_BYTES_PER_S

    def _pays(self, found: Proposal, plan: RoundPlan, rounds_left: int) -> bool:
        work_M = self._measured.work_M
        share = work_M[plan.cohort].sum() / work_M.sum()
        moved = np.flatnonzero(found.homes_M != self._homes_M)
        cost_s = self._predicted_s(moved) * self._seconds_over_predicted
        return bool(found.saved_s * share * min(rounds_left, HORIZON) > cost_s)
