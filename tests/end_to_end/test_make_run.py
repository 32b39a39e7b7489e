"""What ``make run`` shows: Self-FL beside FedAvg and local training, as table and in MLflow."""

from __future__ import annotations

import re

import pytest

from selffl_ray.tracking import open_store
from tests.runtime.processes import Sandbox

pytestmark = [pytest.mark.ray, pytest.mark.slow]

METHODS = "selffl:two_tap,selffl:as_described,fedavg,local"
LABELS = ["selffl-two_tap", "selffl-as_described", "fedavg", "local"]

EXPECTED = {
    ("selffl-two_tap", "global"): 94.6,
    ("selffl-two_tap", "local"): 95.4,
    ("fedavg", "global"): 94.5,
    ("fedavg", "local"): 94.5,
    ("local", "local"): 86.4,
}
"""Means over the seeds of the study of the prototype, in percent; one seed lies within 2 points."""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The sandbox of the command, and how the command ended."""
    box = Sandbox(tmp_path_factory.mktemp("make_run"))
    try:
        done = box.selffl(
            *("compare", "--methods", METHODS, "--set", "placement.clients_per_actor=7"),
            timeout_s=240,
        )
        yield box, done
    finally:
        box.end_all()


@pytest.fixture(scope="module")
def table(shown):
    """Cells of the table that the command printed, by method and column."""
    lines = shown[1].out.splitlines()
    header = re.split(r"\s{2,}", lines[0])
    rows = [re.split(r"\s{2,}", line) for line in lines[2:6]]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_it_ends_with_the_table_and_where_the_curves_are(shown, table):
    _, done = shown
    assert done.status == 0, done.err
    assert list(table) == LABELS
    assert list(table["fedavg"])[1:5] == ["global", "local", "worst 10 %", "harmed"]
    last = done.out.splitlines()[-1]
    assert last.startswith("curves:  selffl ui")
    assert "test/global_accuracy and test/local_accuracy" in last


@pytest.mark.parametrize(("method", "column"), list(EXPECTED))
def test_the_accuracies_are_those_of_the_study(table, method, column):
    assert float(table[method][column]) == pytest.approx(EXPECTED[method, column], abs=2)


def test_personalization_gains_over_training_alone_and_over_the_global_model(table):
    """Both halves of the method's promise, in this one seed."""
    local = {method: float(cells["local"]) for method, cells in table.items()}
    assert local["selffl-two_tap"] > local["local"] + 5
    assert local["selffl-two_tap"] > local["fedavg"]
    assert local["selffl-as_described"] > local["local"] + 5


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # in MLflow
def test_both_accuracies_of_every_run_are_series_in_mlflow(shown, table):
    box, _ = shown
    client = open_store(f"sqlite:///{box.folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "digits"]
    runs = {r.data.tags["method_label"]: r for r in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == sorted(LABELS)
    for label, run in runs.items():
        assert run.info.status == "FINISHED"
        for column in ("global", "local"):
            series = client.get_metric_history(run.info.run_id, f"test/{column}_accuracy")
            # Evaluated after every fifth of 30 rounds.
            assert [point.step for point in series] == [4, 9, 14, 19, 24, 29]
            assert f"{100 * series[-1].value:.1f}" == table[label][column]
