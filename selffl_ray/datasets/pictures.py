"""Encoded pictures as arrays of pixels; Pillow comes with matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import numpy.typing as npt

from selffl_ray.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MODES = {1: "L", 3: "RGB"}
"""Pillow's name of pixels with so many channels."""


def decode(raw: bytes, shape: Sequence[int], place: str) -> npt.NDArray[np.uint8]:
    """Pixels (channels, height, width) of an encoded picture; colours become grey for one channel.

    The size is looked at before any pixel is decoded, so a picture that claims to be huge costs
    nothing.

    Args:
        shape: 1 or 3 channels, height, width.
        place: where the picture comes from, for messages.

    Raises:
        DataError: not such a picture, truncated, or of another size.
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
                pixels = np.asarray(picture.convert(MODES[channels]))
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{place}: not a whole picture in one of {', '.join(FORMATS)} ({error})"
        ) from error
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)
