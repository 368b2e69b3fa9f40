"""The native planner's word: which kernel takes a problem, and what it wants for it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from typing import Any

import numpy as np

from . import arguments, custom_call, native
from .geometry import ConvGeometry
from .maps import INPUT_GRAD, Map

EXCLUDE = "JAX_CONVGRAD_CUDA_EXCLUDE"
_MAX_ELEMENTS = 2**40


def out_of_range(g: ConvGeometry) -> str | None:
    """Why the native code does not count as far as a geometry of static sizes, or None."""
    steps = itertools.chain(g.window_strides, g.lhs_dilation, g.rhs_dilation, *g.padding)
    largest = max(g.groups, *g.in_sizes, *g.window_sizes, *map(abs, steps))
    if largest > (most := arguments.MAX_PARAMETER):
        return f"a spatial axis, step or group count of {largest}, the kernels take {most}"
    shapes = (g.lhs_shape, g.rhs_shape, g.out_shape)
    elements = max(math.prod(max(size, 1) for size in shape) for shape in shapes)
    reason = f"an array of {elements} elements, the kernels take {_MAX_ELEMENTS}"
    return reason if elements > _MAX_ELEMENTS else None


@functools.cache
def excluded() -> tuple[str, ...]:
    """The CUDA kernels that the environment variable JAX_CONVGRAD_CUDA_EXCLUDE leaves out.

    The planner reads the variable too, once: it plans none of them, not even by name. Here
    its value is checked.

    Raises:
        ValueError: there is no such kernel, or it is the one that takes what no other does.
    """
    assert native.cuda is not None
    names = tuple(os.environ.get(EXCLUDE, "").replace(",", " ").split())
    known = [name for name in native.cuda.kernel_names() if name != "direct"]
    for name in names:
        if name not in known:
            raise ValueError(f"{EXCLUDE} must name some of {', '.join(known)}, got {name!r}.")
    return names


@dataclasses.dataclass(frozen=True)
class NativePlan:
    """How a kernel will do a problem, in the native planner's words.

    Attributes:
        kernel: the kernel's name.
        workspace_bytes: scratch memory; the call brings what exceeds the module's scratch_bytes.
        exchanged: whether dy is taken for the filter and the filter for dy, as the CPU
            planner does where the window is many times as large as dy.
        tile: rows, columns and slice of the matrix product that a CUDA block computes;
            zeros for kernels that are no such product.
        stages: slices of the operands that a block has in flight.
        split_k: parts of the sum, if more than one kernel adds it up.
        blocks: CUDA blocks of the grid.
        threads: threads of a block.
        resident: blocks that a multiprocessor holds at once.
        shared_bytes: shared memory of a block.
        model_us: the planner's estimate on its reference GPU, 0 on a CPU.
    """

    kernel: str
    workspace_bytes: int
    exchanged: bool
    tile: tuple[int, int, int]
    stages: int
    split_k: int
    blocks: int
    threads: int
    resident: int
    shared_bytes: int
    model_us: float


def plan(
    geometry: ConvGeometry,
    dtype: Any,
    platform: str,
    precision: Any = None,
    kernel: str = custom_call.AUTO_KERNEL,
    map_: Map = INPUT_GRAD,
) -> NativePlan:
    """The native planner's word.

    Args:
        geometry: the convolution.
        dtype: a dtype that the kernels take.
        platform: "cpu" or "cuda", whose module was built.
        precision: canonical lax precision.
        kernel: a kernel by name, or "auto".
        map_: what is computed.

    Returns:
        The plan.

    Raises:
        ValueError: there is no such kernel, or it does not take this geometry.
    """
    module = native.module_for(platform)
    assert module is not None, platform
    if platform == "cuda":
        excluded()
    attributes = custom_call.attributes(geometry, platform, precision, kernel)
    shapes = (geometry.lhs_shape, geometry.rhs_shape, geometry.out_shape)
    return NativePlan(**module.plan(np.dtype(dtype).name, *shapes, attributes, map_name=map_.name))


@dataclasses.dataclass(frozen=True)
class ReferenceGpu:
    """The GPU that CUDA plans are made for, which need not be the one that is there.

    Attributes:
        name: the product's.
        multiprocessors: how many it has.
        flops_per_s: most arithmetic in a dtype and precision, on whatever units are fastest.
        bytes_per_s: of a large copy, read and written.
    """

    name: str
    multiprocessors: int
    flops_per_s: float
    bytes_per_s: float


def reference_gpu(dtype: Any, precision: Any = None) -> ReferenceGpu | None:
    """What the CUDA planner's models count with, None if that module was not built."""
    if native.cuda is None:
        return None
    allow_tf32 = custom_call.allows_tf32(precision)
    return ReferenceGpu(**native.cuda.reference_gpu(np.dtype(dtype).name, allow_tf32))
