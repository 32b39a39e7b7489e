"""MLflow on real sqlite stores: everything arrives, and nothing that a store does stops a run."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from selffl_ray import (
    ExperimentConfig,
    Result,
    load_config,
    run_experiment,
    run_writer,
    tracking,
)
from selffl_ray.api import Interrupt, make_job
from selffl_ray.errors import ConfigError, RunError
from selffl_ray.run_loop import Message, Progress
from selffl_ray.tracking import (
    MLflowTracker,
    RunInfo,
    TrackingConfig,
    open_store,
    resolve_uri,
    without_password,
)

# MLflow 3.17 declares its tables with an option that SQLAlchemy 2.1 will drop. The warning comes
# when a process opens its first store; as an error it would break that store and every later one.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)

SECRET = "s3cr3t"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A database with MLflow's tables, made once: that takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(empty_store, tmp_path) -> str:
    """A sqlite store of the test's own."""
    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    shutil.copyfile(empty_store, path)
    return f"sqlite:///{path}"


def config(store: str, *sets: str) -> ExperimentConfig:
    own = ["placement.backend=local", "training.num_rounds=3", f"tracking.uri={store}"]
    return load_config(None, [*own, *sets])


def runs_in(store: str) -> list[Run]:
    client = MlflowClient(store)
    ids = [e.experiment_id for e in client.search_experiments(view_type=ViewType.ALL)]
    return list(client.search_runs(ids))


def series(store: str, run: Run | str, name: str) -> list[tuple[int, float]]:
    run_id = run if isinstance(run, str) else run.info.run_id
    history = MlflowClient(store).get_metric_history(run_id, name)
    return sorted((m.step, m.value) for m in history)


def tracker(uri: str, folder: Path, **info: Any) -> MLflowTracker:
    folder.mkdir(parents=True, exist_ok=True)
    return MLflowTracker(uri, RunInfo("tests", folder.name, {"p": "1"}, {"t": "2"}, **info), folder)


def unsent(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "untracked.jsonl").read_text().splitlines()]


# -- one run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(empty_store, tmp_path_factory) -> tuple[Result, str]:
    """Self-FL for three rounds, evaluated after the second and third, with models."""
    folder = tmp_path_factory.mktemp("tracked")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    store = f"sqlite:///{folder}/mlflow.db"
    sets = ["evaluation.every=2", "export_models=true", "tracking.tags={note: mine}", "seed=5"]
    return run_experiment(config(store, *sets), output=folder / "run"), store


def test_a_run_is_one_run_of_its_experiment_with_name_status_and_no_problem(tracked):
    result, store = tracked
    (run,) = runs_in(store)
    assert MlflowClient(store).get_experiment(run.info.experiment_id).name == "digits"
    assert run.info.run_name == "selffl-two_tap-s5"
    assert run.info.status == "FINISHED"
    assert result.summary["tracking_problem"] is None
    assert not (result.folder / "untracked.jsonl").exists()


def test_a_run_has_the_contracts_tags_and_the_users(tracked):
    result, store = tracked
    environment = json.loads((result.folder / "environment.json").read_text())
    (run,) = runs_in(store)
    own = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")}
    assert own == {
        "method": "selffl",
        "method_label": "selffl-two_tap",
        "dataset": "digits",
        "seed": "5",
        "partition_digest": environment["partition_digest"],
        "data_digest": environment["data_digest"],
        "selffl_ray_version": environment["selffl_ray"],
        "note": "mine",
    }


def test_a_runs_parameters_are_the_flattened_configuration(tracked):
    _, store = tracked
    (run,) = runs_in(store)
    assert run.data.params["training.num_rounds"] == "3"
    assert run.data.params["method.intra.name"] == "gradient_chunks"
    assert run.data.params["data.partition.name"] == "natural"
    assert run.data.params["training.clip_norm"] == "None"
    assert len(run.data.params) > 50


def test_every_number_of_the_rounds_table_is_in_the_store_under_the_same_name(tracked):
    result, store = tracked
    (run,) = runs_in(store)
    rounds = result.rounds.set_index("round_index")
    names = [name for name in rounds if "/" in name]
    assert set(run.data.metrics) == set(names)
    assert {"test/global_accuracy", "uncertainty/inter_var", "time/round_s"} <= set(names)
    for name in names:
        expected = [(int(i), float(v)) for i, v in rounds[name].dropna().items()]
        assert series(store, run, name) == expected
    assert [step for step, _ in series(store, run, "test/local_accuracy")] == [1, 2]
    assert [step for step, _ in series(store, run, "train/loss")] == [0, 1, 2]


def test_the_artifacts_are_the_runs_folder_without_checkpoints(tracked):
    result, store = tracked
    (run,) = runs_in(store)
    client = MlflowClient(store)
    kept = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert kept == {path.name for path in result.folder.iterdir()} - {"checkpoints"}
    models = {f.path for f in client.list_artifacts(run.info.run_id, "models")}
    assert models == {"models/global.safetensors", "models/clients"}
    assert run.info.artifact_uri.startswith(Path(store.removeprefix("sqlite:///")).parent.as_uri())


def test_the_folder_says_where_the_run_is_tracked(tracked):
    result, store = tracked
    note = json.loads((result.folder / "tracking.json").read_text())
    assert note == {"uri": store, "run_id": runs_in(store)[0].info.run_id}


def test_tracking_switched_off_leaves_no_store_and_no_note(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = ["placement.backend=local", "training.num_rounds=1", "tracking.enabled=false"]
    result = run_experiment(load_config(None, sets), output=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (result.folder / "tracking.json").exists()


def test_a_failed_run_is_failed_in_the_store(store, tmp_path):
    sets = ["method=fedavg", "faults.min_participants=1.0", "training.learning_rate=1e30"]
    with pytest.raises(RunError, match="it diverged"):
        run_experiment(config(store, *sets), output=tmp_path / "run")
    (run,) = runs_in(store)
    assert run.info.status == "FAILED"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "FAILED"


# -- several at once ----------------------------------------------------------------------------


def test_ten_trackers_on_one_fresh_store_lose_nothing(tmp_path):
    uri = f"sqlite:///{tmp_path}/fresh/mlflow.db"
    trackers = [tracker(uri, tmp_path / f"run-{i}") for i in range(10)]
    for step in range(30):
        for number, one in enumerate(trackers):
            one.log({"train/loss": number + step / 100, "x/y": float(step)}, step)
    assert [one.finish("FINISHED") for one in trackers] == [None] * 10
    runs = {run.info.run_name: run for run in runs_in(uri)}
    assert sorted(runs) == [f"run-{i}" for i in range(10)]
    assert len({run.info.experiment_id for run in runs.values()}) == 1
    for number in range(10):
        run = runs[f"run-{number}"]
        assert series(uri, run, "train/loss") == [(k, number + k / 100) for k in range(30)]
        assert run.info.status == "FINISHED"


IN_A_PROCESS = """
import sys, pathlib
from selffl_ray.tracking import MLflowTracker, RunInfo
uri, folder = sys.argv[1], pathlib.Path(sys.argv[2])
one = MLflowTracker(uri, RunInfo("tests", folder.name, {}, {}), folder)
one.log({"train/loss": 1.0}, 0)
sys.exit(one.finish("FINISHED"))
"""


@pytest.mark.slow
def test_processes_that_start_on_a_fresh_store_at_once_lose_nothing(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    started = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", IN_A_PROCESS, uri, str(tmp_path / name)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in started:
        assert process.communicate(timeout=120)[1].count("MLflow store") == 0
        assert process.returncode == 0
    assert sorted(run.info.run_name for run in runs_in(uri)) == ["one", "two"]


# -- stores that fail ---------------------------------------------------------------------------


def failing(
    monkeypatch: pytest.MonkeyPatch, method: str, failure: Callable[[int], None]
) -> list[int]:
    """Have calls of a method of every client pass through ``failure`` first; counts them."""
    real, calls = getattr(MlflowClient, method), []

    def wrapped(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        failure(calls[-1])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, method, wrapped)
    return calls


def refuse(call: int) -> None:
    raise RuntimeError(f"no, call {call} of http://user:{SECRET}@host failed\nin two lines")


@pytest.mark.parametrize("method", ["search_experiments", "create_run", "log_batch"])
def test_a_store_that_raises_does_not_stop_a_run_and_the_numbers_are_kept(
    store, tmp_path, monkeypatch, method
):
    failing(monkeypatch, method, refuse)
    events: list[Any] = []
    result = run_experiment(config(store), output=tmp_path / "run", watch=events.append)
    assert result.summary["status"] == "FINISHED"
    said = [e.text for e in events if isinstance(e, Message)]
    assert said == [result.summary["tracking_problem"]]
    assert said[0].startswith(f"MLflow store {store}: RuntimeError: no, call 0")
    assert "\n" not in said[0]
    assert str(result.folder / "untracked.jsonl") in said[0]
    kept = {line["step"]: line["metrics"] for line in unsent(result.folder)}
    rounds = result.rounds.set_index("round_index")
    assert sorted(kept) == [0, 1, 2]
    for step, metrics in kept.items():
        expected = rounds.loc[step, [n for n in rounds if "/" in n]].dropna().to_dict()
        assert metrics == expected
    everything = b"".join(p.read_bytes() for p in result.folder.rglob("*") if p.is_file())
    assert SECRET.encode() not in everything
    assert SECRET not in said[0]


def test_what_was_sent_before_a_store_failed_is_not_kept_twice(store, tmp_path, monkeypatch):
    one = tracker(store, tmp_path / "run")
    one.log({"train/loss": 1.0}, 0)
    deadline = time.monotonic() + 20
    while not (one.run_id and series(store, one.run_id, "train/loss")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    failing(monkeypatch, "log_batch", refuse)
    for step in (1, 2, 3):
        one.log({"train/loss": 1.0}, step)
    assert one.finish("FINISHED") is not None
    assert sorted(line["step"] for line in unsent(tmp_path / "run")) == [1, 2, 3]
    assert one.run_id is not None
    assert series(store, one.run_id, "train/loss") == [(0, 1.0)]


def test_a_store_that_refuses_files_only_is_said_and_keeps_the_numbers(
    store, tmp_path, monkeypatch, caplog
):
    failing(monkeypatch, "log_artifact", refuse)
    one = tracker(store, tmp_path / "run")
    one.log({"train/loss": 1.0}, 0)
    problem = one.finish("FINISHED")
    assert [r.getMessage() for r in caplog.records if r.name == tracking.__name__] == [problem]
    assert not (tmp_path / "run" / "untracked.jsonl").exists()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_store_that_never_answers_is_not_waited_for_and_the_numbers_are_kept(
    silent_server, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.5)
    events: list[Any] = []
    began = time.monotonic()
    result = run_experiment(config(silent_server), output=tmp_path / "run", watch=events.append)
    assert time.monotonic() - began < 15
    assert result.summary["status"] == "FINISHED"
    said = [e.text for e in events if isinstance(e, Message)]
    assert len(said) == 1
    assert "did not answer within" in said[0]
    assert sorted(line["step"] for line in unsent(result.folder)) == [0, 1, 2]


def test_a_batch_that_hangs_while_it_is_sent_is_kept(store, tmp_path, monkeypatch):
    free, stuck = threading.Event(), threading.Event()

    def hang(call: int) -> None:
        if call == 1:
            stuck.set()
            free.wait(30)

    monkeypatch.setattr(tracking, "PATIENCE_S", 0.2)
    failing(monkeypatch, "log_batch", hang)
    one = tracker(store, tmp_path / "run")
    one.log({"train/loss": 1.0}, 0)
    assert stuck.wait(20)
    one.log({"train/loss": 2.0}, 1)
    problem = one.finish("FINISHED")
    free.set()
    assert problem is not None
    assert "did not answer" in problem
    assert sorted(line["step"] for line in unsent(tmp_path / "run")) == [0, 1]
    one._thread.join(20)


def test_a_store_that_cannot_be_reached_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one = tracker(f"http://127.0.0.1:{port}", tmp_path / "run")
    for step in range(3):
        one.log({"train/loss": 1.0}, step)
    assert one.finish("FINISHED") is not None
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert len(unsent(tmp_path / "run")) == 3


def test_a_slow_store_does_not_slow_the_loop_and_gets_everything(store, tmp_path, monkeypatch):
    failing(monkeypatch, "log_batch", lambda call: time.sleep(0.3))
    one = tracker(store, tmp_path / "run")
    longest = 0.0
    for step in range(40):
        began = time.monotonic()
        one.log({"train/loss": float(step)}, step)
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.01)
    assert longest < 0.1
    assert one.finish("FINISHED") is None
    assert one.run_id is not None
    assert series(store, one.run_id, "train/loss") == [(k, float(k)) for k in range(40)]


def test_more_metrics_than_fit_a_batch_all_arrive(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "BATCH_METRICS", 7)
    monkeypatch.setattr(tracking, "BATCH_PARAMS", 2)
    sizes: list[int] = []
    real = MlflowClient.log_batch

    def counting(self: MlflowClient, run_id: str, **parts: Any) -> None:
        sizes.extend(len(part) for part in parts.values())
        real(self, run_id, **parts)

    monkeypatch.setattr(MlflowClient, "log_batch", counting)
    folder = tmp_path / "run"
    folder.mkdir()
    params = {f"p{i}": "x" * 9000 for i in range(5)}
    one = MLflowTracker(store, RunInfo("tests", "run", params, {}), folder)
    one.log({f"x/m{i}": float(i) for i in range(20)}, 0)
    assert one.finish("FINISHED") is None
    (run,) = runs_in(store)
    assert run.data.metrics == {f"x/m{i}": float(i) for i in range(20)}
    assert run.data.params == {f"p{i}": "x" * tracking.MOST_VALUE for i in range(5)}
    assert max(sizes) == 7


# -- going on -----------------------------------------------------------------------------------


def stop_after(rounds: int, interrupt: Interrupt) -> Callable[[Any], None]:
    def watch(event: Any) -> None:
        if isinstance(event, Progress) and event.round_index + 1 >= rounds:
            interrupt.set()

    return watch


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_without_steps_twice(
    store, tmp_path, monkeypatch
):
    long = config(store, "training.num_rounds=400", "method=fedavg", "checkpoint.every=7")
    interrupt = Interrupt()
    stopped = run_experiment(
        long, output=tmp_path / "run", watch=stop_after(3, interrupt), interrupt=interrupt
    )
    assert stopped.summary["status"] == "STOPPED"
    (run,) = runs_in(store)
    assert run.info.status == "KILLED"
    # As after a crash: the newest checkpoint is gone, so rounds that the store has are replayed.
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda p: int(p.name[6:]))
    shutil.rmtree(folders[-1])
    interrupt = Interrupt()
    monkeypatch.chdir(tmp_path)
    again = run_experiment(
        long,
        resume=tmp_path / "run",
        watch=stop_after(stopped.summary["rounds"] + 3, interrupt),
        interrupt=interrupt,
    )
    (run,) = runs_in(store)
    steps = [step for step, _ in series(store, run, "train/loss")]
    assert steps == list(range(again.summary["rounds"]))
    assert again.summary["rounds"] > stopped.summary["rounds"]
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert [v for _, v in series(store, run, "train/loss")] == rounds["train/loss"].tolist()


def test_the_mlflow_run_is_noted_while_the_run_is_going_on(store, tmp_path):
    seen = []

    def watch(event: Any) -> None:
        deadline = time.monotonic() + 20
        while not (tmp_path / "run" / "tracking.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        seen.append(json.loads((tmp_path / "run" / "tracking.json").read_text()))

    run_experiment(config(store, "training.num_rounds=1"), output=tmp_path / "run", watch=watch)
    assert seen[0] == {"uri": store, "run_id": runs_in(store)[0].info.run_id}


def test_a_round_that_is_replayed_is_sent_once(store, tmp_path):
    one = tracker(store, tmp_path / "run")
    for step in (0, 1, 2, 1, 2, 3):
        one.log({"train/loss": float(step)}, step)
    assert one.finish("FINISHED") is None
    assert one.run_id is not None
    assert series(store, one.run_id, "train/loss") == [(k, float(k)) for k in range(4)]


def test_a_run_whose_store_never_answered_starts_one_when_it_goes_on(store, tmp_path, monkeypatch):
    long = config(store, "training.num_rounds=400", "method=fedavg")
    with monkeypatch.context() as patch:
        failing(patch, "create_run", refuse)
        interrupt = Interrupt()
        run_experiment(
            long, output=tmp_path / "run", watch=stop_after(2, interrupt), interrupt=interrupt
        )
    assert runs_in(store) == []
    interrupt = Interrupt()
    again = run_experiment(
        long, resume=tmp_path / "run", watch=stop_after(5, interrupt), interrupt=interrupt
    )
    assert again.summary["tracking_problem"] is None
    (run,) = runs_in(store)
    tracked = {step for step, _ in series(store, run, "train/loss")}
    assert tracked | {line["step"] for line in unsent(again.folder)} == set(
        range(again.summary["rounds"])
    )


# -- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["file:///x/mlruns", "file:mlruns", "mlruns", "/x/mlruns", "./m"])
def test_a_folder_as_a_store_is_refused_with_the_remedy(uri, tmp_path):
    with pytest.raises(ConfigError, match="is a folder, which MLflow no longer writes; use sqlite"):
        resolve_uri(TrackingConfig(uri=uri), tmp_path)


def test_a_relative_database_becomes_absolute_and_others_stay(tmp_path, monkeypatch):
    def found(uri: str | None) -> str:
        return resolve_uri(TrackingConfig(uri=uri), tmp_path)

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert found(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert found("sqlite:///a/../b/m.db") == f"sqlite:///{tmp_path}/b/m.db"
    assert found("sqlite:////abs/m.db") == "sqlite:////abs/m.db"
    assert found("http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///env.db")
    assert found(None) == f"sqlite:///{tmp_path}/env.db"
    assert found("sqlite:///own.db") == f"sqlite:///{tmp_path}/own.db"


def test_the_store_is_the_one_of_the_place_where_the_run_was_asked_for(
    empty_store, tmp_path, monkeypatch
):
    shutil.copyfile(empty_store, tmp_path / "env.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///env.db")
    monkeypatch.chdir(tmp_path)
    plain = load_config(None, ["placement.backend=local"])
    job = make_job(plain, tmp_path / "run")
    assert plain.tracking.uri is None
    assert job.store == f"sqlite:///{tmp_path}/env.db"


@pytest.mark.parametrize("what", ["folder", "store", "current folder"])
def test_a_place_that_vanishes_with_a_ray_job_is_refused(what, tmp_path, monkeypatch):
    inside = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1"
    inside.mkdir(parents=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output, uri = tmp_path / "run", f"sqlite:///{tmp_path}/m.db"
    if what == "folder":
        output = inside / "run"
    elif what == "store":
        uri = f"sqlite:///{inside}/m.db"
    else:
        uri = "null"
        monkeypatch.chdir(inside)
    wanted = load_config(None, [f"tracking.uri={uri}", "placement.backend=local"])
    with pytest.raises(ConfigError, match="would vanish with it; give absolute paths: --output"):
        run_experiment(wanted, output=output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"postgresql://me:{SECRET}@host:5432/db", "postgresql://***@host:5432/db"),
        (f"http://me:{SECRET}@p@host/x", "http://***@host/x"),
        (f"http://me:{SECRET}/y@host/x", "http://***@host/x"),
        (f"https://{SECRET}@host", "https://***@host"),
        (
            f"mysql://host/db?user=me&password={SECRET}&x=1",
            "mysql://host/db?user=me&password=***&x=1",
        ),
        (f"cannot reach http://me:{SECRET}@host: no", "cannot reach http://***@host: no"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_passwords_are_hidden_in_addresses_and_texts(uri, shown):
    assert without_password(uri) == shown


def test_a_password_in_the_configuration_would_be_written_to_files_and_is_refused():
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"tracking.uri=http://me:{SECRET}@host:5000"])
    assert SECRET not in str(caught.value)
    assert "MLFLOW_TRACKING_URI" in str(caught.value)


def test_a_password_in_the_environment_reaches_no_file_and_no_message(
    silent_server, tmp_path, monkeypatch
):
    address = silent_server.replace("http://", f"http://me:{SECRET}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.2)
    events: list[Any] = []
    plain = load_config(None, ["placement.backend=local", "training.num_rounds=1"])
    result = run_experiment(plain, output=tmp_path / "run", watch=events.append)
    files = b"".join(p.read_bytes() for p in result.folder.rglob("*") if p.is_file())
    assert SECRET.encode() not in files
    assert SECRET not in repr(events)
    assert re.search(rb"http://\*\*\*@127", files)
    assert SECRET not in repr(result.summary)


def test_a_run_whose_environment_cannot_be_written_ends_as_failed(store, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_writer.RunWriter, "write_environment", full)
    with pytest.raises(RunError, match="No space left on device"):
        run_experiment(config(store), output=tmp_path / "run")
    assert [run.info.status for run in runs_in(store)] == ["FAILED"]


def test_rounds_of_nobody_are_not_sent_twice_when_a_run_goes_on(store, tmp_path):
    """The last rounds have no training loss; what was sent is known all the same."""
    stays = tmp_path / "stays.csv"
    stays.write_text("client_id,first_round,last_round\nform-00,0,1\n")
    chosen = config(store, f"training.trouble.trace={stays}", "training.num_rounds=4")
    run_experiment(chosen, output=tmp_path / "run")
    run_experiment(chosen, resume=tmp_path / "run")
    (run,) = runs_in(store)
    assert [step for step, _ in series(store, run, "train/loss")] == [0, 1]
    assert [step for step, _ in series(store, run, "clients/participants")] == [0, 1, 2, 3]
