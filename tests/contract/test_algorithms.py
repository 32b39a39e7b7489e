"""What every registered algorithm must keep to, built-in or a user's own."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from selffl_ray import trees
from selffl_ray.algorithms.fedavg import AveragingConfig
from selffl_ray.checkpoint import Counters, load_checkpoint, save_checkpoint
from selffl_ray.driver import run_rounds
from selffl_ray.participation import RoundPlan
from selffl_ray.registry import algorithms
from tests.contract import harness

EVERY = pytest.mark.parametrize("name", algorithms.names())


def stack_of(prepared, members):
    """A stack of real clients, and the start of their states."""
    spec, data = prepared.run_spec, harness.open_pool(prepared).transport._hosts[0]
    return data._stack(members, prepared.plans[0]), prepared.algorithm.init_client(
        torch.from_numpy(spec.start_params.copy()), len(members)
    )


def same_length(prepared):
    """Clients that may stand in one stack."""
    training = prepared.config.training
    lengths = [training.batch_length(len(c.train)) for c in prepared.clients]
    return [i for i, length in enumerate(lengths) if length == lengths[0]][:4]


def update(prepared, members):
    server = harness.start(prepared)
    plan = RoundPlan(0, np.asarray(members), prepared.plans[0].learning_rate)
    shared, per_client = prepared.algorithm.broadcast(server, plan)
    stack, state = stack_of(prepared, members)
    return prepared.algorithm.local_update(shared, per_client, state, stack)


@EVERY
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(name):
    first = harness.digests(harness.finish(harness.prepared_as_allowed(name)))
    again = harness.digests(harness.finish(harness.prepared_as_allowed(name)))
    other = harness.digests(harness.finish(harness.prepared_as_allowed(name, seed=1)))
    assert first == again
    assert not set(first) & set(other)


@EVERY
@pytest.mark.parametrize("num_hosts", [2, 3, 7])
def test_results_do_not_depend_on_where_clients_live(name, num_hosts):
    prepared = harness.prepared_as_allowed(name)
    alone = harness.finish(prepared)
    spread = harness.finish(prepared, num_hosts)
    assert harness.digests(alone) == harness.digests(spread)
    for one, other in zip(alone.records, spread.records, strict=True):
        scores = {k: v for k, v in one.metrics.items() if not k.startswith("time/")}
        assert scores == {k: v for k, v in other.metrics.items() if not k.startswith("time/")}


@EVERY
def test_rows_of_an_update_do_not_depend_on_their_neighbours(name):
    prepared = harness.prepared_as_allowed(name)
    members = same_length(prepared)
    together = update(prepared, members)
    for row, member in enumerate(members):
        alone = update(prepared, [member])
        for (leaf, whole), (_, single) in zip(
            trees.leaves(together), trees.leaves(alone), strict=True
        ):
            assert torch.equal(
                torch.nan_to_num(whole[row].double(), nan=-1.0),
                torch.nan_to_num(single[0].double(), nan=-1.0),
            ), leaf


@EVERY
def test_an_update_changes_none_of_its_arguments(name):
    prepared = harness.prepared_as_allowed(name)
    server = harness.start(prepared)
    shared, per_client = prepared.algorithm.broadcast(server, prepared.plans[0])
    members = [int(i) for i in same_length(prepared)]
    plan = RoundPlan(0, np.asarray(members), prepared.plans[0].learning_rate)
    shared, per_client = prepared.algorithm.broadcast(server, plan)
    stack, state = stack_of(prepared, members)
    before = [
        leaf.clone()
        for part in (server, shared, per_client, state)
        for _, leaf in trees.leaves(part)
    ]
    prepared.algorithm.local_update(shared, per_client, state, stack)
    prepared.algorithm.personalize(shared, per_client, state, stack)
    after = [leaf for part in (server, shared, per_client, state) for _, leaf in trees.leaves(part)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(torch.nan_to_num(old.double()), torch.nan_to_num(new.double()))


AVERAGING = [
    n for n in algorithms.names() if issubclass(algorithms.get(n).config_type, AveragingConfig)
]


@pytest.mark.parametrize("name", AVERAGING)
def test_a_server_optimizer_moves_what_the_method_shares(name):
    """Half of the way to the mean at a rate of a half; own parts in the tables go all the way."""
    server = "server: {name: fedavgm, momentum: 0.0, learning_rate: 0.5}"
    plain, half = (
        harness.prepared_with(m, (*harness.DIGITS, "training.num_rounds=1"))
        for m in (name, f"{{name: {name}, {server}}}")
    )
    start_P = torch.from_numpy(plain.run_spec.start_params.copy()).double()
    ends = [harness.finish(p).records[-1].server.params_P.double() for p in (plain, half)]
    whole_P, half_P = (end - start_P for end in ends)
    moved_P = whole_P.abs() > 1e-3
    share_P = (half_P / whole_P)[moved_P]
    halfway_P = (share_P - 0.5).abs() < 1e-2
    assert bool(halfway_P.any())
    assert bool((halfway_P | ((share_P - 1).abs() < 1e-6)).all())
    sent = plain.algorithm.traffic(plain.plans[0]).up
    if sent >= len(start_P):
        assert bool(halfway_P.all())


@EVERY
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit_on_other_hosts(name, tmp_path):
    prepared = harness.prepared_as_allowed(name)
    whole = harness.finish(prepared)
    pool = harness.open_pool(prepared)
    rounds = run_rounds(harness.loop(prepared, pool), harness.start(prepared))
    record = [next(rounds), next(rounds)][-1]
    counters = Counters(record.plan.round_index, record.gradient_steps, "run")
    save_checkpoint(
        tmp_path, counters, record.server, pool.export_states(changed_only=False), keep=2
    )
    saved = load_checkpoint(
        tmp_path / "round_1",
        "run",
        harness.start(prepared),
        prepared.algorithm.init_client(torch.from_numpy(prepared.run_spec.start_params.copy()), 1),
    )
    other = harness.open_pool(prepared, 3)
    other.import_states(saved.states)
    rest = list(
        run_rounds(
            harness.loop(prepared, other),
            saved.server,
            first_round=2,
            gradient_steps=saved.counters.gradient_steps,
        )
    )
    assert [r.digest for r in rest] == harness.digests(whole)[2:]


@EVERY
def test_training_lowers_the_loss_and_beats_guessing(name):
    settings = ("training.num_rounds=15", "evaluation.every=15", "training.num_local_steps=20")
    prepared = harness.prepared_as_allowed(name, settings)
    last = harness.finish(prepared).records[-1].metrics
    assert last["test/local_accuracy"] > 0.7
    assert last["train/loss"] < 1.0


@EVERY
def test_one_client_learns_like_plain_training_where_everybody_is_alone(name):
    """A federation of one: its model must reach the optimum of its own quadratic.

    The model is one layer. A method may have nothing to train in it, but must have said so.
    """
    settings = (
        "data={name: gaussian, num_clients: 1, num_examples: [64], dimension: 3, inter_var: 1.0}",
        "training.num_rounds=20",
        "training.num_local_steps=20",
        "training.batch_size=64",
        "training.learning_rate=0.3",
    )
    prepared = harness.prepared_as_allowed(name, settings)
    done = harness.finish(prepared)
    params = prepared.algorithm.global_params(done.records[-1].server)
    if torch.equal(params, torch.from_numpy(prepared.run_spec.start_params)):
        assert any("train nothing" in caution for caution in prepared.algorithm.cautions)
        return
    rows = prepared.store.read(prepared.clients[0].train)
    optimum = torch.from_numpy(rows.y[:, 1, 0].mean(axis=0)).float()
    torch.testing.assert_close(params, optimum, atol=1e-4, rtol=0)


@EVERY
def test_it_runs_with_one_participant_a_round_and_with_new_clients(name):
    """Or with all of them, if it says before the run that it needs them."""
    settings = (
        "training.num_rounds=3",
        "training.num_local_steps=3",
        "training.participation_rate=0.01",
        "evaluation.every=1",
        "evaluation.new_clients=0.3",
    )
    prepared = harness.prepared_as_allowed(name, settings)
    records = harness.finish(prepared).records
    everybody = prepared.config.training.participation_rate == 1
    num_asked = prepared.federation.num_clients if everybody else 1
    assert all(r.metrics["clients/participants"] == num_asked for r in records)
    assert all(math.isfinite(v) for r in records for v in r.metrics.values())
    assert "new/local_accuracy" in records[-1].metrics


@EVERY
def test_options_are_frozen_keyword_only_documented_and_have_defaults(name):
    kind = algorithms.get(name).config_type
    fields = dataclasses.fields(kind)
    assert kind.__dataclass_params__.frozen
    assert all(f.kw_only for f in fields)
    kind()
    assert algorithms.get(name).summary


def test_a_stack_needs_clients_of_one_batch_length():
    """The promise that rows keep their bits rests on it."""
    prepared = harness.prepared_with("fedavg")
    lengths = {prepared.config.training.batch_length(len(c.train)) for c in prepared.clients}
    assert len(lengths) > 1, "the example must mix lengths, or the other tests prove less"
    stacks = harness.open_pool(prepared).transport._hosts[0]._stacks(range(14))
    for members in stacks:
        inside = {
            prepared.config.training.batch_length(len(prepared.clients[i].train)) for i in members
        }
        assert len(inside) == 1
