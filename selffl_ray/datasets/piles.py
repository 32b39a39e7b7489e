"""Rows of each class in a pile, and how clients of skewed labels take from the piles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from selffl_ray.errors import DataError

Rows = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


def cut_each_class(
    rng: np.random.Generator, piles: list[Rows], num_clients: int, alpha: float
) -> list[Rows]:
    """Each class between all clients; drawn again until everybody has at least two examples.

    piles: rows of each class in random order; returns the rows of each client. DataError if a
    thousand draws leave somebody with fewer than two.
    """
    for _ in range(1000):
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(piles))
        ends = [
            np.floor(np.cumsum(share)[:-1] * len(pile)).astype(np.int64)
            for pile, share in zip(piles, shares, strict=True)
        ]
        pairs = list(zip(piles, ends, strict=True))
        if sum(np.diff(end, prepend=0, append=len(pile)) for pile, end in pairs).min() >= 2:
            cuts = [np.split(pile, end) for pile, end in pairs]
            return [np.concatenate([cut[m] for cut in cuts]) for m in range(num_clients)]
    raise DataError(
        f"data.partition: a Dirichlet draw with alpha={alpha} leaves some of {num_clients} clients "
        "without examples, 1000 times in a row; raise alpha, lower num_clients, or set sizes"
    )


def take_proportions(rng: np.random.Generator, piles: list[Rows], size: int, share: Shares) -> Rows:
    """Deal a client its multinomial numbers off the piles; what a pile lacks the others give.

    share: (K,) proportions of the classes, of sum 1. The piles are shortened in place.
    """
    wanted = rng.multinomial(size, share)
    taken: list[Rows] = []
    missing = 0
    for at, number in enumerate(wanted):
        got = min(int(number), len(piles[at]))
        missing += int(number) - got
        taken.append(piles[at][:got])
        piles[at] = piles[at][got:]
    while missing:
        at = int(np.argmax([len(pile) for pile in piles]))
        got = min(missing, len(piles[at]))
        taken.append(piles[at][:got])
        piles[at] = piles[at][got:]
        missing -= got
    return np.concatenate(taken)
