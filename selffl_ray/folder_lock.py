"""One process at a time writes a run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from selffl_ray.errors import RunError

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""A driver actor whose command was killed may write for some seconds more."""
LOOK_S = 0.1


@contextlib.contextmanager
def only_writer(folder: Path, patience_s: float | None = None) -> Iterator[None]:
    """Hold a folder, which is made if need be; it is free again at the end, or if we are killed.

    Nothing is left in the folder. Another holder is waited for: ``PATIENCE_S`` unless told.

    Raises:
        RunError: another process holds it still.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _take(handle, folder, PATIENCE_S if patience_s is None else patience_s)
        yield
    finally:
        os.close(handle)


def _take(handle: int, folder: Path, patience_s: float) -> None:
    until, waited = time.monotonic() + patience_s, False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise RunError(
                    f"{folder}: another process is writing this run; wait for its end or end it, "
                    f"then give --resume {folder}"
                ) from None
            if not waited:
                logger.warning("%s: another process is writing this run; waiting for it", folder)
            waited = True
            time.sleep(LOOK_S)
        except OSError as error:
            logger.warning(
                "%s: its file system locks no folders (%s); two commands that write this run at "
                "once would not be noticed",
                folder,
                error.strerror,
            )
            return
        else:
            return
