"""``selffl verify``: a file that is gone, cut short or something else is named in one line."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from selffl_ray import load_config, run_experiment
from selffl_ray.tables import TABLES
from tests.mutations import Said, assert_ours, selffl, state_of
from tests.test_security import Touch

SETTINGS = (
    "placement.backend=local",
    "tracking.enabled=false",
    "training.num_rounds=3",
    "training.num_local_steps=2",
    "training.trouble={dropout: {probability: 0.3}}",
    "model.hidden=[4]",
    "evaluation.every=1",
    "checkpoint.every=1",
    "export_models=true",
)


def says_it_was_on_ray(folder: Path) -> None:
    """So that it is repeated in one process, in other stacks."""
    file = folder / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"placement": {"backend": "ray"}}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with every kind of file."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_experiment(load_config(None, SETTINGS), output=folder)
    says_it_was_on_ray(folder)
    (folder / "tracking.json").write_text('{"uri": "sqlite:///none.db", "run_id": "0"}')
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch) -> Path:
    """A copy of that run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def assert_named(said: Said, file: Path) -> None:
    """Refused before or after the repetition, the last line names the file."""
    assert_ours(said, started=True)
    assert said.code == 2, said.out
    assert str(file) in said.err.splitlines()[-1]


def test_a_run_with_all_of_its_files_is_verified_and_left_as_it_is(folder):
    before = state_of(folder)
    said = selffl("verify", str(folder))
    assert said.code == 0, said.err
    assert said.out.startswith("equal: all 3 rounds")
    assert state_of(folder) == before


def cut_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def cut_row(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 1), path)


def cut_round(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.filter(pc.less(table["round_index"], 2)), path)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("damage", [Path.unlink, cut_bytes, cut_row, cut_round])
def test_a_table_that_is_gone_or_cut_short_is_named(folder, name, damage: Callable[[Path], None]):
    file = folder / f"{name}.parquet"
    damage(file)
    assert_named(selffl("verify", str(folder)), file)


@pytest.mark.parametrize(
    ("name", "column"),
    [("clients", "local_loss"), ("uncertainty", "intra_var"), ("participation", "virtual_s")],
)
def test_a_number_that_was_changed_is_named_with_its_round(folder, name, column):
    file = folder / f"{name}.parquet"
    table = pq.read_table(file)
    at = table.column_names.index(column)
    values = table[column].to_pylist()
    row = next(i for i, v in enumerate(values) if v and table["round_index"][i].as_py() == 1)
    values[row] *= 1 + 1e-12
    pq.write_table(table.set_column(at, column, pa.array(values, table[column].type)), file)
    said = selffl("verify", str(folder))
    assert_named(said, file)
    assert "of round 1 are not the" in said.err


@pytest.mark.parametrize("name", ["global.safetensors", "clients/form-03.safetensors"])
def test_a_model_in_the_place_of_another_is_named_with_both_digests(folder, name):
    """A whole file, of the same names and shapes: the model of another client."""
    file, other = folder / "models" / name, folder / "models" / "clients" / "form-00.safetensors"
    recorded = json.loads((folder / "models.json").read_text())
    assert len(recorded) == 15
    assert recorded[name] == hashlib.sha256(file.read_bytes()).hexdigest()
    shutil.copyfile(other, file)
    said = selffl("verify", str(folder))
    assert_named(said, file)
    found = recorded["clients/form-00.safetensors"]
    assert found != recorded[name]
    assert f"SHA-256 {found}, but " in said.err
    assert f" has {recorded[name]}; put it back" in said.err
    # The remedy that is told.
    assert selffl("run", "--resume", str(folder)).code == 0
    assert json.loads((folder / "models.json").read_text()) == recorded
    assert hashlib.sha256(file.read_bytes()).hexdigest() == recorded[name]


def test_models_that_have_come_or_gone_are_named(folder):
    models = folder / "models"
    one, new = models / "clients" / "form-03.safetensors", models / "clients" / "mine.safetensors"
    shutil.move(one, new)
    assert_named(selffl("verify", str(folder)), one)
    shutil.copyfile(new, one)
    assert_named(selffl("verify", str(folder)), new)
    new.unlink()
    shutil.move(models, folder / "elsewhere")
    assert_named(selffl("verify", str(folder)), models / "clients" / "form-00.safetensors")
    shutil.move(folder / "elsewhere", models)
    (folder / "models.json").unlink()
    assert_named(selffl("verify", str(folder)), folder / "models.json")


def test_rounds_are_missed_by_the_summary_or_by_the_checkpoint(folder):
    file = folder / "rounds.parquet"
    cut_round(file)
    shutil.rmtree(folder / "checkpoints" / "round_2")
    assert_named(selffl("verify", str(folder)), file)
    # As a kill leaves a run: without a summary, and with the rounds of its newest checkpoint.
    (folder / "summary.json").unlink()
    said = selffl("verify", str(folder))
    assert said.code == 0, said.err
    assert said.out.startswith("equal: all 2 rounds")
    shutil.copytree(folder / "checkpoints" / "round_1", folder / "checkpoints" / "round_2")
    assert_named(selffl("verify", str(folder)), file)


def test_a_run_that_its_clock_ended_has_an_evaluation_that_the_repetition_has_not(tmp_path):
    """Its last round, wherever it came, was evaluated."""
    more = ("evaluation.every=50", "training.num_rounds=100", "training.stop={seconds: 0.001}")
    result = run_experiment(load_config(None, (*SETTINGS, *more)), output=tmp_path / "run")
    assert result.clients["round_index"].unique().tolist() == [0]
    says_it_was_on_ray(tmp_path / "run")
    said = selffl("verify", str(tmp_path / "run"))
    assert said.code == 0, said.err
    assert said.out.startswith("equal: all 1 rounds")


def test_a_pickle_in_the_place_of_any_file_is_named_and_not_loaded(folder):
    names = [f.relative_to(folder) for f in sorted(folder.rglob("*")) if f.is_file()]
    kinds = {name.parts[0] for name in names}
    assert kinds >= {"config.yaml", "checkpoints", "models", "participation.parquet"}
    for name in [*names, Path("schedule.json")]:
        whole = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps(Touch()))
        said = selffl("verify", str(folder))
        assert not Path("owned").exists(), name
        assert_ours(said)
        assert said.code == 2, name
        # Of a checkpoint its folder is named, and without these two it is no folder of a run.
        at = Path(*name.parts[:2]) if name.parts[0] == "checkpoints" else name
        needed = name.name in ("config.yaml", "environment.json")
        assert str(folder if needed else folder / at) in said.err, name
        (folder / name).unlink()
        if whole is not None:
            (folder / name).write_bytes(whole)
    pickle.loads(pickle.dumps(Touch()))
    assert Path("owned").exists()
