"""YAML of plain values only, and what a file of it may not do."""

from __future__ import annotations

import re
from typing import Any

import yaml

DEEPEST = 50
MOST_VALUES = 100_000
"""Of a file, aliases written out."""
BROKEN_YAML = (
    yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError
)  # fmt: skip
"""What PyYAML raises; not of its own kind are a date that does not exist, or a tag whose text does
not fit."""


class _Loader(yaml.SafeLoader):
    """Plain values only, no key twice in a mapping, nothing that unfolds into more than a file."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"more than {DEEPEST} brackets within one another",
                problem_mark=self.get_mark(),
            )
        super().fetch_flow_collection_start(token)

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _unfolded(node, {})
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    text = f"the key {key.value!r} is given twice; keep one"
                    raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for when every alias is written out.

    Args:
        known: of the nodes seen so far; 0 for those around this one.
    """
    if id(node) not in known:
        known[id(node)] = 0
        parts = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    count = known[id(node)]
    if not 0 < count <= MOST_VALUES:
        what = (
            f"aliases stand for more than {MOST_VALUES} values" if count else "an alias in itself"
        )
        raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
    return count


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def load(text: str) -> Any:
    """Plain values from YAML.

    Raises:
        one of BROKEN_YAML.
    """
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def dump(raw: Any) -> str:
    """YAML that reads back equal."""
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
