"""Synthetic speech: keywords spoken by espeak-ng, a client a voice.

Nobody recorded these clips; a program computes them. A speaker is one of espeak-ng's English
accents with one of its voice variants, a rate and a pitch of its own. Each take of a word differs
in rate (15 %), pitch (8 of 100), loudness (up to 12 dB lower), place (0.1 s around the middle of
the clip) and white noise (10 to 30 dB below the word). Since noise fills the pauses, the inputs are
log-mel levels less 0.75, a fixed number: 0 is a level of -50 dB, about the mean.

All that is drawn from a fixed seed, not the experiment's: the same options and the same library
give the same store. Speaker k is the same whatever the number of speakers.

The generator runs as the store is prepared, one process a speaker (see ``espeak``), and the store
is known by espeak-ng's version and the digest of its files, since releases sound different.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from selffl_ray.datasets import espeak
from selffl_ray.datasets.base import Dataset, Group, content_digest
from selffl_ray.datasets.logmel import Floats, LogMelConfig, fit_length, log_mel
from selffl_ray.datasets.speech import FULL_SCALE, resampled
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.seeding import generator
from selffl_ray.tasks import DataShape

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The ten keywords that are customary for Speech Commands."""

ACCENTS = ("en-us", "gmw/en", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-gb-x-gbcwmd",
           "en-029", "en-us-nyc")  # fmt: skip
"""espeak-ng's names; gmw/en is British English."""

SEED = 0
LEVEL = 0.75
"""Subtracted from the log-mel levels. Inputs far from zero make SGD diverge at usual rates."""
JITTER_S = 0.1
MOST_PROCESSES = 4
LIBRARIES = ("libespeak-ng.so", "libespeak-ng.so.1", "libespeak-ng.dylib", "espeak-ng.dll")
DATA = "espeak-ng-data"
PARTS = ("phondata", "phonindex", "phontab", "intonations", "en_dict")
"""What of espeak-ng's data English speech is made of, besides the voices."""

REMEDY = (
    "pip install -e '.[audio]', or give a folder that holds "
    f"{LIBRARIES[0]} and {DATA} as data.source"
)


@dataclass(frozen=True, kw_only=True)
class SpokenWordsConfig(LogMelConfig):
    """Options of ``data: {name: spoken_words}``."""

    num_speakers: int = 30
    """Voices, each a client; espeak-ng 1.52 has 832 (104 variants in eight accents)."""
    words: tuple[str, ...] = WORDS
    """What is spoken, in the order of the labels; any English words."""
    takes: int = 10
    """Clips of each word by each speaker."""

    def __post_init__(self) -> None:
        LogMelConfig.__post_init__(self)
        for name in ("num_speakers", "takes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be >= 1, got {getattr(self, name)}")
        if len(self.words) < 2 or len(set(self.words)) != len(self.words):
            raise ConfigError(
                f"data.words must be two different words or more, got {list(self.words)}"
            )
        for word in self.words:
            if not any(character.isalpha() for character in word) or "\0" in word:
                raise ConfigError(f"data.words: {word!r} cannot be spoken; give English words")


class Speaker(NamedTuple):
    """A voice (``<accent>+<variant>``) and its usual rate (words a minute) and pitch (0..100)."""

    name: str
    voice: str
    rate: int
    pitch: int


@register_dataset("spoken_words", SpokenWordsConfig)
def spoken_words(config: SpokenWordsConfig) -> Dataset:
    """Ten keywords in synthetic speech, log-mel, 30 voices, each a client (espeak-ng)."""

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        library, data = _places(files)
        roster = speakers(espeak.variants(data), config.num_speakers)
        return _groups(library, data, roster, config)

    return Dataset(
        name="spoken_words",
        title="Spoken words, synthetic speech by espeak-ng",
        licence="generated here; espeak-ng itself is GPL-3.0",
        shape=DataShape(config.input_shape, len(config.words)),
        find=_find,
        read=read,
        label_names=config.words,
        natural=True,
        made_with=_made_with,
        num_groups=lambda files: config.num_speakers,
        defaults={
            "experiment": "spoken_words",
            "training": {"learning_rate": 0.1},
        },
    )


def _find(source: str | None) -> tuple[Path, ...]:
    """The library, then what of its data the clips depend on."""
    if source is None:
        # Found without being imported: only its files are needed.
        package = importlib.util.find_spec("espeakng_loader")
        folders = [Path(f) for f in (package.submodule_search_locations or ())] if package else []
        missing = "espeakng-loader is not installed here and data.source is not set"
    else:
        folders = [Path(source).expanduser()]
        missing = f"data.source: no {LIBRARIES[0]} and {DATA} in {folders[0]}"
    for folder in folders:
        data = folder / DATA
        library = next((folder / n for n in LIBRARIES if (folder / n).is_file()), None)
        voices = data.joinpath(*espeak.VARIANTS)
        parts = [data / name for name in PARTS]
        if library and voices.is_dir() and all(p.is_file() for p in parts):
            return (library, *parts, *(voices / name for name in espeak.variants(data)))
    raise DataError(f"spoken_words: {missing}; {REMEDY}")


def _places(files: tuple[Path, ...]) -> tuple[Path, Path]:
    return files[0], files[1].parent


def _made_with(files: tuple[Path, ...]) -> str:
    """Version and content of the library: names of the files and their bytes, not their place."""
    try:
        version = espeak.library_version(files[0])
    except (OSError, AttributeError) as error:
        raise DataError(
            f"{files[0]}: not espeak-ng for this machine ({error}); {REMEDY}"
        ) from error
    return f"espeak-ng {version}, digest {content_digest(files)}"


def speakers(variants: list[str], num_speakers: int) -> Iterator[Speaker]:
    """The first speakers of a fixed roster.

    A variant comes again, in another accent, when all had their turn.

    Raises:
        ConfigError: more speakers than combinations.
    """
    if num_speakers > len(variants) * len(ACCENTS):
        raise ConfigError(
            f"data.num_speakers is {num_speakers}, but this espeak-ng has "
            f"{len(variants) * len(ACCENTS)} voices; lower it"
        )
    order = generator(SEED, "spoken_words/variants").permutation(len(variants))
    return (_speaker(k, variants, order.tolist()) for k in range(num_speakers))


def _speaker(index: int, variants: list[str], order: list[int]) -> Speaker:
    turn, place = divmod(index, len(variants))
    accent, variant = ACCENTS[(place + turn) % len(ACCENTS)], variants[order[place]]
    voice = f"{accent}+{variant}"
    rng = generator(SEED, "spoken_words/speaker", client_id=voice)
    rate, pitch = int(rng.integers(130, 201)), int(rng.integers(25, 76))
    # The folder of the accent and blanks would be awkward in names of files and tables.
    return Speaker(voice.rpartition("/")[2].replace(" ", "_"), voice, rate, pitch)


def _groups(
    library: Path, data: Path, roster: Iterator[Speaker], config: SpokenWordsConfig
) -> Iterator[Group]:
    """Speakers in order; a few at once, so that only their clips are in memory."""
    everyone = list(roster)
    processes = min(MOST_PROCESSES, len(everyone), os.cpu_count() or 1)
    with ThreadPoolExecutor(processes) as pool:
        for start in range(0, len(everyone), processes):
            yield from pool.map(
                lambda speaker: speak(library, data, speaker, config),
                everyone[start : start + processes],
            )


def speak(library: Path, data: Path, speaker: Speaker, config: SpokenWordsConfig) -> Group:
    """All clips of one speaker: takes of the first word, then of the second, ...

    Raises:
        DataError: espeak-ng failed, or the voice says nothing.
    """
    rng = generator(SEED, "spoken_words/takes", client_id=speaker.voice)
    labels = np.repeat(np.arange(len(config.words)), config.takes)
    rates = np.round(speaker.rate * rng.uniform(0.85, 1.15, len(labels))).astype(int).tolist()
    pitches = (speaker.pitch + rng.integers(-8, 9, len(labels))).tolist()
    said = [
        espeak.Utterance(config.words[k], rate, pitch)
        for k, rate, pitch in zip(labels.tolist(), rates, pitches, strict=True)
    ]
    try:
        rate_hz, sounds = espeak.spoken(library, data, speaker.voice, said)
    except ValueError as error:
        raise DataError(f"spoken_words: {error}; install espeakng-loader again") from error
    clips = [_recorded(np.asarray(s) / FULL_SCALE, rate_hz, rng, config) for s in sounds]
    x = log_mel(clips, config) - np.float32(LEVEL)
    return Group(speaker.name, x, labels.astype(np.int64))


def _recorded(
    sound: Floats, rate_hz: int, rng: np.random.Generator, config: SpokenWordsConfig
) -> Floats:
    """A clip of the configured length: the word near its middle, and noise all over."""
    word = resampled(sound, rate_hz, config.rate_hz)[: config.length]
    word = word * 10.0 ** (rng.uniform(-12.0, 0.0) / 20.0)
    room = config.length - len(word)
    start = round(room / 2 + rng.uniform(-JITTER_S, JITTER_S) * config.rate_hz)
    start = min(max(start, 0), room)
    noise_db = rng.uniform(10.0, 30.0)
    deviation = np.sqrt(np.mean(np.square(word))) * 10.0 ** (-noise_db / 20.0)
    clip = fit_length(np.concatenate([np.zeros(start), word]), config.length)
    clip += deviation * rng.normal(size=config.length)
    return clip
