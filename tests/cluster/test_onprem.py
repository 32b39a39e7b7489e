"""A cluster's whole life for real: `ray up`, a sweep as a job, results brought home, `ray down`.

One machine is head and user at once, behind walls: see ``namespace``.
"""

from __future__ import annotations

import json
import os
import re
import shutil

import pandas as pd
import pytest

from selffl_ray.tracking import open_store
from tests.cluster.namespace import enter, why_not

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),  # MLflow
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the session's files are."""
    return tmp_path_factory.mktemp("onprem")


@pytest.fixture(scope="module")
def seen(folder):
    """What happened in the session."""
    if os.geteuid() != 0:
        pytest.skip("an ssh server in a namespace needs root")
    for name, package in (
        ("sshd", "openssh-server"),
        ("ssh", "openssh-client"),
        ("rsync", "rsync"),
    ):
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"there is no {name} (Debian: {package})")
    if reason := why_not():
        pytest.skip(f"`ray down` ends every Ray that it sees: {reason}")
    return enter("tests.cluster.onprem_session", folder, timeout_s=900)


def ended_well(seen, *names):
    for name in names:
        status, out = seen[name]
        assert status == 0, out


def test_without_a_token_no_ray_is_started(seen):
    status, out = seen["no token"]
    assert status != 0
    assert "auth_token" in out.splitlines()[-1]


def test_the_cluster_comes_up_with_the_commands_of_the_file(seen):
    ended_well(seen, "token", "up")
    assert "Ray runtime started" in seen["up"][1]


def test_dashboard_and_mlflow_listen_on_loopback_only(seen):
    for port in ("8265", "5000"):
        assert seen["listening"][port] == ["127.0.0.1"]


def test_a_stranger_sees_nothing_and_submits_nothing(seen):
    assert seen["stranger"] == [401, 401]
    status, out = seen["submit without a token"]
    assert status != 0
    assert "Missing authentication token" in out


def test_doctor_says_what_the_jobs_find(seen):
    ended_well(seen, "doctor")
    out = seen["doctor"][1]
    assert re.search(r"ok Ray +RAY_ADDRESS=\S+, token authentication on", out)
    assert re.search(r"ok data stores +/mnt/shared/selffl/stores, ", out)
    assert re.search(r"ok MLflow +http://127.0.0.1:5000 answers", out)
    assert re.search(r"ok nodes +1 alive, 0 gone", out)


def test_a_sweep_is_submitted_through_the_tunnel_and_its_log_followed(seen):
    ended_well(seen, "tune")
    out = seen["tune"][1]
    assert "Running entrypoint" in out
    assert "/mnt/shared/selffl/runs/smoke" in out
    assert re.search(r"Job '\w+' succeeded", out)
    assert "inter=reml" in out


def test_results_are_brought_home(seen, folder):
    ended_well(seen, "fetch run")
    results = pd.read_csv(folder / "fetched" / "run" / "results.csv")
    assert len(results) == 2
    assert set(results["status"]) == {"FINISHED"}


def test_mlflow_has_the_sweep_and_its_trials_and_is_brought_home(seen, folder):
    ended_well(seen, "fetch mlflow")
    store = folder / "fetched" / "mlflow"
    client = open_store(f"sqlite:///{store / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("smoke").experiment_id])
    parents = [r for r in runs if r.data.tags.get("selffl.kind") == "sweep"]
    trials = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1
    assert {r.data.tags["mlflow.parentRunId"] for r in trials} == {parents[0].info.run_id}
    assert len(trials) == 2
    assert all("val/local_accuracy" in r.data.metrics for r in trials)
    # Files went through the server, to the folder that came along.
    summaries = list((store / "mlartifacts").rglob("summary.json"))
    assert {json.loads(one.read_text())["status"] for one in summaries} == {"FINISHED"}
    assert len(summaries) == len(trials)


def test_ray_down_leaves_nothing(seen):
    ended_well(seen, "mlflow ended", "down")
    assert "ray: command not found" not in seen["down"][1]
    assert seen["left"] == []
