"""Population-based training on a real Ray Tune: exact copies, true tables, kills, failures."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from selffl_ray import sweep_population, tuning
from selffl_ray.api import run_experiment
from selffl_ray.config import load_config, parse_part
from selffl_ray.sweep import SweepConfig
from selffl_ray.sweep_run import run_sweep
from selffl_ray.tracking import open_store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),  # MLflow
]

BASE = {
    "training": {"num_rounds": 6, "num_local_steps": 3},
    "evaluation": {"every": 1},
    "model": {"name": "mlp", "hidden": [8]},
    "placement": {"backend": "local"},
}
RATES = [0.3, 0.1, 0.002, 0.001]
TABLES = ("results.csv", "results.md", "population.json")


def population_of(space, mutate, base=(), **scheduler):
    raw = {
        "experiment": "populations",
        "base": {**BASE, **dict(base)},
        "space": space,
        "scheduler": {"name": "pbt", "every": 2, "mutate": mutate, **scheduler},
    }
    return parse_part(SweepConfig, raw, "")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A fresh MLflow store."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def timeless(table):
    return table[[c for c in table.columns if not c.startswith("time/") and not c.endswith("_s")]]


def table_of(folder, name):
    return timeless(pd.read_parquet(folder / f"{name}.parquet"))


@pytest.mark.limit_s(400)
def test_a_copy_whose_options_stay_equal_goes_on_bit_for_bit_as_its_source(
    local_ray, tmp_path, store
):
    # Client actors, memories of every client, and a probe in the middle: all of it is carried over.
    base = {
        "training": {"num_rounds": 4, "num_local_steps": 3},
        "method": {"name": "selffl", "intra": "round_window", "probe_every": 2},
        "placement": {},
    }
    space = {"training.learning_rate": [0.001, 0.3], "training.momentum": [0.5]}
    sweep = population_of(space, {"training.momentum": [0.5]}, base, quantile=0.5)
    result = run_sweep(sweep, output=tmp_path / "sweep")
    assert result.complete
    rows = result.rows["select"]
    assert rows["status"].tolist() == ["STOPPED", "FINISHED", "FINISHED"]
    source, copy = (tmp_path / "sweep" / "trials" / name for name in rows["trial"][1:])
    assert json.loads((copy / "schedule.json").read_text())[1]["from"] == source.name
    for table in ("rounds", "clients", "uncertainty"):
        one = table_of(copy, table)
        assert one["round_index"].max() == 3
        assert one.equals(table_of(source, table)), table
    # And being held changes nothing: the same as a run that never was.
    config = load_config(source / "config.yaml", ["tracking.enabled=false"])
    alone = run_experiment(config, output=tmp_path / "alone")
    whole = pd.read_parquet(source / "rounds.parquet")
    assert len(whole) == 4
    assert alone.rounds["digest"].tolist() == whole["digest"].tolist()


SPACE = {"training.learning_rate": RATES, "method.kappa": [1.0]}
MUTATE = {"training.learning_rate": {"loguniform": [0.0005, 1.0]}, "method.kappa": [0.5, 1.0, 2.0]}


@pytest.fixture(scope="module")
def whole(local_ray, tmp_path_factory):
    """A population that was never disturbed, and its store."""
    folder = tmp_path_factory.mktemp("population")
    with pytest.MonkeyPatch.context() as patch:
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        result = run_sweep(population_of(SPACE, MUTATE), output=folder / "sweep")
    assert result.complete
    return result, uri


@pytest.mark.limit_s(400)
def test_tables_and_schedules_tell_what_every_run_was(whole):
    result, _ = whole
    rows = result.rows["select"]
    assert rows["status"].value_counts().to_dict() == {"FINISHED": 4, "STOPPED": 2}
    # The smallest rates are the worst.
    assert set(rows.index[rows["status"] == "STOPPED"]) & {2, 3}
    assert len(result.ranking) == 4
    text = (result.folder / "results.md").read_text()
    assert "each row is a schedule, not a configuration" in text
    log = json.loads((result.folder / "population.json").read_text())["compared"]
    assert [then["round"] for then in log] == [2, 4]
    assert [then["copies"][0]["trial"] for then in log] == rows["trial"].tolist()[4:]
    for then in log:
        check_copy(result.folder / "trials", then["round"], then["copies"][0])


def check_copy(trials, done, told):
    """The source's rows up to the copy, and others from then on; the schedule says so."""
    copy, source = trials / told["trial"], trials / told["copy_of"]
    schedule = json.loads((copy / "schedule.json").read_text())
    assert schedule[-1] == {"round": done, "from": source.name, "options": told["settings"]}
    assert json.loads((copy / "summary.json").read_text())["schedule"] == schedule
    for name in ("rounds", "clients", "uncertainty"):
        one, other = table_of(copy, name), table_of(source, name)
        assert one[one["round_index"] < done].equals(other[other["round_index"] < done]), name
    one, other = (table_of(f, "rounds").set_index("round_index")["digest"] for f in (copy, source))
    later = one.index.intersection(other.index)[done:]
    assert len(later) > 0
    assert (one[later] != other[later]).all()
    ended = json.loads((trials / told["instead_of"] / "ended.json").read_text())
    assert ended == {"round": done, "replaced_by": copy.name}
    assert len(table_of(trials / told["instead_of"], "rounds")) == done


def test_in_mlflow_every_run_has_one_history_and_says_that_it_is_a_schedule(whole):
    result, uri = whole
    client = open_store(uri)
    experiment = client.get_experiment_by_name("populations")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    (parent,) = [r for r in runs if r.data.tags.get("selffl.kind") == "sweep"]
    assert "population.json" in {f.path for f in client.list_artifacts(parent.info.run_id)}
    children = {r.info.run_id: r for r in runs if "mlflow.parentRunId" in r.data.tags}
    assert len(children) == 6
    assert sum(r.data.tags.get("best") == "true" for r in children.values()) == 1
    for note in (result.folder / "trials").glob("*/tracking.json"):
        run = children[json.loads(note.read_text())["run_id"]]
        schedule = json.loads((note.parent / "schedule.json").read_text())
        assert run.data.tags["schedule"] == "pbt"
        assert run.data.tags["options"].count(";") == len(schedule) - 1
        status = json.loads((note.parent / "summary.json").read_text())["status"]
        assert run.info.status == {"FINISHED": "FINISHED", "STOPPED": "KILLED"}[status]
        rounds = pd.read_parquet(note.parent / "rounds.parquet")
        for metric in ("train/loss", "val/local_accuracy", "cost/gradient_steps"):
            series = client.get_metric_history(run.info.run_id, metric)
            assert [p.step for p in series] == rounds["round_index"].tolist()
            assert [p.value for p in series] == rounds[metric].tolist()


class KilledError(Exception):
    """The sweep's process is gone."""


@pytest.mark.limit_s(400)
def test_a_population_that_is_killed_and_resumed_has_the_tables_of_one_that_was_not(
    whole, tmp_path, monkeypatch, store
):
    sweep, folder = population_of(SPACE, MUTATE), tmp_path / "sweep"
    with monkeypatch.context() as patch:
        # Decided, and not carried out.
        patch.setattr(sweep_population, "_copy_run", dies_at(2, sweep_population._copy_run))
        with pytest.raises(KilledError):
            run_sweep(sweep, output=folder)
    log = json.loads((folder / "population.json").read_text())["compared"]
    assert not (folder / "trials" / log[1]["copies"][0]["trial"]).exists()
    kept = folder / "trials" / log[0]["copies"][0]["instead_of"] / "rounds.parquet"
    before = kept.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        # On the way to the end, with some members ahead of the others.
        patch.setattr(tuning, "run_trials", only_some_at(1, tuning.run_trials))
        with pytest.raises(KilledError):
            run_sweep(sweep, resume=folder)
    assert run_sweep(sweep, resume=folder).complete
    for name in TABLES:
        assert (folder / name).read_bytes() == (whole[0].folder / name).read_bytes(), name
    assert kept.stat().st_mtime_ns == before


def dies_at(count, work):
    calls = []

    def other(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise KilledError
        work(*arguments)

    return other


def only_some_at(count, work):
    calls = []

    def other(specs, **more):
        calls.append(specs)
        if len(calls) == count:
            work(dict(list(specs.items())[:2]), **more)
            raise KilledError
        work(specs, **more)

    return other


DIVERGING = {
    "training": {"num_rounds": 4, "num_local_steps": 3},
    "method": "misbehaving",
    "plugins": ["tests.runtime.misbehaving"],
    "faults": {"max_retries": 0, "min_participants": 1.0},
    "tracking": {"enabled": False},
}


@pytest.mark.limit_s(400)
def test_a_member_that_diverges_is_told_and_replaced(local_ray, tmp_path):
    space = {"training.learning_rate": [0.3, 0.2], "method.diverging": [[], ["form-03"]]}
    mutate = {"training.learning_rate": {"uniform": [0.1, 0.5]}}
    sweep = population_of(space, mutate, DIVERGING)
    result = run_sweep(sweep, output=tmp_path / "sweep")
    assert result.complete
    rows = result.rows["select"]
    failed = rows[rows["status"] == "FAILED"]
    assert len(failed) == result.failed == 2
    assert (failed["error"] != "").all()
    assert rows["status"].tolist().count("FINISHED") == 4
    log = json.loads((tmp_path / "sweep" / "population.json").read_text())["compared"]
    first = {one["instead_of"] for one in log[0]["copies"]}
    assert first == set(failed["trial"])
