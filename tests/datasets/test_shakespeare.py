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


def examples_of(text, first=0):
    """A string of 80 characters and the next one at every place from ``first`` on, as LEAF cuts."""
    places = range(first, len(text) - 80)
    return [text[at : at + 80] for at in places], [text[at + 80] for at in places]


def roles(sizes):
    """Texts with so many examples, of letters drawn at random."""
    rng = np.random.default_rng(0)
    return {f"PLAY_{role}": "".join(rng.choice(list(ALPHABET), size + 80)) for role, size in sizes}


def parted(folder, *sets):
    """Clients and new clients of an experiment, and the text place where each role's rows start."""
    named = ["data.name=shakespeare", f"data.source={folder}", "method=local", *sets]
    prepared = prepare_experiment(load_config(None, named))
    starts = dict(zip(prepared.store.client_ids, prepared.store.start_rows, strict=False))
    every = (*prepared.partition.clients, *prepared.partition.new_clients)
    return [(client, starts[client.client_id]) for client in every]


def answers_in(part, trained):
    """How many answers of one part's rows are read in strings or answers of the other's."""
    places = {place for row in trained for place in range(row, row + 81)}
    return sum(int(row) + 80 in places for row in part)


@pytest.mark.parametrize(
    "sets",
    [
        ["data.split=none"],
        ["data.split=none", "evaluation.new_clients=0.3"],
        ["data.split=none", "data.partition.sizes={min: 300, max: 500}"],
        ["data.split=user"],
    ],
    ids=["clients", "new clients", "thinned", "users of test"],
)
def test_no_answer_of_a_test_example_is_read_in_training(tmp_path, sets):
    by_user = "data.split=user" in sets
    for role, text in roles([("A", 600), ("B", 900), ("C", 700)]).items():
        folder = {"PLAY_C": "test"}.get(role, "train") if by_user else "all_data"
        write(tmp_path / folder / f"{role}.json", {role: examples_of(text)})
    clients = parted(tmp_path, *sets)
    assert len(clients) == 3
    for client, _ in clients:
        assert min(map(len, client[1:4])) >= 10
        assert not answers_in(client.test, client.train)
        assert not answers_in(client.val, client.train)
        assert not answers_in(client.test, client.val)


def test_validation_beside_leafs_own_test_part_is_not_read_in_training_either(tmp_path):
    """LEAF leaves out 79 examples before its test part, and so no answer is read in training."""
    text = roles([("A", 600)])["PLAY_A"]
    x, y = examples_of(text)
    write(tmp_path / "train" / "a.json", {"PLAY_A": (x[:400], y[:400])})
    write(tmp_path / "test" / "a.json", {"PLAY_A": examples_of(text, 479)})
    ((client, start),) = parted(tmp_path)
    assert [len(part) for part in client[1:4]] == [256, 64, 121]
    assert sorted(client.train - start) == list(range(256))
    assert not answers_in(client.val, client.train)


def test_a_shorter_context_leaves_out_fewer(tmp_path):
    path = write(tmp_path / "a.json", {"PLAY_A": examples_of(roles([("A", 600)])["PLAY_A"])})
    ((client, _),) = parted(path, "data.split=none", "data.context=10")
    assert sum(map(len, client[1:4])) == 600 - 2 * 10
    assert client.val.min() - client.train.max() == 11


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_dealing_roles_anew_is_refused(tmp_path, partition):
    path = write(tmp_path / "a.json", {"PLAY_A": examples_of("abcde" * 80)})
    message = r"data\.partition\.name: examples of shakespeare overlap .* 80 .*; use natural"
    with pytest.raises(ConfigError, match=message):
        parted(path, "data.split=none", f"data.partition.name={partition}")


def test_the_next_character_of_a_text_that_repeats_is_learnt_by_the_sets_own_model(tmp_path):
    """Each role repeats its own five letters: from one letter the next follows."""
    users = {}
    for role, letters in (("PLAY_A", "abcde"), ("PLAY_B", "edcba"), ("PLAY_C", "ABCDE")):
        users[role] = examples_of(letters * 80)
    write(tmp_path / "a.json", users)
    sets = [
        "data.name=shakespeare", f"data.source={tmp_path}", "data.split=none", "method=local",
        "training.num_rounds=5", "training.num_local_steps=10", "training.learning_rate=0.1",
        "evaluation.every=5",
    ]  # fmt: skip
    prepared = prepare_experiment(load_config(None, sets))
    assert prepared.model.spec.layers == ("embedding", "conv", "output")
    assert finish(prepared).records[-1].metrics["test/local_accuracy"] == 1.0
