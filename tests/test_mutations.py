"""Configurations, sweeps, data files and checkpoints that are not as they should be.

Whatever is in them, the user sees one line of ours and the documented status, nothing outside of
the output folder is touched, and nothing hangs. Mutated inputs are drawn the same in every run;
``SELFFL_RAY_MUTATIONS`` says how many. What they found is kept below by name.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import struct
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from selffl_ray import api, load_config
from selffl_ray.config import to_raw
from selffl_ray.datasets.parquet import ParquetConfig, find_parquet, read_parquet
from selffl_ray.datasets.speech import read_wav
from selffl_ray.datasets.store import prepare
from selffl_ray.errors import SelfFLError
from selffl_ray.raw_config import read_yaml
from selffl_ray.registry import Component, datasets
from selffl_ray.runtime.placement import Node
from tests import mutations
from tests.datasets import leaf_files
from tests.mutations import assert_ours, guarded, selffl, state_of


def drawn(share: float) -> Callable[..., Any]:
    """So large a share of all mutated inputs, the same in every run and as they come."""
    return settings(
        max_examples=max(1, round(share * mutations.CASES)),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory, stores) -> Iterator[Path]:
    """A folder to work in, beside one that nobody has any business in."""
    root = tmp_path_factory.mktemp("lab")
    for name in ("sentinel/deep", "work/runs", "home"):
        (root / name).mkdir(parents=True)
    (root / "sentinel" / "file").write_text("untouched")
    (root / "work" / "link").symlink_to("../sentinel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "work")
        patch.setenv("HOME", str(root / "home"))
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        yield root


@pytest.fixture
def nothing_starts(monkeypatch) -> None:
    """Instead of starting clients a run ends with an error without a word."""

    def start(*args: object, **kwargs: object) -> None:
        raise StartedError

    for name in ("cluster", "run_in_thread", "run_on_ray"):
        monkeypatch.setattr(api, name, start)
    nodes = [Node("here", 2.0, 0.0, 2**34)]
    monkeypatch.setattr(api, "this_machine", lambda: nodes)
    monkeypatch.setattr("selffl_ray.commands.this_machine", lambda: nodes)


class StartedError(SelfFLError):
    """A run came so far that its clients would have been started."""


# -- configurations -------------------------------------------------------------------------------

SMALL_DATA = "data={name: gaussian, num_clients: 5, dimension: 4, num_examples: [5, 30]}"
EXPERIMENTS = [
    {},
    {"data": {"name": "gaussian", "num_clients": 3}},
    *(
        to_raw(load_config(None, ["training.num_rounds=3", *sets]))
        for sets in (
            [],
            ["method.preset=as_described", "model=cnn"],
            ["method={name: fedavg, server: fedadam}", "placement.backend=local"],
            ["method=apfl", "placement.backend=local"],
            ["data={name: synthetic_logistic, num_clients: 4, max_examples: 60}", "method=pfedme"],
            [SMALL_DATA, "placement.backend=local"],
            [SMALL_DATA, "method.intra=known", "evaluation.new_clients=0.2"],
        )
    ),
]


@pytest.mark.slow
@drawn(0.35)
@given(data=st.data())
def test_a_mutated_configuration_is_refused_in_a_line_or_runs(lab, nothing_starts, data):
    raw = copy.deepcopy(data.draw(st.sampled_from(EXPERIMENTS)))
    Path("c.yaml").write_bytes(data.draw(mutations.spoiled_text(raw)))
    before = state_of(lab)
    if data.draw(st.booleans()):
        assert_ours(selffl("run", "c.yaml", "--dry-run"))
    else:
        said = selffl("run", "c.yaml", "--output", "out")
        assert_ours(said, started=True)
        assert said.code == 2 or said.err == "selffl: \n", said
    assert state_of(lab) == before


SWEEPS = [read_yaml(path) for path in sorted(Path("tune_configs").glob("*.yaml"))]
SMALL_SWEEP = {
    "experiment": "small",
    "base": {
        "data": {"name": "gaussian", "num_clients": 4, "dimension": 3, "num_examples": [6, 9]},
        "training": {"num_rounds": 3},
        "evaluation": {"splits": [0.5, 0.5, 0.0]},
    },
    "space": [
        {"method": ["fedavg", "local"], "training.learning_rate": {"loguniform": [0.01, 0.5]}},
        {"method": ["fedprox"], "method.mu": {"uniform": [0.1, 1.0]},
         "training.batch_size": {"randint": [2, 9], "when": {"method": "fedprox"}}},
    ],
    "seeds": [0, 1],
    "metric": "val/local_mse",
    "mode": "min",
    "budget": {"samples": 2, "trials": 40},
    "confirm": {"seeds": [5, 6], "top": 1},
}  # fmt: skip


@pytest.mark.slow
@drawn(0.1)
@given(data=st.data())
def test_a_mutated_sweep_is_refused_in_a_line_or_planned(lab, nothing_starts, data):
    raw = copy.deepcopy(data.draw(st.sampled_from([SMALL_SWEEP, SMALL_SWEEP, *SWEEPS])))
    Path("s.yaml").write_bytes(data.draw(mutations.spoiled_text(raw)))
    before = state_of(lab)
    assert_ours(selffl("tune", "s.yaml", "--dry-run"))
    assert state_of(lab) == before


# -- data files -----------------------------------------------------------------------------------


def write_idx(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("t10k", 6)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8).tobytes()
        head = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images)
        head = struct.pack(">4BI", 0, 0, 8, 1, count)
        labels = bytes(k % 10 for k in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels)


def write_cifar(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        rows = rng.integers(256, size=(3, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


def write_leaf(folder: Path) -> None:
    pixels = np.round(np.random.default_rng(0).uniform(size=(3, 784)), 2).tolist()
    users = {"f0": (pixels[:2], [1, 61]), "f1": (pixels[2:], [7])}
    leaf_files.write(folder / "all_data" / "one.json", users)


def write_table(folder: Path) -> None:
    columns = {"a": [1.0, 2.0, 3.0], "client_id": ["x", "x", "y"], "label": [0, 1, 2]}
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=2)


def write_sound(folder: Path) -> None:
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.arange(400, dtype="<i2").tobytes())


def read_set(name: str, options: dict[str, Any]) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        chosen = Component(name, datasets.get(name).config_type(**options))
        made = datasets.make(chosen)
        store = prepare(made, chosen.options, str(folder), 0, folder.parents[1] / "stores")
        return store.read(np.arange(store.manifest.num_rows))

    return read


NUMBERS = ParquetConfig(features=("a",), shape=(1,), num_classes=3)
FORMATS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "idx": (write_idx, read_set("mnist", {})),
    "cifar": (write_cifar, read_set("cifar10", {})),
    "leaf": (write_leaf, read_set("femnist", {"split": "none"})),
    "parquet": (write_table, lambda f: list(read_parquet(find_parquet(str(f)), NUMBERS))),
    "wav": (write_sound, lambda f: read_wav(f / "a.wav", 8000)),
}


def spoil_a_file(data: Any, folder: Path) -> str:
    """Change, remove, empty or exchange a file; what was done, in words."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    match data.draw(st.sampled_from(["cut", "cut", "cut", "cut", "remove", "other", "link"])):
        case "cut":
            path.write_bytes(data.draw(mutations.cut_bytes(path.read_bytes())))
        case "remove":
            path.unlink()
        case "other":
            path.write_bytes(data.draw(st.sampled_from(files)).read_bytes())
        case "link":
            path.unlink()
            path.symlink_to(data.draw(st.sampled_from(["/nowhere", path.name, "."])))
    return path.name


def assert_one_line(error: SelfFLError) -> None:
    assert len(str(error)) < 2000
    assert str(error).count("\n") == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
@drawn(0.07)
@given(data=st.data())
def test_a_mutated_data_file_is_refused_in_a_line_or_read(lab, name, data):
    write, read = FORMATS[name]
    folder = lab / "work" / f"data-{name}"
    for left in (folder, lab / "stores"):
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir()
    write(folder)
    spoil_a_file(data, folder)
    before = state_of(lab, lab / "stores")
    with guarded(name):
        try:
            read(folder)
        except SelfFLError as error:
            assert_one_line(error)
    assert state_of(lab, lab / "stores") == before


@pytest.mark.slow
@drawn(0.1)
@given(data=st.data())
def test_a_mutated_store_is_refused_in_a_line_or_read(lab, data):
    """Its manifest, its index and its record batches."""
    root = lab / "stores"
    shutil.rmtree(root, ignore_errors=True)
    config = load_config(None, [SMALL_DATA])
    chosen = config.data.component
    dataset, options = datasets.make(chosen), datasets.options(chosen)
    store = prepare(dataset, options, None, 0, root)
    rows = np.arange(store.manifest.num_rows)
    good = store.read(rows)
    spoil_a_file(data, store.folder)
    with guarded("store"):
        try:
            again = prepare(dataset, options, None, 0, root)
            found = again.read(np.arange(again.manifest.num_rows))
            again.labels()
        except SelfFLError as error:
            assert_one_line(error)
        else:
            np.testing.assert_array_equal(found.y, good.y)
            np.testing.assert_array_equal(found.x, good.x)


# -- checkpoints ----------------------------------------------------------------------------------

TINY_RUN = [
    f"--set={setting}"
    for setting in (
        SMALL_DATA,
        "placement.backend=local",
        "tracking.enabled=false",
        "training.num_rounds=2",
        "training.num_local_steps=1",
        "method=fedavg",
        "checkpoint.every=1",
    )
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stores) -> Path:
    """A run's folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert selffl("run", *TINY_RUN, "--output", str(folder)).code == 0
    return folder


@pytest.mark.slow
@drawn(0.1)
@given(data=st.data())
def test_a_mutated_run_is_refused_in_a_line_or_gone_on_with_to_its_end(finished, data):
    """Checkpoints, tables, configuration and notes; ``--resume`` and ``verify`` read them."""
    root = finished.parent / "lab"
    shutil.rmtree(root, ignore_errors=True)
    folder = root / "run"
    shutil.copytree(finished, folder)
    (root / "beside").write_text("untouched")
    told = spoil_a_file(data, folder)
    if data.draw(st.booleans()):
        shutil.rmtree(folder / "checkpoints" / "round_0")
    before = state_of(root, folder)
    said = selffl("run", "--resume", str(folder))
    assert_ours(said, started=True)
    if said.code == 0 and told != "config.yaml":
        digests = [
            json.loads((f / "summary.json").read_text())["digest"] for f in (folder, finished)
        ]
        assert digests[0] == digests[1]
        for name, column in (("rounds", "digest"), ("clients", "global_loss")):
            tables = [pq.read_table(f / f"{name}.parquet")[column] for f in (folder, finished)]
            assert tables[0].equals(tables[1])
    assert state_of(root, folder) == before


# -- what was found -------------------------------------------------------------------------------

NINES = "\n".join(
    ["z0: &z0 [x, x, x, x, x, x, x, x, x]"]
    + [f"z{n}: &z{n} [{', '.join([f'*z{n - 1}'] * 9)}]" for n in range(1, 12)]
)
FOUND = {
    "a tag whose text does not fit": ("seed: !!timestamp x", "c.yaml is not valid YAML"),
    "a tag without text": ("seed: !!float ''", "c.yaml is not valid YAML"),
    "three thousand brackets": ("a: " + "[" * 3000, "more than 50 brackets within one another"),
    "aliases of aliases": (f"{NINES}\nseed: *z11", "aliases stand for more than 100000 values"),
    "an alias in itself": ("tracking: {tags: &a {x: *a}}", "an alias in itself"),
    "a number of thousands of digits": (f"seed: 0x{'f' * 5000}", "a number of thousands of digits"),
    "a name without an end": (f"method: {'x' * 9000}", "unknown method 'xxx"),
    "a key without an end": (f"{'x' * 900}: 1", "unknown key; known: checkpoint, "),
    "more clients than can be counted": (
        "data: {name: gaussian, num_clients: 9223372036854775807}",
        "data.num_clients must be at most 100000000, got 9223372036854775807",
    ),
    "more rounds than can be planned": (
        "training: {num_rounds: 100000000}",
        "training.num_rounds must be at most 1000000, since each is planned",
    ),
    "more examples than memory holds": (
        "data: {name: gaussian, num_examples: [100000000]}",
        "too large for the memory of this machine",
    ),
    "a model that memory does not hold": (
        "model: {name: mlp, hidden: [100000000, 100000000]}",
        "too large for the memory of this machine",
    ),
    "a batch that memory does not hold": (
        "training: {batch_size: 100000000, sampling: replacement}",
        "too large for the memory of this machine",
    ),
    "more bands than sound has": (
        "data: {name: speech_commands, num_mels: 100000}",
        "data.num_mels must be at most 512, got 100000",
    ),
    "a clip of centuries": (
        "data: {name: speech_commands, length_s: 1.0e+300}",
        "data.length_s must be at most 60, got 1e+300",
    ),
    "a window of centuries": (
        "data: {name: watch, window_s: 1.0e+300}",
        "data.window_s and data.hop_s must be at most 3600",
    ),
}


@pytest.mark.parametrize(("text", "message"), FOUND.values(), ids=FOUND)
def test_a_configuration_that_broke_the_command_is_refused_in_a_line(
    lab, nothing_starts, text, message
):
    Path("c.yaml").write_text(text)
    said = selffl("run", "c.yaml", "--dry-run")
    assert_ours(said)
    assert said.code == 2
    assert message in said.err


def test_a_plugin_that_ends_the_process_is_refused_in_a_line(lab, nothing_starts):
    Path("my_ending_plugin.py").write_text("raise SystemExit(0)")
    said = selffl("run", "--dry-run", "--set=plugins=[my_ending_plugin]")
    assert_ours(said)
    assert said.code == 2
    assert "'my_ending_plugin' failed while it was imported: SystemExit" in said.err


def test_a_folder_in_place_of_a_recording_is_refused(tmp_path):
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(SelfFLError, match=r"a\.wav: not a WAV file"):
        read_wav(tmp_path / "a.wav", 8000)


@pytest.mark.parametrize("name", ["rounds", "clients"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:-9])])
def test_a_run_whose_tables_are_lost_is_not_gone_on_with_and_left_as_it_is(
    finished, tmp_path, name, damage
):
    """It ended with a table of the rounds that came after, and without a digest."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage(folder / f"{name}.parquet")
    before = state_of(folder)
    said = selffl("run", "--resume", str(folder))
    assert_ours(said)
    assert said.code == 2
    assert f"{name}.parquet" in said.err
    assert "put it back, or start the run anew" in said.err
    assert state_of(folder) == before


def test_a_hang_and_a_traceback_would_be_noticed(monkeypatch):
    """The judge itself."""
    monkeypatch.setattr(mutations, "PATIENCE_S", 1)

    def for_ever() -> None:
        with contextlib.suppress(Exception):
            while True:
                pass

    with pytest.raises(mutations.HangError), guarded("this"):
        for_ever()
    for said in (
        mutations.Said(1, "", "selffl: KeyError: 3 (--verbose shows where)\n"),
        mutations.Said(2, "", "Traceback (most recent call last)\nselffl: x\n"),
        mutations.Said(1, "", "selffl: before anything started\n"),
        mutations.Said(2, "", "a\nselffl: two lines\n"),
    ):
        with pytest.raises(AssertionError):
            assert_ours(said)
