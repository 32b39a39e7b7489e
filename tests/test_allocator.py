"""Memory that a step frees is there for the next one, without the system's help."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from selffl_ray.allocator import BY_HAND, keep_freed_memory

STEPS = """
import ctypes, resource, sys
import torch
from selffl_ray.allocator import keep_freed_memory

# glibc's first thresholds, by hand: by themselves they grow, when depends on where things lie.
assert ctypes.CDLL(None).mallopt(-3, 128 * 1024) and ctypes.CDLL(None).mallopt(-1, 128 * 1024)
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def step():
    blocks = [torch.zeros(1_250_000) for _ in range(6)]
    del blocks

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""

GLIBC = hasattr(ctypes.CDLL(None), "mallopt")


def faults_a_step(mode: str) -> float:
    """Pages of 4 KiB that a step has to ask the system for; it uses 7,324 of them."""
    command = [sys.executable, "-c", STEPS, mode]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not GLIBC, reason="the C library has no thresholds to set")
@pytest.mark.skipif(
    HUGE.exists() and "[always]" in HUGE.read_text(), reason="pages are of another size here"
)
def test_a_host_asks_for_its_pages_once():
    assert faults_a_step("kept") < 500
    assert faults_a_step("as it starts") > 5000


@pytest.mark.parametrize("name", BY_HAND)
def test_what_the_user_has_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "1000000")
    assert not keep_freed_memory()


@pytest.mark.skipif(not GLIBC, reason="the C library cannot be asked to")
def test_what_is_free_goes_back_when_it_is_given():
    script = """
import psutil, torch
from selffl_ray.allocator import give_back_freed_memory, keep_freed_memory
assert keep_freed_memory()
blocks = [torch.ones(1_250_000) for _ in range(6)]
del blocks
held = psutil.Process().memory_info().rss
give_back_freed_memory()
print(held - psutil.Process().memory_info().rss)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) > 25_000_000
