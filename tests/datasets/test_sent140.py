"""Tweets from LEAF's files and from the raw CSV, and words as tokens."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from selffl_ray.config import load_config
from selffl_ray.datasets.sent140 import TRAINING_FILE, Sent140Config
from selffl_ray.datasets.text import MOST_BUCKETS, PADDING, bucket, word_windows, words
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from tests.contract.harness import finish
from tests.datasets.leaf_files import write


def tweet(text, at=0):
    """The six strings of LEAF; all but the fifth say something else."""
    return [str(at), "Mon Apr 06 2009", "NO_QUERY", "somebody", text, "training"]


def read(path, **options):
    dataset = datasets.make(Component("sent140", Sent140Config(**{"split": "none", **options})))
    return dataset, list(dataset.read(dataset.find(str(path)), 0))


def tokens_of(text, config=Sent140Config()):  # noqa: B008
    return word_windows([text], config.max_words, config.num_buckets)[0].tolist()


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I can't stand IT", ["i", "can't", "stand", "it"]),
        ("@anna look: http://t.co/Ab?x=1 now!!!", ["<name>", "look", ":", "<url>", "now", "!!!"]),
        ("www.x.org &lt;3 &amp; R&amp;B :-)", ["<url>", "<", "3", "&", "r", "&", "b", ":-)"]),
        ("café in Zürich", ["café", "in", "zürich"]),
        ("a @ b", ["a", "@", "b"]),
        ("", []),
    ],
)
def test_words_are_small_with_stand_ins_for_names_and_addresses(text, expected):
    assert words(text) == expected


def test_a_words_bucket_is_the_same_everywhere():
    """CRC-32 of "good" is 0x23c5aa58: Python's own hash would differ by process."""
    import zlib

    assert bucket("good", 4095) == 1 + zlib.crc32(b"good") % 4095
    assert bucket("good", 1) == 1


def test_options_say_how_many_words_are_kept_and_in_how_many_buckets(tmp_path):
    users = {"ann": ([tweet("one two three four five")] * 2, [0, 1])}
    write(tmp_path / "all_data.json", users)
    for max_words, num_buckets in ((3, 7), (4, 11)):
        dataset, (group,) = read(tmp_path, max_words=max_words, num_buckets=num_buckets)
        kept = ["one", "two", "three", "four", "five"][:max_words]
        assert group.x[0].tolist() == [bucket(word, num_buckets) for word in kept]
        assert dataset.shape.input_shape == (max_words,)
        assert dataset.shape.num_tokens == num_buckets + 1


def test_texts_are_cut_behind_and_padded_behind():
    windows = word_windows(["one two three four", "one", ""], 3, 1000)
    assert windows[0].tolist() == [bucket(w, 1000) for w in ("one", "two", "three")]
    assert windows[1].tolist() == [bucket("one", 1000), PADDING, PADDING]
    assert windows[2].tolist() == [PADDING] * 3


def test_buckets_are_hit_evenly():
    """Chi-square of 20,000 words over 100 buckets: mean 99, standard deviation 14."""
    ids = [bucket(f"word{n}", 100) for n in range(20_000)]
    assert min(ids) == 1
    assert max(ids) == 100
    counts = np.bincount(ids, minlength=101)[1:]
    assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * 14


# -- LEAF -----------------------------------------------------------------------------------------


def test_the_fifth_string_is_the_text(tmp_path):
    users = {
        "älter": ([tweet("I love it"), tweet("so sad é")], [1, 0]),
        "bert": ([tweet("meh")], [0]),
    }
    dataset, groups = read(write(tmp_path / "all_data.json", users))
    assert [g.client_id for g in groups] == ["älter", "bert"]
    assert groups[0].x.tolist() == [tokens_of("I love it"), tokens_of("so sad é")]
    assert groups[0].y.tolist() == [1, 0]
    assert dataset.shape.input_shape == (25,)
    assert dataset.shape.num_tokens == 4096
    assert groups[0].x.max() < 4096


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (["text"], [1], r"x\[0\] must be a list of 6 strings"),
        ([tweet("a")[:5]], [1], r"x\[0\] must be a list of 6 strings"),
        ([[*tweet("a")[:4], 7, "training"]], [1], r"x\[0\]\[4\] must be a string, found a number"),
        ([tweet("a")], [4], r"y must lie in 0\.\.1, found 4\.\.4"),
        ([tweet("a")], ["1"], "y must be numbers"),
    ],
)
def test_lists_that_are_no_tweets_are_refused_by_user(tmp_path, x, y, message):
    path = write(tmp_path / "a.json", {"anna": (x, y)})
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: user_data of 'anna': ")


# -- the raw file ---------------------------------------------------------------------------------

ROWS = [
    ("0", "anna", "awful, just awful"),
    ("0", "bert", 'he said "no"'),
    ("4", "anna", "très bien"),
    ("2", "anna", "it is a phone"),
    ("2", "carl", "one\nline more"),
    ("4", "bert", "nice"),
]


def write_csv(path, rows=ROWS, encoding="iso-8859-1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        for at, (polarity, user, text) in enumerate(rows):
            writer.writerow([polarity, at, "Mon Apr 06 2009", "NO_QUERY", user, text])
    return path


def test_users_of_the_raw_file_are_clients_with_their_tweets_in_order(tmp_path):
    write_csv(tmp_path / TRAINING_FILE)
    _, groups = read(tmp_path, layout="csv")
    assert [(g.client_id, g.y.tolist()) for g in groups] == [("anna", [0, 1]), ("bert", [0, 1])]
    assert groups[0].x.tolist() == [tokens_of("awful, just awful"), tokens_of("très bien")]
    assert groups[1].x.tolist() == [tokens_of('he said "no"'), tokens_of("nice")]
    assert groups[0].x.dtype == np.uint16


def test_neutral_tweets_are_left_out_or_count_as_negative_as_in_leaf(tmp_path):
    path = write_csv(tmp_path / "test.csv")
    _, dropped = read(path, layout="csv", neutral="drop")
    _, kept = read(path, layout="csv", neutral="negative")
    assert sum(len(g.y) for g in dropped) == 4
    assert [(g.client_id, g.y.tolist()) for g in kept] == [
        ("anna", [0, 1, 0]), ("bert", [0, 1]), ("carl", [0])
    ]  # fmt: skip


def test_every_byte_is_a_character(tmp_path):
    path = write_csv(
        tmp_path / "a.csv", [("4", "anna", bytes(range(0xA1, 0x100)).decode("latin1"))]
    )
    _, (group,) = read(path, layout="csv")
    assert (group.x > 0).any()


BROKEN = {
    "columns": (b'"0","1","d","q","anna"\n', "line 1: 5 columns instead of 6"),
    "polarity": (b'"0","1","d","q","a","t"\n"3","1","d","q","a","t"\n', "line 2: .* found '3'"),
    "header": (b"target,id,date,flag,user,text\n", "line 1: polarity must be 0, 2 or 4, found 'ta"),
    "no user": (b'"0","1","d","q","","t"\n', "line 1: user is empty"),
    "cut": (b'"0","1","d","q","anna","half of a tw', r"it ends inside a row \(36 bytes\)"),
    "an open quote": (b'"0","1","d","q","a","' + b"x" * 200_000 + b"\n", "line 1: not a CSV row"),
}


@pytest.mark.parametrize(("raw", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_raw_file_is_refused_with_its_line(tmp_path, raw, message):
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read(path, layout="csv")
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_an_empty_raw_file_has_no_clients(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"")
    assert read(tmp_path / "a.csv", layout="csv")[1] == []


def test_a_missing_raw_file_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"there is no file .*{TRAINING_FILE}; give the raw CSV"):
        read(tmp_path, layout="csv")
    with pytest.raises(DataError, match=r"sent140: data\.source is not set"):
        datasets.make(Component("sent140")).find(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_buckets": 0}, rf"data\.num_buckets must lie in 1\.\.{MOST_BUCKETS}, got 0"),
        ({"num_buckets": 2**16}, r"data\.num_buckets must lie in .*, got 65536"),
        ({"max_words": 0}, r"data\.max_words must be >= 1, got 0"),
        ({"layout": "csv"}, r"data\.layout: .* no official split, but data\.split is sample; set"),
        ({"neutral": "drop"}, r"data\.neutral: LEAF's files no longer say"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options, message):
    with pytest.raises(ConfigError, match=message):
        Sent140Config(**options)


# -- from files to a run --------------------------------------------------------------------------


def test_users_with_few_tweets_are_left_out_and_the_sets_own_model_learns_words(tmp_path):
    rng = np.random.default_rng(0)
    rows = [("0", f"rare{n}", "bad") for n in range(40)]
    for user in range(3):
        for _ in range(60):
            good = bool(rng.integers(2))
            filler = " ".join(rng.choice(["the", "a", "day", "today", "work"], 4))
            rows.append(
                ("4" if good else "0", f"user{user}", f"{filler} {'great' if good else 'awful'}")
            )
    write_csv(tmp_path / TRAINING_FILE, rows)
    sets = [
        "data.name=sent140", f"data.source={tmp_path}", "data.split=none", "data.layout=csv",
        "method=local", "training.num_rounds=5", "training.num_local_steps=10",
        "training.learning_rate=0.1", "evaluation.every=5",
    ]  # fmt: skip
    prepared = prepare_experiment(load_config(None, sets))
    assert prepared.client_ids == ["user0", "user1", "user2"]
    assert prepared.store.manifest.num_batches == 43
    # Of 36 tests in all; guessing gets 25 or more right once in a hundred times.
    assert finish(prepared).records[-1].metrics["test/local_accuracy"] > 0.9
