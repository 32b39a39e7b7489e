"""The Free Spoken Digit Dataset: ten digits in English, six speakers, each a client.

``recordings/<digit>_<speaker>_<take>.wav``, mono, 16 bits, 8 kHz, cut close to the word. Takes 0
to 4 of every digit are the published test part. Speakers differ much: other voices, accents and
microphones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selffl_ray.datasets.base import TEST, TRAIN, Dataset, Group
from selffl_ray.datasets.logmel import LogMelConfig
from selffl_ray.datasets.speech import Clip, speakers
from selffl_ray.errors import DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAME = re.compile(r"(?P<digit>[0-9])_(?P<speaker>[^_]+)_(?P<take>[0-9]+)\.wav")
NUM_TEST_TAKES = 5

REMEDY = (
    "give the repository free-spoken-digit-dataset or its folder recordings as data.source "
    "(github.com/Jakobovski/free-spoken-digit-dataset)"
)


@dataclass(frozen=True, kw_only=True)
class FSDDConfig(LogMelConfig):
    """Options of ``data: {name: fsdd}``."""

    rate_hz: int = 8_000
    """Measurements a second; recordings at another rate are resampled."""


@register_dataset("fsdd", FSDDConfig)
def fsdd(config: FSDDConfig) -> Dataset:
    """Ten spoken digits, log-mel, a few speakers with 500 recordings each, each a client (FSDD)."""

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        return speakers([_clip(path) for path in files], config)

    return Dataset(
        name="fsdd",
        title="Free Spoken Digit Dataset (Jackson et al.)",
        licence="CC BY-SA 4.0, its contributors",
        shape=DataShape(config.input_shape, len(DIGITS)),
        find=_find,
        read=read,
        label_names=DIGITS,
        natural=True,
        defaults={
            "experiment": "fsdd",
            "training": {"num_rounds": 100, "learning_rate": 0.1},
            # With 300 test recordings the last round alone would be a matter of luck.
            "evaluation": {"splits": [0.8, 0.2, 0.0], "last": 5},
        },
    )


def _find(source: str | None) -> tuple[Path, ...]:
    if source is None:
        raise DataError(f"fsdd: data.source is not set; {REMEDY}")
    folder = Path(source).expanduser()
    if (folder / "recordings").is_dir():
        folder = folder / "recordings"
    if not folder.is_dir():
        raise DataError(f"fsdd: data.source: there is no folder {folder}; {REMEDY}")
    files = tuple(sorted(folder.glob("*.wav")))
    if not files:
        raise DataError(f"fsdd: data.source: {folder} has no .wav files; {REMEDY}")
    return files


def _clip(path: Path) -> Clip:
    found = NAME.fullmatch(path.name)
    if found is None:
        raise DataError(
            f"{path}: not named <digit>_<speaker>_<take>.wav, so its speaker is unknown; rename or "
            "remove it"
        )
    take = int(found["take"])
    official = TEST if take < NUM_TEST_TAKES else TRAIN
    return Clip(found["speaker"], int(found["digit"]), take, official, path)
