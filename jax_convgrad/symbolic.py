"""Symbolic sizes (shape polymorphism): what a custom call can express of them.

A program for `jax.export` may be lowered before the batch and the spatial sizes are known.
Everything else must be: the kernel and its workspace are chosen when the program runs.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from jax.export import is_symbolic_dim

from . import custom_call, native
from .geometry import ConvGeometry, certainly, dilated_size, is_static
from .maps import FORWARD, INPUT_GRAD, Map


def unsupported(geometry: ConvGeometry) -> str | None:
    """Why a custom call cannot express these symbolic sizes, or None if it can."""
    channels = geometry.lhs_shape[geometry.dimension_numbers.lhs_spec[1]]
    if not is_static((*geometry.rhs_shape, channels, geometry.groups)):
        return "of symbolic sizes, the kernels take those of the batch and of spatial axes alone"
    dims = custom_call.padding_operand(geometry)
    if dims is not None and not all(certainly(operator.ge, dim, 0) for dim in dims):
        return f"padding {geometry.padding} is symbolic and may be negative"
    return None


def workspace_bound(
    geometry: ConvGeometry, dtype: Any, platform: str, precision: Any, map_: Map = INPUT_GRAD
) -> tuple[int, int]:
    """Workspace that is enough whatever the symbolic sizes, by the native planner.

    The arguments are those of `planner.plan`. In bytes, and bytes for each position of each
    image of the map's first operand.
    """
    module = native.module_for(platform)
    assert module is not None, platform
    sample = _sample(geometry)
    return module.workspace_bound(
        np.dtype(dtype).name,
        sample.lhs_shape,
        sample.rhs_shape,
        sample.out_shape,
        custom_call.attributes(sample, platform, precision),
        map_name=map_.name,
    )


def workspace_shape(
    geometry: ConvGeometry, dtype: Any, platform: str, precision: Any, map_: Map = INPUT_GRAD
) -> tuple[int, ...]:
    """Shape of the bytes that `workspace_bound` asks for, with the same arguments.

    One size, or two where the first is symbolic: their product would soon exceed the 32
    bits that JAX computes sizes in.
    """
    fixed, per_position = workspace_bound(geometry, dtype, platform, precision, map_)
    if per_position == 0:
        return (fixed,)
    lhs_spec, _, out_spec = geometry.dimension_numbers
    if map_ is FORWARD:
        positions = geometry.lhs_shape[lhs_spec[0]] * math.prod(geometry.in_sizes)
    else:
        positions = geometry.out_shape[out_spec[0]] * math.prod(geometry.out_sizes)
    return (-(-fixed // per_position) + positions, per_position)


def _sample(geometry: ConvGeometry) -> ConvGeometry:
    """The geometry with some number in the place of each symbolic one, none of them 1."""
    lhs_spec = geometry.dimension_numbers.lhs_spec
    shape = list(geometry.lhs_shape)
    if is_symbolic_dim(shape[lhs_spec[0]]):
        shape[lhs_spec[0]] = 2 * geometry.batch_group_count
    padding = [
        tuple(0 if is_symbolic_dim(pad) else pad for pad in pair) for pair in geometry.padding
    ]
    for axis, dim in enumerate(lhs_spec[2:]):
        if is_symbolic_dim(shape[dim]):
            window = dilated_size(geometry.window_sizes[axis], geometry.rhs_dilation[axis])
            outside = sum(map(abs, padding[axis]))
            shape[dim] = window + outside + geometry.window_strides[axis] + 1
    return geometry.replace(lhs_shape=tuple(shape), padding=tuple(padding))
