"""Arithmetic on a GPU as it is on a processor: no shortened mantissas, the same bits every time.

Set in a process before it first computes on the device. Bits still differ between a GPU and a
processor, and between kinds of GPUs.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def be_exact() -> None:
    """Switch TF32 off and deterministic kernels on, for this process.

    Where an operation has no deterministic kernel, torch warns and goes on.
    """
    # cuBLAS reads it when it starts; without it its sums may depend on what else is under way.
    os.environ.setdefault(CUBLAS, ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    # On by default, other than that of matrix products: three decimal digits in convolutions.
    torch.backends.cudnn.allow_tf32 = False
    # Trying out kernels may take another one each time.
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def tf32_is_on() -> bool:
    """Whether products or convolutions on a GPU may shorten their factors to ten bits."""
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


def processor() -> str:
    """Model of the processor and the instructions that torch uses: what bits depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"
