"""The lowering of max pooling's gradient on a CPU: where `install` says so, the kernel.

What JAX differentiates `lax.reduce_window` with a maximum to is one primitive,
select-and-scatter, which XLA computes on one thread. The kernel gives the same bits. As for
the convolution (lax_lowering.py) only the code changes: the primitive, and with it
derivatives, batching and types, is lax's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.interpreters import mlir

from . import compat, dispatch, native
from .geometry import is_static

# The kernel's vectors hold the windows of a row with their channels. On many planes of 8x8
# and 7x7 with 4 windows a row or one, lax took from a third to the whole of its time; with 7
# windows lax took as long or up to five times as long.
_LEAST_LANES = 7


@functools.cache
def register() -> None:
    """Puts a lowering that asks `dispatch.installed` in front of lax's own."""
    primitive = lax.select_and_scatter_add_p
    rule = functools.partial(_lower, compat.lax_lowering(primitive, "cpu"))
    mlir.register_lowering(primitive, rule, platform="cpu")


def _lower(lax_rule: Callable[..., Any], ctx: Any, dy: Any, x: Any, **params: Any) -> Any:
    if not _covered(ctx, **params):
        return lax_rule(ctx, dy, x, **params)
    call = jax.ffi.ffi_lowering(native.MAX_POOL_GRAD_TARGET)
    return call(ctx, dy, x, **attributes(**params))


def attributes(
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    select_prim: Any = lax.ge_p,
) -> dict[str, np.ndarray]:
    """The custom call's attributes, from the parameters of lax's primitive.

    Args:
        window_dimensions: the window's size in each dimension.
        window_strides: the distance between windows.
        padding: low and high of each dimension.
        select_prim: what chooses a window's winner, always `lax.ge_p`.

    Returns:
        The attributes by name, each a vector.
    """
    assert select_prim is lax.ge_p

    def ints(values: Any) -> np.ndarray:
        return np.asarray(values, np.int64).reshape(-1)

    return {
        "window_dimensions": ints(window_dimensions),
        "window_strides": ints(window_strides),
        "padding": ints(padding),
    }


def _covered(ctx: Any, *, select_prim: Any, **params: Any) -> bool:
    """Whether the kernel takes this one; lax's own rule has the rest."""
    if native.cpu is None or not dispatch.installed.value or dispatch.switch() == "off":
        return False
    if select_prim is not lax.ge_p:
        return False
    dy, x = ctx.avals_in
    if not is_static((*dy.shape, *x.shape)) or not math.prod((*dy.shape, *x.shape)):
        return False
    # Of a single window XLA knows that adding to zero is no addition: -0 stays.
    if math.prod(dy.shape) == 1:
        return False
    if dy.dtype != x.dtype or dispatch.unsupported_dtype(x.dtype) is not None:
        return False
    if compat.has_explicit_sharding(dy, x):
        return False
    # See lax_lowering.py. XLA's partitioner would gather the operands of a custom call.
    if compat.is_exported(ctx) or compat.partitioned_automatically(ctx):
        return False
    if dispatch.switch() != "on" and _lanes(dy.shape, **params) < _LEAST_LANES:
        return False
    vectors = attributes(**params).values()
    obstacle = native.cpu.max_pool_grad_obstacle
    return not obstacle(x.shape, dy.shape, *map(list, vectors), x.dtype.itemsize)


def _lanes(
    dy_shape: Sequence[int],
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> int:
    """How many elements of dY lie side by side, from the last axis with windows on."""
    moves = zip(window_dimensions, window_strides, padding, strict=True)
    axes = [i for i, (w, s, pads) in enumerate(moves) if w > 1 or s > 1 or any(pads)]
    return math.prod(dy_shape[max(axes, default=0) :])
