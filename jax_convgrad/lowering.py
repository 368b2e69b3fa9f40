"""What the primitive becomes in a program.

The custom call where dispatch says so, and lax elsewhere; around either, where XLA splits
the program over devices, the program of one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.interpreters import mlir

from . import compat, custom_call, dispatch, lax_maps, native, partition, symbolic
from .dispatch import Implementation
from .geometry import ConvGeometry
from .maps import Map


def register(primitive: jex_core.Primitive, rule: Callable[..., Any]) -> None:
    """Gives a primitive its lowering, rule(ctx, *operands, platform=..., **params)."""
    compat.requires_devices_during_lowering(primitive)
    mlir.register_lowering(primitive, functools.partial(rule, platform="other"))
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(
            primitive, functools.partial(rule, platform=platform), platform=platform
        )


def choice_in(
    ctx: Any,
    map_: Map,
    geometry: ConvGeometry,
    dtype: Any,
    platform: str,
    implementation: Implementation,
    precision: Any,
) -> dispatch.Choice:
    """What a map becomes in the program that a lowering context belongs to."""
    partitioned = compat.partitioned_automatically(ctx)
    obstacle = compat.no_custom_partitioning(ctx) if partitioned else None
    return dispatch.choose(
        geometry, dtype, platform, implementation, precision, obstacle=obstacle, map_=map_
    )


def lower(
    map_: Map,
    ctx: Any,
    first: Any,
    second: Any,
    *,
    bind: Callable[..., jax.Array],
    platform: str,
    out_sharding: Any,
    **params: Any,
) -> Any:
    """The lowering rule of a map's primitive. `bind` binds it for the shards of one device."""
    del out_sharding  # which is that of the result's type
    (out,) = ctx.avals_out
    if not compat.has_explicit_sharding(out):
        return _lower(map_, ctx, first, second, bind, platform, **params)
    # The code is XLA's to partition; of the types only the result's remains, as a constraint.
    auto = ctx.replace(
        avals_in=[jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in],
        avals_out=[jax.core.ShapedArray(out.shape, out.dtype)],
    )
    (result,) = _lower(map_, auto, first, second, bind, platform, **params)
    return [compat.constrain(ctx, result, out)]


def _lower(
    map_: Map,
    ctx: Any,
    first: Any,
    second: Any,
    bind: Callable[..., jax.Array],
    platform: str,
    *,
    geometry: ConvGeometry,
    precision: Any,
    implementation: Implementation,
) -> Any:
    (out,) = ctx.avals_out
    choice = choice_in(ctx, map_, geometry, out.dtype, platform, implementation, precision)
    if choice.implementation == "xla" or 0 in out.shape:
        rule = mlir.lower_fun(
            functools.partial(lax_maps.of(map_), geometry=geometry, precision=precision),
            multiple_results=False,
        )
        # Of the convolutions that are lowered to the kernel this must not be one.
        with dispatch.installed(False), compat.mark_forward(None):
            return rule(compat.with_lowering_cache_of_its_own(ctx), first, second)
    if compat.partitioned_automatically(ctx):
        shard = functools.partial(bind, precision=precision, implementation=implementation)
        split = functools.partial(
            partition.partitioned, geometry=geometry, map_=map_, compute=shard
        )
        result = mlir.lower_fun(split, multiple_results=False)(ctx, first, second)
        # The call itself names a Python object, which the persistent compilation cache leaves
        # out of its keys on request: without this, programs that differ in their padding alone
        # would share a key. An object of another process may have the same name as well.
        text = f"{geometry} precision={precision} implementation={implementation}"
        compat.annotate(result[0], map_.target, text)
        return result
    if choice.kernel_dtype is not None:

        def widened(*operands: jax.Array) -> jax.Array:
            wide = (x.astype(choice.kernel_dtype) for x in operands)
            result = bind(*wide, geometry, precision=precision, implementation="native")
            return result.astype(out.dtype)

        return mlir.lower_fun(widened, multiple_results=False)(ctx, first, second)
    geometry, map_ = choice.computes or (geometry, map_)
    return call_kernel(
        ctx,
        map_,
        native.TARGETS[map_],
        first,
        second,
        geometry=geometry,
        platform=platform,
        precision=precision,
        choice=choice,
    )


def call_kernel(
    ctx: Any,
    map_: Map,
    target: str,
    first: Any,
    second: Any,
    *arrays: Any,
    geometry: ConvGeometry,
    platform: str,
    precision: Any,
    choice: dispatch.Choice,
) -> list[Any]:
    """The custom call of a target; its lowered result, in a list.

    The types of operands and result are those of `ctx`, the dtype is the one that `choice` is
    planned for. `arrays` are more operands, each of the result's shape, or None for one without
    elements.
    """
    (out,) = ctx.avals_out
    if choice.plan is None:
        shape = symbolic.workspace_shape(geometry, out.dtype, platform, precision, map_)
    else:
        shape = (choice.workspace_bytes,)
    workspace = jax.core.ShapedArray(shape, np.dtype(np.uint8))
    module = native.module_for(platform)
    assert module is not None, platform
    # A small one is the thread's that runs the call (csrc/thread_scratch.h).
    is_brought = choice.plan is None or choice.workspace_bytes > module.scratch_bytes
    results = [out, workspace] if is_brought else [out]
    by_role = [layout[::-1] for layout in custom_call.layouts(geometry, platform)]
    places, to = (by_role[role] for role in map_.operands), by_role[map_.result]
    operands, avals = [first, second], [*ctx.avals_in[:2]]
    layouts: list[tuple[int, ...] | None] = [*places]
    for array in arrays:
        empty = jax.core.ShapedArray((0,), out.dtype)
        operands.append(_without_elements(ctx, empty) if array is None else array)
        avals.append(empty if array is None else out)
        layouts.append(None if array is None else to)  # None: row-major
    if (padding := custom_call.padding_operand(geometry)) is not None:
        aval = jax.core.ShapedArray(padding, np.dtype(np.uint8))
        operands.append(_without_elements(ctx, aval))
        avals.append(aval)
        layouts.append(None)
    to_results = [to, None][: len(results)]
    call = jax.ffi.ffi_lowering(target, operand_layouts=layouts, result_layouts=to_results)
    result, *_ = call(
        ctx.replace(avals_in=avals, avals_out=results),
        *operands,
        **custom_call.attributes(geometry, platform, precision),
    )
    return [result]


def _without_elements(ctx: Any, aval: Any) -> Any:
    """An array of that type, which has no element, lowered."""
    rule = mlir.lower_fun(lambda: jnp.zeros(aval.shape, aval.dtype), multiple_results=False)
    return rule(ctx.replace(avals_in=[], avals_out=[aval]))[0]
