"""Which host each client is at home at: dealt by predicted work, corrected by measured time.

A round waits for its slowest host. Hosts are slower than others because their machines are, because
something else works there, or because their clients take more steps than was predicted. Only where
a client is computed depends on any of this, never what.

Shape letters: M clients that take part, H hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

WINDOW = 10
"""Rounds of which the middle one counts. With 3 or 5 clients follow what comes and goes on a shared
machine, and a move by noise has the next rounds wait for the host that was fast."""
LEAST_GAIN = 0.15
"""Share of a round that moving clients must save: less lies within the noise of the window."""
HORIZON = 20
"""Rounds to come that a move may be paid by: nobody knows how long a core stays slow."""
LEAST_LOAD, MOST_LOAD = 0.5, 2.0
"""A host's work in equal shares: it must be seen when it is fast again, and have the memory."""


def balanced_homes(work: Sequence[float], num_hosts: int) -> list[int]:
    """Host of each client: the largest first, each to the host with the least work so far."""
    load = np.zeros(num_hosts)
    homes = np.zeros(len(work), np.int64)
    for client in np.argsort(-np.asarray(work), kind="stable"):
        host = int(np.argmin(load))
        homes[client] = host
        load[host] += work[client]
    return [int(h) for h in homes]


class Measured(NamedTuple):
    """What rounds have told about clients and hosts.

    predicted_M: work of each client a round, in padded examples; factor_M: what it was over what
    was predicted, NaN of clients that were not asked yet; rates: seconds that each host took for a
    unit of work, (H,) for each of the newest rounds, NaN where it was not asked.
    """

    predicted_M: Floats
    factor_M: Floats
    rates: tuple[Floats, ...] = ()

    @property
    def work_M(self) -> Floats:
        """Work of each client a round; of those not asked yet as the others', on average."""
        known = ~np.isnan(self.factor_M)
        usual = self.factor_M[known].mean() if known.any() else 1.0
        return self.predicted_M * np.where(known, self.factor_M, usual)

    @property
    def rate_H(self) -> Floats | None:
        """Seconds a unit of work of each host: the middle of the window; None until it is full."""
        if len(self.rates) < WINDOW:
            return None
        window = np.stack(self.rates)
        return None if np.isnan(window).any() else np.median(window, axis=0)


def unmeasured(predicted_M: Floats) -> Measured:
    """Before the first round."""
    return Measured(predicted_M, np.full(len(predicted_M), np.nan))


def with_round(
    measured: Measured, homes_M: Indices, index: Indices, factor: Floats, seconds_H: Floats
) -> Measured:
    """What is known after one round more.

    Args:
        index: the clients that answered; factor: work of each over what was predicted, > 0.
        seconds_H: that each host took for those of them that are at home there, NaN of one that
            was not asked.
    """
    factor_M = measured.factor_M.copy()
    before = factor_M[index]
    # Half of the old one: where simulated time is short, steps change from round to round.
    factor_M[index] = np.where(np.isnan(before), factor, (before + factor) / 2)
    work = measured.predicted_M[index] * factor
    work_H = np.bincount(homes_M[index], work, len(seconds_H))
    rate_H = seconds_H / np.where(work_H > 0, work_H, np.nan)
    return Measured(measured.predicted_M, factor_M, (*measured.rates, rate_H)[-WINDOW:])


class Proposal(NamedTuple):
    """New homes: (M,), and the seconds that they are to save in a round of all clients."""

    homes_M: Indices
    saved_s: float


def evened(measured: Measured, homes_M: Indices, kind_H: Sequence[str]) -> Proposal | None:
    """Homes with which all hosts should need as long as each other; None if nothing is to gain.

    Args:
        kind_H: clients move between hosts of one kind only.
    """
    rate_H = measured.rate_H
    if rate_H is None:
        return None
    work_M, kinds = measured.work_M, np.asarray(kind_H)
    new_M = homes_M.copy()
    for kind in np.unique(kinds):
        hosts = np.flatnonzero(kinds == kind)
        for _ in range(4 * len(hosts)):
            if not _even_out(new_M, work_M, rate_H, hosts):
                break
    before, after = (
        (rate_H * np.bincount(homes, work_M, len(rate_H))).max() for homes in (homes_M, new_M)
    )
    enough = before - after >= LEAST_GAIN * before > 0
    return Proposal(new_M, float(before - after)) if enough else None


def _even_out(homes_M: Indices, work_M: Floats, rate_H: Floats, hosts: Indices) -> bool:
    """Move clients (in place) from the host that takes longest to the first that can have some."""
    load_H = np.bincount(homes_M, work_M, len(rate_H))
    first_done = hosts[np.argsort((rate_H * load_H)[hosts], kind="stable")]
    slow, usual = first_done[-1], load_H[hosts].mean()
    own = np.flatnonzero(homes_M == slow)
    own = own[np.argsort(-work_M[own], kind="stable")]
    for host in first_done[:-1].tolist():
        even = rate_H[slow] * load_H[slow] - rate_H[host] * load_H[host]
        much = min(
            even / (rate_H[slow] + rate_H[host]),
            load_H[slow] - LEAST_LOAD * usual,
            MOST_LOAD * usual - load_H[host],
        )
        moved = _up_to(much, own, work_M)
        if moved:
            homes_M[moved] = host
            return True
    return False


def _up_to(much: float, clients: Indices, work_M: Floats) -> list[int]:
    """The largest of the clients, given in descending order, that make up no more than so much."""
    found = []
    for client, work in zip(clients.tolist(), work_M[clients].tolist(), strict=True):
        if 0 < work <= much:
            found.append(client)
            much -= work
    return found
