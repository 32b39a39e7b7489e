"""Tables of pictures or numbers in Parquet files, each column checked."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selffl_ray.config import load_config
from selffl_ray.datasets.base import TEST, TRAIN, UNSEEN, VAL
from selffl_ray.datasets.parquet import ParquetConfig, find_parquet, read_parquet
from selffl_ray.datasets.pictures import decode
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from tests.contract.harness import finish


def encoded(pixels, kind="PNG"):
    """Grey (H, W) or coloured (H, W, 3) bytes as a picture."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def pixels_of(number, shape=(6, 5), seed=0):
    return np.random.default_rng(seed).integers(256, size=(number, *shape)).astype(np.uint8)


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def read(source, **options):
    return list(read_parquet(find_parquet(str(source)), ParquetConfig(**options)))


NUMBERS = {"features": ("a",), "shape": (1,), "num_classes": 3}


# -- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("struct", [True, False], ids=["struct", "bytes"])
@pytest.mark.parametrize("invert", [True, False])
def test_pictures_of_writers_in_several_files_come_back_pixel_by_pixel(tmp_path, struct, invert):
    """As FEMNIST lies on the hub: PNG in a struct, writers across files, rows kept in order."""
    pixels = pixels_of(8)
    writers = ["f1", "f0", "f1", "f2", "f0", "f1", "f2", "f2"]
    labels = [5, 61, 0, 1, 2, 3, 4, 9]
    raw = [encoded(picture) for picture in pixels]
    image = [{"bytes": r, "path": None} for r in raw] if struct else raw
    for part, rows in (("00000-of-00002", slice(0, 5)), ("00001-of-00002", slice(5, 8))):
        write(
            tmp_path / "data" / f"train-{part}.parquet",
            image=image[rows], writer_id=writers[rows], character=labels[rows],
        )  # fmt: skip
    groups = read(
        tmp_path, client="writer_id", label="character", image="image", shape=(1, 6, 5),
        num_classes=62, invert=invert,
    )  # fmt: skip
    assert [g.client_id for g in groups] == ["f1", "f0", "f2"]
    for group in groups:
        rows = [at for at, writer in enumerate(writers) if writer == group.client_id]
        expected = 255 - pixels[rows] if invert else pixels[rows]
        np.testing.assert_array_equal(group.x[:, 0], expected)
        assert group.y.tolist() == [labels[at] for at in rows]
        assert group.x.dtype == np.uint8
        assert group.official is None


def test_coloured_pictures_are_channels_first_and_become_grey_for_one_channel():
    pixels = pixels_of(1, (4, 3, 3))[0]
    found = decode(encoded(pixels), (3, 4, 3), "here")
    np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1))
    grey = decode(encoded(pixels), (1, 4, 3), "here")[0]
    # ITU-R 601-2, as Pillow documents it.
    np.testing.assert_allclose(grey, pixels @ [0.299, 0.587, 0.114], atol=1)
    one = pixels[..., 0]
    np.testing.assert_array_equal(decode(encoded(one), (3, 4, 3), "x"), np.stack([one] * 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_is_white_whatever_colour_hides_there(channels):
    """Also in a palette and in grey with alpha; half clear black is middle grey."""
    pixels = np.zeros((4, 3, 4), np.uint8)
    pixels[..., 3] = [[255] * 3, [0] * 3, [128] * 3, [255] * 3]
    pixels[1, :, :3] = [200, 10, 30]  # hidden
    for mode in ("RGBA", "LA"):
        out = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(out, "PNG")
        found = decode(out.getvalue(), (channels, 4, 3), "here")
        expected = np.broadcast_to([[0], [255], [127], [0]], (channels, 4, 3))
        np.testing.assert_array_equal(found, expected)
    out = io.BytesIO()
    palette = Image.fromarray(np.asarray([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 200, 10, 30])
    palette.save(out, "PNG", transparency=b"\xff\x00")
    assert decode(out.getvalue(), (channels, 1, 2), "here").tolist() == [[[9, 255]]] * channels


def test_a_jpeg_is_close_to_what_was_saved():
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
    found = decode(encoded(smooth, "JPEG"), (1, 16, 16), "here")[0]
    assert np.abs(found.astype(int) - smooth).max() < 12


PICTURE = encoded(pixels_of(1)[0])
BROKEN_PICTURES = {
    "empty": (b"", "not a whole picture"),
    "text": (b"<html>", "not a whole picture in one of PNG, JPEG"),
    "cut": (PICTURE[: len(PICTURE) // 2], "not a whole picture"),
    "size": (encoded(pixels_of(1, (5, 6))[0]), "a picture of 5x6 pixels, data.shape asks for 6x5"),
    "16 bits": (
        encoded(pixels_of(1)[0].astype(np.uint16) * 257),
        "in one of .*pixels of mode I;16.*, not 8 bits a channel",
    ),
    "other format": (encoded(pixels_of(1)[0], "TIFF"), "not a whole picture in one of"),
}


@pytest.mark.parametrize(("raw", "message"), BROKEN_PICTURES.values(), ids=BROKEN_PICTURES)
def test_a_broken_picture_is_refused_with_file_column_and_row(tmp_path, raw, message):
    count = 2000  # beyond the first piece
    raws = [PICTURE] * (count - 1) + [raw]
    path = write(tmp_path / "a.parquet", img=raws, label=[0] * count, client_id=["a"] * count)
    with pytest.raises(DataError, match=message) as error:
        read(path, image="img", shape=(1, 6, 5))
    assert str(error.value).startswith(f"{path}: column 'img', row {count - 1}: ")
    assert "\n" not in str(error.value)


@settings(max_examples=60)
@given(at=st.integers(0, len(PICTURE) - 1), value=st.integers(0, 255))
def test_a_changed_byte_of_a_picture_is_a_picture_or_one_error(at, value):
    raw = bytearray(PICTURE)
    raw[at] = value
    try:
        found = decode(bytes(raw), (1, 6, 5), "here")
    except DataError as error:
        message = str(error)
    else:
        message = f"here: {found.shape}"
    assert message.startswith("here: ")


def test_a_picture_that_claims_to_be_huge_is_refused_by_its_size(tmp_path):
    huge = bytearray(PICTURE)
    huge[16:24] = (50_000).to_bytes(4, "big") * 2
    with pytest.raises(DataError, match="here: "):
        decode(bytes(huge), (1, 6, 5), "here")


# -- numbers --------------------------------------------------------------------------------------


def test_columns_of_numbers_and_lists_are_laid_side_by_side(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        a=[1, 2, 3, 4],
        b=pa.array([[[1.5, 2], [3, 4]]] * 3 + [[[5, 6], [7, 8]]], pa.list_(pa.list_(pa.float32()))),
        c=pa.array([[True], [False], [True], [True]], pa.list_(pa.bool_(), 1)),
        client_id=[7, 8, 7, 8],
        label=pa.array([0, 1, 2, 0], pa.uint8()),
    )
    groups = read(path, features=("a", "b", "c"), shape=(2, 3), num_classes=3)
    assert [g.client_id for g in groups] == ["7", "8"]
    expected = [[1, 1.5, 2, 3, 4, 1], [3, 1.5, 2, 3, 4, 1]]
    np.testing.assert_array_equal(groups[0].x, np.reshape(expected, (2, 2, 3)))
    np.testing.assert_array_equal(groups[1].x[1].ravel(), [4, 5, 6, 7, 8, 1])
    assert groups[0].x.dtype == np.float32
    assert groups[0].y.tolist() == [0, 2]
    assert groups[0].y.dtype == np.int64


def test_without_a_client_column_all_rows_are_one_pool(tmp_path):
    path = write(tmp_path / "a.parquet", a=[1.0, 2.0], label=[0, 1])
    (pool,) = read(path, client=None, **NUMBERS)
    assert pool.client_id == ""
    assert pool.x.tolist() == [[1], [2]]
    assert not datasets.make(Component("parquet", ParquetConfig(client=None))).natural


def test_a_folder_may_name_the_client(tmp_path):
    for client, value in (("b", 2.0), ("a/c", 1.0)):
        folder = tmp_path / f"client_id={client.replace('/', '%2F')}"
        write(folder / "part-0.parquet", a=[value, value], label=[0, 1])
    groups = read(tmp_path, **NUMBERS)
    assert [(g.client_id, g.x.tolist()) for g in groups] == [
        ("a/c", [[1], [1]]), ("b", [[2], [2]])
    ]  # fmt: skip


def test_labels_may_be_names_in_a_given_order(tmp_path):
    names = pa.array(["cat", "dog", "cat"]).dictionary_encode()
    path = write(tmp_path / "a.parquet", a=[1, 2, 3], label=names, client_id=["a"] * 3)
    options = {**NUMBERS, "num_classes": 2}
    (group,) = read(path, label_names=("dog", "cat"), **options)
    assert group.y.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"column 'label' \(data.label\) holds names; give them"):
        read(path, **options)
    with pytest.raises(DataError, match=r"row 1 \(data.label\): 'dog' is not in data.label_names"):
        read(path, label_names=("bird", "cat"), **options)


# -- official parts -------------------------------------------------------------------------------


def split_table(path, clients, parts):
    count = len(clients)
    return write(
        path, a=list(range(count)), label=[0] * count, client_id=clients, part=parts
    )  # fmt: skip


def test_a_column_may_name_the_official_parts(tmp_path):
    path = split_table(
        tmp_path / "a.parquet", list("aabbab"), ["train", "test", "train", "dev", "val", "test"]
    )
    groups = read(path, split="part", **NUMBERS)
    assert [g.official.tolist() for g in groups] == [[TRAIN, TEST, VAL], [TRAIN, VAL, TEST]]


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
    ],
    ids=["in the name", "in the folder"],
)
def test_files_or_folders_may_name_the_official_parts(tmp_path, names):
    for name, value in zip(names, (1.0, 2.0), strict=True):
        write(tmp_path / name, a=[value, value], label=[0, 1], client_id=["a", "b"])
    groups = read(tmp_path, split_in_names=True, **NUMBERS)
    for group in groups:
        order = np.argsort(group.x[:, 0])
        assert group.official[order].tolist() == [TRAIN, TEST]


@pytest.mark.parametrize("several", [True, False])
def test_folders_above_the_data_say_nothing_about_parts(tmp_path, several):
    """Data kept under ``dev`` are no validation data."""
    folder = tmp_path / "dev" / "test"
    names = ["letters-train-0.parquet", *(["deeper/letters-valid-0.parquet"] if several else [])]
    for name in names:
        write(folder / name, a=[1.0], label=[0], client_id=["a"])
    for source in (tmp_path / "dev", folder):
        (group,) = read(source, split_in_names=True, **NUMBERS)
        assert sorted(group.official.tolist()) == ([TRAIN, VAL] if several else [TRAIN])
    write(folder / "letters-0.parquet", a=[1.0], label=[0], client_id=["a"])
    with pytest.raises(DataError, match=f"nor a folder below {folder} says the part"):
        read(folder, split_in_names=True, **NUMBERS)


def test_a_name_of_two_parts_is_refused(tmp_path):
    path = write(tmp_path / "dev-train-0.parquet", a=[1.0], label=[0], client_id=["a"])
    with pytest.raises(DataError, match=r"its name says dev and train .*; rename it") as error:
        read(path, split_in_names=True, **NUMBERS)
    assert str(error.value).startswith(f"{path}: ")


def test_clients_of_the_test_part_alone_are_unseen(tmp_path):
    path = split_table(
        tmp_path / "a.parquet", list("aabcb"), ["train", "train", "test", "train", "test"]
    )
    groups = read(path, split="part", **NUMBERS)
    assert [(g.client_id, g.official.tolist()) for g in groups] == [
        ("a", [TRAIN] * 2), ("b", [UNSEEN] * 2), ("c", [TRAIN])
    ]  # fmt: skip


def test_clients_without_training_rows_beside_clients_of_both_parts_are_refused(tmp_path):
    path = split_table(tmp_path / "a.parquet", list("aab"), ["train", "test", "test"])
    message = r"client 'b' has no training rows \(1 of 2 clients\), while others have training and"
    with pytest.raises(DataError, match=message):
        read(path, split="part", **NUMBERS)


# -- sources --------------------------------------------------------------------------------------


def test_a_source_is_a_file_a_folder_or_a_pattern(tmp_path):
    paths = [
        write(tmp_path / f"{n}.parquet", a=[1]) for n in ("x/test-0", "x/train-0", "x/train-1")
    ]
    assert find_parquet(str(tmp_path)) == tuple(paths)
    assert find_parquet(str(paths[1])) == (paths[1],)
    assert find_parquet(str(tmp_path / "*" / "train-*.parquet")) == tuple(paths[1:])
    with pytest.raises(DataError, match=r"parquet: no \*\.parquet file at .*/valid-\*"):
        find_parquet(str(tmp_path / "valid-*"))
    with pytest.raises(DataError, match=r"parquet: data\.source is not set; give a"):
        find_parquet(None)


# -- refusals -------------------------------------------------------------------------------------

TABLE = {"a": [1.0, 2.0], "label": [0, 1], "client_id": ["x", "y"]}
BROKEN = {
    "no client column": ({"client_id": None}, {}, r"there is no column 'client_id'; it has a, lab"),
    "no label column": (
        {"label": None, "labels": [0, 1]}, {}, r"no column 'label' \(did you mean 'labels'\?\)"
    ),
    "no feature column": ({"a": None}, {}, "there is no column 'a'"),
    "no split column": ({}, {"split": "part"}, "there is no column 'part'"),
    "client null": ({"client_id": ["x", None]}, {}, "column 'client_id', row 1: it is null"),
    "client empty": ({"client_id": ["x", ""]}, {}, "column 'client_id', row 1: .* name is empty"),
    "client floats": (
        {"client_id": [1.5, 2.5]}, {}, r"column 'client_id' \(data.client\) must .* found double"
    ),
    "label null": ({"label": [0, None]}, {}, "column 'label', row 1: it is null"),
    "label floats": (
        {"label": [0.0, 1.0]}, {}, r"column 'label' \(data.label\) must hold .* found double"
    ),
    "label too large": (
        {"label": [0, 3]}, {}, r"column 'label', row 1 \(data.label\): 3 lies outside of 0\.\.2"
    ),
    "label negative": ({"label": [-1, 0]}, {}, r"row 0 \(data.label\): -1 lies outside of 0\.\.2"),
    "feature text": (
        {"a": ["1", "2"]}, {}, r"column 'a' \(data.features\) must hold numbers .* found string"
    ),
    "feature null": (
        {"a": [1.0, None]}, {}, r"column 'a' \(data.features\): a value is null, in row 0 or one of"
    ),
    "feature null inside": ({"a": [[1.0], [None]]}, {}, r"'a' \(data.features\): a value is null"),
    "feature nan": (
        {"a": [1.0, float("nan")]}, {}, r"column 'a', row 1 \(data.features\): a number is not fin"
    ),
    "ragged": (
        {"a": [[1.0], [1.0, 2.0]]}, {}, r"column 'a' \(data.features\): its lists have 1 to 2 entr"
    ),
    "shape": (
        {"a": [[1.0, 2.0], [3.0, 4.0]]}, {}, r"give 2 numbers a row, data.shape \[1\] asks for 1"
    ),
    "split name": (
        {"part": ["train", "holdout"]}, {"split": "part"},
        r"column 'part', row 1 \(data.split\): 'holdout' is none of train, test",
    ),
    "file without part": ({}, {"split_in_names": True}, "nor a folder below .* says the part"),
    "pictures of numbers": (
        {}, {"image": "a", "features": (), "shape": (1, 2, 2)},
        r"column 'a', row 0 \(data.image\) must hold the bytes .* found float in a column of d",
    ),
    "pictures by path only": (
        {"a": [{"bytes": None, "path": "x.png"}] * 2},
        {"image": "a", "features": (), "shape": (1, 2, 2)},
        r"column 'a', row 0 \(data.image\) must hold the bytes .* found NoneType in a col",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "message"), BROKEN.values(), ids=BROKEN)
def test_a_column_that_is_not_as_the_options_say_is_refused(tmp_path, change, options, message):
    columns = {k: v for k, v in {**TABLE, **change}.items() if v is not None}
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=message) as error:
        read(path, **{**NUMBERS, **options})
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write(tmp_path / "a.parquet", **TABLE)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file: ") as error:
        read(path, **NUMBERS)
    assert "\n" not in str(error.value)


def test_changed_pages_are_refused_not_believed_to_be_a_crash(tmp_path):
    path = write(tmp_path / "a.parquet", **TABLE)
    raw = bytearray(path.read_bytes())
    raw[4:60] = b"\xff" * 56
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"cannot be read: ") as error:
        read(path, **NUMBERS)
    assert "\n" not in str(error.value)


def test_inputs_must_be_named(tmp_path):
    path = write(tmp_path / "a.parquet", **TABLE)
    with pytest.raises(DataError, match=r"neither data\.image nor data\.features is set"):
        read(path, num_classes=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ()}, r"data\.shape must hold positive numbers, got \[\]"),
        ({"shape": (1, 0)}, r"data\.shape must hold positive numbers, got \[1, 0\]"),
        ({"image": "i", "features": ("a",)}, r"data\.image and data\.features: give the one or"),
        ({"image": "i", "shape": (28, 28)}, r"data\.shape of pictures must be 1 or 3 channels"),
        ({"image": "i", "shape": (2, 8, 8)}, r"data\.shape of pictures .* got \[2, 8, 8\]"),
        ({"invert": True}, r"data\.invert turns pictures only"),
        ({"num_classes": 1}, r"data\.num_classes must be >= 2, got 1"),
        ({"label_names": ("a", "b")}, r"data\.label_names must be 10 different names .* got 2"),
        ({"split": "s", "split_in_names": True}, r"data\.split and data\.split_in_names: give"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ParquetConfig(**options)


# -- from files to a run --------------------------------------------------------------------------


def test_a_table_of_ones_own_is_trained_on_with_its_official_test_rows(tmp_path):
    rng = np.random.default_rng(0)
    for part, size in (("train", 120), ("test", 30)):
        x = rng.normal(size=(size, 4))
        write(
            tmp_path / f"{part}.parquet",
            x=list(x), label=(x[:, 0] > 0).astype(int), client_id=np.arange(size) % 3,
        )  # fmt: skip
    sets = [
        "data.name=parquet", f"data.source={tmp_path}", "data.features=[x]", "data.shape=[4]",
        "data.num_classes=2", "data.split_in_names=true", "method=local", "model=linear",
        "training.num_rounds=10", "training.num_local_steps=10", "training.learning_rate=0.5",
        "evaluation.every=10",
    ]  # fmt: skip
    prepared = prepare_experiment(load_config(None, sets))
    assert prepared.client_ids == ["0", "1", "2"]
    assert [(len(c.train), len(c.val), len(c.test)) for c in prepared.clients] == [(32, 8, 10)] * 3
    assert finish(prepared).records[-1].metrics["test/local_accuracy"] >= 0.8
