"""What becomes of freed memory: a step's stays with the process, that of rare work goes back.

A step takes and frees some megabytes. glibc gives them back to the system whenever more than a
threshold is free at the end of its heap, and the next step pays for every page anew. glibc raises
its thresholds with use, up to the values below; a host starts with them.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of the parameters in glibc's malloc.h."""
MMAP_BYTES = 32 * 2**20
"""Larger pieces are taken from the system and given back one by one."""
TRIM_BYTES = 2 * MMAP_BYTES
"""So much may be free at the end of the heap."""
BY_HAND = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Variables by which glibc takes the same settings."""


def keep_freed_memory() -> bool:
    """Set the thresholds of this process; False where it has none or the user has set them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in BY_HAND):
        return False
    # One that is set by hand stops both from growing by themselves, so both are set.
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES))


def give_back_freed_memory() -> None:
    """Return to the system what is free in this process, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
