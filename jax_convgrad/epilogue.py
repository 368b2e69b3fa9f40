"""The input gradient with its epilogue: a residual to add, a ReLU to undo.

    dX + residual,  and then zero where relu_mask <= 0

One custom call where the program is one device's and the kernel runs. Everything else is
the three steps, written out: derivatives and batching, whose rules are then those of the
steps, lax, and programs that XLA splits over devices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

from . import arguments, compat, dispatch, lax_maps, lowering, native
from .dispatch import Implementation
from .geometry import ConvGeometry
from .maps import INPUT_GRAD
from .primitive import bind_input_grad, compiled, result_type

fused_input_grad_p = jex_core.Primitive("conv_input_grad_fused")


def bind_fused(
    dy: jax.Array,
    rhs: jax.Array,
    geometry: ConvGeometry,
    *,
    residual: jax.Array | None = None,
    relu_mask: jax.Array | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Binds the primitive, or that without an epilogue where there is none.

    The arguments are `conv_input_grad`'s, which has checked them against the geometry.
    """
    params: dict[str, Any] = {
        "geometry": geometry, "precision": precision, "implementation": implementation
    }  # fmt: skip
    arrays = {
        name: array
        for name, array in (("residual", residual), ("relu_mask", relu_mask))
        if array is not None
    }
    dtype = arguments.result_dtype(dy.dtype, preferred_element_type, "conv_input_grad")
    written_out = (
        not arrays
        or out_sharding is not None
        or dispatch.asks_for_lax(implementation)
        or dispatch.unsupported(geometry, dtype) is not None
        or compat.has_explicit_sharding(*map(jax.typeof, (dy, rhs, *arrays.values())))
    )
    if written_out:
        dx = bind_input_grad(
            dy,
            rhs,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            **params,
        )
        return _finish(dx, **arrays)
    if relu_mask is not None and relu_mask.dtype != dtype:
        # The sign by itself: a conversion may round a positive number to zero.
        arrays["relu_mask"] = (relu_mask > 0).astype(dtype)
    dy, rhs = lax_maps.convert(dy, dtype), lax_maps.convert(rhs, dtype)
    return _bind(dy, rhs, *arrays.values(), epilogue=tuple(arrays), **params)


def _finish(
    dx: jax.Array, residual: jax.Array | None = None, relu_mask: jax.Array | None = None
) -> jax.Array:
    """The steps after the sum."""
    if residual is not None:
        dx = dx + residual
    if relu_mask is not None:
        passes = relu_mask if relu_mask.dtype == jnp.bool_ else relu_mask > 0
        dx = lax.select(passes, dx, jnp.zeros_like(dx))
    return dx


# --- the primitive's rules. Each takes dy, rhs and the arrays that `epilogue` names.


def _bind(*operands: jax.Array, **params: Any) -> jax.Array:
    return fused_input_grad_p.bind(*compat.match_varying_axes(*operands), **params)


def _steps(
    dy: jax.Array, rhs: jax.Array, *arrays: jax.Array, epilogue: tuple[str, ...], **params: Any
) -> jax.Array:
    return _finish(bind_input_grad(dy, rhs, **params), **dict(zip(epilogue, arrays, strict=True)))


def _abstract_eval(dy: Any, rhs: Any, *arrays: Any, geometry: ConvGeometry, **_: Any) -> Any:
    for array in arrays:
        assert array.shape == geometry.lhs_shape, (array.shape, geometry)
        assert array.dtype == dy.dtype, (array.dtype, dy.dtype)
    return result_type(INPUT_GRAD, dy, rhs, geometry).update(weak_type=False)


def _jvp(primals: Any, tangents: Any, *, epilogue: tuple[str, ...], **params: Any) -> Any:
    """The steps are linear, except the mask, which has no derivative."""
    dy, rhs, *arrays = primals
    dy_dot, rhs_dot, *array_dots = tangents
    out = _bind(*primals, epilogue=epilogue, **params)
    terms = []
    if not isinstance(dy_dot, ad.Zero):
        terms.append(bind_input_grad(dy_dot, rhs, **params))
    if not isinstance(rhs_dot, ad.Zero):
        terms.append(bind_input_grad(dy, rhs_dot, **params))
    mask = None
    for name, array, array_dot in zip(epilogue, arrays, array_dots, strict=True):
        if name == "relu_mask":
            mask = array
        elif not isinstance(array_dot, ad.Zero):
            terms.append(array_dot)
    if not terms:
        return out, jnp.zeros_like(out)
    return out, _finish(functools.reduce(jnp.add, terms), relu_mask=mask)


def _transpose(ct: Any, *operands: Any, epilogue: tuple[str, ...], **params: Any) -> Any:
    """Of the map that is linear in the operands without values, and in no others."""
    if isinstance(ct, ad.Zero):
        return [None] * len(operands)
    unknown = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
    # A residual that is known is no part of it.
    names = ("dy", "rhs", *epilogue)
    kept = [i for i, name in enumerate(names) if i in unknown or name != "residual"]

    def linear(*values: jax.Array) -> jax.Array:
        given = dict(zip(unknown, values, strict=True))
        chosen = [given.get(i, operands[i]) for i in kept]
        return _steps(*chosen, epilogue=tuple(names[i] for i in kept[2:]), **params)

    types = [operands[i].aval for i in unknown]
    cotangents = dict(zip(unknown, jax.linear_transpose(linear, *types)(ct), strict=True))
    return [cotangents.get(i) for i in range(len(operands))]


def _batch(operands: Any, dims: Any, **params: Any) -> Any:
    return jax.vmap(functools.partial(_steps, **params), in_axes=tuple(dims))(*operands), 0


def _lower(
    ctx: Any,
    dy: Any,
    rhs: Any,
    *arrays: Any,
    platform: str,
    epilogue: tuple[str, ...],
    geometry: ConvGeometry,
    precision: Any,
    implementation: Implementation,
) -> Any:
    (out,) = ctx.avals_out
    choice = lowering.choice_in(
        ctx, INPUT_GRAD, geometry, out.dtype, platform, implementation, precision
    )
    if (
        choice.implementation == "xla"
        or choice.kernel_dtype is not None  # the epilogue's arrays are as they are
        or 0 in geometry.lhs_shape
        or compat.partitioned_automatically(ctx)
    ):
        steps = functools.partial(
            _steps,
            epilogue=epilogue,
            geometry=geometry,
            precision=precision,
            implementation=implementation,
        )
        return mlir.lower_fun(steps, multiple_results=False)(ctx, dy, rhs, *arrays)
    named = dict(zip(epilogue, arrays, strict=True))
    return lowering.call_kernel(
        ctx,
        INPUT_GRAD,
        native.FUSED_TARGET,
        dy,
        rhs,
        named.get("residual"),
        named.get("relu_mask"),
        geometry=geometry,
        platform=platform,
        precision=precision,
        choice=choice,
    )


fused_input_grad_p.def_impl(
    compiled(fused_input_grad_p, ("geometry", "precision", "implementation", "epilogue"))
)
fused_input_grad_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[fused_input_grad_p] = _jvp
ad.primitive_transposes[fused_input_grad_p] = _transpose
compat.set_composed_jet_rule(fused_input_grad_p, _steps)
compat.check_floats_of(fused_input_grad_p)
batching.primitive_batchers[fused_input_grad_p] = _batch
lowering.register(fused_input_grad_p, _lower)
