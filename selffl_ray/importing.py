"""Imports without the cyclic garbage collector.

torch makes nearly 200,000 objects that stay. Python's collector walks them again and again while
they are made: a tenth of the processor time of importing torch, in every process.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Whatever is imported inside is not searched for garbage meanwhile.

    A collector that was off stays off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def leave_out_of_collections() -> None:
    """Have the garbage collector pass over all that is there now, in a process of our own.

    A round of many clients makes enough objects for a full collection every few rounds, each of
    which would look through some hundred thousand objects of torch and Ray that stay anyway. So
    would the collections with which the interpreter ends.
    """
    gc.freeze()
