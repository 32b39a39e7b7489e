"""The log-mel front end against its definition written out, and against tones with known levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.datasets.logmel import LogMelConfig, fit_length, log_mel, mel_bands
from selffl_ray.errors import ConfigError

SMALL = LogMelConfig(rate_hz=2000, length_s=0.1, num_mels=6, window_s=0.05, hop_s=0.02)


def written_out(sound, config):
    """The definition with loops and sums: a Fourier sum a bin, a triangle a band."""
    rate, window, hop = config.rate_hz, config.window, config.hop
    clip = [float(sound[t]) if t < len(sound) else 0.0 for t in range(config.length)]
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * t / window) for t in range(window)]
    size = 1
    while size < 2 * window:
        size *= 2

    def mel(hz):
        return 2595 * math.log10(1 + hz / 700)

    step = (mel(rate / 2) - mel(20)) / (config.num_mels + 1)
    peaks = [700 * (10 ** ((mel(20) + i * step) / 2595) - 1) for i in range(config.num_mels + 2)]
    frames = []
    for start in range(0, config.length - window + 1, hop):
        power = []
        for k in range(size // 2 + 1):
            wave = sum(
                hann[t] * clip[start + t] * complex(math.cos(a := 2 * math.pi * k * t / size),
                                                    -math.sin(a))
                for t in range(window)
            )  # fmt: skip
            power.append(abs(wave) ** 2 / (sum(hann) / 2) ** 2)
        levels = []
        for low, peak, high in zip(peaks, peaks[1:], peaks[2:], strict=False):
            total = 0.0
            for k, p in enumerate(power):
                hz = k * rate / size
                if low < hz <= peak:
                    total += p * (hz - low) / (peak - low)
                elif peak < hz < high:
                    total += p * (high - hz) / (high - peak)
            levels.append(2 + (10 * math.log10(total) if total > 1e-8 else -80) / 40)
        frames.append(levels)
    return np.transpose(frames)[None]


@pytest.mark.parametrize("length", [60, 200, 260])
def test_it_is_the_definition_written_out(length):
    """Shorter than a clip, as long, and longer."""
    sound = np.random.default_rng(0).normal(scale=0.1, size=length)
    expected = written_out(sound, SMALL)
    assert expected.shape == SMALL.input_shape == (1, 6, 3)
    (found,) = log_mel([sound], SMALL)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.5 / 1024 + 1e-6)
    np.testing.assert_array_equal(found * 1024, np.round(found * 1024))
    assert found.dtype == np.float32
    assert (expected == 0).any() == (length == 60), "what follows a short clip is silence"


def test_the_defaults_are_40_bands_of_30_frames_at_any_rate():
    for rate in (8_000, 16_000):
        assert LogMelConfig(rate_hz=rate).input_shape == (1, 40, 30)
    assert LogMelConfig(length_s=0.064).input_shape == (1, 40, 1)
    assert LogMelConfig(num_mels=20, hop_s=0.016, window_s=0.032).input_shape == (1, 20, 61)


@settings(max_examples=30)
@given(band=st.integers(3, 38), loudness=st.floats(-40, 0))
def test_a_tone_is_loudest_in_its_band_at_its_level(band, loudness):
    config = LogMelConfig()
    hz = np.fft.rfftfreq(config.spectrum, 1 / config.rate_hz)[mel_bands(config)[band].argmax()]
    time = np.arange(config.length) / config.rate_hz
    (found,) = log_mel([10 ** (loudness / 20) * np.sin(2 * np.pi * hz * time)], config)
    level = (found[0] - 2) * 40
    assert (level.argmax(0) == band).all()
    # The peak of the tone, and what Hann's window spreads to the bins around it.
    assert (level.max(0) > loudness - 0.5).all()
    assert (level.max(0) < loudness + 5).all()


def test_ten_times_the_amplitude_is_half_a_unit_more():
    sound = np.random.default_rng(0).normal(scale=0.01, size=16_000)
    quiet, loud = log_mel([sound, 10 * sound], LogMelConfig())
    assert quiet.min() > 0
    np.testing.assert_allclose(loud - quiet, 0.5, atol=1.01 / 1024)


def test_silence_is_zero_and_nothing_is_less():
    silent, faint = log_mel([np.zeros(16_000), np.full(16_000, 1e-9)], LogMelConfig())
    assert not silent.any()
    assert not faint.any()


def test_bands_are_triangles_that_sum_to_one_between_the_outer_peaks():
    config = LogMelConfig(rate_hz=8_000)
    bands = mel_bands(config)
    assert bands.shape == (40, config.spectrum // 2 + 1)
    hz = np.fft.rfftfreq(config.spectrum, 1 / 8_000)
    inner = (hz > hz[bands[0].argmax()] + 20) & (hz < hz[bands[-1].argmax()] - 20)
    np.testing.assert_allclose(bands.sum(0)[inner], 1)
    assert not bands[:, hz < 20].any()
    assert (np.diff([np.average(hz, weights=band) for band in bands]) > 0).all()


def test_a_clip_does_not_depend_on_those_beside_it():
    sounds = [np.random.default_rng(k).normal(size=900 + 37 * k) for k in range(70)]
    together = log_mel(sounds, SMALL)
    for at in (0, 63, 64, 69):
        np.testing.assert_array_equal(together[at], log_mel([sounds[at]], SMALL)[0])


@given(have=st.integers(0, 30), want=st.integers(1, 30))
def test_a_clip_is_cut_or_padded_at_its_end(have, want):
    sound = np.arange(1.0, have + 1)
    found = fit_length(sound, want)
    assert found.tolist() == [t + 1 if t < have else 0 for t in range(want)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate_hz": 0}, r"data\.rate_hz must be > 0 and finite, got 0"),
        ({"num_mels": -1}, r"data\.num_mels must be > 0 and finite, got -1"),
        ({"hop_s": math.inf}, r"data\.hop_s must be > 0 and finite, got inf"),
        ({"length_s": math.nan}, r"data\.length_s must be > 0 and finite, got nan"),
        (
            {"length_s": 0.05},
            r"data\.window_s must be .*at most data\.length_s.* got 0\.064, 0\.05",
        ),
        ({"hop_s": 1e-9}, r"data\.hop_s one or more"),
        ({"num_mels": 500}, r"data\.num_mels: 500 bands up to 8000 Hz are narrower .*; lower it"),
        ({"rate_hz": 30, "window_s": 0.5}, r"data\.num_mels: 40 bands up to 15 Hz"),
    ],
)
def test_options_that_give_no_frames_or_empty_bands_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LogMelConfig(**options)
