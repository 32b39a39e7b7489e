"""Search spaces of sweeps: grids, random entries, conditions; and the settings that they give.

A space maps dotted configuration keys to what they are to be; a list of such mappings is their
union. Each entry is a list (every value, a grid), or a mapping with one of ``grid``, ``choice``,
``uniform``, ``loguniform``, ``randint`` (the upper end excluded) and perhaps ``when``: conditions
on earlier entries of the same mapping, under which alone the key is set::

    space:
      - method.intra: [gradient_chunks, trajectory]
        method.personalization: [early_stop, interpolate]
        method.readout_steps: {grid: [50, 200], when: {method.personalization: interpolate}}
      - method.kappa: {loguniform: [0.25, 4]}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from selffl_ray.errors import ConfigError
from selffl_ray.seeding import generator

Settings = Mapping[str, Any]
Raw = dict[str, Any]

Kind = Literal["grid", "choice", "uniform", "loguniform", "randint"]
KINDS: tuple[Kind, ...] = ("grid", "choice", "uniform", "loguniform", "randint")


@dataclass(frozen=True)
class Dimension:
    """One entry of a space: a key, how its values come about, and when it is set at all."""

    key: str
    kind: Kind
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]]

    @property
    def listed(self) -> bool:
        """Whether the values are named one by one, not as a range."""
        return self.kind in ("grid", "choice")

    def active(self, settings: Settings) -> bool:
        """Whether the conditions hold among what is set already."""
        return all(settings.get(key) in values for key, values in self.when.items())

    def draw(self, rng: Any) -> Any:
        """A random value."""
        if self.listed:
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(rng.integers(low, high))
        if self.kind == "uniform":
            return float(rng.uniform(low, high))
        return float(math.exp(rng.uniform(math.log(low), math.log(high))))

    def holds(self, value: Any) -> bool:
        """Whether a value can be drawn."""
        if self.listed:
            return value in self.values
        low, high = self.values
        numbers = int if self.kind == "randint" else (int, float)
        if not isinstance(value, numbers) or isinstance(value, bool):
            return False
        return bool(low <= value < high if self.kind == "randint" else low <= value <= high)

    def ends(self) -> tuple[Any, ...]:
        """The values, or the smallest and the largest of a range."""
        if self.listed:
            return self.values
        low, high = self.values
        return low, high - 1 if self.kind == "randint" else high


def read_space(space: list[dict[str, Any]] | dict[str, Any]) -> list[list[Dimension]]:
    """The mappings of a space.

    Raises:
        ConfigError: an empty space, an unknown kind, wrong values, a condition on nothing.
    """
    blocks = space if isinstance(space, list) else [space]
    if not any(blocks):
        raise ConfigError("space is empty; name at least one key to vary, as in method.inter: [dl]")
    return [_read_block(block) for block in blocks]


def _read_block(block: Mapping[str, Any]) -> list[Dimension]:
    found: list[Dimension] = []
    for key, entry in block.items():
        if key == "seed" or key.startswith("seed."):
            raise ConfigError(
                "space: seed is no entry of a space: seeds pair the configurations; list them in "
                "seeds"
            )
        dimension = read_dimension(key, entry, f"space: {key}")
        random = {d.key for d in found if d.kind != "grid"}
        for other in dimension.when:
            if other not in {d.key for d in found}:
                raise ConfigError(
                    f"space: {key}: when names {other}, which is no earlier entry of the same "
                    "mapping"
                )
            earlier = next(d for d in found if d.key == other)
            never = [v for v in dimension.when[other] if v not in earlier.values]
            if earlier.listed and (never or not dimension.when[other]):
                raise ConfigError(
                    f"space: {key}: when {other} is one of {list(dimension.when[other])}, but it "
                    f"is only ever one of {list(earlier.values)}"
                )
            if dimension.kind == "grid" and other in random:
                raise ConfigError(
                    f"space: {key} is a grid and cannot depend on the random {other}; use choice"
                )
        found.append(dimension)
    return found


def read_dimension(key: str, entry: Any, where: str) -> Dimension:
    """One entry of a space.

    Args:
        where: what messages call it.

    Raises:
        ConfigError: an unknown kind or wrong values.
    """
    if isinstance(entry, list):
        entry = {"grid": entry}
    kinds = [k for k in KINDS if isinstance(entry, dict) and k in entry]
    if len(kinds) != 1 or set(entry) - {kinds[0], "when"}:
        raise ConfigError(
            f"{where} must be a list of values, or one of {', '.join(KINDS)} (and perhaps when), "
            f"got {entry!r}"
        )
    kind, values, when = kinds[0], entry[kinds[0]], entry.get("when") or {}
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: {kind} needs a list of values, got {values!r}")
    if kind not in ("grid", "choice"):
        _check_range(where, kind, values)
    if not isinstance(when, dict):
        raise ConfigError(f"{where}: when must map keys to values, got {when!r}")
    conditions = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in when.items()}
    return Dimension(key, kind, tuple(values), conditions)


def _check_range(where: str, kind: str, values: list[Any]) -> None:
    numbers = (int,) if kind == "randint" else (int, float)
    good = len(values) == 2 and all(
        isinstance(v, numbers) and not isinstance(v, bool) for v in values
    )
    if not good or not values[0] < values[1] or (kind == "loguniform" and values[0] <= 0):
        least = ", above 0" if kind == "loguniform" else ""
        raise ConfigError(f"{where}: {kind} needs [low, high] with low < high{least}, got {values}")


def expand(blocks: Sequence[Sequence[Dimension]], samples: int, search_seed: int) -> list[Raw]:
    """Settings of every configuration, in order: grids in full, random entries drawn."""
    found: list[Raw] = []
    for block in blocks:
        points: list[Raw] = [{}]
        for dimension in (d for d in block if d.kind == "grid"):
            points = [q for p in points for q in _with_each(dimension, p)]
        drawn = [d for d in block if d.kind != "grid"]
        if samples > 1 and not any(d.kind != "grid" for b in blocks for d in b):
            raise ConfigError(
                f"budget.samples: {samples} draws of a space without random entries are all the "
                "same; leave it out"
            )
        for point in points:
            for _ in range(samples if drawn else 1):
                rng = generator(search_seed, "sweep", len(found))
                found.append(_in_order(block, _drawn(drawn, point, rng)))
    return found


def _with_each(dimension: Dimension, point: Raw) -> Iterator[Raw]:
    if not dimension.active(point):
        yield point
        return
    for value in dimension.values:
        yield {**point, dimension.key: value}


def _drawn(dimensions: Sequence[Dimension], point: Raw, rng: Any) -> Raw:
    settings = dict(point)
    for dimension in dimensions:
        if dimension.active(settings):
            settings[dimension.key] = dimension.draw(rng)
    return settings


def _in_order(block: Sequence[Dimension], settings: Raw) -> Raw:
    return {d.key: settings[d.key] for d in block if d.key in settings}
