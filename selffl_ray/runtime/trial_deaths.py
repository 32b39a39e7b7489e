"""What Ray Tune does when Ray's memory monitor ends the actor of a trial."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError


@contextlib.contextmanager
def memory_deaths_as_deaths() -> Iterator[None]:
    """Have Tune take an actor that was ended for its memory for one that died.

    Ray raises ``OutOfMemoryError`` then, which is no ``RayActorError``, and Tune, which knows
    nothing else of actors that are gone, ends all trials ("Caught unexpected exception"). It has no
    option for it, so the one method that tells errors apart is given the error that it knows.
    """
    real = RayActorManager._actor_task_failed

    def failed(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        real(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = real  # type: ignore[method-assign]
