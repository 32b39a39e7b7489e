"""What Ray Tune does when Ray's memory monitor ends the actor of a trial."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError

logger = logging.getLogger(__name__)

FAILED = "_actor_task_failed"
"""The method of Tune's actor manager that tells errors apart."""


@contextlib.contextmanager
def memory_deaths_as_deaths() -> Iterator[None]:
    """Have Tune take an actor that was ended for its memory for one that died.

    Ray raises ``OutOfMemoryError`` then, which is no ``RayActorError``, and Tune, which knows
    nothing else of actors that are gone, ends all trials ("Caught unexpected exception"). It has no
    option for it, so the one method that tells errors apart is given the error that it knows. A Ray
    that has no such method is left as it is, and that is said.
    """
    manager = _actor_manager()
    real = getattr(manager, FAILED, None)
    if real is None:
        logger.warning(
            "this Ray's Tune is built otherwise: if Ray's memory monitor ends a trial, the sweep "
            "ends with it (resume it then)"
        )
        yield
        return

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        real(self, tracked_actor_task, exception)

    setattr(manager, FAILED, failed)
    try:
        yield
    finally:
        setattr(manager, FAILED, real)


def _actor_manager() -> Any:
    """Tune's own class, which Ray does not promise to keep; None where it is gone."""
    try:
        from ray.air.execution._internal import RayActorManager
    except ImportError:
        return None
    return RayActorManager
