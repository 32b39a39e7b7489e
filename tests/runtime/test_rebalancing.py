"""Real actors: clients leave one that is slow, and the run keeps its bits."""

from __future__ import annotations

import pytest

from selffl_ray.balance import WINDOW
from selffl_ray.runtime.ray_pool import RayTransport
from tests.runtime.saboteur import Saboteur, run

pytestmark = pytest.mark.ray

COMMON = (
    "plugins=[tests.runtime.misbehaving]",
    "method.name=misbehaving",
    f"training.num_rounds={WINDOW + 8}",
    "evaluation.every=9",
    "placement.clients_per_actor=7",
)


def watched(folder, *more):
    """A run, its table of rounds, and what was said about moves."""
    control = Saboteur(folder)
    rounds = run(folder, (*COMMON, *more), control)
    return rounds, [text for text in control.messages if "clients moved" in text]


def test_clients_leave_an_actor_that_is_slow_and_no_bit_changes(local_ray, tmp_path):
    (tmp_path / "notes").mkdir()
    tardy = f"method.tardy={tmp_path / 'notes'}"
    found, said = watched(tmp_path / "run", tardy)
    assert (tmp_path / "notes" / "tardy").is_symlink(), "one of the two was slow indeed"
    assert len(said) == 1, said
    assert said[0].startswith(f"round {WINDOW}: ")
    # A tenth of a second for each of 7 clients, then for 3 or 4: half of an equal share stays.
    assert found["time/train_s"][:WINDOW].min() > 0.7
    assert found["time/train_s"][WINDOW + 1 :].median() < 0.7
    still, silent = watched(tmp_path / "still", "placement.rebalance=false")
    assert silent == []
    assert found["digest"].tolist() == still["digest"].tolist()
    scores = [c for c in found if c.startswith("test/")]
    assert scores
    assert found[scores].equals(still[scores])


def test_actors_on_one_processor_are_of_one_kind_and_those_with_a_gpu_are_not():
    """Bits of a client depend on the processor, and on a GPU on who shares its stack as well."""
    transport = RayTransport.__new__(RayTransport)
    places = [
        ("cpu", "one"),
        ("cpu", "one"),
        ("cpu", "other"),
        ("cuda:0", "one"),
        ("cuda:0", "one"),
    ]
    transport.where = [{"device": device, "processor": name} for device, name in places]
    kinds = [transport.kind(host) for host in range(5)]
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 4
