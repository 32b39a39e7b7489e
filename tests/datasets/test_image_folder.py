"""Images in folders: what a folder means is said, not guessed, and every image fits the model."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from selffl_ray.config import load_config
from selffl_ray.datasets.base import TEST, TRAIN
from selffl_ray.datasets.image_folder import ImageFolderConfig, read_image
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import Component, datasets
from selffl_ray.tasks import DataShape

CLASSES = ("cat", "dog")


def picture(seed, side=8, mode="RGB"):
    rng = np.random.default_rng(seed)
    shape = (side, side, 3) if mode == "RGB" else (side, side)
    return rng.integers(256, size=shape).astype(np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def image_folder(**options):
    values = {"classes": CLASSES, "size": 8, **options}
    return datasets.make(Component("image_folder", ImageFolderConfig(**values)))


def groups_of(folder, **options):
    dataset = image_folder(**options)
    return list(dataset.read(dataset.find(str(folder)), 0))


def write(root, *folders, number=3):
    """Pictures that all differ: seed = 100 * folder + number."""
    for at, folder in enumerate(folders):
        for k in range(number):
            save(root / folder / f"{k}.png", picture(100 * at + k))
    return root


def channels_first(*seeds):
    return np.stack([picture(seed).transpose(2, 0, 1) for seed in seeds])


# -- layouts --------------------------------------------------------------------------------------


def test_class_folders_are_a_pool_with_labels_in_the_order_given(tmp_path):
    write(tmp_path, "cat", "dog", "bird")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
    cat, dog = groups_of(tmp_path)
    np.testing.assert_array_equal(cat.x, channels_first(0, 1, 2))
    np.testing.assert_array_equal(dog.x, channels_first(100, 101, 102))
    assert (cat.y.tolist(), dog.y.tolist()) == ([0] * 3, [1] * 3)
    assert cat.client_id == dog.client_id == ""
    assert cat.official is None
    turned = groups_of(tmp_path, classes=("dog", "bird", "cat"))
    assert [set(group.y.tolist()) for group in turned] == [{1}, {2}, {0}], "folders by name"
    dataset = image_folder()
    assert not dataset.natural
    assert dataset.shape == DataShape((3, 8, 8), 2)
    assert dataset.label_names == CLASSES


def test_client_folders_are_clients_with_all_their_classes(tmp_path):
    write(tmp_path, "bert/cat", "anna/dog", "anna/cat")
    anna, bert = groups_of(tmp_path, layout="client/class")
    assert (anna.client_id, bert.client_id) == ("anna", "bert")
    np.testing.assert_array_equal(anna.x, channels_first(200, 201, 202, 100, 101, 102))
    assert anna.y.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(bert.x, channels_first(0, 1, 2))
    assert image_folder(layout="client/class").natural


def test_part_folders_are_the_published_split(tmp_path):
    write(tmp_path, "train/cat", "train/dog", "test/dog")
    groups = groups_of(tmp_path, layout="part/class")
    found = [(group.y[0], set(group.official.tolist())) for group in groups]
    assert found == [(1, {TEST}), (0, {TRAIN}), (1, {TRAIN})]
    np.testing.assert_array_equal(groups[0].x, channels_first(200, 201, 202))


def test_a_clients_parts_are_one_client(tmp_path):
    write(tmp_path, "anna/train/cat", "anna/test/dog", "anna/train/dog")
    (anna,) = groups_of(tmp_path, layout="client/part/class")
    assert anna.official.tolist() == [TEST] * 3 + [TRAIN] * 6
    assert anna.y.tolist() == [1] * 3 + [0] * 3 + [1] * 3


@pytest.mark.parametrize(
    ("layout", "folders", "clients"),
    [
        ("class", ("cat", "dog"), ["client-0", "client-1"]),
        ("part/class", ("train/cat", "train/dog", "test/cat"), ["client-0", "client-1"]),
        ("client/class", ("anna/cat", "bert/dog"), ["anna", "bert"]),
        (
            "client/part/class",
            ("anna/train/cat", "anna/test/cat", "bert/train/dog", "bert/test/cat"),
            ["anna", "bert"],
        ),
    ],
)
def test_every_layout_runs_with_source_and_classes_alone(tmp_path, layout, folders, clients):
    write(tmp_path, *folders, number=10)
    pooled = [] if "client" in layout else ["data.partition.num_clients=2"]
    sets = ["data.name=image_folder", f"data.source={tmp_path}", "data.classes=[cat, dog]"]
    found = prepare_experiment(load_config(None, [*sets, f"data.layout={layout}", *pooled]))
    assert found.client_ids == clients
    x, _ = found.store.read(found.clients[0].train)
    assert x.shape[1:] == (3, 32, 32)
    features = found.dataset.features(x)
    np.testing.assert_allclose(features, (x / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
    assert -2 <= features.min() < features.max() <= 2


# -- images ---------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path):
    save(tmp_path / "a.png", picture(1))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 8, 3), channels_first(1)[0])


def test_a_jpeg_is_nearly_what_it_was(tmp_path):
    smooth = np.add.outer(np.arange(32), np.arange(32))[..., None] * np.ones(3) * 4
    save(tmp_path / "a.JPG", smooth.astype(np.uint8), format="JPEG", quality=95)
    found = read_image(tmp_path / "a.JPG", 32, 3)
    np.testing.assert_allclose(found, smooth.transpose(2, 0, 1), atol=6)


@pytest.mark.parametrize("shape", [(40, 80), (80, 40), (40, 40)])
def test_another_size_is_the_central_square_scaled(tmp_path, shape):
    """The square's left is dark, its right bright, and what lies outside is neither."""
    height, width = shape
    pixels = np.full((*shape, 3), 99, np.uint8)
    top, left = (height - 40) // 2, (width - 40) // 2
    pixels[top : top + 40, left : left + 20] = 0
    pixels[top : top + 40, left + 20 : left + 40] = 200
    save(tmp_path / "a.png", pixels)
    found = read_image(tmp_path / "a.png", 8, 3)
    assert found.shape == (3, 8, 8)
    assert set(found[:, 1:-1, 1:3].ravel().tolist()) == {0}
    assert set(found[:, 1:-1, 5:7].ravel().tolist()) == {200}


def test_grey_and_colour_become_each_other(tmp_path):
    save(tmp_path / "grey.png", picture(0, mode="L"))
    colour = read_image(tmp_path / "grey.png", 8, 3)
    np.testing.assert_array_equal(colour, np.stack([picture(0, mode="L")] * 3))
    save(tmp_path / "colour.png", picture(0))
    grey = read_image(tmp_path / "colour.png", 8, 1)
    weighted = picture(0) @ np.asarray([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[0], weighted, atol=1)


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4, :, 3] = 255
    save(tmp_path / "a.png", pixels)
    found = read_image(tmp_path / "a.png", 8, 1)
    assert not found[0, :4].any()
    assert (found[0, 4:] == 255).all()


def test_a_photograph_is_turned_as_its_camera_noted(tmp_path):
    pixels = np.zeros((32, 32), np.uint8)
    pixels[:16] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise by 90 degrees
    save(tmp_path / "a.jpg", pixels, exif=exif, quality=95)
    found = read_image(tmp_path / "a.jpg", 32, 1)[0]
    assert found[:, 18:].min() > 180
    assert found[:, :14].max() < 20


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def gif(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "GIF")
    return file.getvalue()


BROKEN = {
    "empty": (b"", "not a readable PNG or JPEG image"),
    "text": (b"<html>not found</html>", "not a readable PNG or JPEG image"),
    "cut": (png(picture(0, 64))[:-500], "not a readable PNG or JPEG image .*runcated"),
    "another format": (gif(picture(0, mode="L")), "not a readable PNG or JPEG image"),
    "16 bits": (png(picture(0, mode="L").astype(np.uint16)), "mode I;16.*not 8 bits a channel"),
}


@pytest.mark.parametrize(("raw", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_or_other_image_is_refused_in_one_line_that_names_it(tmp_path, raw, message):
    write(tmp_path, "cat", "dog")
    path = tmp_path / "dog" / "1.png"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        groups_of(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


# -- folders that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "options", "message"),
    [
        (("cat", "dog"), {"classes": ()}, r"data\.classes: not set; .* are: cat, dog; name those"),
        (("cat", "dogs"), {}, r"data\.classes: there is no folder dog; .* are: cat, dogs; name"),
        (
            ("train/cat", "train/dog"),
            {},
            r"there is no folder cat; .* \(data\.layout class\) .*: tr",
        ),
        (("cat", "dog"), {"layout": "client/class"}, r"there is no folder cat; .* are: none; name"),
        (
            ("train/cat", "val/dog"),
            {"layout": "part/class"},
            r"val: data\.layout part/class has a part here, which must be train or test; move it",
        ),
    ],
)
def test_folders_that_do_not_fit_are_listed(tmp_path, folders, options, message):
    write(tmp_path, *folders)
    with pytest.raises(DataError, match=message):
        groups_of(tmp_path, **options)


def test_a_long_list_of_folders_is_cut(tmp_path):
    for k in range(60):
        (tmp_path / f"class-{k:02d}").mkdir()
    with pytest.raises(DataError, match=r"class-38, class-39, \.\.\.; name those to read"):
        groups_of(tmp_path)


def test_a_file_that_is_no_image_is_named_and_not_passed_over(tmp_path):
    write(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "more.webp").write_bytes(b"")
    message = r"more\.webp: in a class folder but no \.png, \.jpg, \.jpeg file; convert or remove"
    with pytest.raises(DataError, match=message):
        groups_of(tmp_path)


def test_a_missing_folder_is_told(tmp_path):
    find = image_folder().find
    with pytest.raises(DataError, match=r"image_folder: data\.source is not set; give the folder"):
        find(None)
    with pytest.raises(DataError, match=r"data\.source: there is no folder .*nowhere; give"):
        find(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"classes": ("cat",)},
            r"data\.classes must be two different names or more, got \['cat'\]",
        ),
        ({"classes": ("cat", "cat")}, r"data\.classes must be two different names or more"),
        ({"size": 0}, r"data\.size must be >= 1, got 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageFolderConfig(**options)


def test_channels_say_whether_colour_is_kept(tmp_path):
    for name in CLASSES:
        save(tmp_path / name / "1.png", picture(1))
    for channels in (1, 3):
        assert image_folder(channels=channels).shape.input_shape == (channels, 8, 8)
        for group in groups_of(tmp_path, channels=channels):
            assert group.x.shape[1:] == (channels, 8, 8)
