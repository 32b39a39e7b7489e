"""Encoded pictures as arrays of pixels; Pillow comes with matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from selffl_ray.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MODES = {1: "L", 3: "RGB"}
"""Pillow's name of pixels with so many channels."""
EIGHT_BITS = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
"""Kinds of pixels of 8 bits or fewer, which are converted without loss of range."""


def decode(raw: bytes, shape: Sequence[int], place: str) -> npt.NDArray[np.uint8]:
    """Pixels (channels, height, width) of an encoded picture; colours become grey for one channel.

    The size is looked at before any pixel is decoded, so a picture that claims to be huge costs
    nothing. What is transparent becomes white.

    Args:
        shape: 1 or 3 channels, height, width.
        place: where the picture comes from, for messages.

    Raises:
        DataError: not such a picture, truncated, of another size, or with more than 8 bits a
            channel.
    """
    # Imported here: only preparing a store needs it.
    from PIL import Image

    channels, height, width = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(BytesIO(raw), formats=FORMATS) as picture:
                if picture.size != (width, height):
                    raise DataError(
                        f"{place}: a picture of {picture.size[1]}x{picture.size[0]} pixels, "
                        f"data.shape asks for {height}x{width}; set data.shape or resize it"
                    )
                check_bits(picture)
                pixels = np.asarray(over_white(picture).convert(MODES[channels]))
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{place}: not a whole picture in one of {', '.join(FORMATS)} ({error}); replace it "
            "or drop its row"
        ) from error
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def check_bits(picture: Image.Image) -> None:
    """Refuse pixels that Pillow would clip at 255 without a word.

    Raises:
        ValueError: a kind of pixels that is none of EIGHT_BITS.
    """
    if picture.mode not in EIGHT_BITS:
        raise ValueError(f"pixels of mode {picture.mode}, not 8 bits a channel")


def over_white(picture: Image.Image) -> Image.Image:
    """The picture on a white ground; without transparency itself.

    Colours below full transparency are whatever the writer left there.
    """
    from PIL import Image

    picture.load()
    if not picture.has_transparency_data:
        return picture
    clear = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
