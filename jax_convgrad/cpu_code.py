"""Which instruction sets the CPU module holds kernels for, and what to rebuild for others.

A module that was built on one machine may meet a newer processor, whose best instruction
set it was not compiled for. It runs there, more slowly (gpu_code.py: the same for GPUs).
"""

from __future__ import annotations

import os

from . import native

ISAS = "JAX_CONVGRAD_CPU_ISAS"  # read by the build
ISA = "JAX_CONVGRAD_CPU_ISA"  # read by the module


def missing_isa(wish: str | None, used: str, best: str) -> str | None:
    """What a rebuild would add to a module that uses less than the processor has, or None.

    Args:
        wish: the instruction set that the user asked for, if any.
        used: the one whose kernels run.
        best: the best that this processor has kernels for.

    Returns:
        What is missing, with the rebuild that brings it.
    """
    if wish or used == best:
        return None
    return f"the cpu module lacks this processor's kernels ({best}): rebuild with {ISAS}=all"


def local_missing_isa() -> str | None:
    """What a rebuild for this process's processor would add, or None."""
    if native.cpu is None:
        return None
    return missing_isa(os.environ.get(ISA), native.cpu.isa(), native.cpu.best_isa())
