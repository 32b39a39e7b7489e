"""Sweeps on a real Ray Tune: kills, concurrency, early stops, failures, and MLflow's tree."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time

import pandas as pd
import pytest

from selffl_ray.config import parse_part
from selffl_ray.sweep import SweepConfig
from selffl_ray.sweep_run import run_sweep
from selffl_ray.tracking import open_store
from tests.runtime.processes import Sandbox

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),  # MLflow
]

BASE = {
    "training": {"num_rounds": 4, "num_local_steps": 2},
    "evaluation": {"every": 2},
    "model": {"name": "mlp", "hidden": [8]},
}


def sweep_of(space, base=(), **more):
    raw = {"experiment": "sweeps", "base": {**BASE, **dict(base)}, "space": space, **more}
    return parse_part(SweepConfig, raw, "")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A fresh MLflow store for the commands of a test."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def runs_of(uri):
    client = open_store(uri)
    experiment = client.get_experiment_by_name("sweeps")
    return client, client.search_runs([experiment.experiment_id], max_results=1000)


# -- a sweep that is killed ------------------------------------------------------------------------

KILLED = """
experiment: sweeps
base:
  training: {num_rounds: 12, num_local_steps: 20}
  evaluation: {every: 2}
  checkpoint: {every: 2}
space:
  method.kappa: [1.0, 0.5]
seeds: [0, 1]
confirm: {top: 1, per: [method.kappa], seeds: [2]}
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A sandbox in which the sweep has run to its end, undisturbed."""
    found = Sandbox(tmp_path_factory.mktemp("killed"))
    (found.folder / "sweep.yaml").write_text(KILLED)
    try:
        whole = found.selffl("tune", "sweep.yaml", "--output", "whole", timeout_s=150)
        assert whole.status == 0, whole.err
        yield found
    finally:
        found.end_all()


@pytest.mark.limit_s(400)
def test_a_sweep_that_is_killed_and_resumed_has_the_table_of_one_that_was_not(box):
    tmp_path = box.folder
    try:
        killed = box.start(
            sys.executable, "-m", "selffl_ray", "tune", "sweep.yaml", "--output", "killed"
        )
        done = wait_for_a_trial(tmp_path / "killed")
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate(timeout=10)
        assert box.all_gone(within_s=30)
        before = {path: path.stat().st_mtime_ns for path in done}
        left = statuses(tmp_path / "killed")
        assert len(left) < 4
        resumed = box.selffl("tune", "--resume", "killed", timeout_s=150)
        assert resumed.status == 0, resumed.err
    finally:
        box.end_all()
    for name in ("results.csv", "confirm.csv", "results.md", "confirm.md"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    # What was done is not done again.
    assert {path: path.stat().st_mtime_ns for path in done} == before


def statuses(folder):
    files = sorted(folder.glob("trials/*/summary.json"))
    return {f: json.loads(f.read_text())["status"] for f in files}


def wait_for_a_trial(folder):
    """Summaries of the trials that are done while another one is in the middle."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        done = list(statuses(folder))
        begun = list(folder.glob("trials/*/checkpoints/round_*"))
        running = {p.parents[1] for p in begun} - {f.parent for f in done}
        if done and running:
            return done
        time.sleep(0.05)
    raise AssertionError("no trial was in the middle while another was done")


# -- side by side ----------------------------------------------------------------------------------

SPACE = {"method.kappa": [1.0, 0.5]}


def test_results_do_not_depend_on_how_many_trials_run_at_once(local_ray, tmp_path, store):
    tables = {}
    for concurrent in (1, 2):
        sweep = sweep_of(SPACE, seeds=[0, 1], concurrent=concurrent)
        result = run_sweep(sweep, output=tmp_path / str(concurrent))
        assert result.complete
        tables[concurrent] = (tmp_path / str(concurrent) / "results.csv").read_text()
    assert tables[1] == tables[2]
    assert pd.read_csv(tmp_path / "1" / "results.csv")["digest"].nunique() == 2
    check_mlflow(store, tmp_path)


def check_mlflow(store, folder):
    """The tree of the two sweeps, and every metric of every trial."""
    client, runs = runs_of(store)
    parents = [r for r in runs if r.data.tags.get("selffl.kind") == "sweep"]
    assert sorted(r.info.run_name for r in parents) == ["1", "2"]
    for parent in parents:
        children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert len(children) == 4
        assert {r.info.run_name for r in children} == {
            f"kappa={kappa} s{seed}" for kappa in ("1", "0.5") for seed in (0, 1)
        }
        assert {r.info.status for r in [parent, *children]} == {"FINISHED"}
        best = {r.data.tags["configuration"] for r in children if "best" in r.data.tags}
        assert len(best) == 1
        for child in children:
            assert child.data.tags["method"] == "selffl"
            assert child.data.params["method.intra.name"] == "gradient_chunks"
            assert not any(k.startswith("test/") for k in child.data.metrics)
            series = client.get_metric_history(child.info.run_id, "val/local_accuracy")
            assert [point.step for point in series] == [1, 3]
        files = {f.path for f in client.list_artifacts(parent.info.run_id)}
        assert {"sweep.yaml", "results.csv", "results.md"} <= files
    events = list(folder.glob("*/tune/select/*/events.out.tfevents.*"))
    assert len(events) == 8


def test_ten_trials_at_once_on_a_fresh_store_lose_no_metric(local_ray, tmp_path, store):
    # Trials without client actors: what is tried here is ten writers of one store.
    sweep = sweep_of(
        {"method.kappa": [0.1, 0.2, 0.3, 0.4, 0.5]},
        base={"placement": {"backend": "local"}, "evaluation": {"every": 1}},
        seeds=[0, 1],
        cpus_per_trial=0.2,
    )
    result = run_sweep(sweep, output=tmp_path / "sweep")
    assert result.complete
    assert not result.failed
    client, runs = runs_of(store)
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(children) == 10
    for child in children:
        name = f"{child.data.tags['configuration']} s{child.data.tags['seed']}"
        (folder,) = [
            p.parent
            for p in (tmp_path / "sweep" / "trials").glob("*/tracking.json")
            if json.loads(p.read_text())["run_id"] == child.info.run_id
        ]
        assert child.info.run_name == name
        rounds = pd.read_parquet(folder / "rounds.parquet")
        for metric in [c for c in rounds.columns if "/" in c]:
            series = client.get_metric_history(child.info.run_id, metric)
            known = rounds[rounds[metric].notna()]
            assert [p.step for p in series] == known["round_index"].tolist(), metric
            assert [p.value for p in series] == known[metric].tolist(), metric


# -- trials that end early -------------------------------------------------------------------------


def test_asha_ends_the_worst_early_and_what_remains_is_confirmed(local_ray, tmp_path, store):
    sweep = sweep_of(
        {"training.learning_rate": [0.3, 0.0001, 0.0002, 0.0003]},
        base={"training": {"num_rounds": 8, "num_local_steps": 5}, "evaluation": {"every": 1}},
        scheduler={"name": "asha", "grace": 2, "reduction": 2},
        concurrent=1,
        confirm={"top": 1, "seeds": [1, 2]},
    )
    result = run_sweep(sweep, output=tmp_path / "sweep")
    assert result.complete
    first = result.rows["select"].set_index("label")
    assert first.loc["learning_rate=0.3", "status"] == "FINISHED"
    stopped = first[first["status"] == "STOPPED"]
    assert len(stopped) >= 2
    assert stopped["rounds"].between(2, 7).all()
    assert result.rows["confirm"]["label"].unique().tolist() == ["learning_rate=0.3"]
    assert result.rows["confirm"]["test/local_accuracy"].notna().all()
    _, runs = runs_of(store)
    statuses = {r.info.status for r in runs}
    assert statuses == {"FINISHED", "KILLED"}
    again = run_sweep(sweep, resume=tmp_path / "sweep")
    assert again.rows["select"].equals(result.rows["select"])


@pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None,
    reason="optuna is not installed: pip install -e '.[optuna]'",
)
def test_a_search_that_goes_on_in_the_middle_of_a_batch_has_the_same_tables(
    local_ray, tmp_path, store
):
    sweep = sweep_of(
        {"training.learning_rate": {"loguniform": [0.001, 0.5]}},
        base={"placement": {"backend": "local"}},
        searcher={"name": "optuna", "trials": 4, "startup": 2, "batch": 2},
        seeds=[0, 1],
        concurrent=1,
        confirm={"top": 1, "seeds": [2]},
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    messages = []
    result = run_sweep(sweep, output=whole, watch=messages.append)
    assert result.complete
    assert next(m.total for m in messages if m.stage == "select") == 8
    assert [m.done for m in messages if m.stage == "select"][-1] == 8
    rows = result.rows["select"]
    told = json.loads((whole / "search.json").read_text())["told"]
    means = rows.groupby("configuration")["val/local_accuracy"].mean()
    assert [one["value"] for one in told] == means.tolist()
    check_a_search_in_mlflow(store)
    # As a kill leaves it: one batch told, of the other one trial done and three not begun.
    shutil.copytree(whole, cut)
    past = json.loads((cut / "search.json").read_text())
    (cut / "search.json").write_text(json.dumps({**past, "told": past["told"][:2]}))
    for name in [*rows["trial"].tolist()[-1:], *rows["trial"].tolist()[2:4]]:
        shutil.rmtree(cut / "trials" / name)
    for path in [*cut.glob("results.*"), *cut.glob("confirm.*")]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in cut.glob("trials/*/summary.json")}
    assert run_sweep(sweep, resume=cut).complete
    for name in ("search.json", "results.csv", "results.md", "confirm.csv", "confirm.md"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def check_a_search_in_mlflow(store):
    """Every suggestion with every seed below one parent, the best in both stages marked."""
    client, runs = runs_of(store)
    (parent,) = [r for r in runs if r.data.tags.get("selffl.kind") == "sweep"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.data.params["searcher.name"] == "optuna"
    assert {r.info.status for r in [parent, *children]} == {"FINISHED"}
    assert sum(r.data.tags["stage"] == "select" for r in children) == 8
    best = [r for r in children if "best" in r.data.tags]
    assert sorted(r.data.tags["stage"] for r in best) == ["confirm", "select", "select"]
    assert "search.json" in {f.path for f in client.list_artifacts(parent.info.run_id)}


def test_a_trial_that_fails_is_told_with_its_cause_and_the_others_go_on(local_ray, tmp_path):
    sweep = sweep_of(
        {"method.raising": [[], ["form-03"]]},
        base={
            "method": {"name": "misbehaving"},
            "plugins": ["tests.runtime.misbehaving"],
            "faults": {"max_retries": 0, "min_participants": 1.0},
            "tracking": {"enabled": False},
        },
    )
    result = run_sweep(sweep, output=tmp_path / "sweep")
    assert result.complete
    assert result.failed == 1
    rows = result.rows["select"].set_index("configuration")
    assert rows["status"].tolist() == ["FINISHED", "FAILED"]
    assert "the dog ate the gradient" in rows.loc[1, "error"]
    assert [r.configuration for r in result.ranking] == [0]


def test_a_trial_whose_metric_is_no_number_fails_alone(local_ray, tmp_path):
    # Uploads stay finite; the personalized models, and with them the metric, do not.
    sweep = sweep_of(
        {"method.readout_rate": [0.1, 1e30]},
        base={"placement": {"backend": "local"}, "tracking": {"enabled": False}},
        metric="val/local_loss",
        mode="min",
    )
    result = run_sweep(sweep, output=tmp_path / "sweep")
    assert result.complete
    assert result.failed == 1
    rows = result.rows["select"].set_index("configuration")
    assert rows["status"].tolist() == ["FINISHED", "FAILED"]
    assert "val/local_loss was not measured or is not finite" in rows.loc[1, "error"]
    assert "did the models diverge?" in rows.loc[1, "error"]
    assert [r.configuration for r in result.ranking] == [0]
    # What it was is kept, and a resumed sweep repeats the trial that failed only.
    done = tmp_path / "sweep" / "trials" / rows.loc[0, "trial"] / "summary.json"
    before = done.stat().st_mtime_ns
    assert run_sweep(sweep, resume=tmp_path / "sweep").failed == 1
    assert done.stat().st_mtime_ns == before


def test_a_store_that_cannot_be_reached_changes_no_result(local_ray, tmp_path, monkeypatch):
    """Nothing listens at that port: the parent and every trial fail to track, and say so once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tables = {}
    for name, uri in (("down", "http://127.0.0.1:9"), ("up", f"sqlite:///{tmp_path / 'm.db'}")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        messages = []
        result = run_sweep(sweep_of(SPACE), output=tmp_path / name, watch=messages.append)
        assert result.complete
        tables[name] = (tmp_path / name / "results.csv").read_text()
        said = [m.text for m in messages if "no parent run" in getattr(m, "text", "")]
        assert len(said) == (name == "down")
    assert tables["down"] == tables["up"]
    assert list((tmp_path / "down").glob("trials/*/untracked.jsonl"))


# -- several machines ------------------------------------------------------------------------------

TWO_NODES = """
import sys
from pathlib import Path
from selffl_ray.errors import PlacementError
from selffl_ray.runtime import cluster
import ray
from ray.cluster_utils import Cluster

head = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}
nodes = Cluster(initialize_head=True, head_node_args=head)
nodes.add_node(num_cpus=1, node_ip_address="127.0.0.1")
ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
folder = Path(sys.argv[1])
cluster.check_shared(folder)
print("seen", sorted(p.name for p in folder.iterdir()))
mine = ray.get_runtime_context().get_node_id()
# A disk of its own cannot be had on one machine: the other node is made to look elsewhere.
cluster._exists = lambda path: ray.get_runtime_context().get_node_id() == mine
try:
    cluster.check_shared(folder)
except PlacementError as error:
    print("refused", error)
ray.shutdown()
nodes.shutdown()
"""


def test_a_folder_that_a_node_does_not_see_is_refused_before_the_sweep(tmp_path):
    box = Sandbox(tmp_path)
    try:
        process = box.start(sys.executable, "-c", TWO_NODES, str(tmp_path / "shared"))
        out, err = process.communicate(timeout=120)
    finally:
        box.end_all()
    lines = [line for line in out.splitlines() if line.startswith(("seen", "refused"))]
    assert len(lines) == 2, err
    assert lines[0] == "seen []"
    assert "is not seen by the node" in lines[1]
    assert "give --output on storage that all nodes share" in lines[1]
