"""From clients and machines to actors, as pure functions."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selffl_ray.balance import balanced_homes
from selffl_ray.errors import ConfigError, PlacementError
from selffl_ray.runtime.placement import (
    ACTOR_BYTES,
    CLIENTS_PER_CORE,
    DRIVER_CPUS,
    GRAIN,
    MEMORY_SHARE,
    Node,
    PlacementConfig,
    PlacementPlan,
    plan_placement,
)

PLENTY = 2**50


def node(cpus: float, gpus: float = 0, memory: int = PLENTY) -> Node:
    return Node("machine", cpus, gpus, memory)


def plan(
    count: int, *nodes: Node, work: list[float] | None = None, **options: object
) -> PlacementPlan:
    ids = [f"client-{i}" for i in range(count)]
    config = PlacementConfig(**options)  # type: ignore[arg-type]
    return plan_placement(config, nodes, ids, work or [1.0] * count)


def refusal(count: int, *nodes: Node, **options: object) -> str:
    with pytest.raises(PlacementError) as caught:
        plan(count, *nodes, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- how many actors ----------------------------------------------------------------------------


def test_every_client_has_an_actor_of_its_own_up_to_sixteen_a_core():
    most = 2 * CLIENTS_PER_CORE
    assert CLIENTS_PER_CORE == 16
    assert [len(a.clients) for a in plan(most, node(2)).actors] == [1] * most
    assert plan(most, node(2)).note == ""
    more = plan(most + 1, node(2))
    assert len(more.actors) == 2
    assert f"{most + 1} clients are too many for an actor each on 2 cores" in more.note
    assert "placement.clients_per_actor: 1 forces one each" in more.note


def test_memory_limits_the_actors_of_one_client_each():
    enough = math.ceil(10 * ACTOR_BYTES / MEMORY_SHARE)
    assert len(plan(10, node(2, memory=enough)).actors) == 10
    assert len(plan(10, node(2, memory=enough - 1_000_000)).actors) == 2


def test_one_actor_a_client_can_be_forced():
    assert len(plan(100, node(2), clients_per_actor=1).actors) == 100


@pytest.mark.parametrize(("count", "per_actor", "sizes"), [(10, 4, [4, 3, 3]), (3, 8, [3])])
def test_k_clients_an_actor_make_as_few_actors_as_hold_them(count, per_actor, sizes):
    found = plan(count, node(2), clients_per_actor=per_actor)
    assert sorted((len(a.clients) for a in found.actors), reverse=True) == sizes


def test_pooled_clients_are_dealt_so_that_work_is_even():
    work = [100.0, 1, 1, 1, 99, 1, 1, 1]
    found = plan(8, node(2), clients_per_actor=4, work=work)
    loads = [sum(work[c] for c in actor.clients) for actor in found.actors]
    assert max(loads) - min(loads) <= 1


@given(
    work=st.lists(st.floats(0.1, 100), min_size=1, max_size=30),
    num_hosts=st.integers(1, 30),
)
def test_the_busiest_host_has_no_more_than_its_share_and_one_client(work, num_hosts):
    assume(num_hosts <= len(work))
    homes = balanced_homes(work, num_hosts)
    loads = Counter[int]()
    for client, home in enumerate(homes):
        loads[home] += work[client]  # type: ignore[assignment]
    assert set(homes) == set(range(num_hosts))
    # Graham 1966: greedy list scheduling is within mean + largest item.
    assert max(loads.values()) <= sum(work) / num_hosts + max(work) + 1e-9


def test_the_local_backend_needs_no_machine():
    found = plan(5, backend="local", gpus_per_client=1)
    assert found.backend == "local"
    assert [a.clients for a in found.actors] == [(0, 1, 2, 3, 4)]
    assert found.describe() == ["5 clients in this process, without Ray"]


# -- CPU shares ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 14, 31, 32])
def test_automatic_cpu_shares_are_ten_thousandths_that_fit_beside_the_driver(count):
    share = plan(count, node(2)).actors[0].cpus
    grains = share * GRAIN
    assert abs(grains - round(grains)) < 1e-9
    assert share <= 1
    assert count * share <= 2 - DRIVER_CPUS + 1e-9
    # One ten-thousandth more would not fit.
    assert share == 1 or count * (share + 1 / GRAIN) > 2 - DRIVER_CPUS


@pytest.mark.parametrize(
    ("nodes", "count", "share"),
    [
        ((node(1), node(1)), 3, 0.5),
        ((node(1), node(1), node(1)), 3, 0.9),
        ((node(8), node(1)), 4, 1.0),
        ((node(64), node(4, gpus=4)), 4, 1.0),
    ],
)
def test_automatic_cpu_shares_fit_each_machine_not_only_their_sum(nodes, count, share):
    assert plan(count, *nodes).actors[0].cpus == share


def test_automatic_cpu_shares_heed_that_actors_must_go_where_the_gpus_are():
    found = plan(8, node(64), node(4, gpus=4), gpus_per_client=0.5)
    assert found.actors[0].cpus == 0.5


def test_a_given_cpu_share_is_taken():
    assert plan(3, node(2), cpus_per_actor=0.5).actors[0].cpus == 0.5


# -- GPU shares ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 1, 0.5, 0.25, 1 / 3, 0.3333, 0.1, 2, 4.0])
def test_one_kth_of_a_gpu_and_whole_gpus_are_taken(share):
    assert PlacementConfig(gpus_per_client=share).gpu_share("x") == share


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.3, "must be 1/k, so that GPUs are filled, got 0.3; use 0.25 (1/4)"),
        (0.4, "got 0.4; use 0.3333 (1/3)"),
        (0.9, "got 0.9; use 0.5 (1/2)"),
        (1.5, "above 1 must be whole GPUs, got 1.5; use 2"),
        (-0.25, "must be >= 0, got -0.25"),
        (float("nan"), "must be >= 0, got nan"),
        (float("inf"), "must be >= 0, got inf"),
        ({"a": 0.25, "*": 0.3}, "got 0.3; use 0.25 (1/4)"),
    ],
)
def test_another_share_of_a_gpu_is_refused_with_one_that_works(share, message):
    with pytest.raises(ConfigError) as caught:
        PlacementConfig(gpus_per_client=share)
    assert message in str(caught.value)


@given(k=st.integers(1, 100), off=st.floats(0.001, 0.999))
def test_the_share_that_is_suggested_is_accepted(k, off):
    share = 1 / (k + off)
    try:
        PlacementConfig(gpus_per_client=share)
    except ConfigError as error:
        suggested = 1 / int(str(error).rpartition("1/")[2].rstrip(")"))
        assert suggested <= share
        PlacementConfig(gpus_per_client=suggested)


def test_resource_classes_are_patterns_of_client_ids_and_the_first_match_counts():
    config = PlacementConfig(gpus_per_client={"hospital-1?": 1, "hospital-*": 0.5, "*": 0})
    ids = ["hospital-1", "hospital-12", "phone-3", "HOSPITAL-12"]
    assert [config.gpu_share(i) for i in ids] == [0.5, 1, 0, 0]


def test_a_client_that_no_resource_class_matches_is_named_with_the_remedy():
    config = PlacementConfig(gpus_per_client={"hospital-*": 0.5})
    with pytest.raises(PlacementError, match="matches client 'phone-3'; add '\\*' as the last"):
        config.gpu_share("phone-3")


def test_clients_of_one_resource_class_share_actors_only_among_themselves():
    ids = ["a0", "b0", "a1", "b1", "a2", "b2", "b3"]
    config = PlacementConfig(gpus_per_client={"a*": 0.5, "*": 0}, clients_per_actor=2)
    found = plan_placement(config, [node(4, gpus=1)], ids, [1.0] * 7)
    for actor in found.actors:
        assert len({ids[c][0] for c in actor.clients}) == 1
        assert actor.gpus == (0.5 if ids[actor.clients[0]][0] == "a" else 0)
    assert sorted(len(a.clients) for a in found.actors) == [1, 2, 2, 2]


# -- what cannot be -----------------------------------------------------------------------------


def test_a_gpu_where_there_is_none_is_refused_with_the_setting_that_does_without():
    message = refusal(4, node(2), gpus_per_client=0.25)
    assert message.startswith("placement.gpus_per_client: 4 client actors ask for")
    assert "1 GPUs, and the driver actor for 0.1 CPU; the cluster has 2 CPUs and 0 GPUs" in message
    assert message.endswith("use --set placement.gpus_per_client=0")


def test_more_gpu_than_there_is_is_refused_with_the_numbers():
    message = refusal(9, node(16, gpus=2), gpus_per_client=0.25)
    assert "2.25 GPUs" in message
    assert "the cluster has 16 CPUs and 2 GPUs on 1 node(s)" in message
    assert "no place for actor 8 (" in message
    assert "use a smaller share, or more clients an actor" in message


def test_more_cpu_than_there_is_is_refused_with_the_numbers():
    message = refusal(3, node(2), cpus_per_actor=1)
    assert "3 client actors ask for 3 CPUs" in message
    assert "the cluster has 2 CPUs" in message
    assert "lower placement.cpus_per_actor" in message


def test_an_actor_must_fit_one_machine_and_a_share_one_gpu():
    assert "no place for actor 1" in refusal(2, node(1.5), node(0.4), cpus_per_actor=0.9)
    # Three halves on two GPUs leave 1/2 and 0 free: no GPU has room for a whole one.
    table = {"client-[012]": 0.5, "*": 1}
    assert "no place for actor 3" in refusal(4, node(8, gpus=2), gpus_per_client=table)
    assert "no place for actor 0" in refusal(1, node(4, gpus=1), node(4, gpus=1), gpus_per_client=2)


def test_a_machine_too_small_for_the_driver_actor_is_refused():
    assert "the cluster has 0.1 CPUs; at least 0.1 are needed" in refusal(2, node(0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients_per_actor": 0}, "placement.clients_per_actor must be >= 1 or auto, got 0"),
        ({"stack_size": -1}, "placement.stack_size must be >= 1 or auto, got -1"),
        ({"cpus_per_actor": 0}, "placement.cpus_per_actor must be > 0 or auto, got 0"),
        ({"cpus_per_actor": -0.5}, "placement.cpus_per_actor must be > 0 or auto, got -0.5"),
        ({"cpus_per_actor": float("nan")}, "placement.cpus_per_actor must be > 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PlacementConfig(**options)


# -- any plan -----------------------------------------------------------------------------------

SHARES = st.sampled_from([0, 1 / 3, 0.25, 0.5, 1, 2])


def fits(found: PlacementPlan, nodes: list[Node]) -> bool:
    """Whether the actors find room in order, in grains and in twelfths of single GPUs."""
    cpus = [round(n.cpus * GRAIN) for n in nodes]
    cpus[0] -= round(DRIVER_CPUS * GRAIN)
    gpus = [[12] * int(n.gpus) for n in nodes]
    for actor in found.actors:
        need, twelfths = round(actor.cpus * GRAIN), round(actor.gpus * 12)
        for at in range(len(nodes)):
            free = [i for i, left in enumerate(gpus[at]) if left >= min(twelfths, 12)]
            cards = free[: math.ceil(twelfths / 12)]
            if cpus[at] >= need and len(cards) == math.ceil(twelfths / 12):
                cpus[at] -= need
                for i in cards:
                    gpus[at][i] -= min(twelfths, 12)
                break
        else:
            return False
    return True


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    machines=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=4),
    count=st.integers(1, 40),
    per_actor=st.one_of(st.just("auto"), st.integers(1, 12)),
    cpus=st.one_of(st.just("auto"), st.sampled_from([0.1, 0.5, 1.0])),
    shares=st.one_of(SHARES, st.tuples(SHARES, SHARES)),
)
def test_a_plan_that_is_returned_fits_and_covers_every_client_once(
    machines, count, per_actor, cpus, shares
):
    nodes = [node(c, gpus=g) for c, g in machines]
    table = {"client-*[02468]": shares[0], "*": shares[1]} if isinstance(shares, tuple) else shares
    options = {"clients_per_actor": per_actor, "cpus_per_actor": cpus, "gpus_per_client": table}
    config = PlacementConfig(**options)
    ids = [f"client-{i}" for i in range(count)]
    try:
        found = plan_placement(config, nodes, ids, [1.0 + i % 3 for i in range(count)])
    except PlacementError:
        # Refused only if a GPU is asked for, or CPU shares were given.
        assert cpus != "auto" or table != 0
        return
    assert sorted(c for actor in found.actors for c in actor.clients) == list(range(count))
    assert [found.homes[c] for a in found.actors for c in a.clients] == [
        i for i, a in enumerate(found.actors) for _ in a.clients
    ]
    assert all(
        actor.gpus == config.gpu_share(ids[c]) for actor in found.actors for c in actor.clients
    )
    assert fits(found, nodes)


def test_a_plan_describes_actors_shares_and_memory():
    lines = plan(4, node(2, gpus=1), gpus_per_client=0.25).describe()
    assert lines[0] == (
        "4 client actors for 4 clients (at most 1 each), 0.475 CPU each, 1 GPU in all; driver "
        "actor 0.1 CPU"
    )
    assert lines[1] == f"about {4 * ACTOR_BYTES / 2**30:.1f} GiB for the actors"


def test_a_plan_can_say_who_is_at_home_where_by_now():
    config = PlacementConfig(clients_per_actor=3)
    nodes = [Node("here", 4, 0, PLENTY)]
    plan = plan_placement(config, nodes, [str(i) for i in range(6)], [1.0] * 6)
    moved = plan.with_homes([1, 1, 0, 1, 1, 1])
    assert [actor.clients for actor in moved.actors] == [(2,), (0, 1, 3, 4, 5)]
    assert moved.homes == [1, 1, 0, 1, 1, 1]
    assert moved.with_homes(plan.homes) == plan
