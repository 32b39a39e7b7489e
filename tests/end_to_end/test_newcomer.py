"""A method of one's own: one small module, no change to the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).with_name("toy_method.py")
ROOT = TOY.parents[2]


@pytest.fixture
def folder(tmp_path):
    """A newcomer's folder with nothing but the module."""
    shutil.copy(TOY, tmp_path / "my_method.py")
    return tmp_path


def call(folder, *command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_module_has_at_most_25_lines():
    assert len(TOY.read_text().splitlines()) <= 25


def test_it_runs_through_selffl_run(folder):
    done = call(
        folder,
        "-m",
        "selffl_ray",
        "run",
        "--set",
        "plugins=[my_method]",
        "--set",
        "method={name: toy, pull: 0.2}",
        "--set",
        "placement.backend=local",
        "--set",
        "training.num_rounds=8",
        "--output",
        "out",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["method"] == "toy"
    assert summary["final"]["test/global_accuracy"] > 0.8


@pytest.mark.slow
def test_it_passes_all_contract_tests_and_they_include_it(folder):
    # pytest runs in the repository; the module is found through PYTHONPATH.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-k", "toy", "tests/contract"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "SELFFL_RAY_TEST_PLUGINS": "my_method",
        },
        check=False,
    )
    assert done.returncode == 0, done.stdout
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    assert len(passed) >= 10
    assert all("toy" in line for line in passed)


@pytest.mark.ray
def test_it_runs_on_client_actors(folder):
    done = call(
        folder,
        "-m",
        "selffl_ray",
        "run",
        "--set",
        "plugins=[my_method]",
        "--set",
        "method=toy",
        "--set",
        "placement.clients_per_actor=7",
        "--set",
        "training.num_rounds=2",
        "--set",
        "tracking.enabled=false",
        "--output",
        "out",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "out" / "summary.json").read_text())["rounds"] == 2
