"""Train, validation and test examples of every client, and who is held out as new."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.partition import Hand
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.seeding import generator

Rows = npt.NDArray[np.int64]

NO_ROWS: Rows = np.empty(0, np.int64)
NO_ROWS.setflags(write=False)


class ClientRows(NamedTuple):
    """Rows of the store that one client trains, validates and is tested on."""

    client_id: str
    train: Rows
    val: Rows
    test: Rows
    quarter_turns: int


class Partition(NamedTuple):
    """All clients of an experiment.

    clients take part in training; new_clients are never trained on, only adapted to and tested.
    digest covers names, rows and turns.
    """

    clients: tuple[ClientRows, ...]
    new_clients: tuple[ClientRows, ...]
    digest: str


def split_clients(
    hands: Sequence[Hand],
    shares: tuple[float, float, float],
    new_share: float,
    seed: int,
    overlap: int = 0,
) -> Partition:
    """Split every client's own rows, and hold out some clients as new.

    Clients that are published as unseen are new in any case, and are split like the others.

    Args:
        shares: of train, validation and test; the share of a part that clients were dealt rows of
            their own for must be 0.
        new_share: share of the other clients held out besides, in [0, 1).
        overlap: that of the data set, >= 0; 0 draws the parts at random.

    Raises:
        ConfigError: shares that do not fit. DataError: a client left without training examples, or
            with fewer than overlapping parts need.
    """
    _check_shares(hands, shares)
    rows = [_split(hand, shares, seed, overlap) for hand in hands]
    open_ = [i for i, hand in enumerate(hands) if not hand.unseen]
    if not open_:
        raise DataError(
            f"all {len(hands)} clients are published as unseen, so none is left to train on; give "
            "the training part of the source too, or raise data.partition.max_clients"
        )
    held = round(new_share * len(open_))
    if new_share > 0 and not held:
        raise ConfigError(
            f"evaluation.new_clients: {new_share} of {len(open_)} clients is none; raise it, or "
            "set it to 0"
        )
    if held >= len(open_):
        raise ConfigError(
            f"evaluation.new_clients: {new_share} of {len(open_)} clients leaves none to train on"
        )
    order = generator(seed, "new clients").permutation(open_)
    new = {*order[:held].tolist(), *(i for i, hand in enumerate(hands) if hand.unseen)}
    clients = tuple(r for i, r in enumerate(rows) if i not in new)
    return Partition(clients, tuple(rows[i] for i in sorted(new)), _digest(rows, new))


def _check_shares(hands: Sequence[Hand], shares: tuple[float, float, float]) -> None:
    apart = {
        "val": any(len(hand.val_rows) for hand in hands),
        "test": any(len(hand.test_rows) for hand in hands),
    }
    for (part, given), share in zip(apart.items(), shares[1:], strict=True):
        if given and share > 0:
            fitting = ", ".join("0" if dealt else name for name, dealt in apart.items())
            raise ConfigError(
                f"evaluation.splits: the clients have {part} examples apart from their own, so the "
                f"share of {part} must be 0, got {list(shares)}; give [train, {fitting}]"
            )

    if shares[2] == 0 and any(hand.unseen for hand in hands):
        raise ConfigError(
            "evaluation.splits: clients published as unseen are tested on a part of their own "
            f"examples, so test needs a share, got {list(shares)}"
        )


def _split(hand: Hand, shares: tuple[float, float, float], seed: int, overlap: int) -> ClientRows:
    if not len(hand.rows):
        raise DataError(
            f"client {hand.client_id!r} has no examples; lower data.partition.num_clients, raise "
            "alpha, set data.partition.min_examples, or take the client out of the source"
        )
    order = generator(seed, "splits", 0, hand.client_id).permutation(hand.rows)
    if overlap:
        train, val, test = _by_position(hand, order, shares, overlap)
    else:
        train, val, test = np.split(order, _ends(shares, len(order))[:-1])
    if not len(train):
        raise DataError(
            f"client {hand.client_id!r} has {len(order)} examples and with evaluation.splits "
            f"{list(shares)} none of them is for training; raise the first share"
        )
    val, test = np.concatenate([val, hand.val_rows]), np.concatenate([test, hand.test_rows])
    # Training rows keep their random order: variance estimates cut chunks from it. As a part of
    # `order` they would keep all of it in memory, and arrays of nothing take room too.
    val, test = (np.sort(part) if len(part) else NO_ROWS for part in (val, test))
    return ClientRows(hand.client_id, train.copy(), val, test, hand.quarter_turns)


def _ends(shares: tuple[float, float, float], count: int) -> Rows:
    """Where train, validation and test end, out of ``count`` places."""
    return np.round(np.cumsum(np.asarray(shares) / sum(shares)) * count).astype(np.int64)


def _by_position(
    hand: Hand, order: Rows, shares: tuple[float, float, float], overlap: int
) -> list[Rows]:
    """Train, validation and test one after the other, ``overlap`` row numbers apart.

    Places are counted in rows of the store: of a client that was thinned at random only those rows
    are lost that do lie between two parts. Within a part rows keep the order they are given in.
    """
    wanted = np.asarray(shares) > 0
    gaps = overlap * np.maximum(np.cumsum(wanted) - 1, 0)
    place = order - order.min()
    ends = _ends(shares, int(place.max()) + 1 - int(gaps[-1])) + gaps
    starts = np.concatenate([[0], ends[:-1] - gaps[:-1] + gaps[1:]])
    parts = [order[(place >= a) & (place < b)] for a, b in zip(starts, ends, strict=True)]
    if any(want and not len(part) for want, part in zip(wanted, parts, strict=True)):
        raise DataError(
            f"client {hand.client_id!r} has {len(order)} examples, too few for evaluation.splits "
            f"{list(shares)}: neighbours overlap, so {overlap} are left out between two parts; "
            "raise data.partition.min_examples (or sizes.min), or give fewer parts a share"
        )
    return parts


def _digest(rows: Sequence[ClientRows], new: set[int]) -> str:
    sha = hashlib.sha256()
    for index, client in enumerate(rows):
        sha.update(f"{client.client_id}|{client.quarter_turns}|{index in new}|".encode())
        for part in (client.train, client.val, client.test):
            sha.update(f"{len(part)}|".encode() + part.astype("<i8").tobytes())
    return sha.hexdigest()
