"""Typefaces as writers: which faces are drawn, how they are moved, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import pytest
from PIL import Image, ImageDraw, ImageFont, features
from scipy.ndimage import gaussian_filter
from sklearn.svm import SVC

from selffl_ray.datasets import glyphs as module
from selffl_ray.datasets.femnist import CHARACTERS, FemnistConfig
from selffl_ray.datasets.glyphs import FINE, GlyphsConfig, drawn
from selffl_ray.datasets.store import prepare
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import Component, datasets

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SOME = ("DejaVuSans", "DejaVuSerif-Italic", "STIXGeneralBol", "cmtt10")
SIDE = 28


def glyphs(**options):
    return datasets.make(Component("glyphs", GlyphsConfig(**options)))


def folder_of(path, *names):
    """A folder with copies of some of matplotlib's font files."""
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(FONTS / f"{name}.ttf", path)
    return path


@pytest.fixture(scope="module")
def groups():
    """Four faces of four families, eight pictures of each character."""
    return [drawn(FONTS / f"{name}.ttf", 8) for name in SOME]


# -- which faces -----------------------------------------------------------------------------------


def test_matplotlibs_text_faces_are_drawn_and_no_other_face_of_it_could_be():
    chosen = glyphs().find(None)
    assert len(chosen) == len({p.stem for p in chosen}) == 22
    # These two have something at the place of every letter, but no letters.
    symbols = {FONTS / "cmex10.ttf", FONTS / "cmsy10.ttf"}
    for path in sorted(FONTS.glob("*.ttf")):
        if path in chosen:
            assert drawn(path, 1).x.shape == (62, 1, SIDE, SIDE)
        elif path not in symbols:
            with pytest.raises(DataError, match="no face to draw 62 characters with"):
                drawn(path, 1)


def test_a_folder_is_searched_with_what_lies_in_it(tmp_path):
    folder_of(tmp_path / "b" / "deep", "cmtt10")
    folder_of(tmp_path / "a", "cmss10")
    (tmp_path / "a" / "cmss10.ttf").rename(tmp_path / "a" / "Other.OTF")
    (tmp_path / "a" / "readme.txt").write_text("fonts")
    found = glyphs().find(str(tmp_path))
    assert [path.name for path in found] == ["Other.OTF", "cmtt10.ttf"]
    assert [g.client_id for g in glyphs(takes=1).read(found, 0)] == ["Other", "cmtt10"]


# -- what is drawn ---------------------------------------------------------------------------------


def test_every_face_has_every_character_of_femnist_so_many_times(groups):
    femnist = datasets.make(Component("femnist", FemnistConfig()))
    ours = glyphs()
    assert ours.label_names == femnist.label_names == tuple(CHARACTERS)
    assert ours.shape == femnist.shape
    assert ours.shift_scale == femnist.shift_scale
    for group in groups:
        assert group.y.tolist() == [k for k in range(62) for _ in range(8)]
        assert group.x.dtype == np.uint8
        # Takes differ from each other, and none is empty or cut off: the rim has no ink.
        assert len({x.tobytes() for x in group.x}) == len(group.x)
        assert group.x.max(axis=(1, 2, 3)).min() > 100
        assert group.x[:, 0, [0, -1]].max() == group.x[:, 0, :, [0, -1]].max() == 0


def test_as_leafs_files_femnist_reads_the_same_pictures(tmp_path, groups):
    (tmp_path / "train").mkdir()
    some = [g._replace(x=g.x[::8], y=g.y[::8]) for g in groups[:2]]
    raw = {
        "users": [g.client_id for g in some],
        "num_samples": [62, 62],
        "user_data": {
            g.client_id: {"x": (1 - g.x.reshape(62, -1) / 255).tolist(), "y": g.y.tolist()}
            for g in some
        },
    }
    (tmp_path / "all_data_0.json").write_text(json.dumps(raw))
    femnist = datasets.make(Component("femnist", FemnistConfig(split="none")))
    for read, ours in zip(femnist.read(femnist.find(str(tmp_path)), 0), some, strict=True):
        assert read.client_id == ours.client_id
        np.testing.assert_array_equal(read.x, ours.x)
        np.testing.assert_array_equal(read.y, ours.y)


def plain(name, size):
    """(62, 28, 28) characters of a face drawn straight and centred, the shortest way."""
    font = ImageFont.truetype(str(FONTS / f"{name}.ttf"), size)
    pictures = []
    for character in CHARACTERS:
        picture = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(picture).text((14, 14), character, fill=255, font=font, anchor="mm")
        ink = np.argwhere(np.asarray(picture))
        shift = np.round(13.5 - (ink.min(0) + ink.max(0)) / 2).astype(int)
        pictures.append(np.roll(np.asarray(picture), shift, axis=(0, 1)))
    return np.stack(pictures)


def soft(pictures):
    """Flattened, blurred so that a pixel more or less makes no difference, of length one."""
    blurred = gaussian_filter(pictures.astype(float), (0, 1.5, 1.5)).reshape(len(pictures), -1)
    return blurred / np.linalg.norm(blurred, axis=1, keepdims=True)


def test_pictures_show_their_labels(groups):
    for name, group in zip(SOME, groups, strict=True):
        means = soft(group.x.reshape(62, 8, SIDE, SIDE).mean(axis=1))
        # Each face has a size of its own.
        right = [
            (np.argmax(means @ soft(plain(name, size)).T, axis=1) == np.arange(62)).sum()
            for size in range(16, 27, 2)
        ]
        assert max(right) >= 55, name


def test_a_picture_tells_its_face(groups):
    """A classifier of pictures by face, whatever the character; chance is a quarter."""
    x = np.stack([soft(g.x[:, 0]).reshape(62, 8, -1) for g in groups])
    faces = np.repeat(np.arange(len(SOME)), 62 * 4)
    train, test = (x[:, :, part].reshape(len(faces), -1) for part in (slice(4), slice(4, 8)))
    assert SVC(C=10).fit(train, faces).score(test, faces) > 0.7


def test_the_largest_glyph_fills_twenty_pixels_and_all_are_centred():
    for name in SOME:
        boxes = np.array([p.getbbox() for p in module._masters(FONTS / f"{name}.ttf")])
        extents = boxes[:, 2:] - boxes[:, :2]
        assert extents.max() / FINE == pytest.approx(20, abs=0.5)
        assert extents[:, 1].min() < 0.75 * extents[:, 1].max()  # small letters stay small
        np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2, 14 * FINE, atol=1.5)


# -- how it is moved -------------------------------------------------------------------------------


def bar(width, height):
    side = SIDE * FINE
    master = Image.new("L", (side, side))
    left, top = (side - width) // 2, (side - height) // 2
    ImageDraw.Draw(master).rectangle((left, top, left + width - 1, top + height - 1), fill=255)
    return master


def moments(picture):
    """Centre (right, down) and second moments of the ink, in pixels from the middle."""
    ink = picture.astype(float) / picture.sum()
    place = np.arange(SIDE) - (SIDE - 1) / 2
    grid = np.stack(np.meshgrid(place, place), axis=-1)
    centre = np.tensordot(ink, grid, axes=2)
    spread = np.einsum("vu,vui,vuj->ij", ink, grid - centre, grid - centre)
    return centre, spread


def test_an_unmoved_character_is_its_large_picture_averaged():
    master = module._masters(FONTS / "cmr10.ttf")[40]
    pixels = np.asarray(master, float).reshape(SIDE, FINE, SIDE, FINE).mean(axis=(1, 3))
    found = module._picture(master, np.zeros(4))
    np.testing.assert_allclose(found, pixels, atol=0.51)


@pytest.mark.parametrize("way", [-1.0, 0.5, 1.0])
def test_shifts_go_right_and_down(way):
    for axis in (0, 1):
        move = np.zeros(4)
        move[2 + axis] = way
        centre, _ = moments(module._picture(bar(40, 40), move))
        assert centre[axis] == pytest.approx(1.5 * way, abs=0.02)
        assert centre[1 - axis] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("way", [-1.0, 0.5, 1.0])
def test_a_turn_turns_the_long_axis_by_up_to_ten_degrees(way):
    centre, spread = moments(module._picture(bar(72, 8), np.array([way, 0, 0, 0])))
    angle = 0.5 * math.atan2(2 * spread[0, 1], spread[0, 0] - spread[1, 1])
    assert math.degrees(angle) == pytest.approx(10 * way, abs=0.2)
    np.testing.assert_allclose(centre, 0, atol=0.02)


@pytest.mark.parametrize("way", [-1.0, 0.5, 1.0])
def test_a_slant_moves_each_row_by_its_height(way):
    _, spread = moments(module._picture(bar(24, 72), np.array([0, way, 0, 0])))
    # Cov(x + s y, y) / Var(y) = s
    assert spread[0, 1] / spread[1, 1] == pytest.approx(0.15 * way, abs=0.005)


# -- the same bytes --------------------------------------------------------------------------------


def test_a_face_is_the_same_whatever_faces_are_beside_it_and_for_any_seed(tmp_path, groups):
    alone = folder_of(tmp_path, SOME[2])
    dataset = glyphs(takes=8)
    (group,) = dataset.read(dataset.find(str(alone)), 7)
    assert group.client_id == groups[2].client_id
    assert group.x.tobytes() == groups[2].x.tobytes()


def test_the_store_is_known_by_pillow_freetype_and_the_fonts_not_by_their_place(
    tmp_path, monkeypatch
):
    dataset, root = glyphs(takes=1), tmp_path / "stores"
    here, there = (folder_of(tmp_path / name, "cmr10") for name in ("here", "there"))

    def store(folder):
        return prepare(dataset, GlyphsConfig(takes=1), str(folder), 0, root)

    first = store(here)
    assert first.folder == store(there).folder
    version, freetype = PIL.__version__, features.version("freetype2")
    assert first.manifest.source.startswith(f"Pillow {version}, FreeType {freetype}, 1 font files")
    monkeypatch.setattr(PIL, "__version__", "99")
    assert store(here).folder != first.folder
    monkeypatch.undo()
    monkeypatch.setattr(features, "version", lambda name: "9.9")
    assert store(here).folder != first.folder
    monkeypatch.undo()
    shutil.copy(FONTS / "cmb10.ttf", here / "cmr10.ttf")
    other = store(here)
    assert other.folder != first.folder
    assert other.manifest.digest != first.manifest.digest


# -- what is refused -------------------------------------------------------------------------------


def test_no_picture_is_no_number_of_pictures():
    with pytest.raises(ConfigError, match=r"data\.takes must be >= 1, got 0"):
        GlyphsConfig(takes=0)


def test_a_source_without_fonts_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.source: there is no folder .*none; give a folder"):
        glyphs().find(str(tmp_path / "none"))
    (tmp_path / "letter.txt").write_text("A")
    with pytest.raises(DataError, match=rf"data\.source: {tmp_path} has no \.ttf or \.otf file"):
        glyphs().find(str(tmp_path))


def test_two_files_of_one_name_are_named(tmp_path):
    for inner in ("a", "b"):
        folder_of(tmp_path / inner, "cmr10")
    message = rf"{tmp_path}/a/cmr10\.ttf and {tmp_path}/b/cmr10\.ttf would both be client 'cmr10'"
    with pytest.raises(DataError, match=message):
        glyphs().find(str(tmp_path))


def test_a_face_that_matplotlib_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match=r"DejaVuSans\.ttf is missing from matplotlib; install"):
        glyphs().find(None)


def test_without_freetype_one_line_says_so(monkeypatch):
    dataset = glyphs()
    monkeypatch.setattr(features, "version", lambda name: None)
    with pytest.raises(DataError, match="Pillow is built without FreeType here"):
        dataset.made_with(dataset.find(None))


def broken(path, kind):
    whole = (FONTS / "cmr10.ttf").read_bytes()
    path.write_bytes({"empty": b"", "text": b"not a font" * 50, "cut": whole[:2000]}[kind])
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "cut"])
def test_a_broken_font_file_is_named(tmp_path, kind):
    path = broken(tmp_path / "face.ttf", kind)
    with pytest.raises(DataError, match=rf"^{path}: no face to draw .*leave_out$") as error:
        drawn(path, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("STIXSizOneSymReg", f"it has no {CHARACTERS}"),
        ("LastResortHE-Regular", "its 0 and 1 are the same"),
    ],
)
def test_a_face_that_lacks_characters_is_named(name, reason):
    path = FONTS / f"{name}.ttf"
    if not path.is_file():
        pytest.skip(f"this matplotlib has no {path.name}")
    with pytest.raises(DataError) as error:
        drawn(path, 1)
    assert str(error.value).startswith(f"{path}: no face to draw 62 characters with ({reason});")


def test_unfit_faces_are_left_out_with_a_warning_each_if_that_is_asked_for(tmp_path, caplog):
    folder = folder_of(tmp_path, "cmr10", "STIXSizOneSymReg")
    broken(folder / "broken.ttf", "text")
    strict, lenient = glyphs(takes=1), glyphs(takes=1, unfit="leave_out")
    files = strict.find(str(folder))
    with pytest.raises(DataError, match=r"STIXSizOneSymReg\.ttf|broken\.ttf"):
        list(strict.read(files, 0))
    with caplog.at_level(logging.WARNING):
        (only,) = lenient.read(files, 0)
    assert only.client_id == "cmr10"
    assert len(caplog.messages) == 2
    for name, message in zip(("STIXSizOneSymReg", "broken"), caplog.messages, strict=True):
        assert message.startswith(f"glyphs: left out: {folder}/{name}.ttf: ")
