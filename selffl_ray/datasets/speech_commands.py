"""Google's Speech Commands, or any set in its layout: words in folders, speakers in file names.

``<word>/<speaker>_nohash_<take>.wav`` beside the lists ``testing_list.txt`` and
``validation_list.txt`` of lines ``<word>/<file>``. The published lists are by speaker, so that
those who test are never heard in training: they become new clients (adapted to and tested, never
trained on), and every speaker's own clips are split once more for personalization. Speakers of the
validation list take part in training by default, since validation happens inside every client
here. Folders that are no word asked for, such as ``_background_noise_``, are not read. Source:
Warden 2018, "Speech commands: a dataset for limited-vocabulary speech recognition",
arXiv:1804.03209.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selffl_ray.datasets.base import TRAIN, UNSEEN, Dataset, Group
from selffl_ray.datasets.logmel import LogMelConfig
from selffl_ray.datasets.speech import Clip, speakers
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

WORDS = (
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four",
    "go", "happy", "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right",
    "seven", "sheila", "six", "stop", "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
)  # fmt: skip
"""Of version 2."""

NAME = re.compile(r"(?P<speaker>.+)_nohash_(?P<take>[0-9]+)\.wav")
LISTS = {"none": (), "testing": ("testing_list.txt",),
         "both": ("testing_list.txt", "validation_list.txt")}  # fmt: skip
"""Names of the lists whose speakers are new, by ``new_speakers``."""

REMEDY = "give the folder that holds the folders of words as data.source"


@dataclass(frozen=True, kw_only=True)
class SpeechCommandsConfig(LogMelConfig):
    """Options of ``data: {name: speech_commands}``."""

    words: tuple[str, ...] = WORDS
    """Folders to read, in the order of their labels; version 2 has 35."""
    new_speakers: Literal["testing", "both", "none"] = "testing"
    """Whose speakers are held out as new: of testing_list.txt, of validation_list.txt too, or
    nobody's (the lists are then not read)."""
    min_clips: int = 10
    """Speakers with fewer clips of these words are left out."""

    def __post_init__(self) -> None:
        LogMelConfig.__post_init__(self)
        if len(self.words) < 2 or len(set(self.words)) != len(self.words):
            raise ConfigError(
                f"data.words must be two different words or more, got {list(self.words)}"
            )
        if self.min_clips < 1:
            raise ConfigError(f"data.min_clips must be >= 1, got {self.min_clips}")


@register_dataset("speech_commands", SpeechCommandsConfig)
def speech_commands(config: SpeechCommandsConfig) -> Dataset:
    """Spoken words, log-mel, a client a speaker; the test list's speakers are new (any source)."""

    def find(source: str | None) -> tuple[Path, ...]:
        return _find(source, config)

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        return speakers(_clips(files, config), config)

    return Dataset(
        name="speech_commands",
        title="Speech Commands (Warden 2018), or a set in its layout",
        licence="CC BY 4.0 if it is Google's",
        shape=DataShape(config.input_shape, len(config.words)),
        find=find,
        read=read,
        label_names=config.words,
        natural=True,
        defaults={
            "experiment": "speech_commands",
            "training": {"participation_rate": 0.1, "learning_rate": 0.1},
        },
    )


def _find(source: str | None, config: SpeechCommandsConfig) -> tuple[Path, ...]:
    """The lists asked for, then the clips."""
    if source is None:
        raise DataError(f"speech_commands: data.source is not set; {REMEDY}")
    root = Path(source).expanduser()
    missing = [word for word in config.words if not (root / word).is_dir()]
    if missing:
        raise DataError(
            f"speech_commands: {root} has no folder {missing[0]} ({len(missing)} of "
            f"{len(config.words)} words are missing); {REMEDY}, and name its words in data.words"
        )
    lists = [root / name for name in LISTS[config.new_speakers]]
    for path in lists:
        if not path.is_file():
            raise DataError(
                f"speech_commands: {path} is missing, which says who is new; set "
                "data.new_speakers to none if the set has no such list"
            )
    clips = [path for word in config.words for path in sorted((root / word).glob("*.wav"))]
    if not clips:
        raise DataError(f"speech_commands: no .wav files under {root}; {REMEDY}")
    return (*lists, *clips)


def _clips(files: Sequence[Path], config: SpeechCommandsConfig) -> list[Clip]:
    num_lists = len(LISTS[config.new_speakers])
    lists, paths = files[:num_lists], files[num_lists:]
    label = {word: k for k, word in enumerate(config.words)}
    listed = _listed(lists, {f"{p.parent.name}/{p.name}" for p in paths}, label)
    clips = []
    for path in paths:
        found = NAME.fullmatch(path.name)
        if found is None:
            raise DataError(
                f"{path}: not named <speaker>_nohash_<take>.wav, so its speaker is unknown; rename "
                "or remove it"
            )
        official = UNSEEN if f"{path.parent.name}/{path.name}" in listed else TRAIN
        clips.append(
            Clip(found["speaker"], label[path.parent.name], int(found["take"]), official, path)
        )
    _check_speakers(clips)
    counts = Counter(clip.speaker for clip in clips)
    kept = [clip for clip in clips if counts[clip.speaker] >= config.min_clips]
    if not kept:
        raise DataError(
            f"speech_commands: none of {len(counts)} speakers has {config.min_clips} clips (the "
            f"most is {max(counts.values())}); lower data.min_clips"
        )
    return kept


def _listed(lists: Sequence[Path], there: set[str], words: Mapping[str, int]) -> set[str]:
    """Clips of the words asked for that a list names, as ``<word>/<file>``."""
    listed: set[str] = set()
    for path in lists:
        for number, line in enumerate(_lines(path), start=1):
            if not line:
                continue
            word, slash, name = line.partition("/")
            if not slash or not name:
                raise DataError(
                    f"{path}: line {number} is {line[:80]!r} instead of <word>/<file>; fetch it "
                    "again"
                )
            if word not in words:
                continue
            if line not in there:
                raise DataError(
                    f"{path}: line {number} names {line[:80]}, which is not there; the copy is "
                    "incomplete, fetch it again"
                )
            if line in listed:
                raise DataError(
                    f"{path}: line {number} names {line[:80]} a second time; fetch the lists again"
                )
            listed.add(line)
    return listed


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file ({error.reason}); fetch it again") from error
    return [line.strip() for line in lines]


def _check_speakers(clips: Sequence[Clip]) -> None:
    """A speaker is new with all clips or none."""
    new, old = ({c.speaker for c in clips if (c.official == UNSEEN) == k} for k in (True, False))
    if both := sorted(new & old):
        raise DataError(
            f"speech_commands: the lists name some clips of speaker {both[0]} but not all "
            f"({len(both)} such speakers), so they are not by speaker; set data.new_speakers to "
            "none"
        )
