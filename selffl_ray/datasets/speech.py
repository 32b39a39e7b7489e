"""What sets of spoken words share: WAV files, and clips that become a client a speaker."""

from __future__ import annotations

import itertools
import math
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from selffl_ray.datasets.base import Group
from selffl_ray.datasets.logmel import Floats, LogMelConfig, log_mel
from selffl_ray.errors import DataError

FULL_SCALE = 2**15
"""One more than the largest measurement of 16 bits."""
SLOWEST_HZ, FASTEST_HZ = 1_000, 384_000
"""Rates outside are taken for a broken header."""


class Clip(NamedTuple):
    """One recording of one word. take: its number among those of this speaker and word."""

    speaker: str
    label: int
    take: int
    official: int
    path: Path


def speakers(clips: Iterable[Clip], config: LogMelConfig) -> Iterator[Group]:
    """A client a speaker, by name; clips by label and take. One speaker is in memory at a time.

    Raises:
        DataError: a file that is not what it should be.
    """
    for speaker, group in itertools.groupby(sorted(clips), key=lambda clip: clip.speaker):
        own = list(group)
        yield Group(
            speaker,
            log_mel([read_wav(clip.path, config.rate_hz) for clip in own], config),
            np.asarray([clip.label for clip in own], np.int64),
            np.asarray([clip.official for clip in own], np.uint8),
        )


def read_wav(path: Path, rate_hz: int) -> Floats:
    """The measurements (T,) of a mono WAV file of 16 bits, in [-1, 1), at the rate asked for.

    Another rate is resampled with a low-pass filter (Kaiser window, SciPy's ``resample_poly``).

    Raises:
        DataError: not a WAV file, truncated, empty, another encoding, more than one channel.
    """
    try:
        with wave.open(str(path)) as file:
            params = file.getparams()
            # A broken header may claim gigabytes, which Python would set aside before it reads.
            raw = file.readframes(min(params.nframes, path.stat().st_size))
    except (wave.Error, EOFError, OSError, RuntimeError) as error:
        # RuntimeError: a part of the file that claims to reach beyond its end.
        found = str(error) or "it ends too early"
        raise DataError(
            f"{path}: not a WAV file of plain PCM ({found}); convert it to mono PCM of 16 bits"
        ) from error
    if (params.nchannels, params.sampwidth) != (1, 2):
        raise DataError(
            f"{path}: {params.nchannels} channels of {8 * params.sampwidth} bits instead of one "
            "of 16; convert it to mono PCM of 16 bits"
        )
    if not SLOWEST_HZ <= params.framerate <= FASTEST_HZ:
        raise DataError(f"{path}: a rate of {params.framerate} Hz; fetch it again")
    if len(raw) != 2 * params.nframes or not raw:
        raise DataError(
            f"{path}: {len(raw) // 2} measurements, but its header says {params.nframes}; the file "
            f"is {'truncated' if params.nframes else 'empty'}, fetch it again or remove it"
        )
    sound = np.frombuffer(raw, "<i2") / FULL_SCALE
    return sound if params.framerate == rate_hz else resampled(sound, params.framerate, rate_hz)


def resampled(sound: Floats, rate_hz: int, wanted_hz: int) -> Floats:
    """A sound (T,) at another rate, low-pass filtered (Kaiser window, SciPy's)."""
    # Imported here: SciPy's signal part is slow to load, and most sets never need it.
    from scipy.signal import resample_poly

    common = math.gcd(rate_hz, wanted_hz)
    resampled: Floats = resample_poly(sound, wanted_hz // common, rate_hz // common)
    return resampled
