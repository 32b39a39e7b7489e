"""Text as token ids: characters of a fixed alphabet, or words by a hash.

Neither needs to see the data first. A vocabulary of the training words would have to be gathered
from all clients before the first round, and would differ with the split; a fixed alphabet and a
fixed hash are the same for everybody, and new clients' text needs nothing that is not there.

Ids are 0 for padding (a model gives it no weight), 1 for a character outside of the alphabet, then
the characters; of hashed words, 0 for padding and then the buckets.
"""

from __future__ import annotations

import functools
import html
import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PADDING, UNKNOWN = 0, 1
"""Token ids of what is no character, and of a character outside of the alphabet."""

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
"""Line feed and the 95 printable ASCII characters."""

CHARACTER_NAMES = ("<padding>", "<unknown>", "\\n", *ALPHABET[1:])
"""What each id of a character stands for."""

NUM_CHARACTERS = len(CHARACTER_NAMES)

MOST_BUCKETS = 2**16 - 1
"""Ids are stored in two bytes."""

_ID_OF = np.full(128, UNKNOWN, np.uint8)
_ID_OF[[ord(c) for c in ALPHABET]] = np.arange(2, NUM_CHARACTERS)

_TOKEN = re.compile(r"https?://\S+|www\.\S+|@\w+|\w+(?:'\w+)*|[^\w\s]+")

Tokens = npt.NDArray[np.uint8]
WordTokens = npt.NDArray[np.uint16]


def character_ids(text: str) -> Tokens:
    """(len(text),) ids; what is not in the alphabet is UNKNOWN."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return np.where(codes < len(_ID_OF), _ID_OF[np.minimum(codes, 127)], UNKNOWN).astype(np.uint8)


def character_windows(texts: Sequence[str], length: int) -> Tokens:
    """The last ``length`` characters of each text, shorter ones padded in front: (N, length)."""
    windows = np.full((len(texts), length), PADDING, np.uint8)
    for row, text in zip(windows, texts, strict=True):
        ids = character_ids(text[-length:])
        row[length - len(ids) :] = ids
    return windows


def words(text: str) -> list[str]:
    """Lower-case words, runs of other signs, and one stand-in each for addresses and names.

    HTML entities are resolved first: tweets carry ``&amp;`` and ``&lt;3``.
    """
    found = _TOKEN.findall(html.unescape(text).lower())
    return [_stand_in(token) for token in found]


def _stand_in(token: str) -> str:
    if token.startswith(("http://", "https://", "www.")):
        return "<url>"
    return "<name>" if token[0] == "@" and len(token) > 1 else token


@functools.lru_cache(maxsize=2**18)
def bucket(word: str, num_buckets: int) -> int:
    """Id of a word, 1..num_buckets: CRC-32 of its UTF-8 bytes, the same on every machine."""
    return 1 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % num_buckets


def word_windows(texts: Sequence[str], length: int, num_buckets: int) -> WordTokens:
    """The first ``length`` words of each text, shorter ones padded behind: (N, length)."""
    windows = np.full((len(texts), length), PADDING, np.uint16)
    for row, text in zip(windows, texts, strict=True):
        ids = [bucket(word, num_buckets) for word in words(text)[:length]]
        row[: len(ids)] = ids
    return windows
