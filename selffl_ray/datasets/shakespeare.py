"""Shakespeare in LEAF's files: the next character of a role's lines, one client a role.

``x`` holds strings of 80 characters and ``y`` the character that follows. The alphabet is fixed
(``selffl_ray.datasets.text``); a character outside of it is the class and token ``<unknown>``.

LEAF makes an example at every character of a role's text, so that the 80 examples after one hold
its answer in their strings. Parts of a role are therefore cut by position, ``context`` examples
apart, and roles are not dealt anew. This needs the examples in the order of the text, as LEAF's
``-s niid`` leaves them; its ``-s iid`` mixes those of all roles, and no split of such files is free
of leaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selffl_ray.datasets.base import Dataset, Group
from selffl_ray.datasets.leaf import (
    Examples,
    LeafConfig,
    ListError,
    find_leaf,
    leaf_defaults,
    leaf_groups,
    strings,
)
from selffl_ray.datasets.text import (
    CHARACTER_NAMES,
    NUM_CHARACTERS,
    character_ids,
    character_windows,
)
from selffl_ray.errors import ConfigError
from selffl_ray.registry import register_dataset
from selffl_ray.tasks import DataShape


@dataclass(frozen=True, kw_only=True)
class ShakespeareConfig(LeafConfig):
    """Options of ``data: {name: shakespeare}``."""

    context: int = 80
    """Characters before the one to predict; the last so many of a string are kept."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"data.context must be >= 1, got {self.context}")


@register_dataset("shakespeare", ShakespeareConfig)
def shakespeare(config: ShakespeareConfig) -> Dataset:
    """Next character in Shakespeare's plays, each speaking role a client (LEAF's files)."""

    def convert(x: list[Any], y: list[Any]) -> Examples:
        following = strings(y, "y")
        for at, character in enumerate(following):
            if len(character) != 1:
                raise ListError(f"y[{at}] must be one character, found {character[:20]!r}")
        labels = character_ids("".join(following)).astype(np.int64)
        return Examples(character_windows(strings(x, "x"), config.context), labels)

    def read(files: tuple[Path, ...], seed: int) -> Iterator[Group]:
        return leaf_groups(files, config.split, convert)

    return Dataset(
        name="shakespeare",
        title="The Complete Works of William Shakespeare by role (LEAF; Caldas et al. 2018)",
        licence="public domain (Project Gutenberg); LEAF's code is BSD-2-Clause",
        shape=DataShape((config.context,), NUM_CHARACTERS, NUM_CHARACTERS),
        find=lambda source: find_leaf("shakespeare", config.split, source),
        read=read,
        label_names=CHARACTER_NAMES,
        natural=True,
        # Strings are cut to the context, so no window and its answer reach further.
        overlap=config.context,
        defaults={
            **leaf_defaults("shakespeare", config),
            "model": {"name": "textcnn", "pool": "last", "kernel": min(8, config.context)},
        },
    )
