"""Random streams derived from what they are for, never from a global state.

A stream is named by (seed, purpose, round, client). Two streams with different names are
independent; the same name gives the same numbers in any process, in any order of use. Placement,
completion order and retries therefore cannot change a draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def stream_key(seed: int, purpose: str, round_index: int = 0, client_id: str = "") -> int:
    """128-bit key of a stream: the head of a SHA-256 over its name.

    The lengths are part of what is hashed, so that no two names run together.
    """
    name = f"{seed}|{len(purpose)}:{purpose}|{round_index}|{len(client_id)}:{client_id}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")


def generator(
    seed: int, purpose: str, round_index: int = 0, client_id: str = ""
) -> np.random.Generator:
    """NumPy generator of one stream.

    Args:
        seed: the experiment's seed, any integer.
        purpose: what the draws are for, for example ``"batches/train"`` or ``"participation"``.
        round_index: round, from 0.
        client_id: empty for draws that belong to no client.

    Source: Philox is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3"): any key gives a full-quality stream, and building one costs microseconds.
    """
    key = stream_key(seed, purpose, round_index, client_id)
    words = np.array([key & (2**64 - 1), key >> 64], np.uint64)
    return np.random.Generator(np.random.Philox(_Key(words)))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """A key as Philox takes it. ``Philox(key=...)`` first asks the system for entropy unused."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """The key's two words, which is what Philox asks for."""
        assert (n_words, dtype) == (2, np.uint64), "Philox takes two words of 64 bits"
        return self._words


def torch_seed(seed: int, purpose: str, round_index: int = 0, client_id: str = "") -> int:
    """Seed in [0, 2**63) for code that can only be seeded through torch."""
    return stream_key(seed, purpose, round_index, client_id) & (2**63 - 1)


def client_draws(
    seed: int,
    purpose: str,
    client_ids: Sequence[str],
    draw: Callable[[np.random.Generator], np.ndarray],
) -> np.ndarray:
    """A row of draws for each client, from a stream of its own: (M, ...).

    For draws over all rounds: ``rng.random(num_rounds)`` gives a longer run the beginning of a
    shorter one.
    """
    return np.stack([draw(generator(seed, purpose, client_id=name)) for name in client_ids])
