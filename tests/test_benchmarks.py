"""The benchmark of the rounds: same work for everybody, true figures, goals judged as written."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from safetensors.torch import load_file

from benchmarks import backward, gpu
from benchmarks.agreement import apart, findings, largest_difference, load
from benchmarks.entries import (
    DEDICATED,
    FLOWER,
    LOCAL,
    ONE_ACTOR,
    PEERS,
    PLAIN,
    SELFFL,
    TWO_ACTORS,
    entries_of,
    why_not,
)
from benchmarks.export import torch_layout, workload_of
from benchmarks.goals import GOALS, Cell, Goal, figure, standing, table
from benchmarks.peers.peer_workload import QUIET, build_model, read, write
from benchmarks.plain_loop import PlainLoop
from benchmarks.processes import EntryError, environment, measure
from benchmarks.rounds import ROOT, WORKLOAD, Job, add_agreement, skipped_peers
from benchmarks.workloads import WORKLOADS, workload_config
from selffl_ray import load_config, run_experiment
from selffl_ray.datasets.idx import DEBIAN_FASHION_MNIST
from selffl_ray.experiment import prepare_experiment

# Batches hold everything that a client has: nothing is random but who takes part.
FULL_BATCH = [
    "data.name=digits",
    "data.partition.name=dirichlet",
    "data.partition.num_clients=6",
    "method=fedavg",
    "training.batch_size=2000",
    "training.num_local_epochs=1",
    "training.learning_rate=0.1",
    "training.num_rounds=3",
    "training.participation_rate=0.5",
    "placement.backend=local",
    "tracking.enabled=false",
]
MODELS = {
    "mlp": ["model.name=mlp", "model.hidden=[9]"],
    "cnn": ["model.name=cnn", "model.channels=[3,4]", "model.kernel=2", "model.hidden=[7]"],
}
PEERS_PYTHON = os.environ.get("SELFFL_RAY_PEERS_PYTHON", sys.executable)


def full_batch(model: str):
    return load_config(None, [*FULL_BATCH, *MODELS[model], "export_models=true"])


# -- the same work ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_plain_loop_and_our_fedavg_end_at_the_same_model(model, tmp_path):
    config = full_batch(model)
    work = workload_of(prepare_experiment(config))
    assert len(set(work.num_M.tolist())) > 1, "unequal clients, or weights do not matter"
    loop = PlainLoop(work)
    assert len(loop.rounds()) == 3
    run_experiment(config, output=tmp_path / "run")
    ours = torch_layout(load_file(tmp_path / "run" / "models" / "global.safetensors"))
    assert largest_difference(loop.weights(), ours) < 1e-6
    assert largest_difference(work.weights, ours) > 1e-3, "training moved it"


def test_a_workload_is_read_as_it_was_written_and_holds_each_clients_own_examples(tmp_path):
    prepared = prepare_experiment(full_batch("mlp"))
    write(tmp_path / "w.npz", workload_of(prepared))
    work = read(tmp_path / "w.npz")
    assert work.cohort_RK.tolist() == [plan.cohort.tolist() for plan in prepared.plans]
    assert (work.learning_rate, work.batch_size) == (0.1, 2000)
    for index, client in enumerate(prepared.clients):
        found = prepared.store.read(client.train)
        x, y = work.examples(index)
        np.testing.assert_array_equal(x.numpy(), prepared.dataset.features(found.x))
        np.testing.assert_array_equal(y.numpy(), found.y)
    state = build_model(work.weights).state_dict()
    assert list(state) == list(prepared.model.spec.names)
    for name, value in work.weights.items():
        np.testing.assert_array_equal(state[name].numpy(), value)


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="no Debian dataset-fashion-mnist")
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_trains_the_16000_examples_that_its_table_says(name):
    prepared = prepare_experiment(workload_config(name))
    sizes = [len(client.train) for client in prepared.clients]
    clients = {"W1": 20, "W2": 20, "W3": 200, "W3s": 200, "W4": 1000}[name]
    assert (len(sizes), sum(sizes)) == (clients, 16_000)
    asked = 20 if name == "W3s" else clients
    assert {len(plan.cohort) for plan in prepared.plans} == {asked}
    params = 582_026 if name == "W2" else 79_510
    assert prepared.model.spec.num_params == params


@pytest.mark.ray
@pytest.mark.limit_s(300)
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_ends_at_the_plain_loops_model(name, tmp_path):
    script, packages = PEERS[name]
    if reason := why_not(PEERS_PYTHON, packages):
        pytest.skip(f"SELFFL_RAY_PEERS_PYTHON: {reason}")
    config = load_config(None, [*FULL_BATCH, *MODELS["mlp"], "training.participation_rate=1.0"])
    work = workload_of(prepare_experiment(config))
    write(tmp_path / WORKLOAD, work)
    command = (
        *(PEERS_PYTHON, str(ROOT / "benchmarks" / "peers" / script), str(tmp_path / WORKLOAD)),
        *("--params", str(tmp_path / "model.npz")),
    )
    done = measure(command, environment(**QUIET, FLWR_HOME=str(tmp_path / "home")))
    loop = PlainLoop(work)
    assert len(done.report["rounds_s"]) == len(loop.rounds()) == 3
    assert largest_difference(load(tmp_path / "model.npz"), loop.weights()) < 1e-5


# -- peers that are not there -------------------------------------------------------------------


def test_a_peer_without_its_python_or_package_is_skipped_with_the_reason(tmp_path):
    nowhere = str(tmp_path / "bin" / "python")
    options = argparse.Namespace(peers=True, peers_python=nowhere)
    skipped = skipped_peers(options)
    assert set(skipped) == set(PEERS)
    assert all(nowhere in reason and "does not run" in reason for reason in skipped.values())
    missing = why_not(sys.executable, ("numpy", "no_such_package"))
    assert missing is not None
    assert "no no_such_package" in missing
    assert "numpy" not in missing
    assert ".[bench]" in missing
    assert why_not(sys.executable, ("numpy",)) is None
    assert skipped_peers(argparse.Namespace(peers=False, peers_python=nowhere)) == {}


def test_entries_are_those_that_fit_the_workload(tmp_path):
    small = {e.name: e.command for e in entries_of("W1", 20, tmp_path, peers_python=None)}
    many = {e.name: e.command for e in entries_of("W4", 999, tmp_path, peers_python="python")}
    assert DEDICATED in small
    assert DEDICATED not in many
    assert not set(PEERS) & set(small)
    assert set(PEERS) <= set(many)
    assert "placement.clients_per_actor=999" in many[ONE_ACTOR]
    assert "placement.clients_per_actor=500" in many[TWO_ACTORS]


# -- processes ----------------------------------------------------------------------------------

FAMILY = """
import subprocess, sys, time
block = bytearray(b"x") * (40 << 20)
if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "child"])
    print('noise')
    print('{"rounds_s": [1.0, 2.0]}')
else:
    time.sleep(1.5)
"""
ORPHANS = """
import subprocess, sys, time
if len(sys.argv) == 1:
    told = subprocess.run([sys.executable, __file__, "parent"], stdout=subprocess.PIPE, text=True)
    print('{"left": %d}' % int(told.stdout))
else:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    print(subprocess.Popen(sleeper, **quiet).pid, flush=True)
    time.sleep(1.5)
"""


def script(tmp_path, text: str) -> tuple[str, str]:
    path = tmp_path / "entry.py"
    path.write_text(text)
    return sys.executable, str(path)


def test_memory_is_summed_over_an_entrys_processes(tmp_path):
    done = measure(script(tmp_path, FAMILY), environment())
    assert done.report == {"rounds_s": [1.0, 2.0]}
    assert 80 << 20 < done.peak_bytes < 200 << 20


def test_what_an_entry_leaves_behind_is_ended_though_its_parent_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.processes.LEAVE_S", 0.2)
    left = measure(script(tmp_path, ORPHANS), environment()).report["left"]
    for _ in range(100):
        if not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail(f"process {left} lives on")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise ValueError('no such cohort')", "exit code 1.*no such cohort"),
        ("print('no report')", "exit code 0.*no report"),
        ("import time; time.sleep(60)", "none after 1 s"),
    ],
)
def test_an_entry_that_fails_says_why(text, told, tmp_path):
    with pytest.raises(EntryError, match=f"(?s){told}"):
        measure(script(tmp_path, text), environment(), timeout_s=1.0 if "sleep" in text else 60.0)


def test_a_ray_that_others_started_is_not_used_and_byte_code_is_kept(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    found = environment(**QUIET)
    assert "RAY_ADDRESS" not in found
    assert "PYTHONDONTWRITEBYTECODE" not in found
    assert found["RAY_USAGE_STATS_ENABLED"] == found["FLWR_TELEMETRY_ENABLED"] == "0"


# -- goals --------------------------------------------------------------------------------------


def rows_of(**columns) -> pd.DataFrame:
    return pd.DataFrame({"workload": "W1", **columns})


def test_a_figure_is_the_median_of_the_quotients_within_passes():
    rows = rows_of(
        entry=[TWO_ACTORS] * 3 + [PLAIN] * 3,
        round_s=[1.0, 4.0, 9.0, 4.0, 4.0, 10.0],
        **{"pass": [0, 1, 2, 2, 1, 0]},
    )
    goal = Goal("", Cell("W1", TWO_ACTORS), Cell("W1", PLAIN), 0.7)
    assert figure(rows, goal) == 1.0
    medians = rows.groupby("entry")["round_s"].median()
    assert medians[TWO_ACTORS] / medians[PLAIN] == 1.0
    quotients = {0: 0.1, 1: 1.0, 2: 2.25}
    assert figure(rows[rows["pass"] != 1], goal) == np.median([quotients[0], quotients[2]])
    plain = goal._replace(below=None)
    assert figure(rows, plain) == 4.0


@pytest.mark.parametrize(
    ("value", "stands"),
    [(0.45, "aim"), (0.46, "must"), (0.70, "must"), (0.71, "missed"), (float("nan"), None)],
)
def test_a_goal_stands_where_its_figure_lies(value, stands):
    goal = Goal("", Cell("W1", TWO_ACTORS), None, 0.70, 0.45)
    assert standing(value, goal) == (stands or "not measured")
    assert standing(0.1, goal._replace(aim=None)) == "must"


def test_the_table_judges_what_was_measured_and_says_what_was_not():
    rows = rows_of(
        entry=[TWO_ACTORS, PLAIN, FLOWER],
        round_s=[0.5, 1.0, 0.4],
        outside_s=[8.0, 1.0, 20.0],
        peak_gb=[1.6, 0.3, 1.0],
        **{"pass": 0},
    )
    found = table(rows).set_index("goal")["stands"]
    assert len(found) == len(GOALS)
    assert found["W1, 2 actors, x plain loop"] == "must"
    assert found["W1, 2 actors over Flower"] == "missed"
    assert found["W1, s outside steady rounds"] == "aim"
    assert found["W1, peak PSS, GB"] == "missed"
    measured = found[found != "not measured"]
    assert len(measured) == 4


def test_every_goal_can_be_met_by_entries_and_columns_that_exist(tmp_path):
    for goal in GOALS:
        for cell in (goal.top, goal.below):
            if cell is not None:
                entries = entries_of(cell.workload, 20, tmp_path, peers_python="python")
                assert cell.entry in {e.name for e in entries}
                assert cell.column in {"round_s", "outside_s", "peak_gb", "eval_s"}
        assert goal.aim is None or goal.aim < goal.must


# -- agreement ----------------------------------------------------------------------------------


def finished(folder, name: str, value: float) -> dict:
    np.savez(folder / f"{name}.npz", a=np.asarray([value, 1.0]))
    return {"workload": "W4", "pass": 0, "entry": name, "digest": None}


@pytest.mark.parametrize(("off", "good"), [(5e-6, True), (3e-5, False)])
def test_final_models_of_w4_must_agree(off, good, tmp_path):
    rows = [finished(tmp_path, LOCAL, 3.0), finished(tmp_path, FLOWER, 3.0 + off)]
    rows.append(finished(tmp_path, SELFFL, 77.0))
    add_agreement(rows, Job("W4", (), tmp_path, {"a": np.asarray([2.0, 1.0])}))
    assert rows[1]["apart"] == pytest.approx(off)
    assert "difference" not in rows[2]
    assert not list(tmp_path.glob("*.npz"))
    said, fine = findings(pd.DataFrame(rows))
    assert fine is good
    assert any(("DISAGREE" in line) is not good and FLOWER in line for line in said)


def test_distances_are_relative_to_the_way_from_the_start():
    start, end = {"a": np.zeros(2)}, {"a": np.asarray([3.0, 4.0])}
    assert apart({"a": np.asarray([3.0, 4.5])}, end, start) == pytest.approx(0.1)


@pytest.mark.parametrize(("second", "good"), [("aa", True), ("bb", False)])
def test_placements_must_have_one_digest(second, good):
    rows = pd.DataFrame(
        {
            "workload": "W1",
            "entry": [LOCAL, TWO_ACTORS, SELFFL, PLAIN],
            "digest": ["aa", second, "cc", None],
            "difference": [0.0, 0.0, None, 1.0],
        }
    )
    said, fine = findings(rows)
    assert fine is good
    assert ("one digest in 2 runs" in said[0]) is good


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("algorithms", "--methods"),
        ("backward", "--workloads"),
        ("memory", "--methods"),
        ("scale", "--parts"),
        ("selffl", "--variants"),
        ("uneven", "--workloads"),
    ],
)
def test_an_unknown_name_is_one_line_that_says_the_known_ones(module, flag, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, flag, "nosuch"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{module}").main()
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{flag}: unknown nosuch; known: " in last


@pytest.mark.parametrize(
    "module", ["algorithms", "backward", "rounds", "scale", "selffl", "uneven"]
)
def test_no_passes_at_all_are_refused_in_a_line(module, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module, "--passes", "0"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{module}").main()
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--passes: takes a whole number from 1, got '0'" in last


def test_the_two_backward_passes_are_really_two():
    config = workload_config("W1")
    model = config.model, prepare_experiment(config).dataset.shape
    assert backward.without_forward(*model).forward is None
    assert backward.build_model(*model).forward is not None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["W9"], "unknown workload W9; known: W1, W2, W3, W3s, W4, R1"),
        (["W1", "--stacks", "1,some"], "take numbers from 1 .* got some"),
        (["W1", "--actors", "0"], "take numbers from 1 .* got 0"),
        (["W1", "--rounds", "-1"], "take numbers from 1 .* got -1"),
    ],
)
def test_the_gpu_benchmark_says_in_a_line_what_it_cannot_take(given, said, monkeypatch, capsys):
    """Before it asks for a GPU."""
    monkeypatch.setattr(sys, "argv", ["gpu", *given])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])


def test_runs_too_short_for_clients_to_have_moved_are_refused_in_a_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["uneven", "--rounds", "40"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("benchmarks.uneven").main()
    assert end.value.code == 2
    assert "--rounds: takes more than 40, got 40" in capsys.readouterr().err.splitlines()[-1]
