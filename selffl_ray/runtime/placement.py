"""From clients and machines to actors: how many, with which shares, or why it cannot be.

Nothing here touches Ray: a plan is made and judged before anything starts.
"""

from __future__ import annotations

import bisect
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from selffl_ray.balance import balanced_homes
from selffl_ray.errors import ConfigError, PlacementError

CLIENTS_PER_CORE = 16
"""Up to so many clients a core, each has an actor of its own by default."""
MEMORY_SHARE = 0.6
"""Share of the free memory that actors may take by default."""
ACTOR_BYTES = 320 * 2**20
"""Resident memory of an actor that has imported torch, before data and models."""
DRIVER_CPUS = 0.1
"""CPU share of the driver actor: it waits most of the time."""
GRAIN = 10_000
"""Ray counts resources in ten-thousandths."""
SLACK = 1e-6
"""For sums of shares that are not exact in binary."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """The ``placement`` part of an experiment. Results do not depend on it."""

    clients_per_actor: int | Literal["auto"] = "auto"
    """1 gives every client an actor of its own; k lets one actor host k. auto is 1 up to 16 clients
    a core and 60 % of free memory, else as few actors as there are cores."""
    cpus_per_actor: float | Literal["auto"] = "auto"
    """CPU share that each client actor reserves; auto divides what there is."""
    gpus_per_client: float | dict[str, float] = 0.0
    """GPU share of each client's actor: 0, 1/k, or whole GPUs; or a table from patterns of client
    ids to shares, the first match counts. An actor that hosts several clients takes the share of
    one."""
    stack_size: int | Literal["auto"] = "auto"
    """Clients trained together in one stack; auto fits the model to the cache."""
    rebalance: bool = True
    """Move clients between actors that host several, when rounds show that some actors take longer
    than others and the rounds to come save more than the move takes; only between processors of
    one type, so that no bit changes. false leaves them."""
    device: Literal["auto", "cpu"] = "auto"
    """auto trains on the GPU that Ray assigns, if there is a share; cpu always on the CPU."""
    backend: Literal["ray", "local"] = "ray"
    """local runs everything in this process, without Ray."""
    state_store: Literal["memory", "disk"] = "memory"
    """Where hosts keep what their clients keep between rounds: in memory, or in the run's folder on
    the host's machine, for more clients than fit. The files go with the run."""

    def __post_init__(self) -> None:
        for name in ("clients_per_actor", "stack_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"placement.{name} must be >= 1 or auto, got {value}")
        if self.cpus_per_actor != "auto" and not self.cpus_per_actor > 0:
            raise ConfigError(
                f"placement.cpus_per_actor must be > 0 or auto, got {self.cpus_per_actor}"
            )
        table = self.gpus_per_client
        for share in table.values() if isinstance(table, dict) else [table]:
            _check_share(share)

    def gpu_share(self, client_id: str) -> float:
        """GPU share of a client's actor."""
        if not isinstance(self.gpus_per_client, dict):
            return self.gpus_per_client
        for pattern, share in self.gpus_per_client.items():
            if fnmatch.fnmatchcase(client_id, pattern):
                return share
        raise PlacementError(
            f"placement.gpus_per_client: no pattern of {list(self.gpus_per_client)} matches client "
            f"{client_id!r}; add '*' as the last one"
        )


def _check_share(share: float) -> None:
    if not 0 <= share < math.inf:
        raise ConfigError(f"placement.gpus_per_client must be >= 0, got {share}")
    if share > 1 and share != round(share):
        raise ConfigError(
            f"placement.gpus_per_client above 1 must be whole GPUs, got {share}; use {round(share)}"
        )
    if 0 < share < 1 and abs(1 / share - round(1 / share)) > 1e-3:
        raise ConfigError(
            f"placement.gpus_per_client must be 1/k, so that GPUs are filled, got {share}; use "
            f"{1 / math.ceil(1 / share):.4g} (1/{math.ceil(1 / share)})"
        )


@dataclass(frozen=True)
class Node:
    """What one machine offers; memory in bytes, what is free."""

    name: str
    cpus: float
    gpus: float
    memory_bytes: int


@dataclass(frozen=True)
class ActorPlan:
    """One client actor: indices of its clients, and the shares that it reserves."""

    clients: tuple[int, ...]
    cpus: float
    gpus: float


@dataclass(frozen=True)
class PlacementPlan:
    """All client actors, the driver actor's CPU share, and what to tell the user."""

    actors: tuple[ActorPlan, ...]
    driver_cpus: float
    note: str
    backend: str = "ray"

    @property
    def homes(self) -> list[int]:
        """Actor of each client."""
        home = {client: a for a, actor in enumerate(self.actors) for client in actor.clients}
        return [home[client] for client in range(len(home))]

    def with_homes(self, homes: Sequence[int]) -> PlacementPlan:
        """The same actors with the clients that are at home there."""
        members: list[list[int]] = [[] for _ in self.actors]
        for client, home in enumerate(homes):
            members[home].append(client)
        dealt = zip(self.actors, members, strict=True)
        return replace(self, actors=tuple(replace(a, clients=tuple(own)) for a, own in dealt))

    def describe(self) -> list[str]:
        """Lines for a person."""
        if self.backend == "local":
            return [f"{len(self.homes)} clients in this process, without Ray"]
        gpus = sum(a.gpus for a in self.actors)
        most = max(len(a.clients) for a in self.actors)
        lines = [
            f"{len(self.actors)} client actors for {len(self.homes)} clients (at most {most} "
            f"each), {self.actors[0].cpus:g} CPU each, {gpus:g} GPU in all; driver actor "
            f"{self.driver_cpus:g} CPU"
        ]
        lines.append(f"about {len(self.actors) * ACTOR_BYTES / 2**30:.1f} GiB for the actors")
        return lines + ([self.note] if self.note else [])


def plan_placement(
    config: PlacementConfig, nodes: Sequence[Node], client_ids: Sequence[str], work: Sequence[float]
) -> PlacementPlan:
    """Deal clients to actors and check that the machines can hold them.

    Args:
        nodes: the machines of the cluster, or this one.
        work: predicted work of each client, for balance.

    Raises:
        PlacementError: more CPU, GPU or actors than there are, with the numbers.
    """
    count = len(client_ids)
    if config.backend == "local":
        return PlacementPlan((ActorPlan(tuple(range(count)), 0, 0),), 0, "", "local")
    cpus = sum(n.cpus for n in nodes)
    if cpus <= DRIVER_CPUS:
        raise PlacementError(f"the cluster has {cpus:g} CPUs; at least {DRIVER_CPUS} are needed")
    per_actor, note = _clients_per_actor(config, nodes, count)
    num_actors = math.ceil(count / per_actor)
    shares = [config.gpu_share(client_id) for client_id in client_ids]
    if isinstance(config.gpus_per_client, dict) and per_actor > 1:
        homes = _homes_by_class(shares, work, per_actor)
    elif per_actor == 1:
        homes = list(range(count))
    else:
        homes = balanced_homes(work, num_actors)
    members: list[list[int]] = [[] for _ in range(max(homes) + 1)]
    for client, home in enumerate(homes):
        members[home].append(client)
    gpus = [shares[m[0]] for m in members]
    cpu_share = _cpu_share(config, gpus, nodes)
    actors = tuple(
        ActorPlan(tuple(m), cpu_share, gpu) for m, gpu in zip(members, gpus, strict=True)
    )
    plan = PlacementPlan(actors, DRIVER_CPUS, note)
    check_feasible(plan, nodes)
    return plan


def _clients_per_actor(
    config: PlacementConfig, nodes: Sequence[Node], count: int
) -> tuple[int, str]:
    if config.clients_per_actor != "auto":
        return min(config.clients_per_actor, count), ""
    cores = max(1, int(sum(n.cpus for n in nodes)))
    memory = MEMORY_SHARE * sum(n.memory_bytes for n in nodes)
    if count <= CLIENTS_PER_CORE * cores and count * ACTOR_BYTES <= memory:
        return 1, ""
    per_actor = math.ceil(count / cores)
    return per_actor, (
        f"{count} clients are too many for an actor each on {cores} cores and "
        f"{memory / 2**30:.0f} GiB: {cores} actors host about {per_actor} each "
        "(placement.clients_per_actor: 1 forces one each)"
    )


def _homes_by_class(shares: Sequence[float], work: Sequence[float], per_actor: int) -> list[int]:
    """Clients of one GPU share live together."""
    homes = [0] * len(shares)
    start = 0
    for share in sorted(set(shares)):
        members = [i for i, s in enumerate(shares) if s == share]
        num = math.ceil(len(members) / per_actor)
        for member, home in zip(
            members, balanced_homes([work[i] for i in members], num), strict=True
        ):
            homes[member] = start + home
        start += num
    return homes


def _cpu_share(config: PlacementConfig, gpus: Sequence[float], nodes: Sequence[Node]) -> float:
    """The share of each actor: as given, or the largest one, up to 1, with which all find room."""
    if config.cpus_per_actor != "auto":
        return config.cpus_per_actor

    def too_much(grains: int) -> bool:
        asked = [(grains / GRAIN, gpu) for gpu in gpus]
        return _without_room(DRIVER_CPUS, asked, nodes) is not None

    if too_much(1):
        # The GPUs do not fit, whatever the share: the message is to show the CPUs as they would be.
        gpus = [0.0] * len(gpus)
    # Not what there is over the number of actors: what is left over on each machine is lost.
    return max(1, bisect.bisect_left(range(GRAIN + 1), True, lo=1, key=too_much) - 1) / GRAIN


def check_feasible(plan: PlacementPlan, nodes: Sequence[Node]) -> None:
    """Fit the driver actor and then every client actor into the machines, first fit.

    Raises:
        PlacementError: naming the resource, what is asked and what there is.
    """
    asked = [(actor.cpus, actor.gpus) for actor in plan.actors]
    place = _without_room(plan.driver_cpus, asked, nodes)
    if place is not None:
        raise PlacementError(_infeasible(plan, nodes, place))


def _without_room(
    driver_cpus: float, asked: Sequence[tuple[float, float]], nodes: Sequence[Node]
) -> int | None:
    """The first of the (CPU, GPU) requests that finds no room, first fit; None if all do."""
    cpus = [n.cpus for n in nodes]
    cpus[0] -= driver_cpus
    # A share of a GPU lies on one GPU, more than one are whole ones.
    gpus = [[1.0] * int(n.gpus) for n in nodes]
    for place, (cpu, gpu) in enumerate(asked):
        whole = max(1, round(gpu))
        for node, free in enumerate(gpus):
            fitting = [i for i, left in enumerate(free) if left + SLACK >= min(gpu, 1.0)][:whole]
            if cpus[node] + SLACK >= cpu and (gpu == 0 or len(fitting) == whole):
                break
        else:
            return place
        cpus[node] -= cpu
        for i in fitting if gpu else []:
            free[i] -= min(gpu, 1.0)
    return None


def _infeasible(plan: PlacementPlan, nodes: Sequence[Node], place: int) -> str:
    cpus, gpus = sum(a.cpus for a in plan.actors), sum(a.gpus for a in plan.actors)
    have_cpus, have_gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    actor = plan.actors[place]
    asked = (
        f"{len(plan.actors)} client actors ask for {cpus:.4g} CPUs and {gpus:.4g} GPUs, and the "
        f"driver actor for {plan.driver_cpus:g} CPU; the cluster has {have_cpus:g} CPUs and "
        f"{have_gpus:g} GPUs on {len(nodes)} node(s), which leaves no place for actor {place} "
        f"({actor.cpus:g} CPU, {actor.gpus:g} GPU)"
    )
    if gpus > 0 and have_gpus == 0:
        return f"placement.gpus_per_client: {asked}; use --set placement.gpus_per_client=0"
    if _without_room(plan.driver_cpus, [(a.cpus, 0.0) for a in plan.actors], nodes) is None:
        return (
            f"placement.gpus_per_client: {asked}; use a smaller share, or more clients an actor "
            "(placement.clients_per_actor)"
        )
    return (
        f"placement: {asked}; lower placement.cpus_per_actor, or put more clients into an actor "
        "(placement.clients_per_actor)"
    )
