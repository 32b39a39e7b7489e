"""Characters as tokens, and Shakespeare from LEAF's files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selffl_ray.config import load_config
from selffl_ray.datasets.shakespeare import ShakespeareConfig
from selffl_ray.datasets.text import (
    ALPHABET,
    CHARACTER_NAMES,
    NUM_CHARACTERS,
    PADDING,
    UNKNOWN,
    character_ids,
    character_windows,
)
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from tests.contract.harness import finish
from tests.datasets.leaf_files import write


def text_of(ids):
    return "".join(ALPHABET[i - 2] for i in ids)


def read(path, **options):
    dataset = datasets.make(Component("shakespeare", ShakespeareConfig(split="none", **options)))
    return dataset, list(dataset.read(dataset.find(str(path)), 0))


@given(st.text(st.sampled_from(ALPHABET)))
def test_characters_of_the_alphabet_come_back(text):
    ids = character_ids(text)
    assert text_of(ids) == text
    assert ids.dtype == np.uint8


@given(st.text())
def test_other_characters_are_one_token_each_never_padding(text):
    ids = character_ids(text)
    assert len(ids) == len(text)
    expected = [ALPHABET.index(c) + 2 if c in ALPHABET else UNKNOWN for c in text]
    assert ids.tolist() == expected


def test_the_alphabet_is_fixed():
    """Its order is part of stored data and of exported models."""
    assert NUM_CHARACTERS == 98
    assert CHARACTER_NAMES[:5] == ("<padding>", "<unknown>", "\\n", " ", "!")
    assert CHARACTER_NAMES[-1] == "~"
    assert character_ids("\n aZ~é").tolist() == [2, 3, 68, 61, 97, UNKNOWN]


def test_windows_keep_the_last_characters_and_are_padded_in_front():
    windows = character_windows(["abcde", "xy", ""], 3)
    assert text_of(windows[0]) == "cde"
    assert windows[1].tolist() == [PADDING, *character_ids("xy")]
    assert windows[2].tolist() == [PADDING] * 3


LINE = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to su"


def test_strings_and_the_characters_after_them_become_tokens(tmp_path):
    assert len(LINE) == 80
    path = write(tmp_path / "a.json", {"HAMLET_HAMLET": ([LINE, LINE[1:] + "f"], ["f", "ü"])})
    dataset, (group,) = read(path)
    assert text_of(group.x[0]) == LINE
    assert group.y.tolist() == [character_ids("f")[0], UNKNOWN]
    assert dataset.shape.input_shape == (80,)
    assert dataset.features(group.x).dtype == np.int64
    _, (short,) = read(path, context=8)
    assert text_of(short.x[1]) == "nd to suf"[-8:]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([LINE], ["ab"], r"y\[0\] must be one character, found 'ab'"),
        ([LINE], [""], r"y\[0\] must be one character, found ''"),
        ([LINE], [3], r"y\[0\] must be a string, found a number"),
        ([[1, 2]], ["a"], r"x\[0\] must be a string, found a list"),
    ],
)
def test_lists_that_are_no_text_are_refused_by_user_and_place(tmp_path, x, y, message):
    path = write(tmp_path / "a.json", {"PLAY_ROLE": (x, y)})
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: user_data of 'PLAY_ROLE': ")


def test_a_context_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"data\.context must be >= 1, got 0"):
        ShakespeareConfig(context=0)


def test_the_next_character_of_a_text_that_repeats_is_learnt_by_the_sets_own_model(tmp_path):
    """Each role repeats its own five letters: from one letter the next follows."""
    users = {}
    for role, letters in (("PLAY_A", "abcde"), ("PLAY_B", "edcba"), ("PLAY_C", "ABCDE")):
        text = letters * 30
        users[role] = (
            [text[at : at + 80] for at in range(60)],
            [text[at + 80] for at in range(60)],
        )
    write(tmp_path / "a.json", users)
    sets = [
        "data.name=shakespeare", f"data.source={tmp_path}", "data.split=none", "method=local",
        "training.num_rounds=5", "training.num_local_steps=10", "training.learning_rate=0.1",
        "evaluation.every=5",
    ]  # fmt: skip
    prepared = prepare_experiment(load_config(None, sets))
    assert prepared.model.spec.layers == ("embedding", "conv", "output")
    assert finish(prepared).records[-1].metrics["test/local_accuracy"] == 1.0
