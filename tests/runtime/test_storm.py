"""A storm: in every round something else goes wrong, and the run ends as if nothing had.

20 rounds by default; ``SELFFL_STORM_ROUNDS=100 pytest tests/runtime/test_storm.py`` for more. What
strikes whom is drawn from a fixed seed. Updates that cannot be used are left out of their round, so
the quiet run that is compared with has the same ones left out, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest

from selffl_ray.seeding import generator
from tests.runtime.saboteur import Saboteur, actors_of, run

ROUNDS = int(os.environ.get("SELFFL_STORM_ROUNDS", "20"))
SEED = 8
CLIENTS = 8
KINDS = ("killed", "hanging", "diverged", "starved", "slow", "misshapen")
TIMEOUT_S = 12.0
RETRIES = 3

pytestmark = [pytest.mark.ray, pytest.mark.limit_s(240 + 30 * ROUNDS)]


def drawn():
    """A client and a fault for every round."""
    found = []
    for index in range(ROUNDS):
        rng = generator(SEED, "storm", index)
        found.append((index, int(rng.integers(CLIENTS)), KINDS[rng.integers(len(KINDS))]))
    return found


def settings(names, notes, base, *more):
    strikes = [f"{at} {names[client]} {kind}" for at, client, kind in drawn()]
    return (
        f"data.partition={{name: dirichlet, alpha: 1.0, num_clients: {CLIENTS}}}",
        "plugins=[tests.runtime.storming]",
        "model.hidden=[16]",
        f"training.num_rounds={ROUNDS}",
        "training.num_local_steps=3",
        "checkpoint.every=3",
        "placement.clients_per_actor=1",
        f"faults.client_timeout_s={TIMEOUT_S}",
        f"faults.max_retries={RETRIES}",
        "method.name=storm",
        f"method.base={base}",
        f"method.strikes={json.dumps(strikes)}",
        f"method.notes={notes}",
        f"method.slow_s={0.6 * TIMEOUT_S}",
        *more,
    )


def names_of_clients():
    return [f"client-{i}" for i in range(CLIENTS)]


EVENTS = {
    "killed": {("died", "replaced"): 1},
    "hanging": {("silent", "replaced"): 1},
    "diverged": {("diverged", "left out"): 1},
    "misshapen": {("shape", "left out"): 1},
    "slow": {("slow", "kept"): 1},
    # Asked again in vain, then its host is replaced.
    "starved": {("memory", "retried"): RETRIES, ("memory", "replaced"): 2},
}
"""Kind and outcome of the events that follow from a fault, and how many there are."""
CHANCE = {"slow", "silent"}
"""On a machine that others use as well a host may be late without having been struck."""


@pytest.fixture(scope="module")
def storm(local_ray, tmp_path_factory):
    """Rounds of a run in a storm and of the quiet one, and what was said in the storm."""
    folder = tmp_path_factory.mktemp("storm")
    (folder / "notes").mkdir()
    own = settings(names_of_clients(), folder / "notes", "ditto")
    alone = ("method.quiet=true", "placement.backend=local", "placement.stack_size=1")
    quiet = run(folder / "quiet", (*own, *alone))
    control = Saboteur(folder / "run")
    rounds = run(folder / "run", own, control)
    assert len({actor["pid"] for actor in actors_of(folder / "run")}) == CLIENTS
    struck = {tuple(note.name.split()) for note in (folder / "notes").iterdir()}
    return rounds, quiet, control, struck


def test_every_fault_is_drawn_and_strikes(storm):
    *_, struck = storm
    names = names_of_clients()
    assert {kind for *_, kind in drawn()} == set(KINDS)
    once = {(str(at), names[c], k) for at, c, k in drawn() if k not in ("diverged", "misshapen")}
    assert struck == once


def test_no_round_is_lost_or_hangs_and_only_spoiled_updates_are_left_out(storm):
    rounds, *_ = storm
    assert rounds["round_index"].tolist() == list(range(ROUNDS))
    spoiled = [kind in ("diverged", "misshapen") for *_, kind in drawn()]
    assert rounds["participants"].tolist() == [CLIENTS - one for one in spoiled]


def test_the_run_ends_with_the_bits_of_the_quiet_one(storm):
    """The server's and, by the losses of the personalized models, those of the clients' states."""
    rounds, quiet, *_ = storm
    assert rounds["digest"].nunique() == ROUNDS
    assert rounds["digest"].tolist() == quiet["digest"].tolist()
    same = [c for c in quiet if "/" in c and not c.startswith("time/") and c != "clients/faults"]
    assert "test/local_loss" in same
    assert rounds[same].equals(quiet[same])


def test_every_event_is_in_the_table_of_rounds_by_kind_and_count(storm):
    rounds, *_ = storm
    for (at, client, kind), text, faults in zip(
        drawn(), rounds["events"], rounds["faults"], strict=True
    ):
        events = json.loads(text)
        found = Counter((event["kind"], event["outcome"]) for event in events)
        expected = Counter(EVENTS[kind])
        assert expected <= found, (at, kind, events)
        assert {name for name, _ in found - expected} <= CHANCE, (at, kind, events)
        own = [event for event in events if (event["kind"], event["outcome"]) in expected]
        # With an actor each a client's host has its number, however often it was replaced.
        assert client in {event["host"] for event in own}
        assert {event["client_id"] for event in own} <= {None, names_of_clients()[client]}
        assert all(event["round_index"] == at for event in events)
        assert all("node " in event["place"] for event in events)
        assert sum(event["num_clients"] for event in events) == faults


def test_what_was_said_names_cause_client_round_node_and_memory(storm):
    _, _, control, _ = storm
    names = names_of_clients()
    for at, client, kind in drawn():
        if kind == "diverged":
            said = next(m for m in control.messages if m.startswith(f"round {at}: "))
            assert f"client {names[client]!r}, local_update: its update holds NaN" in said
            assert "node " in said
            assert "last memory reading" in said
