"""Freed memory stays with the process, as far as glibc allows by itself.

A step takes and frees some megabytes. glibc gives them back to the system whenever more than a
threshold is free at the end of its heap, and the next step pays for every page anew. The thresholds
grow with use, to at most these values; a host starts there.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of the parameters in glibc's malloc.h."""
MMAP_BYTES = 32 * 2**20
"""Larger pieces are taken from the system and given back one by one."""
TRIM_BYTES = 2 * MMAP_BYTES
"""So much may be free at the end of the heap."""


def keep_freed_memory() -> bool:
    """Set the thresholds of this process; False where its C library has none."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One that is set by hand stops both from growing by themselves, so both are set.
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES))
