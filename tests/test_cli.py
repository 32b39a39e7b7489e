"""The commands: what they print, what they leave, and how they refuse and stop.

In-process through ``main`` where possible; signals and exit status of a process on real ones.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

from selffl_ray import api, commands, load_config
from selffl_ray.cli import _starts_ray, build_parser, main
from selffl_ray.config import parse_config
from selffl_ray.console import (
    ProgressPrinter,
    duration,
    progress_line,
    size,
    store_line,
    text_table,
)
from selffl_ray.datasets.store import StoreProgress
from selffl_ray.errors import RunError
from selffl_ray.experiment import prepare_experiment
from selffl_ray.registry import (
    algorithms,
    datasets,
    inter_estimators,
    intra_estimators,
    models,
    partitioners,
)
from selffl_ray.run_loop import Message, Progress
from selffl_ray.runtime.placement import Node
from selffl_ray.tracking import open_store
from tests.runtime.processes import Sandbox

LOCAL = ["--set", "placement.backend=local", "--set", "tracking.enabled=false"]
QUICK = [*LOCAL, "--set", "training.num_rounds=3"]
SMALL = "data={name: gaussian, num_clients: 5, dimension: 4, num_examples: [5, 30]}"

# What MLflow's tables make SQLAlchemy say; see test_tracking.py.
NOLOAD = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)


class Said(NamedTuple):
    code: int | str | None
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def selffl(tmp_path, monkeypatch, capsys) -> Command:
    """A command in this process, run in the test's folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: str) -> Said:
        try:
            code: int | str | None = main(arguments)
        except SystemExit as end:
            code = end.code
        return Said(code, *capsys.readouterr())

    return command


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Writes a module of the user's; what it registers is forgotten after the test."""
    for registry in (
        algorithms,
        datasets,
        inter_estimators,
        intra_estimators,
        models,
        partitioners,
    ):
        registry.names()  # finds the built-in ones first
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def folder_in(said: Said) -> Path:
    (line,) = [line for line in said.out.splitlines() if line.startswith("folder: ")]
    return Path(line.removeprefix("folder: "))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


# -- help ---------------------------------------------------------------------------------------

COMMANDS = [
    "run",
    "compare",
    "data",
    "data list",
    "data describe",
    "data prepare",
    "verify",
    "ui",
    "doctor",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example_that_parses(selffl, command):
    said = selffl(*command.split(), "--help")
    assert said.code == 0
    assert said.err == ""
    example = said.out.partition("example: ")[2].replace("\n", " ").strip()
    assert example.startswith(f"selffl {command.split()[0]}")
    assert build_parser().parse_args(shlex.split(example)[1:]).command


def test_without_a_command_the_help_is_shown_and_it_is_a_usage_error(selffl):
    said = selffl()
    assert said.code == 2
    assert "example: selffl compare" in said.out


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = (
        "import sys; from selffl_ray import cli; cli.build_parser(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- refused before anything starts -------------------------------------------------------------


@pytest.fixture
def nothing_starts(tmp_path, monkeypatch) -> Iterator[None]:
    """The test fails if clients are started or a run's folder is made."""

    def start(*args: object, **kwargs: object) -> None:
        raise AssertionError("started")

    for name in ("cluster", "run_in_thread", "run_on_ray"):
        monkeypatch.setattr(api, name, start)
    monkeypatch.setattr(api, "this_machine", lambda: [Node("here", 2.0, 0.0, 2**34)])
    yield
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()


def assert_refused(said: Said, *fragments: str) -> None:
    """One line on stderr and nothing else, status 2."""
    assert said.err.startswith("selffl: ")
    assert said.err.count("\n") == 1
    assert said.err.endswith("\n")
    assert "Traceback" not in said.err
    for fragment in fragments:
        assert fragment in said.err
    assert said.out == ""
    assert said.code == 2


REFUSED = {
    "unknown key": (
        sets("training.learning_rat=0.1"),
        ["training.learning_rat: unknown key (did you mean 'learning_rate'?); known: batch_size"],
    ),
    "wrong type": (
        sets("training.num_rounds=many"),
        ["training.num_rounds must be a valid integer, got 'many'"],
    ),
    "negative learning rate": (
        sets("training.learning_rate=-0.1"),
        ["training.learning_rate must be > 0, got -0.1; usual values are"],
    ),
    "a GPU that is not there": (
        sets("placement.gpus_per_client=0.25"),
        ["placement.gpus_per_client", "0 GPUs", "use --set placement.gpus_per_client=0"],
    ),
    "an odd share of a GPU": (
        sets("placement.gpus_per_client=0.3"),
        ["placement.gpus_per_client must be 1/k", "got 0.3; use 0.25"],
    ),
    "more CPU than there is": (
        sets("placement.cpus_per_actor=1.0"),
        ["14 client actors ask for 14 CPUs", "lower placement.cpus_per_actor"],
    ),
    "missing configuration": (
        ["none.yaml"],
        ["cannot read the configuration none.yaml", "No such file"],
    ),
    "missing data folder": (
        sets("data.name=mnist", "data.source=no/such/folder"),
        ["mnist: there is no folder", "no/such/folder", "data.source"],
    ),
    "a source for data that have none": (
        sets("data.source=somewhere"),
        ["data.source: this data set reads no files", "leave it out"],
    ),
    "unknown estimator": (
        sets("method.intra=gradient_chunk"),
        [
            "method.intra: unknown intra-client estimator 'gradient_chunk' (did you mean "
            "'gradient_chunks'?); known: ",
            *intra_estimators.names(),
        ],
    ),
    "unknown inter-client estimator": (
        sets("method.inter=remll"),
        ["method.inter: unknown inter-client estimator", *inter_estimators.names()],
    ),
    "unknown method": (
        sets("method=fedavgg"),
        ["method.name: unknown method 'fedavgg' (did you mean 'fedavg'?)", "selffl"],
    ),
    "unknown preset": (
        sets("method.preset=two"),
        ["method.preset: unknown preset 'two'", "two_tap, interpolated"],
    ),
    "unknown model": (sets("model=mpl"), ["model.name: unknown model 'mpl' (did you mean 'mlp'?)"]),
    "an estimator that the data do not suit": (
        sets("method.intra=known"),
        ["method.intra: known needs data with known variances"],
    ),
    "a model that the data do not suit": (
        sets("data=gaussian", "model=cnn"),
        ["model.name cnn needs images"],
    ),
    "a client without examples": (
        sets(
            "data.partition={name: dirichlet, num_clients: 300, alpha: 0.01}",
            "placement.clients_per_actor=30",
        ),
        ["client", "examples"],
    ),
    "missing start": (
        sets("training.start_from=no.safetensors"),
        ["training.start_from: ", "no.safetensors is not a readable safetensors file"],
    ),
    "missing plugin": (
        sets("plugins=[no_such_module]"),
        ["plugins: cannot import 'no_such_module'", "lies in the folder"],
    ),
    "a setting without a value": (
        sets("training.num_rounds"),
        ["--set 'training.num_rounds': write dotted.key=value"],
    ),
    "a folder as a store": (
        sets("tracking.uri=mlruns"),
        ["tracking.uri: 'mlruns' is a folder, which MLflow no longer writes; use sqlite:///"],
    ),
    "going on with nothing": (
        ["--resume", "out"],
        ["--resume out: there is no run in that folder"],
    ),
    "going on elsewhere": (
        ["--resume", "out", "--output", "there"],
        ["--resume RUN_DIR goes on with that folder's own config.yaml; drop"],
    ),
    "output below a file": (["--output", "/dev/null/out"], ["--output /dev/null/out: /dev/null"]),
    "an unknown option": (["--sett=x"], ["unrecognized arguments: --sett=x; see selffl --help"]),
}


@pytest.mark.parametrize(("arguments", "fragments"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_request_is_refused_in_one_line_before_anything_starts(
    selffl, nothing_starts, arguments, fragments
):
    assert_refused(selffl("run", *arguments), *fragments)


COMPARE_REFUSED = {
    "unknown": (["--methods", "selffl,fedavgg"], ["unknown method 'fedavgg'", "'fedavg'"]),
    "empty": (["--methods", ""], ["method.name: unknown method ''; known: "]),
    "a comma too many": (["--methods", "local,"], ["unknown method ''"]),
    "unknown preset": (["--methods", "selffl:one"], ["unknown preset 'one'", "two_tap"]),
    "a preset that it has not": (["--methods", "local:exact"], ["method.preset: unknown key"]),
    "twice": (["--methods", "local,fedavg, local"], ["--methods names a method twice"]),
    "none": ([], ["the following arguments are required: --methods; see selffl compare --help"]),
    "seeds that are no numbers": (
        ["--methods", "local", "--seeds", "0,one"],
        ["--seeds must be whole numbers with commas, got '0,one'"],
    ),
    "a seed twice": (["--methods", "local", "--seeds", "1,01"], ["--seeds names a seed twice"]),
    "no seed": (["--methods", "local", "--seeds", ""], ["--seeds must be whole numbers"]),
}


@pytest.mark.parametrize(("arguments", "fragments"), COMPARE_REFUSED.values(), ids=COMPARE_REFUSED)
def test_a_wrong_comparison_is_refused_in_one_line_before_anything_starts(
    selffl, nothing_starts, arguments, fragments
):
    assert_refused(selffl("compare", *arguments), *fragments)


OTHERS_REFUSED = {
    "verify nothing": (["verify", "none"], ["none is not the folder of a run", "config.yaml"]),
    "verify a file": (["verify", "/dev/null"], ["/dev/null is not the folder of a run"]),
    "ui of nothing": (["ui", "none"], ["none is neither a tracked run's folder"]),
    "ui of an untracked folder": (["ui", "."], [". is neither a tracked run's folder"]),
    "ui before any run": (["ui"], ["there is no MLflow store sqlite:///", "run an experiment"]),
    "an unknown data set": (["data", "describe", "digit"], ["(did you mean 'digits'?)"]),
    "data without files": (["data", "prepare", "mnist"], ["mnist: data.source is not set; fetch"]),
    "an unknown command": (["rnu"], ["invalid choice: 'rnu'", "see selffl --help"]),
    "an unknown action": (["data", "prepar"], ["invalid choice: 'prepar'"]),
    "a port that is none": (["ui", "--port", "http"], ["invalid int value: 'http'"]),
}


@pytest.mark.parametrize(("arguments", "fragments"), OTHERS_REFUSED.values(), ids=OTHERS_REFUSED)
def test_every_command_refuses_a_wrong_request_in_one_line(selffl, arguments, fragments):
    assert_refused(selffl(*arguments), *fragments)


def test_a_folder_that_holds_a_run_is_not_written_over(selffl, tmp_path):
    assert selffl("run", *QUICK, "--output", "out").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    said = selffl("run", *QUICK, "--output", "out")
    assert_refused(said, f"--output {tmp_path}/out holds a run already", "--resume", "another")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_going_on_with_another_configuration_is_refused_and_the_run_is_left_as_it_was(
    selffl, tmp_path
):
    every = ["--set", "checkpoint.every=1"]
    assert selffl("run", *QUICK, *every, "--output", "out").code == 0
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    said = selffl("run", "--resume", "out", *sets("training.learning_rate=0.1", "seed=3"))
    assert_refused(said, "--resume", "seed, training.learning_rate; leave that as it was")
    for file in sorted((tmp_path / "out" / "checkpoints" / "round_2").iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        assert_refused(selffl("run", "--resume", "out"), str(file.parent), "delete")
        file.write_bytes(content)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert selffl("run", "--resume", "out").code == 0


def write_idx(folder: Path, cut: int = 0) -> None:
    """A tiny data set in MNIST's format; ``cut`` bytes are missing in the last file."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8).tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        head = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images)
        head = struct.pack(">4BI", 0, 0, 8, 1, count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels)
    if cut:
        last = folder / "t10k-labels-idx1-ubyte"
        last.write_bytes(last.read_bytes()[:-cut])


def test_a_truncated_file_of_the_data_is_refused(selffl, nothing_starts, tmp_path):
    write_idx(tmp_path / "images", cut=3)
    said = selffl("run", *sets("data.name=mnist", "data.source=images"))
    assert_refused(said, f"{tmp_path}/images/t10k-labels-idx1-ubyte", "truncated", "fetch it again")


BATCH_NORM = """
from dataclasses import dataclass
from torch import nn
from selffl_ray.registry import register_model

@dataclass(frozen=True, kw_only=True)
class Options:
    units: int = 8

@register_model("with_batch_norm", Options)
def with_batch_norm(config, shape):
    layers = nn.Flatten(), nn.Linear(64, config.units), nn.BatchNorm1d(config.units), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(config.units, shape.num_outputs))
"""


def test_a_model_with_running_statistics_is_refused_naming_the_layer(
    selffl, nothing_starts, plugin
):
    plugin("my_batch_norm", BATCH_NORM)
    said = selffl("run", *sets("plugins=[my_batch_norm]", "model=with_batch_norm"))
    assert_refused(said, "layer '2' (BatchNorm1d)", "set model.convert_norm: group")


def test_the_remedy_for_running_statistics_works(selffl, plugin):
    plugin("my_group_norm", BATCH_NORM)
    chosen = sets("plugins=[my_group_norm]", "model={name: with_batch_norm, convert_norm: group}")
    assert selffl("run", *QUICK, *chosen).code == 0


def test_a_plugin_that_fails_while_it_is_imported_is_refused(selffl, nothing_starts, plugin):
    plugin("my_broken_plugin", "import nothing_of_that_name\n")
    assert_refused(selffl("run", *sets("plugins=[my_broken_plugin]")), "my_broken_plugin")
    plugin("my_wrong_plugin", "1 / 0\n")
    said = selffl("run", *sets("plugins=[my_wrong_plugin]"))
    assert_refused(said, "my_wrong_plugin", "ZeroDivisionError")


# -- failures while running ---------------------------------------------------------------------

BREAKS = """
import dataclasses
from selffl_ray.algorithms.fedavg import FedAvgConfig, fedavg
from selffl_ray.registry import register_algorithm

@register_algorithm("breaks", FedAvgConfig)
def breaks(config, federation):
    inner = fedavg(config, federation)

    def local_update(shared, per_client, state, stack):
        if stack.round_index == 2:
            raise ValueError("flat battery")
        return inner.local_update(shared, per_client, state, stack)

    return dataclasses.replace(inner, local_update=local_update)
"""


@pytest.mark.parametrize("every", [1, 10])
def test_a_run_that_fails_says_cause_client_round_and_the_last_checkpoint(
    selffl, plugin, tmp_path, every
):
    plugin("my_breaking_method", BREAKS)
    chosen = sets("plugins=[my_breaking_method]", "method=breaks", f"checkpoint.every={every}")
    said = selffl("run", *QUICK, *chosen, "--output", "out")
    assert said.code == 1
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("selffl: ")]
    assert said.err.endswith(f"{line}\n")
    assert "round 2: only 0 of 14 clients answered" in line
    assert "client 'form-00', local_update: ValueError('flat battery')" in line
    last = f"the last checkpoint is {tmp_path}/out/checkpoints/round_1"
    assert line.endswith(last if every == 1 else "there is no checkpoint")
    assert line.count("checkpoint is") + line.count("no checkpoint") == 1
    assert "Traceback" not in said.err
    told = summary(tmp_path / "out")
    assert told["status"] == "FAILED"
    assert told["rounds"] == 2
    assert "flat battery" in told["error"]
    assert len(pd.read_parquet(tmp_path / "out" / "rounds.parquet")) == 2


def test_verbose_adds_the_traceback(selffl):
    said = selffl("run", "--verbose", *sets("seed=x"))
    assert said.code == 2
    assert "Traceback (most recent call last)" in said.err
    assert said.err.splitlines()[-1].startswith("selffl: seed must be a valid integer")


@pytest.mark.parametrize(
    ("arguments", "starts"),
    [
        (["run"], True),
        (["run", *sets("seed=1", "placement.clients_per_actor=7")], True),
        (["compare", "--methods", "fedavg"], True),
        (["run", "ray.yaml"], True),
        (["run", "--resume", "run"], True),
        (["run", "--dry-run"], False),
        (["run", *sets("placement.backend=local")], False),
        (["run", "local.yaml"], False),
        (["run", "local.yaml", *sets("placement.backend=ray")], True),
        (["run", *sets("placement=local")], False),
        (["run", *sets("placement=[]", "seed=1")], True),
        (["run", *sets("placement=[1]")], False),
        (["run", *sets("nonsense")], False),
        (["run", "missing.yaml"], False),
        (["run", "--resume", "missing"], False),
        (["run", "pipe"], False),
        (["run", "plugged.yaml"], False),
        (["verify", "run"], False),
        (["doctor"], False),
    ],
)
def test_a_ray_is_started_early_for_what_will_run_on_one(selffl, arguments, starts):
    Path("local.yaml").write_text("placement: {backend: local}")
    Path("ray.yaml").write_text("seed: 1")
    Path("plugged.yaml").write_text("plugins: [mine]")
    os.mkfifo("pipe")
    Path("run").mkdir()
    shutil.copy("ray.yaml", Path("run") / "config.yaml")
    assert _starts_ray(build_parser().parse_args(arguments)) == starts


def test_a_configuration_may_come_through_a_pipe(selffl, nothing_starts):
    """It can be read once only: a second time it is empty, as the default experiment is."""
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_text, args=["seed: x"], daemon=True)
    writer.start()
    assert_refused(selffl("run", "pipe"), "seed must be a valid integer", "'x'")


def test_no_ray_is_started_early_where_there_is_one(selffl, monkeypatch):
    options = build_parser().parse_args(["run"])
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        assert not _starts_ray(options)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert not _starts_ray(options)


def test_a_mistake_of_ours_is_one_line_and_status_1(selffl, monkeypatch):
    def broken(options: Any, say: Any) -> int:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(commands, "doctor", broken)
    said = selffl("doctor")
    assert said == Said(1, "", "selffl: RuntimeError: first second (--verbose shows where)\n")
    assert "Traceback" in selffl("doctor", "--verbose").err


def test_an_error_begins_a_line_of_its_own_after_a_live_line(selffl, monkeypatch):
    def fails(asked: Any, watch: Callable[[Any], None], interrupt: Any) -> None:
        watch(Progress("a", 0, 9, 2, {}, 1.0))
        raise RunError("it broke")

    monkeypatch.setattr(commands, "launch", fails)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    said = selffl("run")
    assert said.code == 1
    assert said.err.splitlines()[-1] == "selffl: it broke"


# -- run ----------------------------------------------------------------------------------------


def test_a_run_prints_its_table_and_folder_and_progress_apart(selffl, tmp_path):
    said = selffl("run", *QUICK, *sets("experiment=mine", "evaluation.every=2"))
    assert said.code == 0
    folder = folder_in(said)
    assert folder.parent == tmp_path / "runs" / "mine"
    final = summary(folder)["final"]
    header, _, row = said.out.splitlines()[:3]
    titles = ["method", "global", "local", "worst 10 %", "harmed", "gradient steps", "seconds"]
    assert [title.strip() for title in header.split("  ") if title] == titles
    cells = row.split()
    assert cells[0] == "selffl-two_tap"
    assert cells[1] == f"{100 * final['test/global_accuracy']:.1f}"
    assert cells[2] == f"{100 * final['test/local_accuracy']:.1f}"
    assert cells[3] == f"{100 * final['test/local_accuracy_worst10']:.1f}"
    steps = final["cost/gradient_steps"] + final["cost/personalization_steps"]
    assert cells[5] == f"{steps:.0f}"
    assert [line.split("  ")[1] for line in said.err.splitlines()] == ["round 2/3", "round 3/3"]


def test_the_written_configuration_repeats_the_run(selffl):
    first = folder_in(selffl("run", *QUICK, *sets("seed=4", "method.preset=interpolated")))
    second = folder_in(selffl("run", str(first / "config.yaml")))
    assert (second / "config.yaml").read_text() == (first / "config.yaml").read_text()
    assert summary(second)["digest"] == summary(first)["digest"]
    other = folder_in(selffl("run", str(first / "config.yaml"), *sets("seed=5")))
    assert summary(other)["digest"] != summary(first)["digest"]


@NOLOAD
def test_a_tracked_run_says_where_to_look_and_that_place_is_right(selffl, tmp_path):
    store = "tracking.uri=sqlite:///elsewhere/m.db"
    said = selffl("run", *sets("placement.backend=local", "training.num_rounds=1", store))
    assert said.code == 0
    folder = folder_in(said)
    (line,) = [line for line in said.out.splitlines() if line.startswith("curves: ")]
    assert f"selffl ui {folder}" in line
    note = json.loads((folder / "tracking.json").read_text())
    assert note["uri"] == f"sqlite:///{tmp_path}/elsewhere/m.db"


def test_a_dry_run_prints_configuration_plan_and_estimate_and_starts_nothing(
    selffl, nothing_starts, monkeypatch
):
    monkeypatch.setattr(commands, "this_machine", lambda: [Node("here", 2.0, 0.0, 2**34)])
    said = selffl("run", "--dry-run", *sets("training.num_rounds=7", "method.kappa=1.5"))
    assert said.code == 0
    assert said.err == ""
    Path("printed.yaml").write_text(said.out)
    wanted = load_config(None, ["training.num_rounds=7", "method.kappa=1.5"])
    assert load_config("printed.yaml") == wanted
    comments = [line for line in said.out.splitlines() if line.startswith("# ")]
    assert comments[0].startswith("# 14 client actors for 14 clients (at most 1 each), 0.1357 CPU")
    assert f"7 rounds, {7 * 14 * 20} local steps in all, model of 4810 parameters" in said.out
    assert any(line.startswith("# training about ") for line in comments)


def test_a_dry_run_tells_what_simulated_trouble_leaves_and_costs(
    selffl, nothing_starts, monkeypatch
):
    """All 14 take 20 s; those that drop out are told from the plan itself."""
    monkeypatch.setattr(commands, "this_machine", lambda: [Node("here", 2.0, 0.0, 2**34)])
    trouble = ("training.num_rounds=7", "training.trouble={dropout: {probability: 0.5}}")
    said = selffl("run", "--dry-run", *sets(*trouble, "training.trouble.deadline=25"))
    assert said.code == 0
    sizes = [len(plan.cohort) for plan in prepare_experiment(load_config(None, trouble)).plans]
    mean = sum(sizes) / 7
    assert min(sizes) < 14
    assert (
        f"# clients a round: 14.0 there, 14.0 asked, {14 - mean:.1f} dropped, 0.0 late, "
        f"0.0 partial; {mean:.1f} answer ({min(sizes)} to {max(sizes)}, nobody in 0 "
        f"of 7 rounds); virtual time {7 * 20} s\n"
    ) in said.out
    assert f"7 rounds, {sum(sizes) * 20} local steps in all" in said.out
    assert "# caution: training.trouble.deadline (25) is never passed" in said.out


def test_a_dry_run_refuses_what_the_run_would(selffl, nothing_starts, monkeypatch):
    monkeypatch.setattr(commands, "this_machine", lambda: [Node("here", 2.0, 0.0, 2**34)])
    said = selffl("run", "--dry-run", *sets("placement.gpus_per_client=1"))
    assert said.code == 2
    assert "use --set placement.gpus_per_client=0" in said.err


# -- compare ------------------------------------------------------------------------------------


def test_a_comparison_ends_with_one_table_of_all_methods_over_the_seeds(selffl, tmp_path):
    methods = ["--methods", "selffl:exact, fedavg,local", "--seeds", "1,2", "--output", "all"]
    said = selffl("compare", *LOCAL, *sets("training.num_rounds=2"), *methods)
    assert said.code == 0
    rows = [line.split() for line in said.out.splitlines()[2:5]]
    assert [row[0] for row in rows] == ["selffl-exact", "fedavg", "local"]
    labels = ("selffl-exact", "fedavg", "local")
    folders = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert folders == sorted(f"{label}-s{seed}" for label in labels for seed in (1, 2))
    for row in rows:
        finals = [summary(tmp_path / "all" / f"{row[0]}-s{s}")["final"] for s in (1, 2)]
        local = 100 * np.asarray([final["test/local_accuracy"] for final in finals])
        assert row[3:5] == [f"{local.mean():.1f}", f"±{local.std(ddof=1):.1f}"]
    assert "seeds 1, 2)" in said.out
    digests = {
        json.loads((tmp_path / "all" / f"{label}-s1" / "environment.json").read_text())[
            "partition_digest"
        ]
        for label in labels
    }
    assert len(digests) == 1


def test_unequal_costs_are_said_under_the_table(selffl):
    two = ["--methods", "fedavg,selffl"]
    assert "(gradient steps differ" not in selffl("compare", *QUICK, *two).out
    long = sets("method.preset=interpolated")
    said = selffl("compare", *QUICK, *long, *two)
    assert "(gradient steps differ: more of them help, whatever the method)" in said.out


def test_a_comparison_that_is_stopped_says_how_to_go_on(selffl, monkeypatch, tmp_path):
    real = commands.launch

    def stopped(asked: Any, watch: Callable[[Any], None], interrupt: Any) -> Any:
        def watching(event: Any) -> None:
            watch(event)
            if isinstance(event, Progress) and event.label.startswith("local"):
                interrupt.set()

        return real(asked, watching, interrupt)

    monkeypatch.setattr(commands, "launch", stopped)
    rounds = sets("training.num_rounds=40", "training.num_local_steps=60", SMALL)
    methods = ["--methods", "fedavg,local,selffl", "--output", "all"]
    said = selffl("compare", *LOCAL, *rounds, *methods)
    assert said.code == commands.STOPPED == 130
    assert "stopped in run 2 of 3" in said.out
    assert f"selffl run --resume {tmp_path}/all/local-s0 " in said.out
    assert summary(tmp_path / "all" / "local-s0")["status"] == "STOPPED"
    assert not (tmp_path / "all" / "selffl-two_tap-s0").exists()


# -- data, ui, doctor ---------------------------------------------------------------------------


def test_the_data_sets_are_listed_with_what_they_need(selffl):
    said = selffl("data", "list")
    assert said.code == 0
    table, remedies = said.out.split("\n\n")
    rows = {line.split()[0]: line for line in table.splitlines()[2:]}
    assert sorted(rows) == datasets.names()
    assert "ready" in rows["digits"]
    assert "its own" in rows["digits"]
    assert "needs --source" in rows["mnist"]
    assert "by partition" in rows["mnist"]
    assert "mnist: data.source is not set; fetch the four files" in remedies
    named = [line.partition(":")[0] for line in remedies.splitlines()]
    assert named == [name for name in rows if "needs --source" in rows[name]]


def test_a_description_has_the_numbers_of_the_clients_and_a_picture(selffl, tmp_path):
    said = selffl("data", "describe", "digits", "--output", "deep/forms.png")
    assert said.code == 0
    assert (tmp_path / "deep" / "forms.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    bounds = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
    sizes = np.diff(bounds)
    assert f"min {sizes.min()}, median {np.median(sizes):g}, max {sizes.max()}" in said.out
    # Gini another way: half the mean absolute difference, relative to the mean.
    gini = np.abs(sizes[:, None] - sizes[None]).mean() / (2 * sizes.mean())
    assert f"size skew {gini:.2f}" in said.out
    assert f"picture: {tmp_path}/deep/forms.png" in said.out
    counts = [line.split() for line in said.out.splitlines() if line[:1].isdigit()]
    assert sum(int(cells[1]) for cells in counts) == 1797


def test_label_skew_grows_as_the_partition_says(selffl, tmp_path):
    write_idx(tmp_path / "images")

    def skew(alpha: float) -> float:
        chosen = sets(f"data.partition={{alpha: {alpha}, num_clients: 3, test_examples: 0}}")
        said = selffl("data", "describe", "mnist", "--source", "images", *chosen)
        assert said.code == 0
        (line,) = [line for line in said.out.splitlines() if line.startswith("label skew ")]
        return float(line.split()[2])

    assert skew(0.3) > 2 * skew(1000.0)


def test_a_description_of_data_without_labels_has_no_label_skew(selffl, tmp_path):
    said = selffl("data", "describe", "gaussian", *sets("data.num_clients=3"))
    assert said.code == 0
    assert "label skew" not in said.out
    assert (tmp_path / "gaussian.png").exists()


def test_preparing_data_builds_a_store_once_and_names_licence_and_digest(selffl, tmp_path):
    write_idx(tmp_path / "images")
    first = selffl("data", "prepare", "mnist", "--source", "images")
    assert first.code == 0
    lines = dict(line.split(":", 1) for line in first.out.splitlines())
    assert lines["mnist"].strip().startswith("80 examples")
    assert set(lines) == {"mnist", "licence", "digest", "store"}
    assert lines["digest"].endswith(" (all record batches checked)")
    store = Path(lines["store"].strip())
    before = (store / "data.arrow").stat().st_mtime_ns
    assert selffl("data", "prepare", "mnist", "--source", "images").out == first.out
    assert (store / "data.arrow").stat().st_mtime_ns == before


def test_preparing_shows_a_bar_on_a_terminal_and_a_line_a_stage_elsewhere(selffl, monkeypatch):
    # Each client has four examples and its optimum besides.
    many = "data={name: gaussian, num_clients: 30, dimension: 2, num_examples: [4, 4]}"
    chosen = ("data", "prepare", "gaussian", *sets(many))
    plain = selffl(*chosen, *sets("seed=1"))
    lines = plain.err.splitlines()
    assert [line.split("  ")[:3] for line in lines[1:]] == [
        [stage, f"[{'#' * 20}] 100 %", "150 examples"] for stage in ("preparing", "checking")
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    live = selffl(*chosen, *sets("seed=2"))
    rewritten = live.err.split("\r\x1b[2K")[1:]
    assert rewritten[0].startswith("preparing  [....................] 3 %  5 examples  ")
    ends = [text.partition("  ")[0] for text in rewritten if text.endswith("\n")]
    assert ends == ["preparing", "checking"]
    known = selffl(*chosen, *sets("seed=2")).err.split("\r\x1b[2K")[1:]
    assert {text.partition("  ")[0] for text in known} == {"checking"}


def test_preparing_again_notices_a_copy_that_was_damaged(selffl, tmp_path):
    write_idx(tmp_path / "images")
    first = selffl("data", "prepare", "mnist", "--source", "images")
    store = Path(first.out.rpartition("store:")[2].strip())
    raw = bytearray((store / "data.arrow").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (store / "data.arrow").unlink()
    (store / "data.arrow").write_bytes(raw)
    said = selffl("data", "prepare", "mnist", "--source", "images")
    assert said.code == 2
    assert f"{store}/data.arrow: record batch " in said.err
    assert f"delete {store} and prepare it again" in said.err
    shutil.rmtree(store)
    assert selffl("data", "prepare", "mnist", "--source", "images").out == first.out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # in MLflow
def test_the_ui_serves_the_runs_store_on_loopback_and_leaves_nothing_behind(tmp_path):
    open_store(f"sqlite:///{tmp_path / 'm.db'}")
    (tmp_path / "run").mkdir()
    note = {"uri": f"sqlite:///{tmp_path / 'm.db'}", "run_id": "1"}
    (tmp_path / "run" / "tracking.json").write_text(json.dumps(note))
    box = Sandbox(tmp_path)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    try:
        process = box.start(
            *(sys.executable, "-m", "selffl_ray", "ui", "run", "--port", str(port)),
            output=subprocess.DEVNULL,
        )
        page = wait_for_page(f"http://127.0.0.1:{port}/health", process)
        assert page == "OK"
        commands = [p.cmdline() for p in box.alive()]
        assert any(note["uri"] in command for command in commands)
        process.terminate()
        assert process.wait(timeout=20) == 130
        assert box.all_gone(within_s=10)
    finally:
        box.end_all()


def wait_for_page(address, process):
    """What a server answers once it is up."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            return answer.read().decode()
        time.sleep(0.5)
    raise AssertionError("the server did not come up")


def test_the_ui_of_a_server_is_its_address_without_the_password(selffl, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cr3t@host:5000")
    assert selffl("ui").out == "the store is a server: open http://***@host:5000\n"
    (tmp_path / "tracking.json").write_text(json.dumps({"uri": "http://***@host:5000"}))
    assert selffl("ui", ".").out == "the store is a server: open http://***@host:5000\n"


def test_the_doctor_looks_at_each_thing_in_a_line(selffl):
    said = selffl("doctor")
    assert said.code == 0
    assert said.err == ""
    lines = said.out.splitlines()
    assert all(line[:3] in ("ok ", "!! ") for line in lines)
    assert all((" -> " in line) == line.startswith("!!") for line in lines)
    names = ["python", "ray", "torch", "mlflow", "cores", "memory", "GPUs", "open files"]
    for name in [*names, "shared memory", "Ray", "nodes", "data stores", "MLflow"]:
        assert sum(line[3:].startswith(f"{name} ") for line in lines) == 1
    # Of a Ray that others use on this machine as many are told as there are.
    assert finding(said, "nodes").startswith("ok nodes          none: no Ray is running for these")


def finding(said: Said, name: str) -> str:
    (line,) = [line for line in said.out.splitlines() if line[3:].startswith(f"{name} ")]
    return line


@NOLOAD
def test_the_doctor_says_what_is_wrong_and_the_remedy(selffl, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/broken.db")
    (tmp_path / "broken.db").write_text("not a database" * 100)
    # Nobody listens there.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    said = selffl("doctor")
    assert said.code == 0
    assert finding(said, "MLflow").startswith("!! ")
    assert "broken.db does not answer" in finding(said, "MLflow")
    assert "without RAY_AUTH_MODE=token anybody" in finding(said, "Ray")
    assert finding(said, "nodes").startswith("!! nodes          none can be seen  -> RAY_ADDRESS=")
    assert "127.0.0.1:9 cannot be reached: " in finding(said, "nodes")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    said = selffl("doctor")
    assert "use sqlite:///" in finding(said, "MLflow")
    assert finding(said, "Ray").startswith("ok ")


# -- verify -------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run of three rounds that says of itself that it was made on Ray.

    So ``verify`` repeats it in one process, in other stacks; the suite of runtime/ does the real
    thing. The numbers do not depend on who made them: that is what is verified.
    """
    folder = tmp_path / "finished"
    config = load_config(None, ["placement.backend=local", "tracking.enabled=false"])
    config = parse_config({**_raw(config), "training": {"num_rounds": 3}}, tmp_path)
    api.run_experiment(config, output=folder)
    change_environment(folder, placement={"backend": "ray"})
    return folder


def _raw(config: Any) -> dict[str, Any]:
    return {"placement": {"backend": "local"}, "tracking": {"enabled": config.tracking.enabled}}


def change_environment(folder: Path, **values: Any) -> None:
    file = folder / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_run_is_verified_round_by_round_under_another_placement(selffl, finished):
    said = selffl("verify", str(finished))
    assert said.code == 0
    assert said.out.startswith("equal: all 3 rounds have the same digest, repeated in one process")


def test_a_digest_that_was_changed_is_found(selffl, finished):
    rounds = pd.read_parquet(finished / "rounds.parquet")
    rounds.loc[1, "digest"] = rounds.loc[0, "digest"]
    rounds.to_parquet(finished / "rounds.parquet")
    said = selffl("verify", str(finished))
    assert said.code == 1
    assert said.out.startswith("DIFFERENT from round 1 on (of 3), repeated in one process")


def test_a_configuration_that_was_changed_is_found(selffl, finished):
    text = (finished / "config.yaml").read_text()
    assert "learning_rate: 0.3\n" in text
    (finished / "config.yaml").write_text(text.replace("learning_rate: 0.3", "learning_rate: 0.2"))
    assert selffl("verify", str(finished)).code == 1


def test_rounds_that_the_configuration_does_not_have_are_found(selffl, finished):
    text = (finished / "config.yaml").read_text()
    (finished / "config.yaml").write_text(text.replace("num_rounds: 3", "num_rounds: 2"))
    said = selffl("verify", str(finished))
    assert said.code == 2
    assert "3 rounds, but the repetition has 2 of them" in said.err


def test_only_the_rounds_that_a_stopped_run_did_are_repeated(selffl, finished):
    text = (finished / "config.yaml").read_text()
    config = text.replace("num_rounds: 3", "num_rounds: 4000")
    (finished / "config.yaml").write_text(config)
    said = selffl("verify", str(finished))
    assert said.code == 0
    assert said.out.startswith("equal: all 3 rounds")


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"processor": "Another 9000 (AVX)"}, "was run with processor 'Another 9000 (AVX)'"),
        ({"packages": {"torch": "1.0.0"}}, "was run with torch '1.0.0', this machine has"),
        ({"devices": ["cuda:0"]}, "on a GPU results agree within rounding, not bit for bit"),
        ({"packages": {}}, "is not the folder of a run"),
        ({"placement": None}, "is not the folder of a run"),
    ],
)
def test_a_run_that_cannot_be_compared_here_is_refused(selffl, finished, values, fragment):
    change_environment(finished, **values)
    assert_refused(selffl("verify", str(finished)), fragment)


# -- stopping and going on ----------------------------------------------------------------------

LONG = [
    *LOCAL,
    *sets(SMALL, "training.num_rounds=200", "training.participation_rate=0.6"),
    *sets("training.num_local_steps=4", "checkpoint.every=5", "evaluation.every=100"),
    *sets("method={probe_every: 3, readout_steps: 10, max_steps: 10}"),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(["run", *LONG, "--output", str(folder)]) == 0
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "selffl_ray", "run", *arguments, "--output", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder.parent, **pipes)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same_run(folder: Path, other: Path) -> None:
    assert summary(folder)["status"] == "FINISHED"
    assert summary(folder)["digest"] == summary(other)["digest"]
    for name in ("rounds", "clients", "uncertainty"):
        frames = [pd.read_parquet(f / f"{name}.parquet") for f in (folder, other)]
        timed = [c for c in frames[0] if c.startswith("time/") or c.endswith("_s")]
        pd.testing.assert_frame_equal(*(frame.drop(columns=timed) for frame in frames))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_after_the_round_and_the_printed_command_ends_like_an_uninterrupted_run(
    selffl, tmp_path, uninterrupted, number
):
    folder = tmp_path / "a run"
    process = start(folder, *LONG)
    wait_for(folder / "checkpoints" / "round_9", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping after this round (again to stop at once)" in err
    assert "Traceback" not in err
    stopped = summary(folder)
    assert stopped["status"] == "STOPPED"
    assert 10 <= stopped["rounds"] < 200
    assert len(pd.read_parquet(folder / "rounds.parquet")) == stopped["rounds"]
    first, command = out.splitlines()
    assert first == f"stopped after {stopped['rounds']} rounds; go on with"
    assert shlex.split(command) == ["selffl", "run", "--resume", str(folder)]
    newest = folder / "checkpoints" / f"round_{stopped['rounds'] - 1}"
    assert newest.is_dir()
    assert selffl(*shlex.split(command)[1:]).code == 0
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *LOCAL, "--set", "training.num_local_steps=30000")
    wait_for(folder / "config.yaml", process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    process.stderr.readline()
    assert process.stderr.readline().startswith("stopping after this round")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not (folder / "summary.json").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_at_any_time_goes_on_to_the_same_end(selffl, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    process = start(folder, *LONG)
    wait_for(folder / "checkpoints" / "round_4", process)
    # Whenever: the claim holds at any time.
    moment = random.SystemRandom().uniform(0, 0.3)
    time.sleep(moment)
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, f"it had ended {moment} s after its checkpoint"
    assert not (folder / "summary.json").exists()
    assert selffl("run", "--resume", str(folder)).code == 0, f"killed after {moment} s"
    assert_same_run(folder, uninterrupted)


def test_a_finished_run_goes_on_by_doing_nothing(selffl, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / "run")
    said = selffl("run", "--resume", "run")
    assert said.code == 0
    assert_same_run(tmp_path / "run", uninterrupted)


# -- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (2**42, "4096.0 GiB")],
)
def test_sizes_are_for_people(count, text):
    assert size(count) == text


def test_columns_of_a_table_are_aligned():
    table = text_table(["a", "bb"], [["long", "1"], ["x", "222"]])
    assert table.splitlines() == ["a      bb", "----  ---", "long    1", "x     222"]


METRICS = {"test/global_accuracy": 0.5, "test/local_accuracy": 0.75, "val/local_accuracy": 0.1}


def test_a_progress_line_has_round_scores_participants_and_the_time_that_is_left():
    line = progress_line(Progress("fedavg seed 0", 9, 40, 7, METRICS, 30.0))
    assert line == (
        "fedavg seed 0  round 10/40  test global 50.0 %, local 75.0 %  7 clients  1 min 30 s left"
    )
    last = progress_line(Progress("fedavg seed 0", 39, 40, 7, {}, 120.0))
    assert last == "fedavg seed 0  round 40/40  7 clients  2 min 0 s"
    only_val = progress_line(Progress("x", 0, 2, 1, {"val/local_mse": 0.25}, 1.0))
    assert "val local 0.25  " in only_val


def test_a_stores_line_has_a_bar_if_its_size_is_known_and_the_time_that_is_left():
    def line(done: int, total: int | None, seconds: float) -> str:
        return store_line(StoreProgress("preparing", done, total, 1200, seconds, finished=False))

    assert line(6, 24, 5.0) == f"preparing  [{'#' * 5}{'.' * 15}] 25 %  1200 examples  15 s left"
    assert line(24, 24, 70.0) == f"preparing  [{'#' * 20}] 100 %  1200 examples  1 min 10 s"
    assert line(6, None, 5.0) == "preparing  1200 examples  5 s"


def test_a_live_bar_changes_ten_times_a_second_at_most_and_says_its_end():
    def shown(live: bool) -> list[str]:
        text: list[str] = []
        printer = ProgressPrinter(text.append, live=live)
        for stage in ("preparing", "checking"):
            for k in range(1, 101):
                printer(StoreProgress(stage, k, 100, 10 * k, 0.01 * k, finished=k == 100))
        return text

    live, plain = shown(live=True), shown(live=False)
    assert len(plain) == 2
    assert all(" 100 %  1000 examples  1 s\n" in line for line in plain)
    for start, stage in ((0, "preparing"), (len(live) // 2, "checking")):
        own = live[start : start + len(live) // 2]
        assert all(text.startswith(f"\r\x1b[2K{stage}  [") for text in own)
        assert 10 <= len(own) <= 12
        assert [text.endswith("\n") for text in own] == [False] * (len(own) - 1) + [True]


def test_on_a_terminal_one_line_lives_and_elsewhere_lines_are_plain():
    def shown(live: bool) -> str:
        text: list[str] = []
        printer = ProgressPrinter(text.append, live=live)
        for index in range(3):
            metrics = METRICS | ({"time/eval_s": 0.1} if index == 1 else {})
            printer(Progress("x", index, 3, 1, metrics, 1.0))
            if index == 0:
                printer(Message("look"))
        printer.end()
        return "".join(text)

    live, plain = shown(live=True), shown(live=False)
    assert live.count("\r\x1b[2K") == 3
    assert "\nlook\n" in live
    assert live.endswith("\n")
    assert "\r" not in plain
    assert [line.partition("  ")[2][:9] for line in plain.splitlines()] == [
        "",
        "round 2/3",
        "round 3/3",
    ]


def test_output_that_nobody_reads_any_more_is_no_error(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m selffl_ray doctor | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert math.isclose(done.stdout.count("\n"), 1)
