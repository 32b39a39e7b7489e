"""Motion of a smartwatch during shoulder exercises, one client an arm (seglearn's copy).

Ten people did seven exercises, about twenty repetitions each, with the watch once on the left wrist
and once on the right: 140 recordings of acceleration and rotation at 50 Hz. A client is a person's
arm, because people *and* sides move differently. Source: Burns et al. 2018, "Shoulder physiotherapy
exercise recognition", arXiv:1802.01489.

Each recording is cut into windows that overlap, and split by time: first training, then validation,
then test, with as many windows left out between two parts as it takes for them to share no
measurement. Drawn at random, a test window would share half its measurements with training
windows. The split is part of the data and the same for every seed.

Inputs are standardised with means and standard deviations over the *training* windows of all
clients. In a real federation that is one exchange more before the first round: each client's number
of windows, sums and sums of squares, which can be summed securely. Clients that are held out as new
are part of these statistics here; truly new ones would have to take them over. Statistics of each
client alone would need no exchange, but remove a part of what makes clients differ.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from selffl_ray.datasets import inert_pickle
from selffl_ray.datasets.base import TEST, TRAIN, VAL, Dataset, Group
from selffl_ray.datasets.inert_pickle import BROKEN
from selffl_ray.errors import ConfigError, DataError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape

FILE = "watch_dataset.npy"
RATE_HZ = 50
CHANNELS = ("ax", "ay", "az", "wx", "wy", "wz")
EXERCISES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
SIDES = ("left", "right")

TRAIN_END, VAL_END = 0.52, 0.70
"""Where training and validation end, as shares of a recording's windows."""
LEFT_OUT = 255
"""Of a window between two parts."""

LONGEST_S = 3600
"""Longest window."""
NUM_STATISTICS = 12
"""Features of each channel, see ``summarise``."""

NPY_1_0 = b"\x93NUMPY\x01\x00"
ONE_OBJECT = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
"""How a .npy file starts, and the header of one that holds a pickled object."""
NUMBERS = ("<f8", "<i8")
"""Types of the arrays in the file."""

Floats = npt.NDArray[np.float64]
Parts = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Options of ``data: {name: watch}``."""

    features: Literal["summary", "raw"] = "summary"
    """summary: 12 statistics of each of 6 channels; raw: the window itself, channels by time."""
    window_s: float = 2.0
    """Length of a window, seconds, rounded to whole measurements at 50 Hz."""
    hop_s: float = 1.0
    """From the start of a window to the start of the next, seconds, rounded in the same way."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.window_s) and math.isfinite(self.hop_s)):
            raise ConfigError(
                f"data.window_s and data.hop_s must be finite, got {self.window_s} and {self.hop_s}"
            )
        if max(self.window_s, self.hop_s) > LONGEST_S:
            raise ConfigError(
                f"data.window_s and data.hop_s must be at most {LONGEST_S}, got {self.window_s:g} "
                f"and {self.hop_s:g}"
            )
        if self.width < 2 or self.hop < 1:
            raise ConfigError(
                f"data.window_s must be >= {2 / RATE_HZ} and data.hop_s >= {1 / RATE_HZ}, got "
                f"{self.window_s} and {self.hop_s}"
            )

    @property
    def width(self) -> int:
        """Measurements of a window."""
        return round(self.window_s * RATE_HZ)

    @property
    def hop(self) -> int:
        """Measurements from a window to the next."""
        return round(self.hop_s * RATE_HZ)

    @property
    def gap(self) -> int:
        """Windows to leave out so that those on both sides share no measurement."""
        return math.ceil(self.width / self.hop) - 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        if self.features == "raw":
            return (len(CHANNELS), self.width)
        return (len(CHANNELS) * NUM_STATISTICS,)


class Recording(NamedTuple):
    """One exercise of one arm. values: (T, 6), acceleration and rotation as the file gives them."""

    client_id: str
    label: int
    values: Floats


@register_dataset("watch", WatchConfig)
def watch(config: WatchConfig) -> Dataset:
    """Seven shoulder exercises by a smartwatch's motion, 20 arms, each a client (seglearn)."""

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        return iter(_standardised(_groups(config, read_recordings(files[0]))))

    return Dataset(
        name="watch",
        title="Smartwatch motion during shoulder exercises, 20 arms (Burns et al. 2018)",
        licence="BSD-3-Clause (as part of seglearn)",
        shape=DataShape(config.input_shape, len(EXERCISES)),
        find=_find,
        read=read,
        label_names=EXERCISES,
        natural=True,
        defaults={
            "experiment": "watch",
            "training": {"num_rounds": 50},
            "evaluation": {"splits": [1.0, 0.0, 0.0]},
        },
    )


def _find(source: str | None) -> tuple[Path, ...]:
    remedy = f"pip install -e '.[watch]', or give seglearn's {FILE} or its folder as data.source"
    if source is not None:
        given = Path(source).expanduser()
        path = given / FILE if given.is_dir() else given
        if not path.is_file():
            raise DataError(f"watch: data.source: there is no file {path}; {remedy}")
        return (path,)
    # Found without being imported: only its file is needed, and its code may want an older library.
    package = importlib.util.find_spec("seglearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / "data" / FILE
        if path.is_file():
            return (path,)
    raise DataError(f"watch: seglearn is not installed here and data.source is not set; {remedy}")


# -- windows --------------------------------------------------------------------------------------


def _groups(config: WatchConfig, recordings: Sequence[Recording]) -> list[Group]:
    """Clients by name; in each the exercises in order, and their windows by time."""
    by_client: dict[str, list[Group]] = {}
    for recording in sorted(recordings, key=lambda r: (r.client_id, r.label)):
        x = windows(recording.values, config.width, config.hop)
        official = split_by_time(len(x), config.gap)
        if not {TRAIN, VAL, TEST} <= set(official.tolist()):
            raise DataError(
                f"watch: {len(recording.values) / RATE_HZ:g} s of {EXERCISES[recording.label]} of "
                f"{recording.client_id} give only {len(x)} windows, too few for training, "
                f"validation and test; lower data.window_s ({config.window_s:g}) or data.hop_s "
                f"({config.hop_s:g})"
            )
        kept = official != LEFT_OUT
        inputs = x[kept] if config.features == "raw" else summarise(x[kept])
        labels = np.full(len(inputs), recording.label, np.int64)
        group = Group(recording.client_id, inputs, labels, official[kept])
        by_client.setdefault(recording.client_id, []).append(group)
    return [_together(client_id, groups) for client_id, groups in by_client.items()]


def _together(client_id: str, groups: Sequence[Group]) -> Group:
    official = [group.official for group in groups if group.official is not None]
    return Group(
        client_id,
        np.concatenate([group.x for group in groups]),
        np.concatenate([group.y for group in groups]),
        np.concatenate(official),
    )


def windows(values: Floats, width: int, hop: int) -> Floats:
    """(T, channels) as (N, channels, width), a window every ``hop`` rows, none shorter."""
    if len(values) < width:
        return np.empty((0, values.shape[1], width))
    return np.lib.stride_tricks.sliding_window_view(values, width, axis=0)[::hop]


def split_by_time(count: int, gap: int) -> Parts:
    """(count,) TRAIN, VAL and TEST in this order, ``gap`` windows LEFT_OUT between two parts.

    Parts are 52, 18 and 30 % of what is not left out; with few windows some of them are empty.
    """
    usable = max(count - 2 * gap, 0)
    train, val = round(TRAIN_END * usable), round(VAL_END * usable)
    sizes = [train, gap, val - train, gap, usable - val]
    parts = [TRAIN, LEFT_OUT, VAL, LEFT_OUT, TEST]
    return np.repeat(parts, sizes)[:count].astype(np.uint8)


def summarise(x: Floats) -> Floats:
    """Statistics of each channel of each window: (N, channels, width) -> (N, channels * 12).

    Mean, standard deviation, root mean square, minimum, quartiles (three), maximum, skewness,
    excess kurtosis, mean absolute difference of neighbours, share of neighbours that lie on
    different sides of the mean. Skewness of a constant is given as 0, kurtosis as -3.
    """
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    std = x.std(-1, keepdims=True)
    z = np.divide(centred, std, out=np.zeros_like(centred), where=std > 0)
    above = centred > 0
    statistics = [
        mean[..., 0],
        std[..., 0],
        np.sqrt(np.square(x).mean(-1)),
        *np.quantile(x, (0.0, 0.25, 0.5, 0.75, 1.0), axis=-1),
        (z**3).mean(-1),
        (z**4).mean(-1) - 3.0,
        np.abs(np.diff(x)).mean(-1),
        (above[..., 1:] != above[..., :-1]).mean(-1),
    ]
    return np.stack(statistics, axis=-1).reshape(len(x), -1)


def _standardised(groups: Sequence[Group]) -> list[Group]:
    """Each feature, or each channel of raw windows, by its training windows; stored as float32."""
    train = np.concatenate([group.x[group.official == TRAIN] for group in groups])
    axes = (0,) if train.ndim == 2 else (0, 2)
    mean, std = (statistic(axis=axes, keepdims=True) for statistic in (train.mean, train.std))
    scale = np.where(std > 0, std, 1.0)
    return [group._replace(x=((group.x - mean) / scale).astype(np.float32)) for group in groups]


# -- the file -------------------------------------------------------------------------------------


def read_recordings(path: Path) -> list[Recording]:
    """The recordings in seglearn's file, in its order; nothing in the file is executed.

    The file is a .npy of one object, a pickled dict: ``X`` (a list of (T, 6) float64), ``y``,
    ``subject``, ``side`` (1 is right), and the names ``X_labels`` and ``y_labels``.

    Raises:
        DataError: not such a file, truncated, names in another order, values that are not finite,
            an arm that did not do each exercise once.
    """
    try:
        content = _unpickle(path.read_bytes())
        recordings = _recordings(content)
    except BROKEN as error:
        raise DataError(
            f"{path}: not seglearn's watch data ({type(error).__name__}: {error}); install "
            "seglearn again, or point data.source at its file"
        ) from error
    done = sorted((r.client_id, r.label) for r in recordings)
    clients = sorted({r.client_id for r in recordings})
    if done != [(client_id, k) for client_id in clients for k in range(len(EXERCISES))]:
        raise DataError(
            f"{path}: not every one of the {len(clients)} arms did each of {len(EXERCISES)} "
            f"exercises once ({len(done)} recordings), so the clients would be wrong; install "
            "seglearn again"
        )
    return recordings


def _unpickle(raw: bytes) -> dict[str, Any]:
    start = 10 + int.from_bytes(raw[8:10], "little")
    if raw[:8] != NPY_1_0 or raw[10:start].strip() != ONE_OBJECT:
        raise ValueError(f"a file that starts with {raw[:8]!r} and {raw[10:start].strip()!r}")
    (content,) = inert_pickle.load(raw[start:]).raw
    if not isinstance(content, dict):
        raise TypeError(f"a {type(content).__name__} instead of a dict")
    return content


def _recordings(content: dict[str, Any]) -> list[Recording]:
    for key, names in (("X_labels", CHANNELS), ("y_labels", EXERCISES)):
        if tuple(content[key]) != names:
            raise ValueError(f"{key} are {content[key]} instead of {list(names)}")
    label, subject, side = (content[key].numbers(*NUMBERS) for key in ("y", "subject", "side"))
    if not np.isin(side, (0, 1)).all():
        raise ValueError(f"side must be 0 or 1, found {np.unique(side)}")
    recordings = []
    for x, k, person, right in zip(content["X"], label, subject, side, strict=True):
        values = x.numbers(*NUMBERS)
        if values.ndim != 2 or values.shape[1] != len(CHANNELS) or not np.isfinite(values).all():
            raise ValueError(f"a recording {values.shape}, not (T, 6) finite numbers")
        client_id = f"subject-{int(person):02d}-{SIDES[int(right)]}"
        recordings.append(Recording(client_id, int(k), values))
    return recordings
