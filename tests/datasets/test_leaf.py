"""LEAF's files as its scripts leave them, their traps, and files that are not what they should be.

Examples here are pairs of numbers: x = [[3, 4], ...], y = [0, ...].
"""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.config import load_config
from selffl_ray.datasets.base import TEST, TRAIN, UNSEEN, Dataset
from selffl_ray.datasets.leaf import (
    Examples,
    LeafConfig,
    class_labels,
    find_leaf,
    leaf_defaults,
    leaf_groups,
    numbers,
    read_leaf_file,
)
from selffl_ray.datasets.store import prepare
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import datasets
from selffl_ray.tasks import DataShape
from tests.contract.harness import finish
from tests.datasets.leaf_files import content, write


def convert(x, y):
    return Examples(numbers(x, "x", 2).astype(np.uint8), class_labels(y, 3))


def pairs(*firsts):
    """(x, y) with one example for each number: [n, n + 1] of class n mod 3."""
    return [[n, n + 1] for n in firsts], [n % 3 for n in firsts]


def groups_of(folder, split):
    return list(leaf_groups(find_leaf("toy", split, str(folder)), split, convert))


def rows_of(group):
    return group.x[:, 0].tolist()


SAMPLE_TRAIN = ({"anna": pairs(1, 2, 3), "bert": pairs(4)}, {"carl": pairs(5, 6)})
SAMPLE_TEST = ({"carl": pairs(7), "anna": pairs(8, 9)}, {"bert": pairs(10)})


def write_split(folder, train, test):
    for part, files in (("train", train), ("test", test)):
        for number, users in enumerate(files):
            write(folder / part / f"all_data_{number}_niid_0_keep_0_{part}_9.json", users)
    return folder


# -- the three cases ------------------------------------------------------------------------------


def test_users_of_both_parts_get_their_test_examples_as_the_official_test_part(tmp_path):
    groups = groups_of(write_split(tmp_path, SAMPLE_TRAIN, SAMPLE_TEST), "sample")
    assert [g.client_id for g in groups] == ["anna", "bert", "carl"]
    assert [rows_of(g) for g in groups] == [[1, 2, 3, 8, 9], [4, 10], [5, 6, 7]]
    assert [g.official.tolist() for g in groups] == [
        [TRAIN] * 3 + [TEST] * 2, [TRAIN, TEST], [TRAIN, TRAIN, TEST]
    ]  # fmt: skip
    for group in groups:
        np.testing.assert_array_equal(group.y, group.x[:, 0] % 3)
        assert group.x.dtype == np.uint8


def test_test_users_who_are_not_in_train_are_unseen(tmp_path):
    write_split(tmp_path, SAMPLE_TRAIN, [{"dora": pairs(7, 8)}, {"emil": pairs(9)}])
    groups = groups_of(tmp_path, "user")
    assert [g.client_id for g in groups] == ["anna", "bert", "carl", "dora", "emil"]
    assert [set(g.official.tolist()) for g in groups] == [{TRAIN}] * 3 + [{UNSEEN}] * 2
    assert rows_of(groups[3]) == [7, 8]


def test_without_a_split_all_files_of_a_folder_are_merged_and_names_say_nothing(tmp_path):
    for name, users in (("b_test", {"anna": pairs(1)}), ("a", {"bert": pairs(2, 3)})):
        write(tmp_path / f"{name}.json", users)
    groups = groups_of(tmp_path, "none")
    assert [(g.client_id, rows_of(g)) for g in groups] == [("bert", [2, 3]), ("anna", [1])]
    assert all(g.official is None for g in groups)


def test_a_single_file_and_the_folder_all_data_are_sources_too(tmp_path):
    path = write(tmp_path / "all_data" / "all_data.json", {"anna": pairs(1)})
    assert find_leaf("toy", "none", str(path)) == (path,)
    assert find_leaf("toy", "none", str(tmp_path)) == (path,)


def test_a_user_with_train_examples_only_has_no_test_part(tmp_path):
    write_split(tmp_path, SAMPLE_TRAIN, SAMPLE_TEST[:1])
    anna, bert, carl = groups_of(tmp_path, "sample")
    assert bert.official.tolist() == [TRAIN]
    assert TEST in anna.official
    assert TEST in carl.official


@settings(max_examples=50)
@given(
    sizes=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=5),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        min_size=1,
        max_size=6,
    )
)
def test_no_example_is_lost_or_mixed_up_whatever_the_users_are_called(stores, sizes):
    folder = stores / "leaf names"
    start = 0
    parts = {"train": {}, "test": {}}
    for user, counts in sizes.items():
        for part, count in zip(("train", "test"), counts, strict=True):
            parts[part][user] = pairs(*range(start, start + count))
            start += count
    write_split(folder, [parts["train"]], [parts["test"]])
    for group in groups_of(folder, "sample"):
        expected = [x[0] for part in parts.values() for x in part[group.client_id][0]]
        assert rows_of(group) == expected


# -- LEAF's habits --------------------------------------------------------------------------------


def test_users_that_leaf_emptied_but_left_in_user_data_are_not_clients(tmp_path, caplog):
    data = {"anna": {"x": [[1, 2]], "y": [1]}, "gone": {"x": [], "y": []}}
    path = write(tmp_path / "a.json", {"anna": pairs(1)}, user_data=data)
    with caplog.at_level(logging.WARNING):
        assert list(read_leaf_file(path, convert)) == ["anna"]
    assert not caplog.records


def test_hierarchies_longer_than_users_change_nothing(tmp_path):
    users = {"anna": pairs(1), "bert": pairs(2)}
    path = write(tmp_path / "a.json", users, hierarchies=["class", "class", "other"])
    assert list(read_leaf_file(path, convert)) == ["anna", "bert"]


def test_counts_that_disagree_with_the_lists_are_told_in_one_line_and_the_lists_count(
    tmp_path, caplog
):
    users = {"anna": pairs(1, 2), "bert": pairs(3), "carl": pairs(4)}
    path = write(tmp_path / "a.json", users, num_samples=[2, 5, 0])
    with caplog.at_level(logging.WARNING):
        found = read_leaf_file(path, convert)
    assert [len(examples.y) for examples in found.values()] == [2, 1, 1]
    (record,) = caplog.records
    expected = f"{path}: num_samples says 5 of 'bert', the lists hold 1, and differs for 1 more"
    assert record.getMessage().startswith(expected)


def test_examples_of_somebody_who_is_not_listed_are_left_out_with_a_warning(tmp_path, caplog):
    data = content({"anna": pairs(1), "bert": pairs(2)})["user_data"]
    path = write(tmp_path / "a.json", {"anna": pairs(1)}, user_data=data)
    with caplog.at_level(logging.WARNING):
        assert list(read_leaf_file(path, convert)) == ["anna"]
    assert "user_data has examples of 'bert' and 0 more who are not in users" in caplog.text


def test_a_listed_user_with_empty_lists_keeps_its_place_until_the_partition(tmp_path):
    path = write(tmp_path / "a.json", {"anna": pairs(1), "none": ([], []), "carl": pairs(2)})
    found = read_leaf_file(path, convert)
    assert [len(examples.y) for examples in found.values()] == [1, 0, 1]
    assert found["none"].x.shape == (0, 2)


def test_users_called_x_and_y_are_users(tmp_path):
    path = write(tmp_path / "a.json", {"x": pairs(1), "y": pairs(2, 3)})
    assert [len(e.y) for e in read_leaf_file(path, convert).values()] == [1, 2]


# -- memory ---------------------------------------------------------------------------------------


def test_a_users_numbers_become_an_array_before_the_next_user_is_parsed(tmp_path):
    """At most one user's lists of a file exist at a time."""
    sizes = []

    def watching(x, y):
        sizes.append(len(x))
        return convert(x, y)

    users = {f"u{k}": pairs(*range(k + 1)) for k in range(5)}
    text = json.dumps(content(users))
    path = tmp_path / "a.json"
    # The file ends right after the third user: its arrays are made although the rest is missing.
    path.write_text(text[: text.index('"u3": {')])
    with pytest.raises(DataError, match="not a whole JSON file"):
        read_leaf_file(path, watching)
    assert sizes == [1, 2, 3]


# -- refusals -------------------------------------------------------------------------------------

GOOD = content({"anna": pairs(1, 2), "bert": pairs(3)})


def changed(**fields):
    return json.dumps({**GOOD, **fields})


def with_entry(entry):
    return changed(user_data={**GOOD["user_data"], "bert": entry})


def without(field):
    return json.dumps({k: v for k, v in GOOD.items() if k != field})


BROKEN = {
    "empty": ("", "not a whole JSON file: .*; fetch or make it again"),
    "truncated": (json.dumps(GOOD)[:-9], "not a whole JSON file"),
    "not UTF-8": (b'{"users": ["\xff"]}', "not a whole JSON file: 'utf-8' codec"),
    "too deep": ("[" * 100_000, "not a whole JSON file: .*recursion"),
    "a list": ("[1, 2]", "not a LEAF file: it holds a list, not an object"),
    "a number": ("3", "it holds a number"),
    "null": ("null", "it holds a null"),
    "no users": (without("users"), "the field 'users' is missing"),
    "no counts": (without("num_samples"), "the field 'num_samples' is missing"),
    "no data": (without("user_data"), "the field 'user_data' is missing"),
    "users no list": (changed(users="anna"), "users must be a list, found a string"),
    "data no object": (changed(user_data=[]), "user_data must be an object, found a list"),
    "counts no list": (changed(num_samples=3), "num_samples must be a list, found a number"),
    "too few counts": (changed(num_samples=[2]), "num_samples has 1 entries for 2 users"),
    "listed twice": (
        changed(users=["anna", "bert", "anna"], num_samples=[2, 1, 2]),
        "users: 'anna' is listed 2 times; list it once",
    ),
    "in the data twice": (
        json.dumps(GOOD).replace('"bert": {', '"anna": {'),
        "the key 'anna' occurs twice in one object",
    ),
    "lists twice": (
        json.dumps(GOOD).replace('"y": [0]', '"y": [0], "y": [1]'),
        "the key 'y' occurs twice in one object",
    ),
    "id no string": (changed(users=["anna", 7]), "users: an id must be a string .* found 7"),
    "id empty": (changed(users=["anna", ""]), "users: an id must be a string .* found ''"),
    "listed without data": (changed(users=["anna", "carl"]), "no entry of 'carl', who is listed"),
    "entry no object": (with_entry([1]), "user_data of 'bert' must be an object of two lists"),
    "entry without y": (with_entry({"x": []}), "user_data of 'bert' must be an object of two"),
    "x no list": (with_entry({"x": 3, "y": [1]}), "user_data of 'bert' must be an object of two"),
    "lengths": (
        with_entry({"x": [[1, 2]], "y": [1, 2]}),
        "user_data of 'bert': x has 1 entries and y has 2; they must be as many",
    ),
    "ragged": (
        with_entry({"x": [[1, 2], [1]], "y": [1, 2]}),
        "user_data of 'bert': x must be lists of 2 numbers of equal length",
    ),
    "width": (
        with_entry({"x": [[1, 2, 3]], "y": [1]}),
        r"user_data of 'bert': x must be lists of 2 numbers, found \(3,\) of int64",
    ),
    "text for numbers": (
        with_entry({"x": [["1", "2"]], "y": [1]}), "'bert': x must be lists of 2 numbers, found"
    ),
    "null for a number": (
        with_entry({"x": [[1, None]], "y": [1]}), "'bert': x must be lists of 2 numbers, found"
    ),
    "true for a label": (with_entry({"x": [[1, 2]], "y": [True]}), "'bert': y must be numbers"),
    "not finite": (
        with_entry({"x": [[1, float("nan")]], "y": [1]}), "user_data of 'bert': x must be finite"
    ),
    "label too large": (
        with_entry({"x": [[1, 2]], "y": [3]}), r"'bert': y must lie in 0\.\.2, found 3\.\.3"
    ),
    "label negative": (
        with_entry({"x": [[1, 2]], "y": [-1]}), r"'bert': y must lie in 0\.\.2, found -1\.\.-1"
    ),
    "label huge": (with_entry({"x": [[1, 2]], "y": [2**70]}), "'bert': y must be numbers"),
    "label a fraction": (
        with_entry({"x": [[1, 2]], "y": [1.5]}), "'bert': y must be whole numbers"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_file_and_field(tmp_path, text, message):
    path = tmp_path / "all_data_0.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as error:
        read_leaf_file(path, convert)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@settings(max_examples=60)
@given(cut=st.integers(0, len(json.dumps(GOOD)) - 1))
def test_no_cut_of_a_file_is_believed(stores, cut):
    path = stores / "cut.json"
    path.write_text(json.dumps(GOOD)[:cut])
    with pytest.raises(DataError, match=r"cut\.json: "):
        read_leaf_file(path, convert)


def test_a_user_in_two_files_of_a_part_is_refused_with_both_files(tmp_path):
    write_split(tmp_path, [{"anna": pairs(1)}, {"bert": pairs(2), "anna": pairs(3)}], SAMPLE_TEST)
    with pytest.raises(DataError, match=r"_1_niid.*: users: 'anna' is also in .*_0_niid.*; a user"):
        groups_of(tmp_path, "sample")


def test_the_split_that_is_found_must_be_the_one_that_is_set(tmp_path):
    write_split(tmp_path / "sample", SAMPLE_TRAIN, SAMPLE_TEST)
    message = "user 'anna' is in train and in test, but data.split is user.*set data.split=sample"
    with pytest.raises(DataError, match=message):
        groups_of(tmp_path / "sample", "user")
    write_split(tmp_path / "user", SAMPLE_TRAIN, [{"dora": pairs(7)}])
    message = r"no user of test is in train \(LEAF's -t user\), .* set data.split=user"
    with pytest.raises(DataError, match=message):
        groups_of(tmp_path / "user", "sample")


def test_users_of_test_only_beside_users_of_both_are_refused(tmp_path):
    write_split(tmp_path, SAMPLE_TRAIN, [*SAMPLE_TEST, {"dora": pairs(7), "emil": pairs(8)}])
    message = "user 'dora' is in test but not in train, as are 1 more, while 3 users are in both"
    with pytest.raises(DataError, match=message):
        groups_of(tmp_path, "sample")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_part_is_named_with_the_option_that_does_without(tmp_path, part):
    write_split(tmp_path, SAMPLE_TRAIN, SAMPLE_TEST)
    for file in (tmp_path / part).iterdir():
        file.unlink()
    message = rf"toy: no \*\.json file in {tmp_path / part} of data\.split: sample; .*=none"
    with pytest.raises(DataError, match=message):
        find_leaf("toy", "sample", str(tmp_path))
    (tmp_path / part).rmdir()
    with pytest.raises(DataError, match=rf"toy: there is no folder {tmp_path / part} of"):
        find_leaf("toy", "sample", str(tmp_path))


def test_a_missing_source_is_named_with_where_to_get_one(tmp_path):
    with pytest.raises(DataError, match=r"toy: data\.source is not set; make it with the scripts"):
        find_leaf("toy", "sample", None)
    with pytest.raises(DataError, match=r"toy: there is no folder .*nowhere; make it with"):
        find_leaf("toy", "none", str(tmp_path / "nowhere"))


# -- from files to a run --------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """The pairs as a registered set."""
    datasets.names()
    monkeypatch.setattr(datasets, "_entries", dict(datasets._entries))

    @datasets.register("toy_leaf", LeafConfig)
    def toy_leaf(config):
        """Pairs of numbers."""
        return Dataset(
            name="toy_leaf",
            title="Toy",
            licence="none",
            shape=DataShape((2,), 3),
            find=lambda source: find_leaf("toy_leaf", config.split, source),
            read=lambda files, seed: leaf_groups(files, config.split, convert),
            natural=True,
            defaults=leaf_defaults("toy_leaf", config),
        )


def settings_of(folder, split):
    return [
        "data.name=toy_leaf", f"data.source={folder}", f"data.split={split}", "method=local",
        "training.num_rounds=2", "training.num_local_steps=2", "evaluation.every=1",
    ]  # fmt: skip


def test_users_of_a_sample_split_are_trained_and_tested_on_the_official_parts(tmp_path, toy):
    users = {f"u{k}": pairs(*range(10 * k, 10 * k + 8)) for k in range(4)}
    tests = {f"u{k}": pairs(100 + k, 110 + k) for k in range(4)}
    write_split(tmp_path, [users], [tests])
    found = prepare_experiment(load_config(None, settings_of(tmp_path, "sample")))
    assert found.client_ids == ["u0", "u1", "u2", "u3"]
    assert not found.partition.new_clients
    for k, client in enumerate(found.clients):
        assert found.store.read(client.test).x[:, 0].tolist() == [100 + k, 110 + k]
        own = np.concatenate([client.train, client.val])
        assert sorted(found.store.read(own).x[:, 0]) == list(range(10 * k, 10 * k + 8))


def test_test_users_of_a_user_split_become_new_clients_and_are_scored(tmp_path, toy):
    users = {f"u{k}": pairs(*range(10 * k, 10 * k + 8)) for k in range(4)}
    tests = {f"new{k}": pairs(*range(100 + 10 * k, 110 + 10 * k)) for k in range(2)}
    write_split(tmp_path, [users], [tests])
    prepared = prepare_experiment(load_config(None, settings_of(tmp_path, "user")))
    assert [c.client_id for c in prepared.partition.clients] == ["u0", "u1", "u2", "u3"]
    assert [c.client_id for c in prepared.partition.new_clients] == ["new0", "new1"]
    for client in prepared.partition.new_clients:
        assert [len(client.train), len(client.val), len(client.test)] == [6, 2, 2]
    metrics = finish(prepared).records[-1].metrics
    assert any(name.startswith("new") for name in metrics), sorted(metrics)


def test_a_user_without_examples_is_refused_by_name_and_left_out_by_min_examples(tmp_path, toy):
    write(tmp_path / "a.json", {"anna": pairs(*range(9)), "none": ([], []), "bert": pairs(1, 2, 3)})
    chosen = settings_of(tmp_path, "none")
    with pytest.raises(DataError, match=r"client 'none' has no examples; .*partition.min_examples"):
        prepare_experiment(load_config(None, chosen))
    for least, expected in ((1, ["anna", "bert"]), (4, ["anna"])):
        sets = [*chosen, f"data.partition.min_examples={least}"]
        assert prepare_experiment(load_config(None, sets)).client_ids == expected


def test_a_user_split_without_a_test_share_is_refused(tmp_path, toy):
    write_split(tmp_path, SAMPLE_TRAIN, [{"dora": pairs(7, 8)}])
    sets = [*settings_of(tmp_path, "user"), "evaluation.splits=[0.8, 0.2, 0]"]
    with pytest.raises(ConfigError, match=r"published as unseen .* test needs a share, got \[0\.8"):
        prepare_experiment(load_config(None, sets))


def test_a_source_of_listed_but_no_users_is_refused(tmp_path, toy):
    write(tmp_path / "a.json", {})
    dataset = datasets.get("toy_leaf").factory(LeafConfig(split="none"))
    with pytest.raises(DataError, match="toy_leaf: no examples in"):
        prepare(dataset, None, str(tmp_path), 0, tmp_path / "stores")
