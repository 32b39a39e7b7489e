"""Hosts in Ray actors: created in waves, called once each a request, waited for with a limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from selffl_ray.errors import PlacementError, SelfFLError
from selffl_ray.pool import ClientPool, HostLost
from selffl_ray.runtime.actors import ClientActor
from selffl_ray.runtime.placement import ActorPlan, PlacementPlan

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""Longest wait for an actor to start; importing torch on a busy machine takes a while."""


class RayTransport:
    """Client actors by placement plan.

    Args:
        plan: actors and their shares.
        device: ``placement.device``.
        timeout_s: longest wait for any answer; whoever is silent longer is ended and lost.
        label: prefix of the actors' names on the dashboard.
        plugins: modules of the user's, and the folder that they may lie in.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        device: str,
        timeout_s: float,
        label: str,
        plugins: tuple[Sequence[str], str],
    ) -> None:
        self._plan = plan
        self._wanted = device
        self._timeout_s = timeout_s
        self._label = label
        self._plugins = plugins
        self._actors: list[ActorHandle[Any] | None] = [None] * len(plan.actors)
        self._births = 0
        self.where: list[dict[str, Any]] = [{} for _ in plan.actors]
        # Imports of torch compete for the cores: more at once only makes each of them late.
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        wave = max(2, 2 * int(resources.get("CPU", 1)))
        for start in range(0, len(plan.actors), wave):
            self._start(range(start, min(start + wave, len(plan.actors))))

    @property
    def num_hosts(self) -> int:
        """Number of actors."""
        return len(self._actors)

    def _start(self, hosts: range | list[int]) -> None:
        for host in hosts:
            self._actors[host] = self._create(host, self._plan.actors[host])
        answers = self._wait({h: self._actor(h).describe.remote() for h in hosts}, START_TIMEOUT_S)
        for host, answer in answers.items():
            if isinstance(answer, HostLost):
                raise PlacementError(
                    f"client actor {host} did not start within {START_TIMEOUT_S:.0f} s: "
                    f"{answer.cause}; is the cluster full? See `ray status`"
                )
            self.where[host] = answer

    def _create(self, host: int, actor: ActorPlan) -> ActorHandle[Any]:
        self._births += 1
        options = {
            "num_cpus": actor.cpus,
            "num_gpus": actor.gpus,
            "name": f"{self._label}-clients-{host:04d}-{self._births}",
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        remote: Any = ray.remote(ClientActor)
        handle: ActorHandle[Any] = remote.options(**options).remote(
            actor.gpus, self._wanted, self._plugins
        )
        return handle

    def _actor(self, host: int) -> ActorHandle[Any]:
        actor = self._actors[host]
        assert actor is not None
        return actor

    def call(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], shared: Any = None
    ) -> dict[int, Any]:
        """Ask all hosts at once; answers in host order."""
        has = shared is not None
        reference = ray.put(shared) if has else None
        pending = {
            host: self._actor(host).call.remote(method, has, reference, own)
            for host, own in arguments.items()
        }
        return self._wait(pending, self._timeout_s)

    def _wait(self, pending: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        for host, reference in pending.items():
            try:
                left = max(0.0, deadline - time.monotonic())
                answers[host] = ray.get(reference, timeout=left)
            except GetTimeoutError:
                ray.kill(self._actor(host), no_restart=True)
                answers[host] = HostLost(host, f"no answer within {timeout_s:.0f} s")
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, SelfFLError):
                    raise cause from None
                raise
            except RayActorError as error:
                text = " ".join(str(error).split())
                answers[host] = HostLost(host, text[:300])
        return answers

    def restart(self, host: int) -> None:
        """A fresh actor in place of a lost one."""
        old = self._actors[host]
        if old is not None:
            ray.kill(old, no_restart=True)
        self._start([host])

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            if actor is not None:
                ray.kill(actor, no_restart=True)


def ray_pool(
    plan: PlacementPlan,
    device: str,
    timeout_s: float,
    label: str,
    plugins: tuple[Sequence[str], str],
) -> ClientPool:
    """A pool of client actors, all of them started."""
    transport = RayTransport(plan, device, timeout_s, label, plugins)
    return ClientPool(transport, plan.homes)
