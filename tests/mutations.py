"""Hypothesis strategies that spoil configurations and files, and the judge of what comes of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hypothesis import strategies as st

from selffl_ray.cli import main
from selffl_ray.registry import (
    algorithms,
    datasets,
    inter_estimators,
    intra_estimators,
    models,
    partitioners,
)

CASES = int(os.environ.get("SELFFL_RAY_MUTATIONS", "2000"))
"""Mutated inputs of the whole suite; more of them on demand."""
PATIENCE_S = 30
"""Longest time of one case, on a machine that does other things besides."""
MEMORY_BYTES = 3 * 2**30
"""Address space that one case may take in addition."""


class HangError(BaseException):
    """A case took too long; no ``except Exception`` catches it."""


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """End a case that hangs, and refuse it memory that the machine may not have."""

    def give_up(number: int, frame: object) -> None:
        raise HangError(f"no end after {PATIENCE_S} s: {what}")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY_BYTES
    before = signal.signal(signal.SIGALRM, give_up)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    signal.alarm(PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


class Said(NamedTuple):
    code: int | str | None
    out: str
    err: str


def selffl(*arguments: str) -> Said:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None
    with (
        guarded(" ".join(arguments)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    return Said(code, out.getvalue(), err.getvalue())


def assert_ours(said: Said, *, started: bool = False) -> None:
    """Success, or one line of ours with status 2 (1 if a run had started)."""
    told = f"status {said.code}\n{said.err}"
    assert "Traceback" not in said.err, told
    # What our own errors never say: the catch-all for our mistakes does.
    assert "--verbose shows where" not in said.err, told
    if said.code == 0:
        return
    assert said.code in ((1, 2) if started else (2,)), told
    last = said.err.splitlines()[-1]
    assert last.startswith("selffl: "), told
    assert started or said.err == f"{last}\n", told
    assert len(last) < 2100, told


def state_of(folder: Path, *besides: Path) -> dict[str, tuple[Any, ...]]:
    """Everything in a folder, by name: kind, size, time and content."""
    found: dict[str, tuple[Any, ...]] = {}
    for root, names, files in os.walk(folder):
        here = Path(root)
        names[:] = [name for name in names if here / name not in besides]
        for name in (*names, *files):
            path = here / name
            status = path.lstat()
            content = ""
            if path.is_file() and not path.is_symlink():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


# -- plain values -------------------------------------------------------------------------------

PATHS = ["../../x", "/etc/passwd", "/", ".", "..", "a/b", "a\\b", "~", "~root/x", "\0", "con", "-",
         "../sentinel/file", "link", "/dev/zero", "file:///tmp/x", "sqlite:///../sentinel/m.db",
         "sqlite:////proc/x.db", "http://user:secret@host/", "$(touch x)", "%2e%2e%2f", "*",
         "?"]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
           -(10**30), 0.0, -0.0, 0.5, 1e-300, 1e300, 1e308, -1e308, 1e-9,
           float("nan"), float("inf"), float("-inf")]  # fmt: skip
TEXTS = ["", " ", "x", "é", "\U0001f4a9", "\ud800"[:0] + "ünï", "a\nb", "\t", "x" * 5000, "null",
         "true", "1e3", "auto", "none", "fedavg", "selffl", "local", "natural", "dirichlet", "cnn",
         "lstm", "mnist", "gaussian", "digits", "epoch", "cosine", "__class__", "{0}",
         "%s"]  # fmt: skip

NAMES = sorted(
    {name for registry in (algorithms, datasets, models, partitioners, intra_estimators,
                           inter_estimators) for name in registry.names()}
)  # fmt: skip

scalars = st.one_of(
    st.sampled_from([None, True, False]),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(PATHS),
    st.integers(-5, 60),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=12),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(raw: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in nested mappings and lists."""
    found: list[tuple[Any, ...]] = []
    items = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for key, value in items:
        found.append((*at, key))
        if isinstance(value, dict | list):
            found += places(value, (*at, key))
    return found


def inside(raw: Any, path: tuple[Any, ...]) -> Any:
    """What a path leads to."""
    for key in path:
        raw = raw[key]
    return raw


def _of_its_type(value: Any) -> st.SearchStrategy[Any]:
    """Other values that pass the check of the type, extreme ones among them."""
    match value:
        case bool():
            return st.just(not value)
        case int():
            return st.one_of(
                st.sampled_from([n for n in NUMBERS if isinstance(n, int)]), st.integers(-2, 40)
            )
        case float():
            return st.one_of(st.sampled_from([0, 1, *NUMBERS]), st.floats(0, 2))
        case str():
            return st.sampled_from([*NAMES, *TEXTS, *PATHS])
        case list() if value:
            inner = st.one_of([_of_its_type(v) for v in value])
            return st.lists(inner, max_size=2 * len(value))
        case _:
            return values


@st.composite
def spoiled(draw: Callable[..., Any], raw: dict[str, Any]) -> dict[str, Any]:
    """A mapping with one to three changes (``raw`` itself is changed: give a copy)."""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        found = places(raw)
        if not found:
            break
        path = draw(st.sampled_from(found))
        parent, key = inside(raw, path[:-1]), path[-1]
        kinds = ["same", "same", "same", "set", "drop", "add", "swap", "wrap", "rename"]
        match draw(st.sampled_from(kinds)):
            case "same":
                parent[key] = draw(_of_its_type(parent[key]))
            case "set":
                parent[key] = draw(values)
            case "drop":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[draw(st.one_of(st.text(max_size=8), st.integers(), st.none()))] = draw(
                    values
                )
            case "swap":
                other = draw(st.sampled_from(found))
                parent[key] = _copied(inside(raw, other))
            case "wrap":
                parent[key] = draw(st.sampled_from([[parent[key]], {"name": parent[key]}]))
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = parent.pop(key)
    return raw


def _copied(value: Any) -> Any:
    return yaml.safe_load(yaml.safe_dump(value, allow_unicode=True))


SNIPPETS = [
    "\n? [a, b]\n: c\n",
    "\n!!python/object/apply:os.system [touch owned]\n",
    "\nx: !!python/name:os.system\n",
    "\nplugins: [os]\n",
    "\na: &a [*a]\n",
    "\nseed: &x {y: *x}\n",
    "\n<<: *nothing\n",
    "\n<<: 3\n",
    "\n---\nseed: 1\n",
    "\t",
    "\0",
    "\ufeff",
    "{",
    "]",
    '"',
    "'",
    "|",
    ": ",
    "- ",
    "#",
    "[" * 3000,
    "{a: " * 1500,
    "\nseed: 2020-13-45\n",
    "\nseed: 0o17\n",
    "\nseed: 1_000\n",
    "\nseed: 12:30:45\n",
    "\nseed: !!binary aGk=\n",
    "\nseed: !!set {a, b}\n",
    "\nseed: !!omap [a: 1]\n",
    "\nseed: !!timestamp x\n",
    "\nseed: !!int x\n",
    "\nseed: !!float ''\n",
    "\nseed: .nan\n",
    f"\nseed: {'9' * 5000}\n",
    f"\nseed: 0x{'f' * 5000}\n",
    "\n"
    + "\n".join(
        [
            "z0: &z0 [x, x, x, x, x, x, x, x, x]",
            *(f"z{n}: &z{n} [{', '.join([f'*z{n - 1}'] * 9)}]" for n in range(1, 12)),
        ]
    ),
]


def cut(draw: Callable[..., Any], raw: bytes) -> bytes:
    """A file with one to three changes: shorter, a bit, a byte, a part twice, elsewhere or lost."""
    for _ in range(draw(st.integers(1, 3))):
        size = len(raw)
        at = draw(st.one_of(st.integers(0, size), st.integers(0, min(size, 64))))
        match draw(st.sampled_from(["cut", "bit", "byte", "twice", "lose", "extreme", "grow"])):
            case "cut":
                raw = raw[:at]
            case "bit" if at < size:
                raw = raw[:at] + bytes([raw[at] ^ (1 << draw(st.integers(0, 7)))]) + raw[at + 1 :]
            case "byte" if at < size:
                raw = raw[:at] + bytes([draw(st.integers(0, 255))]) + raw[at + 1 :]
            case "twice":
                end = draw(st.integers(at, min(size, at + 200)))
                raw = raw[:end] + raw[at:end] + raw[end:]
            case "lose":
                raw = raw[:at] + raw[draw(st.integers(at, min(size, at + 200))) :]
            case "extreme":
                word = draw(
                    st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
                )
                raw = raw[:at] + word * draw(st.integers(1, 2)) + raw[at + 4 :]
            case "grow":
                raw += draw(st.binary(min_size=1, max_size=40))
    return raw


@st.composite
def cut_bytes(draw: Callable[..., Any], raw: bytes) -> bytes:
    """``cut`` as a strategy."""
    return cut(draw, raw)


@st.composite
def spoiled_text(draw: Callable[..., Any], raw: dict[str, Any]) -> bytes:
    """A file of YAML: values changed, then perhaps the text itself."""
    changed = draw(spoiled(raw)) if draw(st.integers(0, 4)) else raw
    try:
        text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    except (ValueError, yaml.YAMLError):
        text = repr(changed)
    kind = draw(st.integers(0, 9))
    if kind == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(SNIPPETS)) + text[at:]
    if kind == 1:
        text += draw(st.sampled_from(SNIPPETS))
    encoded = text.encode("utf-8", "surrogatepass")
    return cut(draw, encoded) if kind == 2 else encoded
