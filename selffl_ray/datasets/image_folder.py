"""Images of one's own: a folder a class, PNG or JPEG, with or without a folder a client.

``layout`` says which folders there are from the source down; nothing is guessed from their names.
Which classes there are must be given too, since it sets the size of the model: they are labels in
the order given, and folders of other names are not read.

Every image is turned as its camera noted, laid over white where it is transparent, cut to its
central square, and scaled to the side asked for. Pixels x become (x / 255 - 0.5) / 0.25: mean and
deviation of unknown images are not known, and these bring any into [-2, 2].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets.base import TEST, TRAIN, Dataset, Group
from selffl_ray.datasets.pictures import MODES, check_bits, over_white
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

SUFFIXES = (".png", ".jpg", ".jpeg")
PARTS = {"train": TRAIN, "test": TEST}

MOST_SHOWN = 40
"""Names of folders that a message lists."""

REMEDY = "give the folder of images as data.source"


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig:
    """Options of ``data: {name: image_folder}``."""

    classes: tuple[str, ...] = ()
    """Names of the class folders, in the order of their labels; must be given."""
    layout: Literal["class", "client/class", "part/class", "client/part/class"] = "class"
    """Folders from the source down to an image; a part is ``train`` or ``test``."""
    size: int = 32
    """Side of the images that the model sees."""
    channels: Literal[1, 3] = 3
    """Grey or colour."""

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes) or len(self.classes) == 1:
            raise ConfigError(
                f"data.classes must be two different names or more, got {list(self.classes)}"
            )
        if self.size < 1:
            raise ConfigError(f"data.size must be >= 1, got {self.size}")

    @property
    def levels(self) -> tuple[str, ...]:
        """What the folders stand for, from the source down."""
        return tuple(self.layout.split("/"))


@register_dataset("image_folder", ImageFolderConfig)
def image_folder(config: ImageFolderConfig) -> Dataset:
    """PNG and JPEG images of one's own in class folders, a client folder each or a common pool."""
    natural, parted = "client" in config.levels, "part" in config.levels

    def find(source: str | None) -> tuple[Path, ...]:
        return _find(source, config)

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        return _groups(files, config)

    return Dataset(
        name="image_folder",
        title=f"Images in folders, {len(config.classes)} classes",
        licence="that of the images",
        shape=DataShape((config.channels, config.size, config.size), len(config.classes)),
        find=find,
        read=read,
        label_names=config.classes,
        shift_scale=(0.5, 0.25),
        natural=natural,
        defaults={
            "experiment": "image_folder",
            "data": {"partition": {"name": "natural" if natural else "dirichlet"}},
            "model": {"name": "cnn"},
            "training": {"learning_rate": 0.05},
            **({"evaluation": {"splits": [0.8, 0.2, 0.0]}} if natural and parted else {}),
        },
    )


class Place(NamedTuple):
    """Where an image belongs, from its folders; an empty client_id is the pool."""

    client_id: str
    label: int
    official: int


def _find(source: str | None, config: ImageFolderConfig) -> tuple[Path, ...]:
    """All images, sorted by path."""
    if source is None:
        raise DataError(f"image_folder: data.source is not set; {REMEDY}")
    root = Path(source).expanduser()
    if not root.is_dir():
        raise DataError(f"image_folder: data.source: there is no folder {root}; {REMEDY}")
    folders = [root]
    for level in config.levels:
        below = [f for folder in folders for f in sorted(folder.iterdir()) if _shown(f)]
        folders = [f for f in below if f.is_dir()]
        if level == "part" and (other := [f for f in folders if f.name not in PARTS]):
            raise DataError(f"{other[0]}: data.layout {config.layout} has a part here, which must "
                            "be train or test; move it or choose another layout")  # fmt: skip
    found = list(dict.fromkeys(folder.name for folder in folders))
    missing = [name for name in config.classes if name not in found]
    if missing or not config.classes:
        listed = ", ".join(
            [*sorted(found)[:MOST_SHOWN], *(["..."] if len(found) > MOST_SHOWN else [])]
        )
        what = f"there is no folder {missing[0]}" if missing else "not set"
        raise DataError(
            f"image_folder: data.classes: {what}; under {root} (data.layout {config.layout}) the "
            f"folders of classes are: {listed or 'none'}; name those to read"
        )
    chosen = [folder for folder in folders if folder.name in config.classes]
    return tuple(file for folder in chosen for file in _images(folder))


def _shown(path: Path) -> bool:
    return not path.name.startswith(".")


def _images(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if _shown(path)]
    for path in files:
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise DataError(
                f"{path}: in a class folder but no {', '.join(SUFFIXES)} file; convert or remove it"
            )
    return files


def _groups(files: Sequence[Path], config: ImageFolderConfig) -> Iterator[Group]:
    """A client's images together, or a class folder's; within them by path."""
    together: dict[tuple[str, ...], list[tuple[Path, Place]]] = defaultdict(list)
    for path in files:
        place = _place(path, config)
        key = (place.client_id,) if place.client_id else path.parent.parts
        together[key].append((path, place))
    for members in together.values():
        official = None
        if "part" in config.levels:
            official = np.asarray([place.official for _, place in members], np.uint8)
        yield Group(
            members[0][1].client_id,
            np.stack([read_image(path, config.size, config.channels) for path, _ in members]),
            np.asarray([place.label for _, place in members], np.int64),
            official,
        )


def _place(path: Path, config: ImageFolderConfig) -> Place:
    levels = config.levels
    name = dict(zip(levels, path.parts[-1 - len(levels) : -1], strict=True))
    label = config.classes.index(name["class"])
    return Place(name.get("client", ""), label, PARTS[name.get("part", "train")])


def read_image(path: Path, side: int, channels: int) -> npt.NDArray[np.uint8]:
    """(channels, side, side) of a PNG or JPEG file.

    Raises:
        DataError: not such a file, truncated, or with more than 8 bits a channel.
    """
    # Imported here: only preparing the store needs it.
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=("PNG", "JPEG")) as opened:
            check_bits(opened)
            upright = over_white(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: not a readable PNG or JPEG image ({' '.join(str(error).split())}); replace "
            "or remove it"
        ) from error
    plain = upright.convert(MODES[channels])
    # Bilinear averages when it shrinks and, unlike bicubic, invents no brighter or darker rims.
    fitted = ImageOps.fit(plain, (side, side), Image.Resampling.BILINEAR)
    pixels = np.asarray(fitted, np.uint8).reshape(side, side, channels)
    return pixels.transpose(2, 0, 1)
