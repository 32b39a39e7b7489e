"""Synthetic speech: the roster of voices, the clips' bytes, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.datasets import espeak
from selffl_ray.datasets.base import Group
from selffl_ray.datasets.espeak import Utterance
from selffl_ray.datasets.spoken_words import (
    ACCENTS,
    DATA,
    LIBRARIES,
    PARTS,
    SpokenWordsConfig,
    speak,
    speakers,
)
from selffl_ray.datasets.store import prepare
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import Component, datasets

FOUND = importlib.util.find_spec("espeakng_loader")
PACKAGE = Path(FOUND.submodule_search_locations[0]) if FOUND else Path("nowhere")
needs_espeak = pytest.mark.skipif(
    FOUND is None, reason="espeakng-loader is not installed: pip install -e '.[audio]'"
)
SMALL = {"num_speakers": 2, "words": ("yes", "go"), "takes": 2}


def spoken_words(**options):
    return datasets.make(Component("spoken_words", SpokenWordsConfig(**options)))


def pretended(folder):
    """A folder with the names of espeak-ng's files."""
    voices = folder / DATA / "voices" / "!v"
    voices.mkdir(parents=True)
    for path in (folder / LIBRARIES[0], voices / "f1", voices / "Mr serious"):
        path.write_bytes(b"not a library")
    for name in PARTS:
        (folder / DATA / name).write_bytes(b"0")
    return folder


# -- the roster ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(num_variants=st.integers(1, 17), share=st.floats(0.01, 1))
def test_speakers_are_different_voices_and_the_first_ones_of_any_longer_roster(num_variants, share):
    names = [f"v {k}" for k in range(num_variants)]
    everyone = list(speakers(names, num_variants * len(ACCENTS)))
    assert len({s.voice for s in everyone}) == len({s.name for s in everyone}) == len(everyone)
    fewer = max(1, int(share * len(everyone)))
    assert list(speakers(names, fewer)) == everyone[:fewer]
    # Every variant has its turn before one comes again.
    first = everyone[:num_variants]
    assert sorted(s.voice.partition("+")[2] for s in first) == sorted(names)
    for speaker in everyone:
        assert 130 <= speaker.rate <= 200
        assert 25 <= speaker.pitch <= 75
        assert not {" ", "/"} & set(speaker.name)


def test_more_speakers_than_voices_are_refused():
    with pytest.raises(ConfigError, match=r"data\.num_speakers is 17, but .* has 16 voices"):
        speakers(["f1", "f2"], 17)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_speakers": 0}, r"data\.num_speakers must be >= 1, got 0"),
        ({"takes": 0}, r"data\.takes must be >= 1, got 0"),
        ({"words": ("yes",)}, r"data\.words must be two different words"),
        ({"words": ("yes", "yes")}, r"data\.words must be two different words"),
        ({"words": ("yes", " ")}, r"data\.words: ' ' cannot be spoken"),
        ({"words": ("yes", "n\0o")}, r"data\.words: .* cannot be spoken"),
        ({"rate_hz": 0}, r"data\.rate_hz must be > 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SpokenWordsConfig(**options)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"espeakng-loader is not installed here.*; pip install -e '\.\[audio\]'"
    with pytest.raises(DataError, match=message) as error:
        spoken_words().find(None)
    assert "\n" not in str(error.value)


def test_a_source_without_the_library_or_its_data_is_told(tmp_path):
    for gone in (LIBRARIES[0], f"{DATA}/phontab", f"{DATA}/voices"):
        folder = pretended(tmp_path / gone.replace("/", "-"))
        assert len(spoken_words().find(str(folder))) == 1 + len(PARTS) + 2
        path = folder / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(DataError, match=r"data\.source: no libespeak-ng\.so and .*; pip"):
            spoken_words().find(str(folder))


def test_a_file_that_is_no_library_is_named(tmp_path):
    dataset = spoken_words(**SMALL)
    folder = pretended(tmp_path / "broken")
    with pytest.raises(DataError, match=r"libespeak-ng\.so: not espeak-ng for this machine"):
        prepare(dataset, None, str(folder), 0, tmp_path)


def test_an_unknown_variant_is_refused_before_anything_is_spoken(tmp_path):
    folder = pretended(tmp_path)
    with pytest.raises(ValueError, match="no variant 'f9'"):
        espeak.spoken(folder / LIBRARIES[0], folder / DATA, "en-us+f9", [Utterance("go", 150, 50)])


def test_a_process_that_fails_is_a_data_error_with_its_last_line(tmp_path):
    folder = pretended(tmp_path)
    (speaker,) = speakers(["f1"], 1)
    with pytest.raises(DataError, match=r"spoken_words: voice '.*\+f1': exit 1, OSError") as error:
        speak(folder / LIBRARIES[0], folder / DATA, speaker, SpokenWordsConfig(**SMALL))
    assert "\n" not in str(error.value)


# -- the key of the store --------------------------------------------------------------------------


def test_the_store_is_known_by_the_generator_not_by_where_its_files_lie(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / "library").write_text("1.52.0")
    toy = dataclasses.replace(
        spoken_words(**SMALL),
        find=lambda source: (Path(source) / "library",),
        read=lambda files, seed: iter([Group("a", np.zeros((2, 3)), np.arange(2))]),
        made_with=lambda files: f"toy {files[0].read_text()}",
    )

    def store(folder):
        return prepare(toy, None, str(folder), 0, tmp_path / "stores")

    first, same = (store(folder) for folder in folders)
    assert first.folder == same.folder
    assert first.manifest.source == "toy 1.52.0"
    (folders[1] / "library").write_text("1.51")
    assert store(folders[1]).folder != first.folder
    by_place = dataclasses.replace(toy, made_with=None)
    apart = {prepare(by_place, None, str(f), 0, tmp_path / "stores").folder for f in folders}
    assert len(apart) == 2


# -- with espeak-ng --------------------------------------------------------------------------------


@needs_espeak
def test_two_generations_of_a_voice_give_the_same_bytes():
    library, data = PACKAGE / LIBRARIES[0], PACKAGE / DATA
    said = [Utterance(word, 150, 50) for word in ("yes", "no")]
    # f3 draws noise, which the library alone would seed with the second it is started in.
    for voice in ("en-us+f3", "gmw/en+Mr serious"):
        first = espeak.spoken(library, data, voice, said)
        time.sleep(1.1)
        assert espeak.spoken(library, data, voice, said) == first
        assert first[0] == 22_050
        assert all(0.15 < len(sound) / first[0] < 1.0 for sound in first[1])


@needs_espeak
def test_every_accent_is_known_and_sounds_different():
    library, data = PACKAGE / LIBRARIES[0], PACKAGE / DATA
    said = [Utterance("stop", 150, 50)]
    heard = {
        espeak.spoken(library, data, f"{accent}+f1", said)[1][0].tobytes() for accent in ACCENTS
    }
    # The two standard forms of English say this word alike or not; no more than two may.
    assert len(heard) >= len(ACCENTS) - 1
    with pytest.raises(ValueError, match="no such language"):
        espeak.spoken(library, data, "nowhere+f1", said)


@needs_espeak
def test_a_second_store_of_the_same_options_has_the_same_digest(tmp_path):
    dataset = spoken_words(**SMALL)
    first, again = (prepare(dataset, SMALL, None, seed, tmp_path / str(seed)) for seed in (1, 2))
    assert first.folder.name == again.folder.name
    assert first.manifest.digest == again.manifest.digest
    assert first.manifest.source.startswith("espeak-ng 1.")
    (library, *_) = dataset.find(None)
    assert espeak.library_version(library) in first.manifest.source


@needs_espeak
def test_clips_are_takes_of_each_word_and_do_not_depend_on_the_number_of_speakers():
    one, two = (
        spoken_words(**SMALL | {"num_speakers": n, "takes": 3, "length_s": 1.0}) for n in (1, 2)
    )
    (alone,) = one.read(one.find(None), 0)
    first, second = two.read(two.find(None), 0)
    assert alone.client_id == first.client_id != second.client_id
    assert alone.x.tobytes() == first.x.tobytes()
    assert first.x.shape == (6, *one.shape.input_shape)
    assert first.y.tolist() == [0, 0, 0, 1, 1, 1]
    # Zero is near the mean: training with usual rates depends on it.
    assert abs(float(first.x.mean())) < 0.25
    # Takes differ, and no clip is silence.
    assert len({x.tobytes() for x in first.x}) == 6
    assert first.x.max(axis=(1, 2, 3)).min() > 0.25


@needs_espeak
def test_long_words_lose_their_end():
    dataset = spoken_words(num_speakers=1, words=("incomprehensibilities", "no"), takes=1,
                           length_s=0.4)  # fmt: skip
    (group,) = dataset.read(dataset.find(None), 0)
    assert group.x.shape == (2, *dataset.shape.input_shape)
