"""The tables of a run's folder: the contract's columns, whole files, nothing made up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from selffl_ray import ExperimentConfig, Result, load_config, run_experiment, tables
from selffl_ray.algorithms.base import UncertaintyRows
from selffl_ray.driver import RoundRecord
from selffl_ray.evaluation import ClientScores
from selffl_ray.participation import RoundPlan
from selffl_ray.tables import RunTables, final_metrics, selected_round, write_json, write_text

LOCAL = ("placement.backend=local", "tracking.enabled=false", "training.num_rounds=3")


def config(*sets: str) -> ExperimentConfig:
    return load_config(None, [*LOCAL, *sets])


@pytest.fixture(scope="module")
def selffl(tmp_path_factory) -> Result:
    """Self-FL on digits for three rounds, evaluated after the second and the third."""
    folder = tmp_path_factory.mktemp("selffl") / "run"
    sets = ["evaluation.every=2", "evaluation.new_clients=0.2", "training.participation_rate=0.5"]
    return run_experiment(config(*sets), output=folder)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory) -> Result:
    folder = tmp_path_factory.mktemp("gaussian") / "run"
    return run_experiment(config("data=gaussian", "data.num_clients=4"), output=folder)


def read(result: Result, name: str) -> pd.DataFrame:
    return pd.read_parquet(result.folder / f"{name}.parquet")


# -- what a run leaves --------------------------------------------------------------------------

OF_A_SPLIT = {
    "{}/global_{}",
    "{}/global_{}_on_clients",
    "{}/local_{}",
    "{}/local_{}_mean",
    "{}/local_{}_std",
    "{}/local_{}_worst10",
    "{}/local_{}_best10",
    "{}/global_loss",
    "{}/local_loss",
    "{}/clients_harmed_vs_global",
}
PLAIN = {
    "bytes_down",
    "bytes_up",
    "digest",
    "eval_s",
    "events",
    "faults",
    "participants",
    "round_s",
    "train_s",
}
OF_A_ROUND = {
    "train/loss",
    "time/round_s",
    "time/train_s",
    "comm/bytes_up",
    "comm/bytes_down",
    "cost/gradient_steps",
    "clients/participants",
    "clients/faults",
}
OF_AN_EVALUATION = {"time/eval_s", "cost/personalization_steps"}
OF_SELFFL = {
    "uncertainty/inter_var",
    "uncertainty/intra_var_mean",
    "uncertainty/shrinkage_mean",
    "uncertainty/num_local_steps_mean",
    "uncertainty/alarm_floor",
    "uncertainty/alarm_ratio",
    "uncertainty/alarm_no_information",
}


OF_TROUBLE = {"available", "asked", "dropped", "late", "partial", "virtual_s"}
"""Only where it is simulated; see test_trouble.py."""


def of_splits(score: str, *splits: str) -> set[str]:
    return {name.format(split, score) for name in OF_A_SPLIT for split in splits}


def test_rounds_have_the_contracts_columns_and_no_others(selffl, gaussian):
    always = {"round_index"} | PLAIN | OF_A_ROUND | OF_AN_EVALUATION | OF_SELFFL
    assert set(read(selffl, "rounds")) == always | of_splits("accuracy", "val", "test", "new")
    assert set(read(gaussian, "rounds")) == always | of_splits("mse", "test")


def test_rounds_have_a_row_for_each_round_in_order(selffl):
    assert read(selffl, "rounds")["round_index"].tolist() == [0, 1, 2]


def test_a_round_that_was_not_evaluated_has_null_and_not_zero(selffl):
    rounds = read(selffl, "rounds").set_index("round_index")
    evaluated = [*of_splits("accuracy", "val", "test", "new"), *OF_AN_EVALUATION, "eval_s"]
    assert rounds.loc[0, evaluated].isna().all()
    assert rounds.loc[[1, 2], evaluated].notna().all(axis=None)
    assert rounds[[*OF_A_ROUND, "digest"]].notna().all(axis=None)


def test_plain_columns_repeat_their_metric_and_counts_are_whole_numbers(selffl):
    rounds = read(selffl, "rounds")
    aliases = {k: v for k, v in tables.ALIASES.items() if k not in OF_TROUBLE}
    for plain, metric in aliases.items():
        pd.testing.assert_series_equal(
            rounds[plain], rounds[metric], check_names=False, check_dtype=False
        )
    assert all(rounds[name].dtype == np.int64 for name in tables.COUNTS - OF_TROUBLE)
    # 11 of 14 clients take part, and half of them, rounded to even, are asked.
    assert rounds["participants"].tolist() == [6, 6, 6]


def test_clients_have_the_contracts_columns_and_a_row_a_client_split_and_evaluated_round(selffl):
    clients = read(selffl, "clients")
    assert set(clients) == {
        "round_index",
        "client_id",
        "split",
        "num_examples",
        "global_accuracy",
        "local_accuracy",
        "global_loss",
        "local_loss",
    }
    counts = clients.groupby(["round_index", "split"])["client_id"].nunique()
    expected = {(r, s): n for r in (1, 2) for s, n in (("val", 11), ("test", 11), ("new", 3))}
    assert counts.to_dict() == expected
    assert len(clients) == 2 * (11 + 11 + 3)


@pytest.mark.parametrize("split", ["val", "test", "new"])
def test_the_metrics_of_a_round_follow_from_the_rows_of_its_clients(selffl, split):
    clients = read(selffl, "clients").query("round_index == 2 and split == @split")
    last = read(selffl, "rounds").set_index("round_index").loc[2]
    weights, local = clients["num_examples"], clients["local_accuracy"]
    expected = {
        "local_accuracy": np.average(local, weights=weights),
        "global_accuracy": np.average(clients["global_accuracy"], weights=weights),
        "local_accuracy_mean": local.mean(),
        "local_accuracy_std": local.std(ddof=0),
        "local_accuracy_worst10": local.nsmallest(math.ceil(0.1 * len(local))).mean(),
        "local_accuracy_best10": local.nlargest(math.ceil(0.1 * len(local))).mean(),
        "clients_harmed_vs_global": (local < clients["global_accuracy"]).mean(),
        "local_loss": np.average(clients["local_loss"], weights=weights),
    }
    for name, value in expected.items():
        assert last[f"{split}/{name}"] == pytest.approx(value, abs=1e-12)


def test_uncertainty_has_the_contracts_columns_and_a_row_a_participant(selffl):
    uncertainty = read(selffl, "uncertainty")
    assert list(uncertainty) == [
        "round_index",
        "client_id",
        "group",
        "intra_var",
        "inter_var",
        "shrinkage",
        "num_local_steps",
        "learning_rate",
        "agg_weight",
    ]
    participants = read(selffl, "rounds")["participants"]
    assert uncertainty.groupby("round_index").size().tolist() == participants.tolist()
    assert uncertainty["shrinkage"].between(0, 1).all()


def test_other_methods_leave_no_uncertainty(tmp_path):
    result = run_experiment(config("method=fedavg", "training.num_rounds=1"), output=tmp_path / "r")
    assert not (result.folder / "uncertainty.parquet").exists()
    assert result.uncertainty.empty
    assert not any(name.startswith("uncertainty/") for name in result.rounds)


def test_only_whole_files_with_the_contracts_names_are_in_the_folder(selffl):
    assert sorted(path.name for path in selffl.folder.iterdir()) == [
        "clients.parquet",
        "config.yaml",
        "environment.json",
        "rounds.parquet",
        "summary.json",
        "uncertainty.parquet",
    ]


def test_the_summary_holds_final_and_selected_metrics(selffl):
    summary = json.loads((selffl.folder / "summary.json").read_text())
    rounds = read(selffl, "rounds").set_index("round_index")
    assert summary["status"] == "FINISHED"
    assert summary["rounds"] == 3
    assert summary["digest"] == rounds.loc[2, "digest"]
    assert summary["final"]["test/local_accuracy"] == rounds.loc[2, "test/local_accuracy"]
    best = rounds["val/local_accuracy"].idxmax()
    assert summary["selected"]["round_index"] == best
    chosen = summary["selected"]["metrics"]["test/local_accuracy"]
    assert chosen == rounds.loc[best, "test/local_accuracy"]


def test_the_environment_says_what_results_depend_on(selffl):
    environment = json.loads((selffl.folder / "environment.json").read_text())
    assert environment["placement"]["backend"] == "local"
    assert environment["numerics"]["threads_per_host"] == 1
    assert len(environment["data_digest"]) == len(environment["partition_digest"]) == 64
    assert len(environment["client_ids"]) == 14
    assert environment["num_params"] == 64 * 64 + 64 + 64 * 10 + 10


# -- the tables themselves ----------------------------------------------------------------------


def record(round_index: int, **metrics: float) -> RoundRecord:
    """A round with some metrics; ``__`` stands for the slash of a metric's name."""
    index = np.asarray([0, 2])
    scores = ClientScores(
        index,
        np.asarray([4, 0]),
        *(np.asarray([float(k), 0.0]) for k in (1, 2, 3)),
        np.asarray([np.nan, 0.0]),
        np.asarray([2.0, 0.0]),
    )
    uncertainty = UncertaintyRows(
        index, np.asarray(["model", "model"]), *(np.asarray([0.5, np.nan]) for _ in range(6))
    )
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return RoundRecord(
        RoundPlan(round_index, index, 0.1),
        server=None,
        metrics=named,
        digest=f"digest {round_index}",
        gradient_steps=0,
        uncertainty=uncertainty,
        scores={"test": scores},
    )


def made(folder: Path, *records: RoundRecord) -> RunTables:
    found = RunTables(folder, ["a", "b", "c"], "accuracy")
    for one in records:
        found.add(one)
    found.flush()
    return found


def test_a_client_without_examples_and_a_score_that_is_not_a_number_are_null(tmp_path):
    made(tmp_path, record(0))
    clients = pd.read_parquet(tmp_path / "clients.parquet").set_index("client_id")
    assert clients.index.tolist() == ["a", "c"]
    assert clients.loc["a", "global_accuracy"] == 2 / 4
    assert clients.loc["a", "global_loss"] == 3 / 4
    assert clients.loc["a", "local_loss"] == 2 / 4
    columns = ["global_accuracy", "local_accuracy", "global_loss", "local_loss"]
    assert clients.loc["c", columns].isna().all()
    assert pq.read_table(tmp_path / "clients.parquet")["local_accuracy"].null_count == 2
    assert pq.read_table(tmp_path / "uncertainty.parquet")["intra_var"].null_count == 1


def test_a_metric_that_is_not_a_number_is_null_in_the_table_and_absent_from_the_rows(tmp_path):
    found = made(tmp_path, record(0, x__y=1.0), record(1, x__y=math.nan, time__round_s=math.nan))
    assert found.rows()[1].keys() == {"round_index", "digest", "events"}
    rounds = pq.read_table(tmp_path / "rounds.parquet")
    assert rounds["x/y"].to_pylist() == [1.0, None]
    assert set(rounds.column_names) == {"round_index", "digest", "events", "x/y"}


def test_going_on_keeps_the_rows_up_to_the_checkpoint_and_drops_later_ones(tmp_path):
    made(tmp_path, *(record(i, x__y=float(i), time__eval_s=1.0) for i in range(5)))
    again = RunTables(tmp_path, ["a", "b", "c"], "accuracy")
    again.restore(2)
    assert [row["round_index"] for row in again.evaluated_rounds()] == [0, 1, 2]
    again.add(record(3, x__y=30.0))
    again.flush()
    rounds = pd.read_parquet(tmp_path / "rounds.parquet")
    assert rounds["x/y"].tolist() == [0, 1, 2, 30]
    for name in ("clients", "uncertainty"):
        table = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert table["round_index"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    last = again.last_round()
    assert last is not None
    assert last["digest"] == "digest 3"


def test_going_on_from_the_start_forgets_everything(tmp_path):
    made(tmp_path, record(0))
    again = RunTables(tmp_path, ["a", "b", "c"], "accuracy")
    again.restore(-1)
    assert again.rows() == []
    assert again.last_round() is None


def test_rounds_that_are_kept_in_memory_only_are_written_after_a_while(tmp_path, monkeypatch):
    found = RunTables(tmp_path, ["a", "b", "c"], "accuracy")
    found.add(record(0))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tables, "FLUSH_SECONDS", -1.0)
    found.add(record(1))
    assert len(pd.read_parquet(tmp_path / "rounds.parquet")) == 2


@pytest.mark.parametrize("fails", ["write", "rename"])
def test_a_table_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch, fails):
    found = made(tmp_path, record(0))
    before = (tmp_path / "rounds.parquet").read_bytes()

    def half(table, where, **kwargs):
        Path(where).write_bytes(b"PAR1 half a file")
        raise OSError("disk full")

    def no_rename(self, target):
        raise OSError("disk full")

    if fails == "write":
        monkeypatch.setattr(pq, "write_table", half)
    else:
        monkeypatch.setattr(Path, "replace", no_rename)
    found.add(record(1))
    with pytest.raises(OSError, match="disk full"):
        found.flush()
    assert (tmp_path / "rounds.parquet").read_bytes() == before
    monkeypatch.undo()
    found.flush()
    assert len(pd.read_parquet(tmp_path / "rounds.parquet")) == 2


def test_a_text_is_replaced_whole_and_no_draft_remains(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "summary.json"
    write_text(path, "one")
    seen = []
    real = Path.replace

    def watching(self, target):
        seen.append((path.read_text(), self.read_text()))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", watching)
    write_text(path, "two")
    assert seen == [("one", "two")]
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_json_never_holds_what_json_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": math.nan})
    assert list(tmp_path.iterdir()) == []


# -- final and selected -------------------------------------------------------------------------


def row(round_index: int, **metrics: float) -> dict[str, float]:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return {"round_index": round_index, "participants": 3, **named}


def test_final_scores_are_means_over_the_last_evaluations_and_the_rest_is_the_newest():
    rows = [
        row(
            i,
            test__local_accuracy=a,
            val__local_loss=a,
            new__x=a,
            cost__gradient_steps=a,
            time__s=a,
        )
        for i, a in enumerate([0.1, 0.4, 0.8])
    ]
    final = final_metrics(rows, last=2)
    assert final == {
        "test/local_accuracy": pytest.approx(0.6),
        "val/local_loss": pytest.approx(0.6),
        "new/x": pytest.approx(0.6),
        "cost/gradient_steps": 0.8,
        "time/s": 0.8,
    }
    assert final_metrics(rows, last=1)["test/local_accuracy"] == 0.8
    assert final_metrics(rows, last=99)["test/local_accuracy"] == pytest.approx(1.3 / 3)


def test_a_mean_is_over_the_evaluations_that_have_the_metric():
    rows = [row(0, test__a=1.0), row(1), row(2, test__a=3.0)]
    assert final_metrics(rows, last=3)["test/a"] == 2.0
    assert final_metrics([], last=3) == {}


def test_what_is_infinite_is_left_out_of_the_summary():
    rows = [row(0, test__a=1.0, val__local_accuracy=0.5, test__b=math.inf, train__loss=math.inf)]
    assert final_metrics(rows, last=1) == {"test/a": 1.0, "val/local_accuracy": 0.5}
    chosen = selected_round(rows, "accuracy", higher_is_better=True)
    assert chosen == {"round_index": 0, "metrics": {"test/a": 1.0, "val/local_accuracy": 0.5}}


def test_the_selected_round_is_the_first_with_the_best_validation_score():
    values = [0.5, 0.9, 0.2, 0.9]
    rows = [
        row(i, val__local_accuracy=v, test__local_accuracy=1 - v, train__loss=0.0)
        for i, v in enumerate(values)
    ]
    best = selected_round(rows, "accuracy", higher_is_better=True)
    assert best is not None
    assert best["round_index"] == 1
    assert best["metrics"] == {"val/local_accuracy": 0.9, "test/local_accuracy": pytest.approx(0.1)}
    worst = selected_round(rows, "accuracy", higher_is_better=False)
    assert worst is not None
    assert worst["round_index"] == 2


def test_without_validation_data_no_round_is_selected():
    assert (
        selected_round([row(0, test__local_accuracy=1.0)], "accuracy", higher_is_better=True)
        is None
    )


def test_rounds_without_validation_are_not_selected():
    rows = [row(0), row(1, val__local_mse=0.5), row(2)]
    chosen = selected_round(rows, "mse", higher_is_better=False)
    assert chosen is not None
    assert chosen["round_index"] == 1
