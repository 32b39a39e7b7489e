"""Spoken words: WAV files whole and broken, and the two layouts that name a clip's speaker."""

from __future__ import annotations

import io
import struct
import wave
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.config import load_config
from selffl_ray.datasets.base import TEST, TRAIN, UNSEEN
from selffl_ray.datasets.fsdd import FSDDConfig
from selffl_ray.datasets.logmel import LogMelConfig, log_mel
from selffl_ray.datasets.speech import FULL_SCALE, read_wav
from selffl_ray.datasets.speech_commands import WORDS, SpeechCommandsConfig
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from selffl_ray.tasks import DataShape
from tests.real_data import needs, source_of


def wav_bytes(values, rate=8_000, *, channels=1, width=2):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(np.asarray(values, f"<i{width}" if width != 3 else "u1").tobytes())
    return file.getvalue()


def tone(hz, seconds=0.3, rate=8_000):
    time = np.arange(round(seconds * rate)) / rate
    return np.round(8_000 * np.sin(2 * np.pi * hz * time)).astype(np.int16)


# -- WAV files ------------------------------------------------------------------------------------


def test_measurements_are_shares_of_full_scale(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes([0, 1, -1, 32_767, -32_768]))
    found = read_wav(tmp_path / "a.wav", 8_000)
    assert (found * FULL_SCALE).tolist() == [0, 1, -1, 32_767, -32_768]
    assert found.min() == -1


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 16_000, 44_100])
def test_a_tone_keeps_pitch_level_and_length_at_another_rate(tmp_path, rate):
    (tmp_path / "a.wav").write_bytes(wav_bytes(tone(440, 0.5, rate), rate))
    found = read_wav(tmp_path / "a.wav", 8_000)
    assert abs(len(found) - 4_000) <= 1
    expected = tone(440, 0.5) / FULL_SCALE
    inner = slice(200, 3_800)  # the filter's ends aside
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.003)


def test_what_the_lower_rate_cannot_hold_is_filtered_out(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(tone(6_000, 0.5, 16_000), 16_000))
    found = read_wav(tmp_path / "a.wav", 8_000)
    assert np.abs(found[200:-200]).max() < 0.002, "and not folded to 2,000 Hz"


WHOLE = wav_bytes(tone(300, 0.01))


def with_format(tag):
    at = WHOLE.index(b"fmt ") + 8
    return WHOLE[:at] + struct.pack("<H", tag) + WHOLE[at + 2 :]


BROKEN = {
    "empty": (b"", "not a WAV file of plain PCM .*; convert it to mono PCM of 16 bits"),
    "text": (b"<html>not found</html>", "not a WAV file of plain PCM"),
    "another RIFF": (WHOLE.replace(b"WAVE", b"AVI "), "not a WAV file of plain PCM"),
    "floats": (with_format(3), r"not a WAV file of plain PCM \(unknown format: 3\)"),
    "mu-law": (with_format(7), r"not a WAV file of plain PCM \(unknown format: 7\)"),
    "8 bits": (wav_bytes([1, 2], width=1), "1 channels of 8 bits instead of one of 16"),
    "24 bits": (wav_bytes([0] * 6, width=3), "1 channels of 24 bits instead of one of 16"),
    "stereo": (wav_bytes([1, 2, 3, 4], channels=2), "2 channels of 16 bits instead of one of 16"),
    "no measurements": (wav_bytes([]), "0 measurements, but its header says 0; the file is empty"),
    "cut": (WHOLE[:-20], "70 measurements, but its header says 80; the file is truncated"),
    "no rate": (wav_bytes([1, 2], rate=1), "a rate of 1 Hz; fetch it again"),
}


@pytest.mark.parametrize(("raw", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_or_other_file_is_refused_in_one_line_that_names_it(tmp_path, raw, message):
    path = tmp_path / "0_anna_0.wav"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read_wav(path, 8_000)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@settings(max_examples=80)
@given(cut=st.integers(0, len(WHOLE) - 1))
def test_no_cut_of_a_file_is_believed(stores, cut):
    path = stores / "cut.wav"
    path.write_bytes(WHOLE[:cut])
    with pytest.raises(DataError, match=r"cut\.wav: "):
        read_wav(path, 8_000)


@settings(max_examples=100)
@given(at=st.integers(0, 60), byte=st.integers(0, 255))
def test_a_changed_header_is_another_sound_or_refused_but_never_another_error(stores, at, byte):
    path = stores / "changed.wav"
    path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    try:
        found = read_wav(path, 8_000)
    except DataError:
        return
    assert np.isfinite(found).all()


# -- FSDD -----------------------------------------------------------------------------------------


def write_fsdd(folder, speakers=("theo", "anna"), takes=range(3, 8), digits=range(10)):
    """Tones: every digit, speaker and take sounds different."""
    folder.mkdir(parents=True)
    for digit in digits:
        for s, speaker in enumerate(speakers):
            for take in takes:
                values = tone(200 + 100 * digit + 30 * s, 0.15 + 0.02 * take)
                (folder / f"{digit}_{speaker}_{take}.wav").write_bytes(wav_bytes(values))
    return folder


def groups_of(name, source, options=None):
    dataset = datasets.make(Component(name, options))
    return list(dataset.read(dataset.find(str(source)), 0))


@pytest.mark.parametrize("inside", ["recordings", ""])
def test_speakers_of_fsdd_are_clients_and_takes_0_to_4_are_the_test(tmp_path, inside):
    folder = write_fsdd(tmp_path / "fsdd" / inside)
    anna, theo = groups_of("fsdd", tmp_path / "fsdd")
    assert (anna.client_id, theo.client_id) == ("anna", "theo")
    for group in (anna, theo):
        order = [(digit, take) for digit in range(10) for take in range(3, 8)]
        assert group.y.tolist() == [digit for digit, _ in order]
        assert group.official.tolist() == [TEST if take < 5 else TRAIN for _, take in order]
        paths = [folder / f"{digit}_{group.client_id}_{take}.wav" for digit, take in order]
        expected = log_mel([read_wav(p, 8_000) for p in paths], FSDDConfig())
        np.testing.assert_array_equal(group.x, expected)
        assert len(np.unique(group.x.reshape(50, -1), axis=0)) == 50


def test_takes_are_numbers_not_texts(tmp_path):
    folder = write_fsdd(tmp_path / "fsdd", ("anna",), (9, 10, 100), (7,))
    (anna,) = groups_of("fsdd", folder)
    by_take = [read_wav(folder / f"7_anna_{take}.wav", 8_000) for take in (9, 10, 100)]
    np.testing.assert_array_equal(anna.x, log_mel(by_take, FSDDConfig()))


@pytest.mark.parametrize("name", ["anna.wav", "x_anna_3.wav", "11_anna_3.wav", "3_anna.wav"])
def test_a_recording_without_a_speaker_in_its_name_is_refused(tmp_path, name):
    folder = write_fsdd(tmp_path / "fsdd")
    (folder / name).write_bytes(WHOLE)
    with pytest.raises(DataError, match=rf"{name}: not named <digit>_<speaker>_<take>\.wav"):
        groups_of("fsdd", folder)


def test_a_missing_source_is_told_with_what_to_do(tmp_path):
    find = datasets.make(Component("fsdd")).find
    with pytest.raises(DataError, match=r"fsdd: data\.source is not set; give the repository"):
        find(None)
    with pytest.raises(DataError, match=r"fsdd: data\.source: there is no folder .*nowhere; give"):
        find(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"fsdd: data\.source: .* has no \.wav files; give"):
        find(str(tmp_path))


def prepared(name, source, *sets):
    settings = [f"data.name={name}", f"data.source={source}", *sets]
    return prepare_experiment(load_config(None, settings))


def test_its_name_and_source_are_enough_and_the_manifest_names_the_folder_not_every_file(tmp_path):
    folder = write_fsdd(tmp_path / "fsdd")
    found = prepared("fsdd", folder)
    assert found.client_ids == ["anna", "theo"]
    for client in found.clients:
        assert [len(rows) for rows in (client.train, client.val, client.test)] == [24, 6, 20]
    assert found.store.manifest.source == f"{folder} (100 files)"
    assert found.store.manifest.x_shape == (1, 40, 30)


@pytest.mark.parametrize(
    ("setting", "shape"),
    [
        ("data.num_mels=20", (1, 20, 30)),
        ("data.length_s=0.512", (1, 40, 15)),
        ("data.hop_s=0.064", (1, 40, 15)),
        ("data.window_s=0.1", (1, 40, 29)),
    ],
)
@pytest.mark.parametrize("model", ["mlp", "{name: cnn, channels: [4, 4], kernel: 3, hidden: [8]}"])
def test_options_set_the_shape_and_both_networks_fit_it(tmp_path, setting, shape, model):
    folder = write_fsdd(tmp_path / "fsdd", takes=(4, 5, 6), digits=(0, 1))
    found = prepared("fsdd", folder, setting, f"model={model}", "evaluation.splits=[1, 0, 0]")
    assert found.store.manifest.x_shape == shape
    assert found.model.shape == DataShape(shape, 10)


# -- Speech Commands ------------------------------------------------------------------------------

VOICES = ("0a0b0c0d", "11112222", "ffff0000", "9a9a9a9a")
TESTING, VALIDATION = VOICES[2], VOICES[1]


def write_commands(folder, words=("yes", "no"), *, takes=3, lists=True):
    """Tones in the layout: four speakers, one of them in each list, and noise to be left alone."""
    names = {voice: [] for voice in VOICES}
    for w, word in enumerate(words):
        (folder / word).mkdir(parents=True)
        for v, voice in enumerate(VOICES):
            for take in range(takes):
                name = f"{word}/{voice}_nohash_{take}.wav"
                values = tone(300 + 200 * w + 40 * v, 0.2 + 0.1 * take, 16_000)
                (folder / name).write_bytes(wav_bytes(values, 16_000))
                names[voice].append(name)
    (folder / "_background_noise_").mkdir()
    (folder / "_background_noise_" / "doing_the_dishes.wav").write_bytes(b"never opened")
    (folder / "README.md").write_text("about")
    if lists:
        (folder / "testing_list.txt").write_text("\n".join(names[TESTING]) + "\n")
        (folder / "validation_list.txt").write_text("\n".join(names[VALIDATION]) + "\n")
    return folder


def options(**values):
    return SpeechCommandsConfig(**{"words": ("yes", "no"), "min_clips": 1, **values})


def test_speakers_come_from_the_file_names_and_words_from_the_folders(tmp_path):
    folder = write_commands(tmp_path / "set")
    groups = groups_of("speech_commands", folder, options())
    assert [group.client_id for group in groups] == sorted(VOICES)
    for group in groups:
        assert group.y.tolist() == [0, 0, 0, 1, 1, 1]
        paths = [
            folder / word / f"{group.client_id}_nohash_{take}.wav"
            for word in ("yes", "no")
            for take in range(3)
        ]
        expected = log_mel([read_wav(p, 16_000) for p in paths], LogMelConfig())
        np.testing.assert_array_equal(group.x, expected)


@pytest.mark.parametrize(
    ("new_speakers", "new"),
    [("testing", {TESTING}), ("both", {TESTING, VALIDATION}), ("none", set())],
)
def test_speakers_of_the_lists_become_new_clients(tmp_path, new_speakers, new):
    folder = write_commands(tmp_path / "set")
    groups = groups_of("speech_commands", folder, options(new_speakers=new_speakers))
    for group in groups:
        assert set(group.official.tolist()) == {UNSEEN if group.client_id in new else TRAIN}
    found = prepared(
        "speech_commands",
        folder,
        "data.words=['yes', 'no']",
        "data.min_clips=1",
        f"data.new_speakers={new_speakers}",
    )
    assert {client.client_id for client in found.partition.new_clients} == new
    assert {client.client_id for client in found.partition.clients} == set(VOICES) - new
    for client in found.clients:
        parts = [len(rows) for rows in (client.train, client.val, client.test)]
        assert parts == [4, 1, 1], "everybody's own clips are split, those of new clients too"


def test_words_are_labels_in_the_order_given_and_others_are_left_alone(tmp_path):
    folder = write_commands(tmp_path / "set", ("yes", "no", "up"))
    (folder / "no" / "not-a-sound.wav").write_bytes(b"")
    groups = groups_of("speech_commands", folder, options(words=("up", "yes")))
    assert [group.y.tolist() for group in groups] == [[0, 0, 0, 1, 1, 1]] * 4
    low, high = (groups[0].x[k, 0].mean(1).argmax() for k in (5, 2))
    assert low < high, "the tone of yes is the lower one"


def test_without_words_it_is_the_35_of_version_2():
    assert len(set(WORDS)) == 35
    assert list(WORDS) == sorted(WORDS)
    dataset = datasets.make(Component("speech_commands"))
    assert dataset.shape == DataShape((1, 40, 30), 35)
    assert dataset.label_names == WORDS


def test_speakers_with_few_clips_are_left_out(tmp_path):
    folder = write_commands(tmp_path / "set")
    for take in (1, 2):
        (folder / "no" / f"{VOICES[0]}_nohash_{take}.wav").unlink()
    groups = groups_of("speech_commands", folder, options(min_clips=5))
    assert {group.client_id for group in groups} == set(VOICES[1:])
    message = r"none of 4 speakers has 7 clips \(the most is 6\); lower data\.min_clips"
    with pytest.raises(DataError, match=message):
        groups_of("speech_commands", folder, options(min_clips=7))


def edited(name, change):
    def edit(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return edit


def first_line(line):
    return lambda raw: line + b"\n" + raw


INCONSISTENT = {
    "no such clip": (
        edited("testing_list.txt", first_line(b"yes/0123abcd_nohash_0.wav")),
        r"testing_list\.txt: line 1 names yes/0123abcd_nohash_0\.wav, which is not there",
    ),
    "no such file": (
        lambda folder: (folder / "yes" / f"{TESTING}_nohash_1.wav").unlink(),
        rf"testing_list\.txt: line 2 names yes/{TESTING}_nohash_1\.wav, which is not there",
    ),
    "not a path": (
        edited("testing_list.txt", first_line(b"\n\nnonsense")),
        r"testing_list\.txt: line 3 is 'nonsense' instead of <word>/<file>",
    ),
    "not text": (
        edited("testing_list.txt", lambda raw: b"\xff\xfe\x00" + raw),
        r"testing_list\.txt: not a text file",
    ),
    "in both lists": (
        edited("validation_list.txt", lambda raw: raw + f"yes/{TESTING}_nohash_0.wav".encode()),
        rf"validation_list\.txt: line 7 names yes/{TESTING}_nohash_0\.wav a second time",
    ),
    "a speaker in part": (
        edited("testing_list.txt", lambda raw: raw.split(b"\n", 1)[1]),
        rf"some clips of speaker {TESTING} but not all \(1 such .*new_speakers to none",
    ),
    "no speaker": (
        lambda folder: (folder / "no" / "hello.wav").write_bytes(WHOLE),
        r"hello\.wav: not named <speaker>_nohash_<take>\.wav",
    ),
    "no list": (
        lambda folder: (folder / "testing_list.txt").unlink(),
        r"testing_list\.txt is missing, which says who is new; set data\.new_speakers to none",
    ),
    "no folder": (
        lambda folder: (folder / "no").rename(folder / "nope"),
        r"has no folder no \(1 of 2 words are missing\); .* name its words in data\.words",
    ),
    "a broken clip": (
        edited(f"no/{VOICES[0]}_nohash_0.wav", lambda raw: raw[:-7]),
        rf"no/{VOICES[0]}_nohash_0\.wav: 3196 measurements, but its header says 3200",
    ),
}


@pytest.mark.parametrize(("damage", "message"), INCONSISTENT.values(), ids=INCONSISTENT)
def test_what_disagrees_is_refused_in_one_line(tmp_path, damage, message):
    folder = write_commands(tmp_path / "set")
    groups_of("speech_commands", folder, options(new_speakers="both"))
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        groups_of("speech_commands", folder, options(new_speakers="both"))
    assert str(folder) in str(error.value) or "speech_commands" in str(error.value)
    assert "\n" not in str(error.value)


def test_lists_may_name_words_that_are_not_asked_for(tmp_path):
    folder = write_commands(tmp_path / "set", ("yes", "no", "up"))
    groups = groups_of("speech_commands", folder, options())
    assert [g.client_id for g in groups if UNSEEN in g.official] == [TESTING]


def test_without_lists_nobody_is_new_if_so_asked(tmp_path):
    folder = write_commands(tmp_path / "set", lists=False)
    groups = groups_of("speech_commands", folder, options(new_speakers="none"))
    assert all((group.official == TRAIN).all() for group in groups)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"words": ("yes",)}, r"data\.words must be two different words or more, got \['yes'\]"),
        ({"words": ("yes", "yes")}, r"data\.words must be two different words or more"),
        ({"min_clips": 0}, r"data\.min_clips must be >= 1, got 0"),
        ({"hop_s": 0.0}, r"data\.hop_s must be > 0"),
    ],
)
def test_wrong_options_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        SpeechCommandsConfig(**values)


def test_no_folder_and_no_clips_are_told(tmp_path):
    find = datasets.make(Component("speech_commands", options())).find
    with pytest.raises(DataError, match=r"speech_commands: data\.source is not set; give"):
        find(None)
    folder = write_commands(tmp_path / "set", takes=0)
    with pytest.raises(DataError, match=r"speech_commands: no \.wav files under"):
        find(str(folder))


# -- the real recordings --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return groups_of("fsdd", source_of("fsdd"))


@needs("fsdd")
def test_fsdd_has_six_speakers_with_fifty_takes_of_every_digit(real):
    names = ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]
    assert [group.client_id for group in real] == names
    for group in real:
        assert group.x.shape == (500, 1, 40, 30)
        assert Counter(group.y.tolist()) == dict.fromkeys(range(10), 50)
        assert Counter(group.official.tolist()) == {TRAIN: 450, TEST: 50}
        assert 0 <= group.x.min() < group.x.max() < 2.2


@needs("fsdd")
def test_a_speakers_own_recordings_tell_more_than_those_of_the_others(real):
    """By the nearest class mean: own 69 %, the others' 27 %."""

    def class_means(chosen):
        x, y = (np.concatenate([part[g.official == TRAIN] for g, part in pairs])
                for pairs in ([(g, g.x) for g in chosen], [(g, g.y) for g in chosen]))  # fmt: skip
        return np.stack([x[y == k].mean(0) for k in range(10)])

    def accuracy(means, group):
        test = group.official == TEST
        distance = np.square(group.x[test][:, None] - means).sum((-1, -2, -3))
        return (distance.argmin(1) == group.y[test]).mean()

    own = np.mean([accuracy(class_means([g]), g) for g in real])
    others = np.mean([accuracy(class_means([h for h in real if h is not g]), g) for g in real])
    assert own > 0.65
    assert others < 0.35
