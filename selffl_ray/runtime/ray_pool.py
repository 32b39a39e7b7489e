"""Hosts in Ray actors: created in waves, called once each a request, waited for with a limit."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from selffl_ray.errors import PlacementError, RunError, SelfFLError
from selffl_ray.local_ray import IN_MESSAGE
from selffl_ray.pool import HostLost, StateLostError
from selffl_ray.runtime.actors import ClientActor
from selffl_ray.runtime.cluster import await_nodes
from selffl_ray.runtime.placement import ActorPlan, PlacementPlan

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""Longest wait for an actor to start; importing torch on a busy machine takes a while."""

IN_MESSAGE_BY_DEFAULT = 100 * 1024
"""Bytes; of a Ray that was not started by us."""

SETUP = frozenset({"load", "begin", "admit", "release", "take"})
"""Methods that get an actor ready, or move clients: no measure for them is how long rounds take."""


class ActorShell(NamedTuple):
    """What client actors have in common.

    device: ``placement.device``; label: prefix of the actors' names on the dashboard; plugins:
    modules of the user's, and the folder that they may lie in.
    """

    device: str
    label: str
    plugins: tuple[Sequence[str], str]

    def create(self, actor: ActorPlan, name: str) -> ActorHandle[Any]:
        """An actor that is asked for; it may take a while to start."""
        remote: Any = ray.remote(ClientActor)
        handle: ActorHandle[Any] = remote.options(
            num_cpus=actor.cpus,
            num_gpus=actor.gpus,
            name=f"{self.label}-clients-{name}",
            max_restarts=0,
            max_task_retries=0,
        ).remote(actor.gpus, self.device, self.plugins)
        return handle


@contextmanager
def first_actors(plan: PlacementPlan, shell: ActorShell) -> Iterator[list[ActorHandle[Any]]]:
    """The first wave of a plan's client actors, in host order: asked for, but not waited for.

    They import torch beside the driver actor, which is to use them. They end with the block. None
    on several machines: there they could take the room on the one that the driver actor is bound
    to, before it is placed.
    """
    actors: list[ActorHandle[Any]] = []
    try:
        if sum(node["Alive"] for node in ray.nodes()) == 1:  # type: ignore[no-untyped-call]
            for host, actor in enumerate(plan.actors[: _wave()]):
                actors.append(shell.create(actor, f"{host:04d}-0"))
        yield actors
    finally:
        for started in actors:
            with suppress(RayError):
                ray.kill(started, no_restart=True)


def _wave() -> int:
    """Imports of torch compete for the cores: more at once only makes each of them late."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(2, 2 * int(resources.get("CPU", 1)))


def _is_small(shared: Any, copies: int) -> bool:
    """Whether so many copies in the calls themselves take less time than Ray's object store."""
    return _num_bytes(shared) * copies <= int(os.environ.get(IN_MESSAGE, IN_MESSAGE_BY_DEFAULT))


def _num_bytes(tree: Any) -> float:
    """Of nested tuples of arrays; of anything else nobody knows."""
    if isinstance(tree, tuple):
        return sum(map(_num_bytes, tree))
    if isinstance(tree, np.ndarray):
        return tree.nbytes
    return 0 if tree is None else math.inf


class RayTransport:
    """Client actors by placement plan.

    Args:
        plan: actors and their shares.
        shell: the rest of what an actor is made from.
        timeout_s: longest wait for an answer of an actor that is ready; whoever is silent longer is
            ended and lost.
        started: the first ones of the plan, where somebody has asked for them already.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        shell: ActorShell,
        timeout_s: float,
        started: Sequence[ActorHandle[Any]] = (),
    ) -> None:
        self._plan = plan
        self._shell = shell
        self._timeout_s = timeout_s
        later = len(plan.actors) - len(started)
        self._actors: list[ActorHandle[Any] | None] = [*started, *[None] * later]
        self._births = 0
        self.where: list[dict[str, Any]] = [{} for _ in plan.actors]
        wave = _wave()
        for start in range(0, len(plan.actors), wave):
            lost = self._start(range(start, min(start + wave, len(plan.actors))))
            if lost:
                raise PlacementError(
                    f"client actor {lost[0].host} did not start: {lost[0].cause}; is the cluster "
                    "full? See `ray status`"
                )

    @property
    def num_hosts(self) -> int:
        """Number of actors."""
        return len(self._actors)

    def _start(self, hosts: range | list[int]) -> list[HostLost]:
        """Actors for these hosts where there are none; those that did not come up."""
        for host in hosts:
            if self._actors[host] is None:
                self._births += 1
                name = f"{host:04d}-{self._births}"
                self._actors[host] = self._shell.create(self._plan.actors[host], name)
        answers = self._wait({h: self._actor(h).describe.remote() for h in hosts}, START_TIMEOUT_S)
        lost = [answer for answer in answers.values() if isinstance(answer, HostLost)]
        for host in set(answers) - {item.host for item in lost}:
            self.where[host] = answers[host]
        return lost

    def _actor(self, host: int) -> ActorHandle[Any]:
        actor = self._actors[host]
        assert actor is not None
        return actor

    def call(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], shared: Any = None
    ) -> dict[int, Any]:
        """Ask all hosts at once; answers in host order."""
        has = shared is not None
        beside = has and _is_small(shared, len(arguments))
        sent = ray.put(shared) if has and not beside else shared
        pending = {
            host: self._actor(host).call.remote(method, has, sent, own)
            for host, own in arguments.items()
        }
        return self._wait(pending, self._patience(method))

    def _patience(self, method: str) -> float:
        """A fresh actor imports and reads much before it is ready for its first round."""
        return max(self._timeout_s, START_TIMEOUT_S) if method in SETUP else self._timeout_s

    def _wait(self, pending: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        references = list(pending.values())
        # One limit for all: who is late must not take along the answer of one that is not.
        arrived = set(ray.wait(references, num_returns=len(references), timeout=timeout_s)[0])
        answers: dict[int, Any] = {}
        for host, reference in pending.items():
            if reference not in arrived:
                ray.kill(self._actor(host), no_restart=True)
                answers[host] = HostLost(host, f"no answer within {timeout_s:g} s", "silent")
                continue
            try:
                answers[host] = ray.get(reference, timeout=timeout_s)
            except RayTaskError as error:
                if isinstance(error.cause, SelfFLError):
                    raise error.cause from None
                raise RunError(f"host {host} ({self.place(host)}): {error.cause!r}") from error
            except RayError as error:
                # It died, its node died with the answer, or the answer was lost on the way.
                answers[host] = HostLost(host, " ".join(str(error).split())[:300])
        return answers

    def restart(self, hosts: Sequence[int]) -> None:
        """Fresh actors in place of lost ones.

        Raises:
            StateLostError: some did not come up either.
        """
        for host in hosts:
            old = self._actors[host]
            if old is not None:
                ray.kill(old, no_restart=True)
            self._actors[host] = None
        await_nodes({self.where[host]["node"] for host in hosts if self.where[host]})
        lost = self._start(list(hosts))
        if lost:
            raise StateLostError(lost)

    def place(self, host: int) -> str:
        """Node and process of an actor, as they were told when it started."""
        at = self.where[host]
        return f"node {at['node'][:8]}, process {at['pid']}" if at else "an actor that is starting"

    def kind(self, host: int) -> str:
        """The actor's processor; of one with a GPU itself: bits depend on the whole stack there."""
        at = self.where[host]
        return at["processor"] if at["device"] == "cpu" else f"{at['device']} of host {host}"

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            if actor is not None:
                ray.kill(actor, no_restart=True)
