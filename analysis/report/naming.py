"""Labels of rows: the method's, and the fewest options that tell its rows apart."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from analysis.report.store import StoredRun
from selffl_ray.config import flatten, to_raw
from selffl_ray.errors import ConfigError
from selffl_ray.registry import algorithms

SHORT = 40
"""Longest value of a parameter in a label."""
UNSET = "unset"
MOST_TRIED = 4
"""Sets of up to so many options are tried; beyond, all that differ are named."""
VARIED = "space.method"
"""Tag of a sweep's trial: the method, with the options that make it a method of its own beside
others of that name (``{'name': 'fedavg', 'server': 'fedavgm'}``). What a sweep tunes has tags of
its own."""


class Variant(NamedTuple):
    """A row's options, and the names of those that a sweep set together with the method's name.

    named: empty where the sweep gave the name alone; None outside of sweeps over methods.
    """

    options: Mapping[str, str]
    named: tuple[str, ...] | None


def variant(run: StoredRun, options: Mapping[str, str]) -> Variant:
    """What a row's run is, beside its method's label."""
    if VARIED not in run.tags:
        return Variant(options, None)
    settings = flatten(_parsed(run.tags[VARIED]), "method")
    named = [name if name in options else f"{name}.name" for name in settings]
    return Variant(options, tuple(name for name in named if name in options))


def own_name(run: StoredRun) -> str:
    """The method's label with what a sweep set together with its name, as for a run left out."""
    settings = flatten(_parsed(run.tags.get(VARIED, "")))
    return " ".join([run.tags["method_label"], *(f"{k}={v}" for k, v in settings.items())])


def _parsed(text: str) -> dict[str, object]:
    """The settings beside name and preset, which the label holds already."""
    if not text.startswith("{"):
        return {}
    return {k: v for k, v in ast.literal_eval(text).items() if k not in ("name", "preset")}


def method_defaults(method: str) -> dict[str, str]:
    """A method's options where none is given; empty for one that this version does not know."""
    try:
        return flatten(to_raw(algorithms.get(method).config_type()), "method")
    except ConfigError:
        return {}


def marks(places: Sequence[Sequence[Variant]], defaults: Mapping[str, str]) -> list[list[str]]:
    """``server=fedavgm`` for every row of one label: what tells it from others of that label.

    A label means the same in all places: rows are told apart by the same options in each, the
    fewest that make the rows of each place distinct, and distinct those that a sweep took for
    methods of their own. Tuned values may thus differ between places under one label. An option
    is left out where it has its default; a number only where the sweep left it alone.

    Args:
        places: rows of every section or scene; those of one place differ in their options.
        defaults: of the method; empty where the label stands for other ones (a preset's).
    """
    telling = _telling(places)
    short = shorten(telling)

    def mark(one: Variant, names: Iterable[str]) -> str:
        return " ".join(f"{short[n]}={one.options.get(n, UNSET)[:SHORT]}" for n in names)

    brief = [[mark(one, _told(one, telling, defaults)) for one in place] for place in places]
    whole = [[mark(one, telling) for one in place] for place in places]
    pairs = {pair for own in zip(brief, whole, strict=True) for pair in zip(*own, strict=True)}
    return brief if len(pairs) == len({told for told, _ in pairs}) else whole


def _told(one: Variant, names: Sequence[str], defaults: Mapping[str, str]) -> Iterator[str]:
    for name in names:
        value = one.options.get(name)
        usual = defaults.get(name)
        left_alone = one.named is not None and name not in one.named
        if value != usual or (usual is not None and _is_number(usual) and not left_alone):
            yield name


def _telling(places: Sequence[Sequence[Variant]]) -> list[str]:
    """The fewest options; among as few, those that make a method before those that are tuned."""
    rows = [one for place in places for one in place]
    chosen = sorted({name for one in rows for name in one.named or ()})

    def values(one: Variant, names: Sequence[str]) -> tuple[str | None, ...]:
        return tuple(one.options.get(name) for name in names)

    def enough(names: Sequence[str]) -> bool:
        if any(len({values(one, names) for one in place}) < len(place) for place in places):
            return False
        return len({(values(o, names), values(o, chosen)) for o in rows}) == len(
            {values(o, names) for o in rows}
        )

    def cost(name: str) -> int:
        if name in chosen:
            return 0
        found = {one.options.get(name) for one in rows}
        numbers = any(value is not None and _is_number(value) for value in found)
        return 1 + numbers + 2 * (None in found) + 4 * (not name.startswith("method."))

    differing = [
        name
        for name in sorted({name for one in rows for name in one.options})
        if any(len({one.options.get(name) for one in place}) > 1 for place in places)
        or (name in chosen and len({one.options.get(name) for one in rows}) > 1)
    ]
    for count in range(min(MOST_TRIED, len(differing)) + 1):
        fitting = [names for names in itertools.combinations(differing, count) if enough(names)]
        if fitting:
            return list(min(fitting, key=lambda names: (sum(map(cost, names)), names)))
    return differing


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def shorten(names: Sequence[str]) -> dict[str, str]:
    """The last parts of dotted names, as few as keep them apart; a last ``name`` is dropped."""
    parts = {name: name.removesuffix(".name").split(".") for name in names}
    found = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        count = next(
            (n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)),
            len(own),
        )
        found[name] = ".".join(own[-count:])
    return found
