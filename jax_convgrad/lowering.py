"""What the primitive becomes in a program.

The custom call where dispatch says so, and lax elsewhere; around either, where XLA splits
the program over devices, the program of one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from . import compat, custom_call, dispatch, lax_maps, native, partition, symbolic
from .dispatch import Implementation
from .geometry import ConvGeometry


def choice_in(
    ctx: Any,
    geometry: ConvGeometry,
    dtype: Any,
    platform: str,
    implementation: Implementation,
    precision: Any,
) -> dispatch.Choice:
    """What the primitive becomes in the program that a lowering context belongs to."""
    partitioned = compat.partitioned_automatically(ctx)
    obstacle = compat.no_custom_partitioning(ctx) if partitioned else None
    return dispatch.choose(geometry, dtype, platform, implementation, precision, obstacle=obstacle)


def lower(
    ctx: Any,
    dy: Any,
    rhs: Any,
    *,
    bind: Callable[..., jax.Array],
    platform: str,
    geometry: ConvGeometry,
    precision: Any,
    implementation: Implementation,
    out_sharding: Any,
) -> Any:
    """The lowering rule of the primitive on one platform.

    Args:
        ctx: JAX's lowering context.
        dy: lowered operand.
        rhs: lowered operand.
        bind: binds the primitive for the shards of one device.
        platform: "cpu", "cuda" or another.
        geometry: the primitive's parameter, as those that follow.
        precision: see there.
        implementation: see there.
        out_sharding: see there.

    Returns:
        The lowered dX, in a list.
    """
    del out_sharding  # which is that of the result's type
    (out,) = ctx.avals_out
    if compat.has_explicit_sharding(out):
        # The code is XLA's to partition; of the types only the result's remains, as a constraint.
        auto = ctx.replace(
            avals_in=[jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in],
            avals_out=[jax.core.ShapedArray(out.shape, out.dtype)],
        )
        (dx,) = lower(
            auto,
            dy,
            rhs,
            bind=bind,
            platform=platform,
            geometry=geometry,
            precision=precision,
            implementation=implementation,
            out_sharding=None,
        )
        return [compat.constrain(ctx, dx, out)]
    choice = choice_in(ctx, geometry, out.dtype, platform, implementation, precision)
    if choice.implementation == "xla" or 0 in geometry.lhs_shape:
        rule = mlir.lower_fun(
            functools.partial(lax_maps.input_grad, geometry=geometry, precision=precision),
            multiple_results=False,
        )
        # Of the convolutions that `install` lowers to the kernel this must not be one.
        with dispatch.installed(False):
            return rule(compat.with_lowering_cache_of_its_own(ctx), dy, rhs)
    if compat.partitioned_automatically(ctx):
        shard = functools.partial(bind, precision=precision, implementation=implementation)
        split = functools.partial(partition.partitioned, geometry=geometry, compute=shard)
        result = mlir.lower_fun(split, multiple_results=False)(ctx, dy, rhs)
        # The call itself names a Python object, which the persistent compilation cache leaves
        # out of its keys on request: without this, programs that differ in their padding alone
        # would share a key. An object of another process may have the same name as well.
        text = f"{geometry} precision={precision} implementation={implementation}"
        compat.annotate(result[0], "convgrad_input_grad", text)
        return result
    if choice.plan is None:
        shape = symbolic.workspace_shape(geometry, out.dtype, platform, precision)
    else:
        shape = (choice.workspace_bytes,)
    workspace = jax.core.ShapedArray(shape, np.dtype(np.uint8))
    more, more_avals = _padding_operand(ctx, geometry)
    lhs, filter_, cotangent = (layout[::-1] for layout in custom_call.layouts(geometry, platform))
    call = jax.ffi.ffi_lowering(
        native.TARGET,
        operand_layouts=[cotangent, filter_, *map(_row_major, more_avals)],
        result_layouts=[lhs, _row_major(workspace)],
    )
    dx, _ = call(
        ctx.replace(avals_in=[*ctx.avals_in, *more_avals], avals_out=[out, workspace]),
        dy,
        rhs,
        *more,
        **custom_call.attributes(geometry, platform, precision),
    )
    return [dx]


def _row_major(aval: Any) -> tuple[int, ...]:
    """The layout from minor to major, as XLA writes it."""
    return tuple(reversed(range(aval.ndim)))


def _padding_operand(ctx: Any, geometry: ConvGeometry) -> tuple[Sequence[Any], list[Any]]:
    """The empty array that carries symbolic padding, lowered, and its type; nothing if static."""
    shape = custom_call.padding_operand(geometry)
    if shape is None:
        return (), []
    aval = jax.core.ShapedArray(shape, np.dtype(np.uint8))
    rule = mlir.lower_fun(lambda: jnp.zeros(shape, aval.dtype), multiple_results=False)
    return rule(ctx.replace(avals_in=[], avals_out=[aval])), [aval]
