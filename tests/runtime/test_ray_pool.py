"""Client actors: where they are put, and what happens when they hang, die, raise or diverge."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks.in_process import Bench, Spent
from benchmarks.scale_actors import Ratio, ratio
from selffl_ray import api
from selffl_ray.algorithms.fedavg import Global
from selffl_ray.config import load_config
from selffl_ray.errors import PlacementError, RunError
from selffl_ray.local_ray import IN_MESSAGE
from selffl_ray.messages import RunSpec
from selffl_ray.pool import ClientPool
from selffl_ray.run_loop import Progress
from selffl_ray.runtime.placement import ActorPlan, PlacementPlan
from selffl_ray.runtime.ray_pool import (
    IN_MESSAGE_BY_DEFAULT,
    ActorShell,
    RayTransport,
    first_actors,
)
from tests.runtime.saboteur import Saboteur, actors_of, run

pytestmark = pytest.mark.ray

TWO_ACTORS = (
    "placement.clients_per_actor=7",
    # Which clients live with an actor is known.
    "placement.rebalance=false",
    "evaluation.every=100",
)
GAUSSIAN = (
    "data={name: gaussian, num_clients: 8, dimension: 5}",
    "training.num_rounds=1",
    "placement.clients_per_actor=1",
    "method=fedavg",
    "tracking.enabled=false",
)
MISBEHAVING = (
    "plugins=[tests.runtime.misbehaving]",
    "method.name=misbehaving",
    "training.num_rounds=2",
    "evaluation.every=100",
    "placement.clients_per_actor=14",
)
"""All clients in one actor, and in one stack."""


# -- how models get there --------------------------------------------------------------------------


def test_a_small_model_travels_in_the_calls_and_a_large_one_by_the_object_store(
    local_ray, monkeypatch
):
    """And it is the same one, with the same bits after every round."""
    put, original = [], local_ray.put
    monkeypatch.setattr(local_ray, "put", lambda value: put.append(type(value)) or original(value))
    data = "data={name: gaussian, num_clients: 8, dimension: 50000, num_examples: [4, 4]}"
    config = load_config(None, [*GAUSSIAN, data, "training.num_rounds=3"])
    transport = RayTransport(plan_of((0.3, 0), (0.3, 0)), ActorShell("auto", "sent", ((), "")), 60)
    pool = ClientPool(transport, [client % 2 for client in range(8)])

    def digests():
        put.clear()
        return [done.record.digest for done in bench.rounds(config)]

    try:
        bench = Bench(config, pool=pool)
        both = 2 * bench.prepared.run_spec.start_params.nbytes
        assert IN_MESSAGE_BY_DEFAULT < both < 2**20, "between Ray's own limit and ours"
        expected = digests()
        # Of the run's specification nobody knows the size: once a run.
        assert put == [RunSpec]
        for limit, models in ((both, 0), (both - 1, 3), (None, 3)):
            if limit is None:
                monkeypatch.delenv(IN_MESSAGE)
            else:
                monkeypatch.setenv(IN_MESSAGE, str(limit))
            assert digests() == expected
            assert put == [RunSpec, *models * [Global]]
    finally:
        pool.close()


def test_rounds_in_turn_are_compared_in_pairs():
    def spent(wall_s, in_hosts):
        return Spent(0.0, wall_s, SimpleNamespace(metrics={"time/train_s": in_hosts}))

    pairs = [(spent(4, 2), spent(1, 1)), (spent(2, 1), spent(1, 0.1)), (spent(1, 1), spent(9, 9))]
    assert ratio(pairs) == Ratio(0.5, 0.5)


# -- where actors are ------------------------------------------------------------------------------


def plan_of(*actors):
    return PlacementPlan(tuple(ActorPlan((i,), *share) for i, share in enumerate(actors)), 0.1, "")


def test_actors_have_readable_names_and_one_math_thread(local_ray):
    transport = RayTransport(
        plan_of((0.3, 0), (1.5, 0)), ActorShell("auto", "readable", ((), "")), 60
    )
    try:
        names = sorted(n for n in local_ray.util.list_named_actors() if n.startswith("readable"))
        assert names == ["readable-clients-0000-1", "readable-clients-0001-2"]
        actors = [local_ray.get_actor(name) for name in names]
        # As many as there are cores would compete, and give a stack of one other bits.
        threads = [actor.__ray_call__.remote(num_threads) for actor in actors]
        assert local_ray.get(threads, timeout=60) == [1, 1]
    finally:
        transport.close()


def test_actors_that_were_asked_for_before_are_the_first_of_the_plan(local_ray):
    plan, shell = plan_of((0.3, 0), (0.4, 0)), ActorShell("auto", "before", ((), ""))
    with first_actors(plan, shell) as started:
        pids = [local_ray.get(actor.describe.remote(), timeout=60)["pid"] for actor in started]
        transport = RayTransport(plan, shell, 60, started[:1])
        try:
            assert transport.where[0]["pid"] == pids[0]
            assert transport.where[1]["pid"] not in pids
            transport.restart([0])
            assert transport.where[0]["pid"] not in pids
        finally:
            transport.close()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_on_several_machines_no_client_actor_is_asked_for_before_the_driver_actor(
    local_ray, monkeypatch
):
    """It could take the last room on the one that the driver actor is bound to."""
    monkeypatch.setattr(local_ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}])
    with first_actors(plan_of((0.3, 0)), ActorShell("auto", "none", ((), ""))) as started:
        assert started == []
    monkeypatch.setattr(local_ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    with first_actors(plan_of((0.3, 0)), ActorShell("auto", "one", ((), ""))) as started:
        assert len(started) == 1


def test_a_run_uses_the_actors_that_started_beside_its_driver_actor(local_ray, tmp_path):
    seen = []

    def watch(event):
        if isinstance(event, Progress):
            seen.append(sorted(local_ray.util.list_named_actors()))

    settings = (
        *GAUSSIAN,
        "placement.clients_per_actor=4",
        "training.num_rounds=500",
        "experiment=beside",
    )
    api.run_experiment(load_config(None, settings), output=tmp_path / "run", watch=watch)
    names = [name for name in seen[0] if name.startswith("beside-") and "-clients-" in name]
    assert [name.partition("-clients-")[2] for name in names] == ["0000-0", "0001-0"]


def num_threads(actor):
    import torch

    return torch.get_num_threads()


def test_quarter_gpus_put_four_clients_on_each_gpu_and_can_train_on_the_cpu(local_ray, tmp_path):
    settings = (*GAUSSIAN, "placement.gpus_per_client=0.25", "placement.device=cpu")
    run(tmp_path / "run", settings)
    where = actors_of(tmp_path / "run")
    assert [len(actor["gpus"]) for actor in where] == [1] * 8
    assert Counter(actor["gpus"][0] for actor in where) == {"0": 4, "1": 4}
    assert {actor["device"] for actor in where} == {"cpu"}
    assert len({actor["pid"] for actor in where}) == 8


def test_resource_classes_give_gpus_to_those_who_match(local_ray, tmp_path):
    table = "{'client-[0-1]': 1, '*': 0}"
    settings = (*GAUSSIAN, "data.num_clients=4", f"placement.gpus_per_client={table}")
    run(tmp_path / "run", (*settings, "placement.device=cpu"))
    gpus = [actor["gpus"] for actor in actors_of(tmp_path / "run")]
    assert sorted(gpus[:2]) == [["0"], ["1"]]
    assert gpus[2:] == [[], []]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_gpu_share_without_a_cuda_device_is_one_line_with_the_remedy(local_ray, tmp_path):
    config = load_config(None, (*GAUSSIAN, "placement.gpus_per_client=0.25"))
    with pytest.raises(PlacementError, match="torch sees no CUDA device") as caught:
        api.run_experiment(config, output=tmp_path / "run")
    message = str(caught.value)
    assert "0.25 of GPU" in message
    assert "--set placement.gpus_per_client=0" in message
    assert "placement.device=cpu" in message
    assert "\n" not in message


def test_more_gpus_than_there_are_are_refused_before_any_actor(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(
        api, "run_on_ray", lambda *a, **k: pytest.fail("the driver actor was started")
    )
    config = load_config(None, (*GAUSSIAN, "placement.gpus_per_client=0.5"))
    with pytest.raises(PlacementError, match=r"ask for .* 4 GPUs.* the cluster has .* 2 GPUs"):
        api.run_experiment(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- actors that are lost --------------------------------------------------------------------------

SIX_ROUNDS = ("training.num_rounds=6", "training.num_local_steps=3", *TWO_ACTORS)


@pytest.fixture(scope="module")
def undisturbed(local_ray, tmp_path_factory):
    """Rounds of a run in which nothing happens."""
    rounds = run(tmp_path_factory.mktemp("undisturbed") / "run", SIX_ROUNDS)
    assert rounds["digest"].nunique() == 6
    assert rounds["faults"].sum() == 0
    return rounds


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def stop(pid):
    os.kill(pid, signal.SIGSTOP)


def test_a_killed_actor_is_replaced_and_the_run_replayed_from_its_start(undisturbed, tmp_path):
    control = Saboteur(tmp_path / "run", 2, kill)
    rounds = run(tmp_path / "run", SIX_ROUNDS, control)
    assert rounds["digest"].tolist() == undisturbed["digest"].tolist()
    assert control.rounds == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert rounds["faults"].tolist() == [0, 0, 0, 7, 0, 0]
    assert any("lost host 0" in message for message in control.messages)


def test_a_killed_actor_is_replaced_and_the_run_goes_on_from_its_checkpoint(undisturbed, tmp_path):
    control = Saboteur(tmp_path / "run", 2, kill)
    rounds = run(tmp_path / "run", (*SIX_ROUNDS, "checkpoint.every=2"), control)
    assert rounds["digest"].tolist() == undisturbed["digest"].tolist()
    assert control.rounds == [0, 1, 2, 2, 3, 4, 5]
    assert rounds["faults"].tolist() == [0, 0, 0, 7, 0, 0]


def test_a_hanging_actor_is_given_up_after_the_time_out_and_replaced(undisturbed, tmp_path):
    control = Saboteur(tmp_path / "run", 0, stop)
    began = time.monotonic()
    rounds = run(tmp_path / "run", (*SIX_ROUNDS, "faults.client_timeout_s=5"), control)
    assert time.monotonic() - began > 5
    assert rounds["digest"].tolist() == undisturbed["digest"].tolist()
    assert rounds["faults"].tolist() == [0, 7, 0, 0, 0, 0]
    assert any("no answer within 5 s" in message for message in control.messages)
    assert gone(control.victims[0], within_s=20)


def gone(pid, within_s):
    """Whether a process has ended; Ray takes some seconds for one that is stopped."""
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def test_actors_that_keep_dying_end_the_run_with_their_cause(local_ray, tmp_path):
    settings = (
        *MISBEHAVING,
        "method.dying=[form-03]",
        "method.from_round=1",
        "faults.max_retries=1",
    )
    control = Saboteur(tmp_path / "run")
    began = time.monotonic()
    with pytest.raises(RunError, match="hosts were lost 2 times without progress") as caught:
        run(tmp_path / "run", settings, control)
    assert time.monotonic() - began < 90
    assert "died" in str(caught.value)
    assert "there is no checkpoint" in str(caught.value)
    assert control.rounds == [0, 0]


# -- clients that fail -----------------------------------------------------------------------------


def test_a_client_that_raises_is_named_and_does_not_take_its_stack_along(local_ray, tmp_path):
    control = Saboteur(tmp_path / "run")
    rounds = run(
        tmp_path / "run", (*MISBEHAVING, "method.raising=[form-03]", "method.from_round=1"), control
    )
    assert rounds["participants"].tolist() == [14, 13]
    # Asked three times: the first time and two retries.
    assert rounds["faults"].tolist() == [0, 3]
    last = control.messages[-1]
    assert "round 1: going on without 1 of 14" in last
    assert "client 'form-03', local_update: ValueError('the dog ate the gradient')" in last


def test_too_many_clients_that_raise_end_the_run_naming_client_and_round(local_ray, tmp_path):
    settings = (*MISBEHAVING, "method.raising=[form-03]", "method.from_round=1")
    with pytest.raises(RunError) as caught:
        run(tmp_path / "run", (*settings, "faults.min_participants=1.0", "faults.max_retries=0"))
    message = str(caught.value)
    assert message.startswith("round 1: only 13 of 14 clients answered")
    assert "client 'form-03', local_update: ValueError('the dog ate the gradient')" in message


def test_an_update_of_nan_counts_as_little_as_none(local_ray, tmp_path):
    """Left out: the rounds are those in which the same client never answers."""
    bad = "[form-03, form-07]"
    control = Saboteur(tmp_path / "run")
    diverged = run(tmp_path / "run", (*MISBEHAVING, f"method.diverging={bad}"), control)
    silent = run(
        tmp_path / "silent", (*MISBEHAVING, f"method.raising={bad}", "faults.max_retries=0")
    )
    assert diverged["participants"].tolist() == [12, 12]
    assert diverged["faults"].tolist() == [2, 2]
    assert diverged["digest"].tolist() == silent["digest"].tolist()
    assert "client 'form-03', local_update: its update holds NaN" in control.messages[-1]


def test_too_many_updates_of_nan_end_the_run(local_ray, tmp_path):
    settings = (*MISBEHAVING, "method.diverging=[form-03, form-07]", "faults.min_participants=0.9")
    with pytest.raises(RunError, match=r"round 0: only 12 of 14.*'form-03'.*it diverged"):
        run(tmp_path / "run", settings)


def test_a_client_that_fails_when_it_is_evaluated_is_named(local_ray, tmp_path):
    with pytest.raises(RunError, match=r"client 'form-03', round 1, personalize: ValueError"):
        run(tmp_path / "run", (*MISBEHAVING, "method.mute=[form-03]"))
