"""Which instruction sets the CPU module holds kernels for, and what to rebuild for others.

A module that was built on one machine may meet a newer processor, whose best instruction
set it was not compiled for. It runs there, more slowly (gpu_code.py: the same for GPUs).
"""

from __future__ import annotations

import os

from . import native


def local_missing_isa() -> str | None:
    """What a rebuild for this process's processor would add, or None."""
    if native.cpu is None or os.environ.get("JAX_CONVGRAD_CPU_ISA") == native.cpu.isa():
        return None  # as asked for
    best = native.cpu.best_isa()
    if best in native.cpu.isas():
        return None
    rebuild = "rebuild with JAX_CONVGRAD_CPU_ISAS=all and a compiler that knows it"
    return f"the cpu module lacks {best} kernels, which this processor runs: {rebuild}"
