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
    hands: Sequence[Hand], shares: tuple[float, float, float], new_share: float, seed: int
) -> Partition:
    """Split every client's own rows, and hold out some clients as new.

    Clients that are published as new are those; otherwise a share is drawn.

    Args:
        shares: of train, validation and test; the share of a part that clients were dealt rows of
            their own for must be 0.
        new_share: share of the clients held out, in [0, 1).

    Raises:
        ConfigError: shares that do not fit. DataError: a client left without training examples, or
            all of them published as new.
    """
    _check_shares(hands, shares)
    rows = [_split(hand, shares, seed) for hand in hands]
    new = _new_clients(hands, new_share, seed)
    clients = tuple(r for i, r in enumerate(rows) if i not in new)
    return Partition(clients, tuple(rows[i] for i in sorted(new)), _digest(rows, new))


def _new_clients(hands: Sequence[Hand], new_share: float, seed: int) -> set[int]:
    """Places of the clients held out as new: those published as such, or a share drawn."""
    named = {i for i, hand in enumerate(hands) if hand.new}
    if named and new_share > 0:
        raise ConfigError(
            f"evaluation.new_clients: the data name {len(named)} of {len(hands)} clients as new, "
            f"so no share is drawn, got {new_share}; leave it out"
        )
    if len(named) == len(hands):
        raise DataError("all clients are published as new, which leaves none to train on")
    held = round(new_share * len(hands))
    if new_share > 0 and not held:
        raise ConfigError(
            f"evaluation.new_clients: {new_share} of {len(hands)} clients is none; raise it, or "
            "set it to 0"
        )
    if held >= len(hands):
        raise ConfigError(
            f"evaluation.new_clients: {new_share} of {len(hands)} clients leaves none to train on"
        )
    order = generator(seed, "new clients").permutation(len(hands))
    return named | set(order[:held].tolist())


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


def _split(hand: Hand, shares: tuple[float, float, float], seed: int) -> ClientRows:
    if not len(hand.rows):
        raise DataError(
            f"client {hand.client_id!r} has no examples; lower data.partition.num_clients, raise "
            "alpha, or take the client out of the source"
        )
    order = generator(seed, "splits", 0, hand.client_id).permutation(hand.rows)
    ends = np.round(np.cumsum(np.asarray(shares) / sum(shares)) * len(order)).astype(np.int64)
    train, val, test = np.split(order, ends[:-1])
    if not len(train):
        raise DataError(
            f"client {hand.client_id!r} has {len(order)} examples and with evaluation.splits "
            f"{list(shares)} none of them is for training; raise the first share"
        )
    val, test = np.concatenate([val, hand.val_rows]), np.concatenate([test, hand.test_rows])
    # Training rows keep their random order: variance estimates cut chunks from it.
    return ClientRows(hand.client_id, train, np.sort(val), np.sort(test), hand.quarter_turns)


def _digest(rows: Sequence[ClientRows], new: set[int]) -> str:
    sha = hashlib.sha256()
    for index, client in enumerate(rows):
        sha.update(f"{client.client_id}|{client.quarter_turns}|{index in new}|".encode())
        for part in (client.train, client.val, client.test):
            sha.update(f"{len(part)}|".encode() + part.astype("<i8").tobytes())
    return sha.hexdigest()
