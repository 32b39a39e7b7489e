"""CIFAR-10 and CIFAR-100 in both versions, written here as published, whole and broken."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.config import load_config
from selffl_ray.datasets.base import TEST, TRAIN
from selffl_ray.datasets.cifar import COARSE, FINE, Cifar100Config, CifarConfig
from selffl_ray.datasets.store import prepare
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from selffl_ray.tasks import DataShape

TRAIN_10 = [f"data_batch_{k}" for k in range(1, 6)]
PER_FILE = 6


def batch(name, number=PER_FILE, classes=10):
    """Rows as published (N, 3072), and labels."""
    rng = np.random.default_rng(sum(map(ord, name)))
    return rng.integers(256, size=(number, 3072)).astype(np.uint8), rng.integers(
        classes, size=number
    )


def python_2(content):
    """A pickle as Python 2 wrote it: strings are byte strings, arrays are NumPy 1's."""

    def text(value):
        raw = value if isinstance(value, bytes) else value.encode()
        return b"T" + len(raw).to_bytes(4, "little") + raw

    def number(value):
        return b"J" + int(value).to_bytes(4, "little", signed=True)

    def array(x):
        return b"".join([
            b"cnumpy.core.multiarray\n_reconstruct\n", b"(cnumpy\nndarray\n", number(0), b"\x85",
            text("b"), b"tR", b"(", number(1), number(x.shape[0]), number(x.shape[1]), b"\x86",
            b"cnumpy\ndtype\n(", text("u1"), number(0), number(1), b"tR(", number(3), text("|"),
            b"NNN", number(-1), number(-1), number(0), b"tb", b"\x89", text(x.tobytes()), b"tb",
        ])  # fmt: skip

    def value(v):
        if isinstance(v, np.ndarray):
            return array(v)
        if isinstance(v, list):
            return b"](" + b"".join(map(value, v)) + b"e"
        return text(v) if isinstance(v, str) else number(v)

    items = b"".join(text(k) + value(v) for k, v in content.items())
    return b"\x80\x02}(" + items + b"u."


def python_3(content, *, keys=str.encode):
    """As someone who converts the files writes them: protocol 2 with keys as bytes or as text."""
    return pickle.dumps({keys(k): v for k, v in content.items()}, protocol=2)


WRITERS = {
    "Python 2": python_2,
    "bytes keys": python_3,
    "text keys": lambda content: python_3(content, keys=str),
    "protocol 4": lambda content: pickle.dumps(content, protocol=4),
}


def content_of(name, x, y):
    return {"batch_label": name, "labels": y.tolist(), "data": x, "filenames": ["a.png"] * len(y)}


def write_10(folder, version, number=PER_FILE):
    folder.mkdir(parents=True)
    for name in (*TRAIN_10, "test_batch"):
        x, y = batch(name, number)
        if version == "binary":
            raw = np.concatenate([y[:, None].astype(np.uint8), x], axis=1).tobytes()
            (folder / f"{name}.bin").write_bytes(raw)
        else:
            (folder / name).write_bytes(WRITERS[version](content_of(name, x, y)))
    (folder / "batches.meta").write_bytes(b"never opened")
    return folder


def cifar10(**options):
    return datasets.make(Component("cifar10", CifarConfig(**options)))


def groups_of(dataset, folder):
    return list(dataset.read(dataset.find(str(folder)), 0))


# -- whole files ----------------------------------------------------------------------------------


def test_the_pickle_of_python_2_is_one():
    x, y = batch("data_batch_1")
    found = pickle.loads(python_2(content_of("one", x, y)), encoding="bytes")
    np.testing.assert_array_equal(found[b"data"], x)
    assert found[b"labels"] == y.tolist()
    assert found[b"batch_label"] == b"one"


@pytest.mark.parametrize("version", ["binary", *WRITERS])
def test_a_row_is_a_label_then_red_green_and_blue_each_row_by_row(tmp_path, version):
    *train, test = groups_of(cifar10(), write_10(tmp_path / "set", version))
    assert len(train) == 5
    for name, group, part in (
        *zip(TRAIN_10, train, [TRAIN] * 5, strict=True),
        ("test_batch", test, TEST),
    ):
        x, y = batch(name)
        assert group.y.tolist() == y.tolist()
        assert group.y.dtype == np.int64
        assert set(group.official.tolist()) == {part}
        assert group.x.shape == (PER_FILE, 3, 32, 32)
        for n, colour, row, column in ((0, 0, 0, 0), (1, 0, 0, 31), (2, 1, 3, 4), (5, 2, 31, 30)):
            assert group.x[n, colour, row, column] == x[n, 1024 * colour + 32 * row + column]


def test_both_versions_are_one_data_set_wherever_they_lie(tmp_path):
    folders = [
        write_10(tmp_path / "a", "binary"),
        write_10(tmp_path / "b", "Python 2"),
        write_10(tmp_path / "c" / "cifar-10-batches-bin", "binary").parent,
        write_10(tmp_path / "d" / "cifar-10-batches-py", "protocol 4").parent,
    ]
    stores = [prepare(cifar10(), None, str(f), 0, tmp_path / "stores") for f in folders]
    assert len({store.manifest.digest for store in stores}) == 1


@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar_100_has_fine_and_coarse_labels(tmp_path, version):
    expected = {}
    for name in ("train", "test"):
        x, fine = batch(name, 9, 100)
        coarse = fine // 5
        expected[name] = (x, {"fine": fine, "coarse": coarse})
        if version == "binary":
            raw = np.concatenate([np.stack([coarse, fine], 1).astype(np.uint8), x], axis=1)
            (tmp_path / f"{name}.bin").write_bytes(raw.tobytes())
        else:
            content = {"data": x, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
            (tmp_path / name).write_bytes(python_2(content))
    for kind, classes, names in (("fine", 100, FINE), ("coarse", 20, COARSE)):
        dataset = datasets.make(Component("cifar100", Cifar100Config(labels=kind)))
        assert dataset.shape == DataShape((3, 32, 32), classes)
        assert dataset.label_names == names
        assert len(set(names)) == classes
        assert list(names) == sorted(names)
        for name, group in zip(("train", "test"), groups_of(dataset, tmp_path), strict=True):
            np.testing.assert_array_equal(group.x.reshape(9, -1), expected[name][0])
            np.testing.assert_array_equal(group.y, expected[name][1][kind])


def test_the_binary_version_is_preferred_to_pickles(tmp_path):
    folder = write_10(tmp_path / "set", "binary")
    for name in TRAIN_10:
        (folder / name).write_bytes(b"never opened")
    assert all(path.suffix == ".bin" for path in cifar10().find(str(folder)))


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (6, [6]), (8, [6, 2]), (99, [6] * 5)])
def test_max_examples_keeps_the_first_training_examples_and_all_test_ones(tmp_path, most, sizes):
    *train, test = groups_of(cifar10(max_examples=most), write_10(tmp_path / "set", "binary"))
    assert [len(group.y) for group in train] == sizes
    np.testing.assert_array_equal(train[-1].y, batch(TRAIN_10[len(sizes) - 1])[1][: sizes[-1]])
    assert len(test.y) == PER_FILE
    with pytest.raises(ConfigError, match=r"data\.max_examples must be >= 1, got 0"):
        cifar10(max_examples=0)


@pytest.mark.parametrize(
    ("name", "means", "deviations"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ],
)
def test_shift_and_scale_follow_from_the_colours_published_ones(name, means, deviations):
    """Mean of means; deviation from it: within a colour and between colours."""
    mean = np.mean(means)
    deviation = np.sqrt(np.mean(np.square(deviations)) + np.var(means))
    shift, scale = datasets.make(Component(name)).shift_scale
    assert shift == pytest.approx(mean, abs=2e-4)
    assert scale == pytest.approx(deviation, abs=2e-4)


def test_its_name_and_source_are_enough_for_a_small_experiment(tmp_path):
    folder = write_10(tmp_path / "set", "binary", 40)
    sets = ["data.name=cifar10", f"data.source={folder}", "data.partition.num_clients=3"]
    found = prepare_experiment(load_config(None, sets))
    assert len(found.clients) == 3
    assert found.config.model.component.name == "cnn"
    x, _ = found.store.read(found.clients[0].train)
    expected = (x / 255 - 0.4734) / 0.2516
    np.testing.assert_allclose(found.dataset.features(x), expected, rtol=1e-4, atol=1e-6)


# -- broken files ---------------------------------------------------------------------------------


def refused(folder, name, message):
    with pytest.raises(DataError, match=message) as error:
        groups_of(cifar10(), folder)
    assert str(error.value).startswith(f"{folder / name}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"", "0 bytes are no whole number of rows of 3073"),
        (lambda raw: raw[:-1], "18437 bytes are no whole number of rows of 3073; .* truncated"),
        (lambda raw: raw + b"\0", "18439 bytes are no whole number"),
        (lambda raw: raw[:-3073], "5 images, but data_batch_1.bin has 6; one of them is truncated"),
        (lambda raw: b"\x0a" + raw[1:], r"labels must lie in 0\.\.9, found \d\.\.10; unpack"),
    ],
    ids=["empty", "cut", "longer", "cut between rows", "label"],
)
def test_a_broken_binary_file_is_refused_in_one_line(tmp_path, change, message):
    folder = write_10(tmp_path / "set", "binary")
    path = folder / "data_batch_3.bin"
    path.write_bytes(change(path.read_bytes()))
    refused(folder, path.name, message)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.parts = (function, args)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("place", ["instead of all", "data", "labels", "filenames"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_call_hidden_in_a_batch_is_refused_and_not_made(tmp_path, place, protocol):
    folder = write_10(tmp_path / "set", "Python 2")
    trap = tmp_path / "trap"
    call = Call(os.mkdir, str(trap))
    content = content_of("three", *batch("three"))
    raw = pickle.dumps({**content, place: call} if place in content else call, protocol=protocol)
    (folder / "data_batch_3").write_bytes(raw)
    refused(folder, "data_batch_3", r"not a batch of CIFAR .*it asks for posix\.mkdir")
    assert not trap.exists()
    pickle.loads(raw)
    assert trap.exists(), "the call is real: pickle's own reader makes it"


@pytest.mark.parametrize("function", [eval, np.fromfile, np.load, pickle.loads, bytes.hex])
def test_nothing_but_arrays_is_known(tmp_path, function):
    folder = write_10(tmp_path / "set", "Python 2")
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Call(function, "1")}))
    refused(folder, "test_batch", "it asks for ")


def changed(**values):
    content = content_of("three", *batch("three"))
    content.update(values)
    return {key: value for key, value in content.items() if value is not None}


X, Y = batch("three")
CONTENTS = {
    "no data": (changed(data=None), "KeyError: 'data'"),
    "no labels": (changed(labels=None), "KeyError: 'labels'"),
    "another width": (changed(data=X[:, :3071]), r"data are \(6, 3071\) instead of \(N, 3072\)"),
    "flat": (changed(data=X[0]), r"data are \(3072,\) instead of"),
    "floats": (changed(data=X / 255), r"an array of type '<f8' instead of uint8"),
    "objects": (changed(data=X.astype(object)), r"an array of type '\|O8?' instead of uint8"),
    "a list": (changed(data=X.tolist()), "AttributeError"),
    "counts": (changed(labels=Y.tolist()[:-1]), "5 labels for 6 images"),
    "labels that are text": (changed(labels=["cat"] * 6), "labels are not a list of whole numbers"),
    "labels as an array": (changed(labels=Y), "labels are not a list of whole numbers"),
    "a list instead": ([1, 2], "AttributeError"),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS)
def test_a_pickle_of_something_else_is_refused(tmp_path, content, message):
    folder = write_10(tmp_path / "set", "Python 2")
    (folder / "data_batch_2").write_bytes(pickle.dumps(content, protocol=2))
    refused(folder, "data_batch_2", rf"not a batch of CIFAR \(.*{message}.*\); unpack the archive")


def test_a_pickle_without_images_is_refused(tmp_path):
    folder = write_10(tmp_path / "set", "Python 2")
    (folder / "data_batch_2").write_bytes(python_2(changed(data=X[:0], labels=[])))
    refused(folder, "data_batch_2", r"data are \(0, 3072\) instead of \(N, 3072\)")


def test_labels_out_of_range_in_a_pickle_are_refused(tmp_path):
    folder = write_10(tmp_path / "set", "Python 2")
    (folder / "data_batch_2").write_bytes(python_2(changed(labels=[0, 1, 2, -1, 4, 5])))
    refused(folder, "data_batch_2", r"labels must lie in 0\.\.9, found -1\.\.5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_10(tmp_path_factory.mktemp("cifar") / "set", "Python 2")
    return folder, (folder / "data_batch_4").read_bytes()


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_pickle_is_refused_wherever_it_ends(whole, share):
    folder, raw = whole
    (folder / "data_batch_4").write_bytes(raw[: int(share * len(raw))])
    refused(folder, "data_batch_4", "not a batch of CIFAR")
    (folder / "data_batch_4").write_bytes(raw)


# The same bytes each time: CPython itself prints an error about some that ask for huge arrays.
@settings(max_examples=100, derandomize=True)
@given(at=st.integers(0, 700), byte=st.integers(0, 255))
def test_a_changed_byte_is_a_changed_value_or_refused_but_never_another_error(whole, at, byte):
    folder, raw = whole
    at = at if at < 350 else len(raw) - 700 + at  # structure lies at both ends, pixels between
    (folder / "data_batch_4").write_bytes(raw[:at] + bytes([byte]) + raw[at + 1 :])
    try:
        number, refusal = sum(len(group.y) for group in groups_of(cifar10(), folder)), ""
    except DataError as error:
        number, refusal = 0, str(error)
    assert number == 36 or "data_batch_4: " in refusal
    (folder / "data_batch_4").write_bytes(raw)


def test_missing_files_are_named(tmp_path):
    find = cifar10().find
    with pytest.raises(DataError, match=r"cifar10: data\.source is not set; give the folder that"):
        find(None)
    message = r"cifar10: data\.source: .* has no data_batch_1 \(\.bin or not\); give the folder"
    with pytest.raises(DataError, match=message):
        find(str(tmp_path / "nowhere"))
    folder = write_10(tmp_path / "set", "binary")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin is missing beside data_batch_1\.bin"):
        find(str(folder))
