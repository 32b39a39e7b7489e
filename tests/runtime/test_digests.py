"""Same seed, same bits: on Ray's actors as in one process, however many clients an actor hosts.

The actors of a placement are created once and do one experiment after the other, which shows at the
same time that nothing of one is left for the next. Every estimator, in process: see
``test_digests_local.py``.
"""

from __future__ import annotations

import math

import pytest

from selffl_ray.api import placement_of, run_comparison
from selffl_ray.config import load_config
from selffl_ray.pool import ClientPool
from selffl_ray.registry import Component
from selffl_ray.runtime.cluster import cluster
from selffl_ray.runtime.ray_pool import ActorShell, RayTransport
from tests.runtime.placements import different, locally, moved, outcome, prepared_with

pytestmark = pytest.mark.ray

CNN = "model={name: cnn, channels: [4], kernel: 3, pool: 1, hidden: [16]}"
UNEQUAL = "data.partition.sizes={min: 20, max: 110}"
SOME = "training.participation_rate=0.3"
COMMON = ("training.num_rounds=3", "evaluation.every=3", "method.probe_every=2")
EXPERIMENTS = {
    "mlp": (),
    "mlp, some clients a round": (SOME,),
    "mlp, unequal clients": (UNEQUAL,),
    "cnn, some unequal clients a round": (CNN, UNEQUAL, SOME),
}


def settings_of(name, method):
    common = COMMON if method == "selffl" else COMMON[:-1]
    return (f"method.name={method}", *common, *EXPERIMENTS[name])


@pytest.fixture(scope="module")
def references():
    """What one process makes of every experiment, in stacks of the usual height."""
    found = {}
    for name in EXPERIMENTS:
        for method in ("selffl", "fedavg"):
            prepared = prepared_with(*settings_of(name, method))
            result = locally(prepared, 1, prepared.run_spec.stack_size)
            assert moved(result)
            found[name, method] = result
    return found


@pytest.mark.parametrize("clients_per_actor", [1, 2, 7, 14])
def test_actors_leave_the_bits_of_one_process(local_ray, references, clients_per_actor):
    per_actor = f"placement.clients_per_actor={clients_per_actor}"
    first = prepared_with(per_actor)
    with cluster() as here:
        plan = placement_of(first, here.nodes)
    assert len(plan.actors) == math.ceil(14 / clients_per_actor)
    transport = RayTransport(plan, ActorShell("auto", f"digests-{clients_per_actor}", ((), "")), 60)
    pool = ClientPool(transport, plan.homes)
    try:
        for (name, method), reference in references.items():
            prepared = prepared_with(*settings_of(name, method), per_actor)
            wrong = different(reference, outcome(prepared, pool))
            assert not wrong, f"{method} on {name}: {wrong[:5]}"
    finally:
        pool.close()


def test_a_comparison_in_the_driver_actor_leaves_the_rounds_of_one_process(local_ray, tmp_path):
    methods = [Component("selffl"), Component("fedavg")]
    tables = {}
    for backend in ("ray", "local"):
        settings = (*COMMON, f"placement.backend={backend}", "placement.clients_per_actor=7")
        config = load_config(None, [*settings, "tracking.enabled=false"])
        results = run_comparison(config, methods, output=tmp_path / backend)
        tables[backend] = [untimed(result.rounds) for result in results]
        tables[backend] += [result.clients for result in results]
    for on_ray, in_process in zip(tables["ray"], tables["local"], strict=True):
        assert len(on_ray) > 0
        assert on_ray.equals(in_process)


def untimed(rounds):
    """The table without what a clock measured."""
    return rounds[[c for c in rounds.columns if not c.startswith("time/") and c[-2:] != "_s"]]
