"""The watch data: windows that never straddle a split, and a pickle that is never executed."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from selffl_ray.config import load_config
from selffl_ray.datasets.base import TEST, TRAIN, VAL
from selffl_ray.datasets.watch import (
    CHANNELS,
    EXERCISES,
    FILE,
    LEFT_OUT,
    WatchConfig,
    read_recordings,
    split_by_time,
    summarise,
    windows,
)
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from selffl_ray.tasks import DataShape

ROWS = 700
"""Measurements of a made recording: 13 windows of 100, one every 50."""


def content(*, rows=ROWS, subjects=(3, 11), signal=None):
    """Each of two people does each exercise once a side; recordings in no order, as in the file."""
    rng = np.random.default_rng(0)
    done = [(k, s, a) for k in range(7) for s in subjects for a in (0, 1)]
    done = [done[i] for i in rng.permutation(len(done))]
    signal = signal or (lambda length: rng.normal(size=(length, 6)) + rng.normal(size=6))
    return {
        "X": [np.asfortranarray(signal(rows)) for _ in done],
        "X_labels": list(CHANNELS),
        "y": np.asarray([k for k, _, _ in done]),
        "y_labels": list(EXERCISES),
        "subject": np.asarray([s for _, s, _ in done]),
        "side": np.asarray([a for _, _, a in done], dtype=np.float64),
    }


def file_bytes(found, *, published=True):
    """As the published file was written (protocol 2 of NumPy 1), or as today's np.save does."""
    file = io.BytesIO()
    holder = np.asarray(found, dtype=object)
    if not published:
        np.save(file, holder, allow_pickle=True)
        return file.getvalue()
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(file, header)
    body = pickle.dumps(holder, protocol=2).replace(b"numpy._core.", b"numpy.core.")
    return file.getvalue() + body


def written(folder, found, **options):
    path = folder / FILE
    path.write_bytes(file_bytes(found, **options))
    return path


def groups_of(path, **options):
    dataset = datasets.make(Component("watch", WatchConfig(**options)))
    return list(dataset.read(dataset.find(str(path)), 0))


def ramp(rows):
    """Every channel is the time, so that a window tells which measurements it holds."""
    return np.repeat(np.arange(float(rows))[:, None], 6, axis=1)


# -- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [True, False], ids=["as published", "as np.save writes"])
def test_recordings_come_back_with_their_bits_in_the_files_order(tmp_path, published):
    found = content(rows=9)
    recordings = read_recordings(written(tmp_path, found, published=published))
    assert len(recordings) == 28
    for at, recording in enumerate(recordings):
        np.testing.assert_array_equal(recording.values, found["X"][at])
        side = "right" if found["side"][at] else "left"
        assert recording.client_id == f"subject-{found['subject'][at]:02d}-{side}"
        assert recording.label == found["y"][at]


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("published", [True, False], ids=["as published", "as np.save writes"])
@pytest.mark.parametrize("place", ["instead of all", "in X", "as y", "beside"])
def test_a_call_hidden_in_the_file_is_refused_and_not_made(tmp_path, place, published):
    trap = tmp_path / "trap"
    call = Call(os.mkdir, str(trap))
    found = content(rows=9)
    if place == "in X":
        found["X"][5] = call
    elif place == "as y":
        found["y"] = call
    elif place == "beside":
        found["more"] = call
    else:
        found = call
    path = written(tmp_path, found, published=published)
    with pytest.raises(DataError, match=r"not seglearn's watch data .*it asks for posix\.mkdir"):
        read_recordings(path)
    assert not trap.exists()
    np.load(path, allow_pickle=True)
    assert trap.exists(), "the call is real: NumPy's own reader makes it"


@pytest.mark.parametrize("function", [eval, print, np.fromfile, np.load, pickle.loads, bytes.hex])
def test_only_the_four_names_that_the_file_needs_are_known(tmp_path, function):
    path = written(tmp_path, {**content(rows=9), "more": Call(function, "1")})
    with pytest.raises(DataError, match="it asks for "):
        read_recordings(path)


def test_bytes_that_claim_to_be_an_array_of_objects_are_refused(tmp_path):
    """NumPy's own functions believe them, and a process that touches such an array dies."""
    no_flags = (3, "|", None, None, None, -1, -1, 0)
    dtype = Call(np.dtype, "O8", False, True, state=no_flags)
    reconstruct = np.empty(0).__reduce__()[0]
    array = Call(
        reconstruct, np.ndarray, (0,), b"b", state=(1, (28,), dtype, False, b"\x41" * 8 * 28)
    )
    path = written(tmp_path, {**content(rows=9), "y": array})
    with pytest.raises(DataError, match=r"an array of type '\|O8' instead of float64 or int64"):
        read_recordings(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return file_bytes(content(rows=3)), tmp_path_factory.mktemp("broken") / FILE


@settings(max_examples=100)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_wherever_it_ends(small, share):
    raw, path = small
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(DataError, match=r"watch_dataset\.npy: not seglearn's watch data"):
        read_recordings(path)


# The same bytes each time: CPython itself prints an error about some that ask for huge arrays.
@settings(max_examples=200, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_changed_byte_is_a_changed_value_or_refused_but_never_another_error(small, share, byte):
    raw, path = small
    at = int(share * len(raw))
    path.write_bytes(raw[:at] + bytes([byte]) + raw[at + 1 :])
    try:
        number = len(read_recordings(path))
    except DataError:
        return
    assert number == 28


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / FILE
    for values in (np.zeros((3, 6)), np.asarray([{}, {}], dtype=object)):
        np.save(path, values, allow_pickle=True)
        with pytest.raises(DataError, match=r"a file that starts with .*NUMPY.*shape': \([23]"):
            read_recordings(path)
    holder = np.empty((), dtype=object)
    holder[()] = [1, 2]
    np.save(path, holder, allow_pickle=True)
    with pytest.raises(DataError, match="a list instead of a dict"):
        read_recordings(path)


def broken(**changes):
    found = content(rows=9)
    for key, change in changes.items():
        found[key] = change(found[key])
    return found


def with_first(value):
    return lambda values: [value, *values[1:]]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({k: v for k, v in content(rows=9).items() if k != "side"}, "KeyError: 'side'"),
        (broken(X_labels=lambda v: v[::-1]), r"X_labels are \['wz', .* instead of \['ax'"),
        (broken(y_labels=lambda v: v[::-1]), r"y_labels are \['ROW', .* instead of \['PEN'"),
        (broken(side=lambda v: v + 1), r"side must be 0 or 1, found \[1\. 2\.\]"),
        (broken(X=lambda v: v[:-1]), r"ValueError: zip"),
        (broken(X=with_first(np.zeros((9, 5)))), r"a recording \(9, 5\), not \(T, 6\) finite"),
        (broken(X=with_first(np.full((9, 6), np.nan))), r"a recording \(9, 6\), not \(T, 6\) fin"),
        (broken(X=with_first(np.zeros((9, 6), np.float32))), r"type '<f4' instead of float64 or"),
        (broken(X=with_first("text")), "AttributeError"),
        (broken(y=lambda v: v.astype(object)), r"an array of type '\|O8?' instead"),
    ],
)
def test_content_that_is_not_the_watch_data_is_refused(tmp_path, found, message):
    with pytest.raises(DataError, match=rf"not seglearn's watch data \(.*{message}"):
        read_recordings(written(tmp_path, found))


@pytest.mark.parametrize("label", [0, 1, 7, -1])
def test_an_arm_without_one_of_the_exercises_is_refused(tmp_path, label):
    found = content(rows=9)
    at = int(np.flatnonzero(found["y"] == 6)[0])
    found["y"][at] = label
    with pytest.raises(DataError, match=r"not every one of the 4 arms did each of 7 exercises"):
        read_recordings(written(tmp_path, found))


# -- finding it -----------------------------------------------------------------------------------


def test_the_source_is_the_file_or_its_folder(tmp_path):
    path = written(tmp_path, content())
    dataset = datasets.make(Component("watch"))
    assert dataset.find(str(path)) == dataset.find(str(tmp_path)) == (path,)
    message = r"data\.source: there is no file .*nowhere; pip install -e '\.\[watch\]', or"
    with pytest.raises(DataError, match=message):
        dataset.find(str(tmp_path / "nowhere"))


def test_without_package_and_source_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"^watch: seglearn is not installed .*; pip install -e '\.\[watch\]', or give "
    with pytest.raises(DataError, match=message) as caught:
        datasets.make(Component("watch")).find(None)
    assert "\n" not in str(caught.value)


def test_the_package_is_found_without_being_imported(tmp_path, monkeypatch):
    folder = tmp_path / "seglearn"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('needs an older scikit-learn')")
    path = written(folder / "data", content())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    assert datasets.make(Component("watch")).find(None) == (path,)
    assert "seglearn" not in sys.modules
    path.unlink()
    with pytest.raises(DataError, match="seglearn is not installed here"):
        datasets.make(Component("watch")).find(None)


# -- windows and their split ----------------------------------------------------------------------


def test_a_window_starts_at_every_hop_and_none_is_shorter():
    found = windows(ramp(247), 100, 50)
    assert found.shape == (3, 6, 100), "the one from 150 would end at 250"
    np.testing.assert_array_equal(found[:, 2, 0], [0, 50, 100])
    np.testing.assert_array_equal(found[1, 4], np.arange(50, 150))
    assert len(windows(ramp(250), 100, 50)) == 4
    assert len(windows(ramp(99), 100, 50)) == 0


@given(count=st.integers(0, 200), gap=st.integers(0, 9))
def test_parts_follow_each_other_with_their_shares_and_gaps(count, gap):
    parts = split_by_time(count, gap)
    assert len(parts) == count
    usable = count - 2 * gap
    if usable < 4:
        return
    sizes = [int((parts == part).sum()) for part in (TRAIN, VAL, TEST)]
    assert sum(sizes) == usable
    for size, share in zip(sizes, (0.52, 0.18, 0.30), strict=True):
        assert abs(size - share * usable) <= 1
    runs = parts[np.flatnonzero(np.diff(parts.astype(int), prepend=-1))].tolist()
    expected = [TRAIN, LEFT_OUT, VAL, LEFT_OUT, TEST]
    assert runs == [p for p in expected if gap or p != LEFT_OUT]
    assert (parts == LEFT_OUT).sum() == 2 * gap


def times(group, x):
    """What a ramp's raw windows hold, from the first channel, whose step is one measurement."""
    first = group.x[0, 0]
    return np.rint((x[:, 0] - first[0]) / (first[1] - first[0])).astype(int)


@settings(max_examples=40)
@given(width=st.integers(2, 130), hop=st.integers(1, 130))
def test_no_measurement_is_in_two_parts_of_a_recording(ramps, width, hop):
    options = {"features": "raw", "window_s": width / 50, "hop_s": hop / 50}
    if VAL not in split_by_time((ROWS - width) // hop + 1, -(-width // hop) - 1):
        with pytest.raises(DataError, match=r"too few for training, validation and test; lower"):
            groups_of(ramps, **options)
        return
    group = groups_of(ramps, **options)[1]
    for label in range(7):
        mine = group.y == label
        train, val, test = (
            times(group, group.x[mine & (group.official == part)]) for part in (TRAIN, VAL, TEST)
        )
        assert train.max() < val.min()
        assert val.max() < test.min()
        lost = val.min() - train.max() - 1, test.min() - val.max() - 1
        assert max(lost) < 2 * hop, "and no more is left out than needed"
        assert train.min() == 0
        assert test.max() >= ROWS - hop


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    return written(tmp_path_factory.mktemp("ramps"), content(signal=ramp))


def test_windows_of_a_client_are_those_of_its_own_recordings(tmp_path):
    found = content()
    groups = groups_of(written(tmp_path, found), features="raw")
    names = ["subject-03-left", "subject-03-right", "subject-11-left", "subject-11-right"]
    assert [group.client_id for group in groups] == names
    everything = np.concatenate(
        [windows(x, 100, 50)[split_by_time(13, 1) == TRAIN] for x in found["X"]]
    )
    mean, std = everything.mean((0, 2)), everything.std((0, 2))
    for group, (person, side) in zip(groups, [(3, 0), (3, 1), (11, 0), (11, 1)], strict=True):
        assert np.bincount(group.y).tolist() == [11] * 7
        for label in range(7):
            (at,) = np.flatnonzero(
                (found["y"] == label) & (found["subject"] == person) & (found["side"] == side)
            )
            expected = windows(found["X"][at], 100, 50)[split_by_time(13, 1) != LEFT_OUT]
            restored = group.x[group.y == label] * std[:, None] + mean[:, None]
            np.testing.assert_allclose(restored, expected, atol=1e-5)


# -- features -------------------------------------------------------------------------------------


def test_statistics_are_what_scipy_and_a_loop_say():
    x = np.random.default_rng(0).gamma(2.0, size=(4, 6, 50))
    found = summarise(x).reshape(4, 6, 12)
    crossings = [
        [sum((a > w.mean()) != (b > w.mean()) for a, b in pairwise(w)) / 49 for w in example]
        for example in x
    ]
    expected = [
        x.mean(-1),
        x.std(-1),
        np.sqrt(x.mean(-1) ** 2 + x.var(-1)),
        x.min(-1),
        *(stats.scoreatpercentile(x, q, axis=-1) for q in (25, 50, 75)),
        x.max(-1),
        stats.skew(x, axis=-1),
        stats.kurtosis(x, axis=-1),
        np.abs(x[..., 1:] - x[..., :-1]).sum(-1) / 49,
        crossings,
    ]
    np.testing.assert_allclose(found, np.stack(expected, axis=-1), rtol=1e-12)


def test_a_channel_that_stands_still_has_finite_statistics():
    found = summarise(np.full((1, 6, 20), 0.1)).reshape(6, 12)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0, [0, 3, 7]], 0.1)
    np.testing.assert_allclose(found[0, [1, 10, 11]], 0, atol=1e-15)


@pytest.mark.parametrize(("features", "axes"), [("summary", 0), ("raw", (0, 2))])
def test_training_windows_of_all_clients_together_have_mean_0_and_variance_1(
    tmp_path, features, axes
):
    groups = groups_of(written(tmp_path, content()), features=features)
    train = np.concatenate([g.x[g.official == TRAIN] for g in groups]).astype(np.float64)
    np.testing.assert_allclose(train.mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose(train.std(axes), 1, atol=1e-6)
    # Clients keep what makes them differ.
    offsets = [g.x[g.official == TRAIN].mean(axes) for g in groups]
    assert np.abs(offsets).max() > 0.2


@pytest.mark.parametrize("features", ["summary", "raw"])
def test_what_comes_after_training_changes_no_training_input(tmp_path, features):
    """Neither through windows nor through the statistics of standardising."""
    found, other = content(), content()
    first_of_val = 50 * int(np.flatnonzero(split_by_time(13, 1) == VAL)[0])
    for x in other["X"]:
        x[first_of_val:] = 5 * x[first_of_val:] + 7
    (tmp_path / "other").mkdir()
    before = groups_of(written(tmp_path, found), features=features)
    after = groups_of(written(tmp_path / "other", other), features=features)
    for a, b in zip(before, after, strict=True):
        train = a.official == TRAIN
        np.testing.assert_array_equal(a.x[train], b.x[train])
        assert (np.abs(a.x[~train] - b.x[~train]).max(axis=tuple(range(1, a.x.ndim))) > 1).all()


# -- options and defaults -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape", "examples"),
    [
        ({}, (72,), 11),
        ({"features": "raw"}, (6, 100), 11),
        ({"hop_s": 2.0}, (72,), 7),
        ({"window_s": 1.0}, (72,), 14),
        ({"features": "raw", "window_s": 0.5, "hop_s": 0.5}, (6, 25), 28),
    ],
)
def test_options_set_the_shape_and_number_of_examples(tmp_path, options, shape, examples):
    path = written(tmp_path, content())
    dataset = datasets.make(Component("watch", WatchConfig(**options)))
    assert dataset.shape == DataShape(shape, 7)
    for group in groups_of(path, **options):
        assert group.x.shape == (7 * examples, *shape)
        assert group.x.dtype == np.float32
        assert group.y.dtype == np.int64


@pytest.mark.parametrize(
    "options", [{"window_s": 0.02}, {"hop_s": 0.0}, {"hop_s": -1.0}, {"window_s": float("nan")}]
)
def test_lengths_that_make_no_windows_are_refused(options):
    with pytest.raises(ConfigError, match=r"data\.window_s .*data\.hop_s"):
        WatchConfig(**options)


def test_recordings_that_are_too_short_are_named(tmp_path):
    path = written(tmp_path, content(rows=300))
    message = r"6 s of PEN of subject-03-left give only 5 windows, too few .*lower data\.window_s"
    with pytest.raises(DataError, match=message):
        groups_of(path)


def prepared(path, *sets):
    return prepare_experiment(load_config(None, ["data.name=watch", f"data.source={path}", *sets]))


def test_its_name_alone_configures_the_experiment(tmp_path):
    found = prepared(written(tmp_path, content())).config
    assert found.experiment == "watch"
    assert found.training.num_rounds == 50
    assert found.evaluation.splits == (1.0, 0.0, 0.0)


def test_the_split_does_not_depend_on_the_seed_but_the_order_of_training_rows_does(tmp_path):
    path = written(tmp_path, content())
    first, other = (prepared(path, f"seed={seed}") for seed in (0, 1))
    official = first.store.official()
    for a, b in zip(first.clients, other.clients, strict=True):
        assert sorted(a.train.tolist()) == sorted(b.train.tolist())
        assert a.train.tolist() != b.train.tolist()
        for rows, part in ((a.train, TRAIN), (a.val, VAL), (a.test, TEST)):
            assert set(official[rows]) == {part}
        assert a.val.tolist() == b.val.tolist()
        assert a.test.tolist() == b.test.tolist()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.splits=[0.8, 0.2, 0]", r"share of val must be 0, .*; give \[train, 0, 0\]"),
        ("evaluation.splits=[0.8, 0, 0.2]", r"share of test must be 0, .*; give \[train, 0, 0\]"),
        ("data.partition.name=iid", r"watch is published as training, validation and test parts"),
        ("data.partition.name=dirichlet", r"which dealing would mix; use natural"),
    ],
)
def test_what_would_mix_the_parts_again_is_refused(tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        prepared(written(tmp_path, content()), setting)


# -- the real data --------------------------------------------------------------------------------

needs_seglearn = pytest.mark.skipif(
    importlib.util.find_spec("seglearn") is None,
    reason="seglearn is not installed: pip install -e '.[watch]'",
)


@pytest.fixture(scope="module")
def real():
    dataset = datasets.make(Component("watch"))
    (path,) = dataset.find(None)
    return path, read_recordings(path), list(dataset.read((path,), 0))


@needs_seglearn
def test_the_installed_file_is_the_one_that_the_figures_are_about(real):
    path, recordings, _ = real
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
    lengths = [len(r.values) for r in recordings]
    assert (len(lengths), min(lengths), max(lengths), sum(lengths)) == (140, 947, 2618, 244_102)
    # One gap instead of two, as in a split without validation.
    assert sum((length - 100) // 50 + 1 - 1 for length in lengths) == 4537


@needs_seglearn
def test_stand_ins_read_what_numpy_reads(real):
    path, recordings, _ = real
    found = np.load(path, allow_pickle=True).item()  # what seglearn itself does
    for recording, x, k in zip(recordings, found["X"], found["y"], strict=True):
        np.testing.assert_array_equal(recording.values, x)
        assert recording.label == k


@needs_seglearn
def test_there_are_ten_people_with_two_arms_and_4397_windows(real):
    _, _, groups = real
    ids = [f"subject-{s:02d}-{side}" for s in range(1, 11) for side in ("left", "right")]
    assert [group.client_id for group in groups] == ids
    sizes = [len(group.y) for group in groups]
    assert (min(sizes), max(sizes), sum(sizes)) == (121, 289, 4397)
    labels = np.bincount(np.concatenate([group.y for group in groups]))
    assert labels.tolist() == [462, 730, 740, 678, 683, 543, 561]
    parts = np.bincount(np.concatenate([group.official for group in groups]))
    assert parts[[TRAIN, VAL, TEST]].tolist() == [2284, 786, 1327]


@needs_seglearn
def test_an_arms_own_training_windows_tell_more_than_those_of_all(real):
    """By the nearest class mean: own 94 %, everybody's 79 %, the others' 77 %."""
    _, _, groups = real

    def class_means(chosen):
        x, y = (np.concatenate([part[g.official == TRAIN] for g, part in pairs])
                for pairs in ([(g, g.x) for g in chosen], [(g, g.y) for g in chosen]))  # fmt: skip
        return np.stack([x[y == k].mean(0) for k in range(7)])

    def accuracy(means, group):
        test = group.official == TEST
        distance = np.square(group.x[test][:, None] - means).sum(-1)
        return (distance.argmin(1) == group.y[test]).mean()

    own = np.mean([accuracy(class_means([g]), g) for g in groups])
    of_all = np.mean([accuracy(class_means(groups), g) for g in groups])
    others = np.mean([accuracy(class_means([h for h in groups if h is not g]), g) for g in groups])
    assert own > 0.92
    assert 0.75 < others < of_all < 0.82
