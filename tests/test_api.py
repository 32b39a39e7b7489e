"""What a script or a notebook gets: results, models, warm starts, stopping, recovery."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from selffl_ray import (
    ExperimentConfig,
    Result,
    api,
    execution,
    load_config,
    rebalancer,
    run_comparison,
    run_experiment,
    run_loop,
)
from selffl_ray.api import Interrupt, make_job, new_folder, parse_method
from selffl_ray.balance import Proposal
from selffl_ray.checkpoint import latest_checkpoint
from selffl_ray.errors import ConfigError, DataError, DriverLostError, RunError, UsageError
from selffl_ray.experiment import Prepared, prepare_experiment
from selffl_ray.host import ClientHost
from selffl_ray.pool import HostLost, LocalTransport
from selffl_ray.registry import Component
from selffl_ray.run_loop import Message, Progress
from selffl_ray.run_writer import Job, Restart
from selffl_ray.runtime import driver_actor, ray_pool
from selffl_ray.runtime.actors import Control
from selffl_ray.runtime.placement import ActorPlan, PlacementPlan
from selffl_ray.verification import verify_run

LOCAL = ("placement.backend=local", "tracking.enabled=false", "training.num_rounds=3")
SMALL = "data={name: gaussian, num_clients: 5, dimension: 4, num_examples: [5, 30]}"
SHORT = "method={probe_every: 3, readout_steps: 10, max_steps: 10}"


def config(*sets: str) -> ExperimentConfig:
    return load_config(None, [*LOCAL, *sets])


def digests(result: Result) -> list[str]:
    return result.rounds["digest"].tolist()


# -- results ------------------------------------------------------------------------------------


def test_a_result_is_the_summary_the_folder_and_three_frames(tmp_path):
    result = run_experiment(config(), output=tmp_path / "run")
    assert result.folder == tmp_path / "run"
    for name in ("rounds", "clients", "uncertainty"):
        expected = pd.read_parquet(result.folder / f"{name}.parquet")
        pd.testing.assert_frame_equal(getattr(result, name), expected)
    written = json.loads((result.folder / "summary.json").read_text())
    assert result.summary == written | {"tracking_problem": None}
    assert result.summary["folder"] == str(result.folder)
    assert result.summary["digest"] == digests(result)[-1]


def test_tables_of_a_folder_that_is_gone_are_not_empty_ones(tmp_path):
    result = run_experiment(config(), output=tmp_path / "run")
    shutil.rmtree(result.folder)
    with pytest.raises(
        DataError, match=r"run is gone, .* read rounds before the folder is deleted"
    ):
        _ = result.rounds


def test_without_an_output_runs_get_folders_of_their_own_in_the_current_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    quick = config("training.num_rounds=1", "experiment=mine", SMALL)
    folders = [run_experiment(quick).folder for _ in range(2)]
    assert len(set(folders)) == 2
    for folder in folders:
        assert folder.parent == tmp_path / "runs" / "mine"
        assert folder.name.startswith("selffl-two_tap-s0-")
    assert new_folder(quick) != new_folder(quick)


def test_whoever_watches_sees_every_round_with_its_metrics(tmp_path):
    events: list[Any] = []
    result = run_experiment(config(), output=tmp_path / "run", watch=events.append)
    assert [e.round_index for e in events] == [0, 1, 2]
    assert all(isinstance(e, Progress) for e in events)
    assert {e.label for e in events} == {"selffl-two_tap seed 0"}
    assert (
        events[2].metrics["test/local_accuracy"] == result.summary["final"]["test/local_accuracy"]
    )
    assert [e.seconds for e in events] == sorted(e.seconds for e in events)


def test_a_configuration_that_was_built_in_python_runs_like_one_from_yaml(tmp_path):
    own = ExperimentConfig(method=Component("fedavg"))
    own = dataclasses.replace(
        own,
        training=dataclasses.replace(own.training, num_rounds=1),
        placement=dataclasses.replace(own.placement, backend="local"),
        tracking=dataclasses.replace(own.tracking, enabled=False),
    )
    result = run_experiment(own, output=tmp_path / "own")
    same = config("method=fedavg", "training.num_rounds=1")
    assert digests(result) == digests(run_experiment(same, output=tmp_path / "same"))


def test_an_exception_in_whoever_watches_ends_the_run_and_is_raised(tmp_path):
    def watch(event: Any) -> None:
        raise LookupError("mine")

    long = config("training.num_rounds=2000", "method=fedavg", SMALL)
    with pytest.raises(LookupError, match="mine"):
        run_experiment(long, output=tmp_path / "run", watch=watch)


# -- comparisons --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> list[Result]:
    folder = tmp_path_factory.mktemp("compared")
    methods = [Component("selffl"), Component("fedavg"), Component("local")]
    halves = config("training.participation_rate=0.5", "evaluation.max_clients=6")
    return run_comparison(halves, methods, seeds=[0, 1], output=folder)


def test_a_comparison_runs_every_method_with_every_seed_in_order(compared):
    found = [(r.summary["method"], r.summary["seed"]) for r in compared]
    assert found == [(m, s) for s in (0, 1) for m in ("selffl", "fedavg", "local")]
    names = [r.folder.name for r in compared]
    assert names == [f"{m}-s{s}" for s in (0, 1) for m in ("selffl-two_tap", "fedavg", "local")]


def test_methods_share_partition_participants_and_evaluated_clients(compared):
    for seed in (0, 1):
        own = [r for r in compared if r.summary["seed"] == seed]
        environments = [json.loads((r.folder / "environment.json").read_text()) for r in own]
        assert len({e["partition_digest"] for e in environments}) == 1
        assert len({tuple(r.rounds["participants"]) for r in own}) == 1
        assert len({tuple(r.clients["client_id"]) for r in own}) == 1
    one, other = (
        json.loads((r.folder / "environment.json").read_text())["partition_digest"]
        for r in (compared[0], compared[3])
    )
    assert one != other


def test_a_run_of_a_comparison_is_bit_for_bit_the_run_alone(compared, tmp_path):
    halves = ["training.participation_rate=0.5", "evaluation.max_clients=6"]
    for result, sets in ((compared[1], ["method=fedavg"]), (compared[3], ["seed=1"])):
        alone = run_experiment(
            config(*halves, *sets), output=tmp_path / f"{result.folder.name}-alone"
        )
        assert digests(alone) == digests(result)


def test_two_runs_that_would_share_a_folder_are_refused_before_anything_is_written(tmp_path):
    base = config()
    for methods, seeds in (
        ([Component("fedavg"), Component("fedavg")], [0]),
        ([Component("fedavg")], [1, 1]),
    ):
        with pytest.raises(ConfigError, match="would be written to one folder"):
            run_comparison(base, methods, seeds=seeds, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_does_not_write_over_a_run(tmp_path):
    one = config("training.num_rounds=1", SMALL)
    run_comparison(one, [Component("fedavg")], output=tmp_path)
    with pytest.raises(ConfigError, match="fedavg-s0 holds a run already"):
        run_comparison(one, [Component("local"), Component("fedavg")], output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fedavg-s0"]


def test_a_method_is_given_by_name_and_preset_and_ones_own_keeps_its_options():
    own = config("method={preset: exact, kappa: 0.5}")
    assert parse_method("selffl", own) == own.method
    assert parse_method(" fedavg ", own).name == "fedavg"
    assert parse_method("selffl:exact", own) == config("method.preset=exact").method
    assert parse_method("selffl:exact", own) != own.method


# -- models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Result, Prepared]:
    chosen = config("export_models=true", "model.hidden=[16]")
    folder = tmp_path_factory.mktemp("exported") / "run"
    return run_experiment(chosen, output=folder), prepare_experiment(chosen)


def predictions(file: Path, x: np.ndarray) -> np.ndarray:
    """The multi-layer perceptron written out: weights are stored (inputs, outputs)."""
    named = {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
    assert sorted(named) == ["hidden0.bias", "hidden0.weight", "output.bias", "output.weight"]
    hidden = np.maximum(x @ named["hidden0.weight"] + named["hidden0.bias"], 0)
    return np.asarray((hidden @ named["output.weight"] + named["output.bias"]).argmax(1))


def test_exported_personal_models_reproduce_every_clients_local_accuracy(exported):
    result, prepared = exported
    last = result.clients.query("round_index == 2 and split == 'test'").set_index("client_id")
    assert len(last) == len(prepared.clients) == 14
    for client in prepared.clients:
        x, y = prepared.store.read(client.test)
        file = result.folder / "models" / "clients" / f"{client.client_id}.safetensors"
        right = predictions(file, x.reshape(len(y), -1).astype(np.float64)) == y
        assert right.mean() == pytest.approx(last.loc[client.client_id, "local_accuracy"])


def test_the_exported_global_model_reproduces_the_global_accuracy(exported):
    result, prepared = exported
    x, y = prepared.store.read(np.concatenate([c.test for c in prepared.clients]))
    file = result.folder / "models" / "global.safetensors"
    right = predictions(file, x.reshape(len(y), -1).astype(np.float64)) == y
    assert right.mean() == pytest.approx(result.summary["final"]["test/global_accuracy"])


def test_personal_models_differ_and_a_method_without_them_exports_the_global_one_only(
    exported, tmp_path
):
    result, _ = exported
    files = sorted((result.folder / "models" / "clients").iterdir())
    assert len({file.read_bytes() for file in files}) == 14
    plain = run_experiment(config("export_models=true", "method=fedavg"), output=tmp_path / "run")
    found = [p.name for p in (plain.folder / "models").iterdir()]
    assert found == ["global.safetensors"]


def test_models_that_a_run_did_not_come_to_write_are_written_when_it_goes_on(tmp_path, monkeypatch):
    chosen = config("export_models=true", "checkpoint.every=3")

    def killed(self: object, *args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_loop.RunLoop, "_export", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(chosen, output=tmp_path / "run")
    assert not (tmp_path / "run" / "models").exists()
    run_experiment(chosen, resume=tmp_path / "run")
    straight = run_experiment(chosen, output=tmp_path / "straight")
    for name in ("global.safetensors", "clients/form-03.safetensors"):
        one, other = (tmp_path / run / "models" / name for run in ("run", "straight"))
        assert one.read_bytes() == other.read_bytes()
    assert straight.summary["digest"] == digests(straight)[-1]


# -- warm start ---------------------------------------------------------------------------------


def test_a_warm_start_begins_where_the_exported_model_ended(exported, tmp_path):
    result, _ = exported
    start = result.folder / "models" / "global.safetensors"
    still = ["method=fedavg", "model.hidden=[16]", "training.num_rounds=1"]
    still.append("training.learning_rate=1e-9")
    warm = run_experiment(config(*still, f"training.start_from={start}"), output=tmp_path / "warm")
    cold = run_experiment(config(*still), output=tmp_path / "cold")
    trained = result.summary["final"]["test/global_accuracy"]
    assert warm.summary["final"]["test/global_accuracy"] == trained
    assert cold.summary["final"]["test/global_accuracy"] < trained - 0.1


def started_from(file: Path) -> None:
    prepare_experiment(config("model.hidden=[4]", f"training.start_from={file}"))


def right_start() -> dict[str, torch.Tensor]:
    shapes = {
        "hidden0.weight": (64, 4),
        "hidden0.bias": (4,),
        "output.weight": (4, 10),
        "output.bias": (10,),
    }
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def test_a_start_that_fits_is_taken_as_it_is(tmp_path):
    save_file(right_start(), tmp_path / "x.safetensors")
    chosen = config("model.hidden=[4]", f"training.start_from={tmp_path}/x.safetensors")
    assert (prepare_experiment(chosen).run_spec.start_params == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output.bias": None}, "has output.bias of shape None, the model needs"),
        ({"output.bias": torch.ones(9)}, r"has output.bias of shape \(9,\), the model needs"),
        ({"conv0.weight": torch.ones(2)}, "has conv0.weight, which the model has not; it has"),
    ],
)
def test_a_start_with_other_parameters_is_refused_by_name(tmp_path, change, message):
    named = {k: v for k, v in (right_start() | change).items() if v is not None}
    save_file(named, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=f"training.start_from: .*{message}"):
        started_from(tmp_path / "x.safetensors")


def test_a_start_that_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\x80\x04no pickles, please")
    for file in (tmp_path / "x", tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="is not a readable safetensors file"):
            started_from(file)


# -- stopping -----------------------------------------------------------------------------------

STOPPABLE = ("method=fedavg", "training.num_rounds=12", "evaluation.every=1", "model.hidden=[8]")


@pytest.fixture(scope="module")
def curve(tmp_path_factory) -> np.ndarray:
    """Validation accuracy after every round of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("curve") / "run"
    rounds = run_experiment(config(*STOPPABLE), output=folder).rounds
    return rounds["val/local_accuracy"].to_numpy()


def test_a_run_stops_at_the_first_round_that_reaches_the_target(curve, tmp_path):
    target = float(np.sort(curve)[6])
    first = int(np.flatnonzero(curve >= target)[0])
    assert 0 < first < 11
    stop = f"training.stop.target={target!r}"
    result = run_experiment(config(*STOPPABLE, stop), output=tmp_path / "run")
    assert result.summary["status"] == "FINISHED"
    assert result.summary["rounds"] == first + 1


def rounds_with_patience(values: np.ndarray, patience: int) -> int:
    """Rounds until so many in a row were no better than the best before."""
    for end in range(len(values)):
        recent = values[max(0, end - patience + 1) : end + 1]
        before = values[: max(0, end - patience + 1)]
        if len(before) and recent.max() <= before.max():
            return end + 1
    return len(values)


def test_a_run_stops_when_nothing_got_better_for_a_while(curve, tmp_path):
    patience = 1
    expected = rounds_with_patience(curve, patience)
    assert 1 < expected < 12
    stop = f"training.stop.patience={patience}"
    result = run_experiment(config(*STOPPABLE, stop), output=tmp_path / "run")
    assert result.summary["rounds"] == expected


def test_lower_is_better_for_a_loss(tmp_path):
    stop = "training.stop={metric: val/local_loss, target: 100.0}"
    result = run_experiment(config(*STOPPABLE, stop), output=tmp_path / "run")
    assert result.summary["rounds"] == 1


def test_a_run_stops_after_the_round_in_which_its_time_is_up(tmp_path):
    one = run_experiment(config(*STOPPABLE, "training.stop.seconds=1e-6"), output=tmp_path / "one")
    assert one.summary["rounds"] == 1
    rest = config(*STOPPABLE, "training.stop.seconds=1000")
    assert run_experiment(rest, output=tmp_path / "rest").summary["rounds"] == 12


def stop_after(rounds: int, interrupt: Interrupt) -> Callable[[Any], None]:
    def watch(event: Any) -> None:
        if isinstance(event, Progress) and event.round_index + 1 >= rounds:
            interrupt.set()

    return watch


def test_the_patience_of_a_run_that_goes_on_counts_the_rounds_before(tmp_path, monkeypatch):
    # At a rate this low nothing gets better: patience of 300 ends the run after 301 rounds.
    chosen = config(
        "method=fedavg",
        "training.num_rounds=1000",
        "training.learning_rate=1e-12",
        "training.stop.patience=300",
        "evaluation.every=1",
        "model=linear",
        "training.num_local_steps=1",
        "evaluation.max_clients=2",
        "training.participation_rate=0.1",
    )
    interrupt = Interrupt()
    half = run_experiment(
        chosen, output=tmp_path / "run", watch=stop_after(20, interrupt), interrupt=interrupt
    )
    assert half.summary["status"] == "STOPPED"
    assert 20 <= half.summary["rounds"] < 301
    assert run_experiment(chosen, resume=tmp_path / "run").summary["rounds"] == 301


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path):
    chosen = config(SMALL, SHORT, "training.num_rounds=60", "training.participation_rate=0.6")
    interrupt = Interrupt()
    half = run_experiment(
        chosen, output=tmp_path / "run", watch=stop_after(3, interrupt), interrupt=interrupt
    )
    assert half.summary["status"] == "STOPPED"
    last = latest_checkpoint(half.folder / "checkpoints")
    assert last is not None
    assert last.name == f"round_{half.summary['rounds'] - 1}"
    whole = run_experiment(chosen, resume=tmp_path / "run")
    straight = run_experiment(chosen, output=tmp_path / "straight")
    assert whole.summary["status"] == "FINISHED"
    assert digests(whole) == digests(straight)


def test_a_wish_to_stop_in_the_last_round_is_a_finished_run(tmp_path):
    interrupt = Interrupt()
    interrupt.set()
    one = config("training.num_rounds=1", "training.num_local_steps=1500", SMALL)
    result = run_experiment(one, output=tmp_path / "run", interrupt=interrupt)
    assert result.summary["status"] == "FINISHED"


# -- evaluation ---------------------------------------------------------------------------------


def test_a_sample_of_the_clients_is_evaluated_the_same_in_every_round_and_method(compared):
    for result in compared[:3]:
        clients = result.clients
        chosen = clients.groupby(["round_index", "split"])["client_id"].agg(tuple)
        assert len(set(chosen)) == 1
        assert len(chosen.iloc[0]) == 6
    sampled = {tuple(sorted(set(r.clients["client_id"]))) for r in compared[:3]}
    assert len(sampled) == 1
    # Others take part nevertheless.
    assert set(compared[0].uncertainty["client_id"]) - set(compared[0].clients["client_id"])


def test_new_clients_never_train_and_are_tested_apart(tmp_path):
    chosen = config("evaluation.new_clients=0.3", "evaluation.every=1")
    result = run_experiment(chosen, output=tmp_path / "run")
    by_split = result.clients.groupby("split")["client_id"].agg(set)
    assert len(by_split["new"]) == round(0.3 * 14) == 4
    assert by_split["test"] == by_split["val"]
    assert by_split["test"] & by_split["new"] == set()
    assert set(result.uncertainty["client_id"]) == by_split["test"]
    assert result.rounds["participants"].tolist() == [10, 10, 10]
    assert result.rounds["new/local_accuracy"].notna().all()
    # A new client's model is its own: adapted, not the global one.
    last = result.clients.query("round_index == 2 and split == 'new'")
    assert (last["local_loss"] != last["global_loss"]).all()


def test_evaluation_does_not_change_training(tmp_path):
    often = run_experiment(config("evaluation.every=1"), output=tmp_path / "often")
    rarely = run_experiment(config("evaluation.every=100"), output=tmp_path / "rarely")
    assert digests(often) == digests(rarely)


# -- losses -------------------------------------------------------------------------------------


class Losing(LocalTransport):
    """Hosts in this process, the last of which is lost at chosen calls: a fault made to order."""

    lose_at: frozenset[int] = frozenset()
    lose_in: str | None = None
    """A method in which the host is lost every time."""
    calls = 0
    restarted: list[int] = []  # noqa: RUF012 - set anew for every test

    def __init__(self, num_hosts: int = 1, device: torch.device | None = None) -> None:
        super().__init__(num_hosts, device)

    def call(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], shared: Any = None
    ) -> dict[int, Any]:
        answers = super().call(method, arguments, shared)
        type(self).calls += 1
        if self.calls in self.lose_at or method == self.lose_in:
            lost = max(answers)
            # Whatever it knew is gone.
            super().restart([lost])
            answers[lost] = HostLost(lost, f"lost in {method}")
        return answers

    def restart(self, hosts: Sequence[int]) -> None:
        type(self).restarted.extend(hosts)
        super().restart(hosts)


@pytest.fixture
def losing(monkeypatch) -> Callable[..., None]:
    def lose(*calls: int) -> None:
        Losing.calls, Losing.lose_at, Losing.restarted = 0, frozenset(calls), []
        Losing.lose_in = None
        monkeypatch.setattr(execution, "LocalTransport", Losing)
        monkeypatch.setattr(api, "placement_of", lambda prepared, nodes: TWO_HOSTS)

    return lose


FRAGILE = (
    SMALL,
    SHORT,
    "training.num_rounds=6",
    "checkpoint.every=2",
    "training.participation_rate=0.6",
    # Which clients a host that is lost takes along is known, and how many calls there are.
    "placement.rebalance=false",
)
TWO_HOSTS = PlacementPlan((ActorPlan((0, 3, 4), 0, 0), ActorPlan((1, 2), 0, 0)), 0, "", "local")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Result:
    return run_experiment(config(*FRAGILE), output=tmp_path_factory.mktemp("whole") / "run")


def calls_of_a_run(tmp_path: Path, losing: Callable[..., None]) -> int:
    losing()
    run_experiment(config(*FRAGILE), output=tmp_path / "counting")
    return Losing.calls


@pytest.mark.slow
def test_a_host_that_is_lost_at_any_call_is_replaced_and_the_run_ends_with_the_same_bits(
    losing, tmp_path, whole
):
    count = calls_of_a_run(tmp_path, losing)
    assert count >= 20
    cohorts = [plan.cohort for plan in prepare_experiment(config(*FRAGILE)).plans]
    # The first call reads the data; there is nothing to go back to yet.
    for call in range(2, count + 1):
        losing(call)
        events: list[Any] = []
        result = run_experiment(
            config(*FRAGILE), output=tmp_path / f"lost-at-{call}", watch=events.append
        )
        assert digests(result) == digests(whole), call
        assert len(Losing.restarted) == 1
        said = [e.text for e in events if isinstance(e, Message)]
        assert len(said) == 1, said
        assert "replacing it and replaying its rounds" in said[0]
        # The clients of that host whose updates were wanted in the round that it was lost in.
        told = result.rounds.loc[result.rounds["events"] != "[]", "round_index"].tolist()
        assert len(told) == 1, told
        lived_there = TWO_HOSTS.actors[Losing.restarted[0]].clients
        wanted = np.isin(cohorts[told[0]], lived_there).sum()
        assert result.rounds["faults"].tolist() == [wanted * (r == told[0]) for r in range(6)]


@pytest.fixture
def swapping(monkeypatch):
    """Before every round all clients change places, whatever was measured."""

    def swapped(measured, homes_M, kind_H):
        return Proposal(1 - homes_M, np.inf)

    monkeypatch.setattr(rebalancer, "evened", swapped)


MOVING = (*FRAGILE, "placement.rebalance=true")


@pytest.mark.slow
def test_a_host_that_is_lost_while_clients_move_is_replaced_and_the_bits_stay(
    losing, tmp_path, whole, swapping
):
    lost_in: set[str] = set()
    losing()
    result = run_experiment(config(*MOVING), output=tmp_path / "moving")
    assert digests(result) == digests(whole)
    assert (result.summary["clients_moved"], whole.summary.get("clients_moved")) == (5 * 6, None)
    for call in range(2, Losing.calls + 1):
        losing(call)
        result = run_experiment(config(*MOVING), output=tmp_path / f"lost-at-{call}")
        assert digests(result) == digests(whole), call
        (event,) = [e for text in result.rounds["events"] for e in json.loads(text)]
        lost_in.add(event["cause"])
    assert {"lost in admit", "lost in release", "lost in take"} < lost_in


@pytest.mark.parametrize("method", ["admit", "release", "take"])
def test_a_move_that_always_loses_a_host_is_tried_once(method, losing, tmp_path, whole, swapping):
    losing()
    Losing.lose_in = method
    said: list[str] = []

    def watch(event):
        if isinstance(event, Message) and "could not be moved" in event.text:
            said.append(event.text)

    result = run_experiment(config(*MOVING), output=tmp_path / "run", watch=watch)
    assert digests(result) == digests(whole)
    assert result.summary["status"] == "FINISHED"
    # Before the first round nobody has a state to take along.
    tried = 1 if method == "take" else 0
    assert said == [
        f"round {tried}: clients could not be moved to hosts that are faster (lost in {method}); "
        "they stay where they are from now on"
    ]
    assert result.summary.get("clients_moved", 0) == 5 * tried
    assert len(Losing.restarted) == 1


@pytest.mark.parametrize(("method", "replaced"), [("admit", 0), ("release", 2), ("take", 2)])
def test_a_run_goes_on_where_examples_or_states_cannot_move(
    method, replaced, losing, tmp_path, whole, swapping, monkeypatch
):
    def full(self, *arguments):
        raise DataError("no room for more")

    losing()
    monkeypatch.setattr(ClientHost, method, full)
    result = run_experiment(config(*MOVING), output=tmp_path / "run")
    assert digests(result) == digests(whole)
    assert len(Losing.restarted) == replaced


def test_a_host_that_is_lost_again_while_it_is_replaced_is_replaced_again(losing, tmp_path, whole):
    # 5 calls in, then during each of the three calls that bring the new one to the start.
    for again in (6, 7, 8):
        losing(5, again)
        result = run_experiment(config(*FRAGILE), output=tmp_path / f"again-at-{again}")
        assert digests(result) == digests(whole)
        assert Losing.restarted == [1, 1]


def test_hosts_that_are_lost_again_and_again_end_the_run_with_the_last_checkpoint(losing, tmp_path):
    losing(*range(12, 1000))
    folder = tmp_path / "run"
    with pytest.raises(RunError) as caught:
        run_experiment(config(*FRAGILE), output=folder)
    assert "hosts were lost 3 times without progress (host 1: lost in " in str(caught.value)
    last = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert str(caught.value).endswith(f"; the last checkpoint is {last}")
    before = json.loads((folder / "summary.json").read_text())["events"]
    assert [e["outcome"] for e in before] == ["replaced", "replaced", "aborted"]
    losing()
    resumed = run_experiment(config(*FRAGILE), resume=folder)
    assert digests(resumed)[-1]
    # The round was done in the end, and its row tells what it took.
    assert events_of(resumed) == before
    assert "events" not in resumed.summary


def events_of(result: Result) -> list[dict[str, Any]]:
    """All that went wrong in a run, by its table of rounds and its summary."""
    rows = [event for text in result.rounds["events"] for event in json.loads(text)]
    return rows + result.summary.get("events", [])


def test_a_host_that_is_lost_when_all_rounds_are_done_is_told_too(losing, tmp_path, whole):
    """While states are fetched for the last checkpoint, and after it while models are."""
    exporting = config(*FRAGILE, "export_models=true")
    losing()
    run_experiment(exporting, output=tmp_path / "counting")
    count = Losing.calls
    for call, method in ((count - 1, "export_states"), (count, "personal_models")):
        losing(call)
        result = run_experiment(exporting, output=tmp_path / method)
        assert digests(result) == digests(whole)
        (event,) = events_of(result)
        assert (event["cause"], event["outcome"]) == (f"lost in {method}", "replaced")
        assert event["round_index"] == 5
        # Updates were lost with the states only.
        assert (event["num_clients"] > 0) == (method == "export_states")
        again = run_experiment(exporting, resume=tmp_path / method)
        assert events_of(again) == [event]


def test_an_old_summary_does_not_tell_again_what_a_row_has(losing, tmp_path):
    """A summary is as old as the last orderly end."""
    losing(6)
    folder = tmp_path / "run"
    (event,) = events_of(run_experiment(config(*FRAGILE), output=folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert "events" not in summary
    (folder / "summary.json").write_text(json.dumps(summary | {"events": [event]}))
    shutil.rmtree(folder / "checkpoints" / "round_5")
    assert events_of(run_experiment(config(*FRAGILE), resume=folder)) == [event]


def test_events_of_rounds_that_were_to_be_done_again_are_told_if_that_fails(losing, tmp_path):
    """Their rows are gone: without a checkpoint all is done again."""
    rare = config(*FRAGILE, "checkpoint.every=100")
    losing()
    run_experiment(rare, output=tmp_path / "counting")
    # Once in the beginning, then near the end, and twice in what three calls bring back.
    end = Losing.calls + 4
    losing(6, end, end + 4, end + 8)
    with pytest.raises(RunError):
        run_experiment(rare, output=tmp_path / "run")
    assert Losing.restarted == [1, 1, 1]
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["events"]
    assert not (tmp_path / "run" / "rounds.parquet").exists()
    assert [event["outcome"] for event in told] == ["replaced"] * 3 + ["aborted"]
    assert told[0]["round_index"] < told[1]["round_index"]


# -- driver actors that died --------------------------------------------------------------------


def test_each_driver_actor_that_died_is_told_once_whatever_it_had_written(tmp_path):
    """The first two left nothing; the third told of them, and died when all rounds were done."""
    folder = tmp_path / "run"
    run_experiment(config(*FRAGILE), output=folder)
    shutil.rmtree(folder / "checkpoints" / "round_5")

    def done_by(restart: Restart) -> dict[int, list[tuple[int, str]]]:
        """Events by round of what this actor does."""
        (folder / "summary.json").unlink()
        job = dataclasses.replace(make_job(config(*FRAGILE), folder, resume=True), restart=restart)
        execution.run_jobs(Control(), [job], TWO_HOSTS, "test")
        rounds = pd.read_parquet(folder / "rounds.parquet")
        found = {r: json.loads(e) for r, e in rounds[["round_index", "events"]].to_numpy()}
        return {r: [(e["attempt"], e["cause"]) for e in events] for r, events in found.items()}

    first, second, third = (1, "out of luck"), (2, "again"), (3, "and again")
    told = done_by(Restart(*second, (first,)))
    assert told == {0: [], 1: [], 2: [], 3: [], 4: [first, second], 5: []}
    assert done_by(Restart(*third, (first, second))) == told
    (event,) = json.loads((folder / "summary.json").read_text())["events"]
    assert (event["round_index"], event["attempt"], event["cause"]) == (5, *third)


def test_a_driver_actor_is_told_of_all_that_died_before_it(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").touch()
    asked: list[Job] = []

    def follow(job: Any, arguments: Any, **more: Any) -> list[Any]:
        asked.extend(arguments[0])
        if len(asked) < 3:
            raise DriverLostError(f"death {len(asked)}")
        return []

    monkeypatch.setattr(driver_actor, "follow", follow)
    monkeypatch.setattr(ray_pool, "first_actors", lambda *given: contextlib.nullcontext([]))
    job = make_job(config(SMALL), tmp_path, resume=True)
    execution.run_on_ray([job], TWO_HOSTS, "test", lambda e: None, lambda: False, restarts=2)
    assert [one.restart for one in asked] == [
        None,
        Restart(1, "death 1"),
        Restart(2, "death 2", ((1, "death 1"),)),
    ]


@pytest.mark.parametrize(
    "raised", [driver_actor.RayActorError(), driver_actor.OutOfMemoryError("too much")]
)
def test_a_driver_actor_counts_as_dead_whoever_ended_it(raised, monkeypatch):
    """Ray says it in another way if its own memory monitor did."""

    def fail(*given: Any, **more: Any) -> Any:
        raise raised

    monkeypatch.setattr(driver_actor, "_start", lambda *given: Mock())
    monkeypatch.setattr(driver_actor.ray, "wait", fail)
    monkeypatch.setattr(driver_actor.ray, "kill", lambda *given, **more: None)
    with pytest.raises(DriverLostError, match="the driver actor died: "):
        driver_actor.follow(
            Mock(), (), plan=TWO_HOSTS, label="x", watch=print, interrupted=lambda: False
        )


def test_a_host_that_is_lost_while_it_reads_the_data_is_an_error_that_says_so(losing, tmp_path):
    losing(1)
    with pytest.raises(RunError, match=r"read their clients' data \(host 1: lost in load\)"):
        run_experiment(config(*FRAGILE), output=tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_is_said_once_and_the_run_goes_on(
    tmp_path, monkeypatch, whole
):
    real, calls = run_loop.save_checkpoint, []

    def full(*args: Any, **kwargs: Any) -> Path:
        calls.append(args)
        if len(calls) == 1:
            raise OSError("No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(run_loop, "save_checkpoint", full)
    events: list[Any] = []
    result = run_experiment(config(*FRAGILE), output=tmp_path / "run", watch=events.append)
    said = [e.text for e in events if isinstance(e, Message)]
    assert said == ["no checkpoint after round 1: No space left on device"]
    assert digests(result) == digests(whole)
    # The next one holds what the first one should have held.
    kept = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None
    monkeypatch.undo()
    for folder in sorted(kept.parent.iterdir())[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = run_experiment(config(*FRAGILE), resume=tmp_path / "run")
    assert digests(again) == digests(whole)


def test_tables_are_on_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    found = []
    real = run_loop.save_checkpoint

    def looking(folder: Path, counters: Any, *rest: Any) -> Path:
        rounds = pd.read_parquet(folder.parent / "rounds.parquet")
        found.append((counters.round_index, rounds["round_index"].max()))
        return real(folder, counters, *rest)

    monkeypatch.setattr(run_loop, "save_checkpoint", looking)
    run_experiment(config(*FRAGILE), output=tmp_path / "run")
    assert found == [(1, 1), (3, 3), (5, 5)]


MISBEHAVING = (SMALL, "plugins=[tests.runtime.misbehaving]", "training.num_rounds=4")


def test_the_failure_that_ends_a_run_stands_in_its_summary(tmp_path):
    """The round never ended, so the table has no row for it."""
    chosen = config(*MISBEHAVING, "faults.max_retries=0", "faults.min_participants=1.0")
    first = prepare_experiment(chosen).client_ids[0]
    bad = config(
        *MISBEHAVING,
        *("faults.max_retries=0", "faults.min_participants=1.0"),
        f"method={{name: misbehaving, raising: [{first}], from_round: 2}}",
    )
    with pytest.raises(RunError, match="the dog ate the gradient"):
        run_experiment(bad, output=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    told = [(e["round_index"], e["client_id"], e["outcome"]) for e in summary["events"]]
    assert told == [(2, first, "aborted")]
    rows = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rows["events"].tolist() == ["[]", "[]"]


def test_a_run_without_failures_has_none_in_its_summary(tmp_path):
    result = run_experiment(config(SMALL, "training.num_rounds=2"), output=tmp_path / "run")
    assert "events" not in result.summary


def test_verify_names_a_client_that_was_left_out_and_repeats_nothing(tmp_path):
    first = prepare_experiment(config(SMALL)).client_ids[0]
    run_experiment(
        config(*MISBEHAVING, f"method={{name: misbehaving, raising: [{first}], from_round: 2}}"),
        output=tmp_path / "run",
    )
    with pytest.raises(UsageError, match=rf"client '{first}' was left out of round 2 \(.*dog"):
        verify_run(tmp_path / "run", lambda event: None)


@pytest.mark.slow
def test_the_wall_time_of_a_run_that_went_on_counts_what_came_before(tmp_path):
    chosen = config(SMALL, "method=fedavg", "training.num_rounds=300", "checkpoint.every=300")
    whole = run_experiment(chosen, output=tmp_path / "run")
    spent = float(whole.rounds["time/round_s"].sum())
    again = run_experiment(chosen, resume=tmp_path / "run")
    assert again.summary["wall_s"] > spent
