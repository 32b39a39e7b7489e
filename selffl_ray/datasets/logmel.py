"""Log-mel levels of sound: what a model sees of a clip, computed once as the store is built.

A clip is cut into overlapping frames under a Hann window, each frame's power spectrum is summed in
triangular bands that are equally wide on the mel scale (2595 log10(1 + f / 700)), and the sums
become levels in decibels. 0 dB is a tone at full scale; everything under -80 dB counts as silence.
The input is level / 40 + 2, so that silence is 0 and speech lies between 0 and about 2. This scale
is fixed: unlike means and deviations over the clients' data it needs no exchange before the first
round, and what one clip holds changes no other clip's input. Inputs are rounded to 1/1024, so that
machines whose arithmetic differs in the last bits build the same store.

Shape letters: N clips, T measurements, F frames, M mel bands, K bins of a spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from selffl_ray.errors import ConfigError

LOWEST_HZ = 20.0
FLOOR_DB = -80.0
DB_PER_UNIT = 40.0
STEPS_PER_UNIT = 1024

MOST = {"rate_hz": 384_000, "length_s": 60, "num_mels": 512}
"""Largest values that sound asks for; a spectrum of more would not end."""

PIECE = 64
"""Clips whose frames are in memory at once."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LogMelConfig:
    """Options of every set of sounds."""

    rate_hz: int = 16_000
    """Measurements a second; recordings at another rate are resampled."""
    length_s: float = 1.0
    """Of a clip: shorter ones get silence at their end, longer ones lose theirs."""
    num_mels: int = 40
    """Bands, from 20 Hz to half the rate."""
    window_s: float = 0.064
    """Length of a frame, seconds, rounded to whole measurements."""
    hop_s: float = 0.032
    """From the start of a frame to the start of the next, seconds, rounded in the same way."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(LogMelConfig)):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"data.{name} must be > 0 and finite, got {value}")
            if value > MOST.get(name, math.inf):
                raise ConfigError(f"data.{name} must be at most {MOST[name]:g}, got {value:g}")
        if not 2 <= self.window <= self.length or self.hop < 1:
            raise ConfigError(
                f"data.window_s must be two measurements or more and at most data.length_s, and "
                f"data.hop_s one or more, got {self.window_s}, {self.length_s} and {self.hop_s} "
                f"at {self.rate_hz} Hz"
            )
        if not mel_bands(self).any(axis=1).all():
            raise ConfigError(
                f"data.num_mels: {self.num_mels} bands up to {self.rate_hz / 2:g} Hz are narrower "
                f"than what {self.window_s} s can tell apart; lower it or raise data.window_s"
            )

    @property
    def length(self) -> int:
        """Measurements of a clip."""
        return round(self.length_s * self.rate_hz)

    @property
    def window(self) -> int:
        """Measurements of a frame."""
        return round(self.window_s * self.rate_hz)

    @property
    def hop(self) -> int:
        """Measurements from a frame to the next."""
        return round(self.hop_s * self.rate_hz)

    @property
    def spectrum(self) -> int:
        """Measurements of a frame with zeros behind it: the power of two from twice its length."""
        return 1 << (2 * self.window - 1).bit_length()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """One channel, bands (low to high) and frames, none of which reaches beyond the clip."""
        return (1, self.num_mels, 1 + (self.length - self.window) // self.hop)


def fit_length(sound_T: Floats, length: int) -> Floats:
    """(length,): cut at the end, or silence after it."""
    return np.pad(sound_T[:length], (0, max(length - len(sound_T), 0)))


def mel_bands(config: LogMelConfig) -> Floats:
    """(M, K) weights of each bin in each band.

    Triangles of height 1 whose feet lie below the peaks of their neighbours.
    """
    highest = _mel(config.rate_hz / 2)
    peaks = np.linspace(_mel(LOWEST_HZ), highest, config.num_mels + 2)
    hz = 700.0 * (10.0 ** (peaks / 2595.0) - 1.0)
    bins = np.fft.rfftfreq(config.spectrum, 1.0 / config.rate_hz)
    width = np.diff(hz)[:, None]
    rising = (bins - hz[:-2, None]) / width[:-1]
    falling = (hz[2:, None] - bins) / width[1:]
    return np.maximum(np.minimum(rising, falling), 0.0)


def _mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)


def log_mel(sounds: Sequence[Floats], config: LogMelConfig) -> npt.NDArray[np.float32]:
    """Inputs (N, 1, M, F) of sounds in [-1, 1] at the configured rate, of any lengths."""
    weights_KM = mel_bands(config).T
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(config.window) / config.window)
    inputs = np.empty((len(sounds), *config.input_shape), np.float32)
    for start in range(0, len(sounds), PIECE):
        clips = np.stack([fit_length(s, config.length) for s in sounds[start : start + PIECE]])
        frames = np.lib.stride_tricks.sliding_window_view(clips, config.window, axis=1)
        waves = np.fft.rfft(frames[:, :: config.hop] * hann, config.spectrum)
        # A tone of amplitude 1 has the height sum(hann) / 2.
        power_NFK = np.square(np.abs(waves) * (2.0 / hann.sum()))
        quiet = 10.0 ** (FLOOR_DB / 10.0)
        level = 10.0 * np.log10(np.maximum(power_NFK @ weights_KM, quiet))
        steps = np.round((level - FLOOR_DB) * (STEPS_PER_UNIT / DB_PER_UNIT))
        inputs[start : start + PIECE, 0] = (steps / STEPS_PER_UNIT).transpose(0, 2, 1)
    return inputs
