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

    Nothing is left in the folder, and beside it only where a file system such as NFS locks files
    but no folders: a hidden file. Another holder is waited for: ``PATIENCE_S`` unless told.

    Raises:
        RunError: another process holds it still.
    """
    folder.mkdir(parents=True, exist_ok=True)
    patience_s = PATIENCE_S if patience_s is None else patience_s
    with contextlib.ExitStack() as handles:
        refusal = _take(_opened(folder, os.O_RDONLY, handles), folder, patience_s)
        if refusal is not None:
            beside = folder.with_name(f".{folder.name}.lock")
            refusal = _take(_opened(beside, os.O_RDWR | os.O_CREAT, handles), folder, patience_s)
        if refusal is not None:
            logger.warning(
                "%s: its file system locks neither folders nor files (%s); two commands that write "
                "this run at once would not be noticed",
                folder,
                refusal.strerror,
            )
        yield


def _opened(path: Path, flags: int, handles: contextlib.ExitStack) -> int:
    handle = os.open(path, flags, 0o666)
    handles.callback(os.close, handle)
    return handle


def _take(handle: int, folder: Path, patience_s: float) -> OSError | None:
    """Lock what is open; what the file system says if it cannot.

    Raises:
        RunError: another process holds it still.
    """
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
            return error
        else:
            return None
