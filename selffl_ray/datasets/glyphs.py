"""Typefaces as writers: digits and letters drawn from font files, each face a client.

Nobody wrote these pictures; a program draws them. They have FEMNIST's size, classes and polarity
(28x28, its 62 characters in its order, ink 1 on 0) and its kind of difference between clients: the
same labels everywhere, in another hand. They are not handwriting, and within a face two pictures of
a character differ only in how they are turned, slanted and moved: by up to 10 degrees, 0.15 and
1.5 pixels to either side, uniformly. Faces of one family are clients of their own, and alike.

A face is drawn at the size at which the largest of its 62 glyphs fills 20 pixels, so capitals keep
their size beside small letters; each glyph is centred. All that is drawn from a fixed seed, not the
experiment's: the same options, font files, Pillow and FreeType give the same store, and a face
looks the same whatever other faces are beside it.

By default the 22 text faces that come with matplotlib are drawn. ``data.source`` is a folder of
.ttf and .otf files, for example Debian's /usr/share/fonts.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import Dataset, Group, content_digest
from selffl_ray.datasets.femnist import CHARACTERS, SIDE
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.seeding import generator
from selffl_ray.tasks import DataShape

if TYPE_CHECKING:
    from PIL import Image, ImageFont

logger = logging.getLogger(__name__)

FAMILIES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    "cm": ("b10", "mi10", "r10", "ss10", "ti10", "tt10"),
}
"""matplotlib's faces that draw all characters; its others are symbols and pieces of formulas."""

SUFFIXES = (".ttf", ".otf")
SEED = 0
LARGEST = 20
"""Pixels that the largest glyph of a face fills."""
FINE = 4
"""Drawn so many times larger, turned, and then averaged down to grey."""
MOST_TURN, MOST_SLANT, MOST_SHIFT = math.radians(10.0), 0.15, 1.5
NO_CHARACTER = "\uffff"
"""Is no character in any script: what a face draws for it is what it draws for all it lacks."""


@dataclass(frozen=True, kw_only=True)
class GlyphsConfig:
    """Options of ``data: {name: glyphs}``."""

    takes: int = 4
    """Pictures of each of the 62 characters by each face; 4 make a client as large as FEMNIST's."""
    unfit: Literal["refuse", "leave_out"] = "refuse"
    """A font file that cannot be read, or a face that does not draw 62 different characters, ends
    the preparation; or it is left out with a warning."""

    def __post_init__(self) -> None:
        if self.takes < 1:
            raise ConfigError(f"data.takes must be >= 1, got {self.takes}")


@register_dataset("glyphs", GlyphsConfig)
def glyphs(config: GlyphsConfig) -> Dataset:
    """Digits and letters drawn from typefaces, 28x28, 62 classes, each face a client."""

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        for path in files:
            try:
                yield drawn(path, config.takes)
            except DataError as error:
                if config.unfit == "refuse":
                    raise
                logger.warning("glyphs: left out: %s", error)

    return Dataset(
        name="glyphs",
        title="Glyphs: digits and letters drawn from typefaces",
        licence="generated here; matplotlib's faces: Bitstream Vera, STIX and BaKoMa font licences",
        shape=DataShape((1, SIDE, SIDE), len(CHARACTERS)),
        find=_find,
        read=read,
        label_names=tuple(CHARACTERS),
        shift_scale=(0.0, 1.0),
        natural=True,
        made_with=_made_with,
        num_groups=len,
        # 62 classes with little ink: at 0.05 the usual model is much worse after 60 rounds.
        defaults={"experiment": "glyphs", "training": {"learning_rate": 0.2}},
    )


def _find(source: str | None) -> tuple[Path, ...]:
    """Font files by name; two of one name would be one client."""
    if source is None:
        return _bundled()
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"glyphs: data.source: there is no folder {folder}; give a folder of .ttf or .otf files"
        )
    found = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not found:
        raise DataError(
            f"glyphs: data.source: {folder} has no .ttf or .otf file; give a folder of fonts, or "
            "leave it out for matplotlib's"
        )
    files = sorted(found, key=lambda p: (p.stem, str(p)))
    for first, second in itertools.pairwise(files):
        if first.stem == second.stem:
            raise DataError(
                f"glyphs: data.source: {first} and {second} would both be client "
                f"{first.stem!r}; take one away, or give the folder of one of them"
            )
    return tuple(files)


def _bundled() -> tuple[Path, ...]:
    # Imported here: it takes a moment, and no other set needs it.
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = [f"{family}{style}.ttf" for family, styles in FAMILIES.items() for style in styles]
    for name in names:
        if not (folder / name).is_file():
            raise DataError(
                f"glyphs: {folder / name} is missing from matplotlib; install matplotlib again, or "
                "give a folder of fonts as data.source"
            )
    return tuple(folder / name for name in names)


def _made_with(files: tuple[Path, ...]) -> str:
    """Versions of what draws, and content of the font files."""
    import PIL
    from PIL import features

    freetype = features.version("freetype2")
    if freetype is None:
        raise DataError("glyphs: Pillow is built without FreeType here; pip install pillow")
    return (
        f"Pillow {PIL.__version__}, FreeType {freetype}, {len(files)} font files, digest "
        f"{content_digest(files)}"
    )


def drawn(path: Path, takes: int) -> Group:
    """All pictures of one face: takes of the first character, then of the second, ...

    Raises:
        DataError: not a font, or a face that does not draw 62 different characters.
    """
    try:
        masters = _masters(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: no face to draw {len(CHARACTERS)} characters with ({error}); take it out of "
            "the folder, or set data.unfit=leave_out"
        ) from error
    labels = np.repeat(np.arange(len(CHARACTERS)), takes)
    rng = generator(SEED, "glyphs", client_id=path.stem)
    moves = rng.uniform(-1.0, 1.0, (len(labels), 4))
    x = np.stack(
        [_picture(masters[k], move) for k, move in zip(labels.tolist(), moves, strict=True)]
    )
    return Group(path.stem, x[:, None], labels.astype(np.int64))


def _masters(path: Path) -> list[Image.Image]:
    """The characters upright, large and centred, ink 255.

    Raises:
        OSError: from FreeType. ValueError: characters that are missing or look like another.
    """
    from PIL import ImageFont

    def face(size: int) -> ImageFont.FreeTypeFont:
        # Pillow's own layout: the other depends on a library that may be there or not.
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)

    trial = [size for c in CHARACTERS for size in _ink(face(100), c).size]
    font = face(max(1, 100 * LARGEST * FINE // max(trial)))
    pictures = [_centred(_ink(font, c)) for c in CHARACTERS]
    nothing = {bytes(SIDE * FINE * SIDE * FINE), _centred(_ink(font, NO_CHARACTER)).tobytes()}
    missing = [c for c, p in zip(CHARACTERS, pictures, strict=True) if p.tobytes() in nothing]
    if missing:
        raise ValueError(f"it has no {''.join(missing)}")
    seen: dict[bytes, str] = {}
    for character, picture in zip(CHARACTERS, pictures, strict=True):
        other = seen.setdefault(picture.tobytes(), character)
        if other != character:
            raise ValueError(f"its {other} and {character} are the same")
    return pictures


def _ink(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """The smallest picture with all ink of a character, at least a pixel."""
    from PIL import Image, ImageDraw

    # This box holds the room before and after the character besides.
    left, top, right, low = font.getbbox(character)
    picture = Image.new("L", (max(1, math.ceil(right - left)), max(1, math.ceil(low - top))))
    ImageDraw.Draw(picture).text((-left, -top), character, fill=255, font=font)
    return picture.crop(picture.getbbox() or (0, 0, 1, 1))


def _centred(ink: Image.Image) -> Image.Image:
    from PIL import Image

    side = SIDE * FINE
    picture = Image.new("L", (side, side))
    picture.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return picture


def _picture(master: Image.Image, move: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """(28, 28) uint8: slanted, then turned about the middle, then moved.

    Args:
        move: turn, slant, and shift to the right and down, each in [-1, 1].
    """
    from PIL import Image

    turn, slant = MOST_TURN * move[0], MOST_SLANT * move[1]
    cos, sin = math.cos(turn), math.sin(turn)
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, slant], [0.0, 1.0]])
    # Pillow asks where each pixel of the result comes from.
    back = np.linalg.inv(forward)
    middle = np.full(2, SIDE * FINE / 2)
    offset = middle - back @ (middle + FINE * MOST_SHIFT * move[2:])
    matrix = (*back[0].tolist(), float(offset[0]), *back[1].tolist(), float(offset[1]))
    moved = master.transform(
        master.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )
    return np.asarray(moved.reduce(FINE))
