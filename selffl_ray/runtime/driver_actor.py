"""Starting a driver actor on the head node and following what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selffl_ray.errors import DriverLostError, RunError, SelfFLError
from selffl_ray.runtime.actors import DriverActor
from selffl_ray.runtime.placement import PlacementPlan

LOST = (RayActorError, OutOfMemoryError)
"""What Ray raises when an actor has died; the second one when its memory monitor ended it."""

POLL_S = 0.3
ANSWER_S = 300.0
"""Longest wait for the driver actor to answer a question, its start included: it has threads of
its own for them, but has to import torch first."""


def follow(
    job: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    plan: PlacementPlan,
    label: str,
    watch: Callable[[Any], None],
    interrupted: Callable[[], bool],
) -> Any:
    """Run ``job(control, *arguments)`` in a driver actor; what it returns.

    The actor is pinned to the node that this process is on: MLflow stores and run folders with
    local paths are there.

    Raises:
        SelfFLError: what the job raised. DriverLostError: the actor died. RunError: it does not
            answer, or cannot be started.
    """
    actor = _start(plan, label)
    running = actor.run.remote(job, *arguments)
    stopped = False
    try:
        while True:
            done, _ = ray.wait([running], timeout=POLL_S)
            if interrupted() and not stopped:
                stopped = True
                actor.stop.remote()
            for event in ray.get(actor.events.remote(), timeout=ANSWER_S):
                watch(event)
            if done:
                return ray.get(running)
    except RayTaskError as error:
        if isinstance(error.cause, SelfFLError):
            raise error.cause from error
        if isinstance(error.cause, OSError):
            raise RunError(f"{type(error.cause).__name__}: {error.cause}") from error
        raise
    except GetTimeoutError as error:
        raise RunError(
            f"the driver actor did not answer within {ANSWER_S:g} s; is there room for its "
            f"{plan.driver_cpus:g} CPU on this node? See `ray status`"
        ) from error
    except RayError as error:
        kind = DriverLostError if isinstance(error, LOST) else RunError
        raise kind(cause_of_death(error)) from error
    finally:
        ray.kill(actor, no_restart=True)


def cause_of_death(error: object) -> str:
    """One line from what Ray says of a driver actor that died."""
    return f"the driver actor died: {' '.join(str(error).split())[:300]}"


def _start(plan: PlacementPlan, label: str) -> Any:
    """The driver actor, on this process's node."""
    remote: Any = ray.remote(DriverActor)
    return remote.options(
        name=f"{label}-driver",
        num_cpus=plan.driver_cpus,
        max_concurrency=3,
        scheduling_strategy=NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        ),
    ).remote()
