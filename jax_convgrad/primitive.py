"""The input gradient as a JAX primitive.

`conv_input_grad_p` is bilinear in dy and rhs, the map dX = dT/dx of
docs/mathematics.md. Its transposes are the other two maps of the same form, its
batching rules fold every mapped axis into the batch, the channels or the groups of one
call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jax.extend import core as jex_core
from jax.interpreters import ad, batching
from jax.sharding import NamedSharding, PartitionSpec

from . import compat, dispatch, lax_maps, lowering, partition
from .dispatch import Implementation
from .folding import fold, folded_sharding, unfold, unmapped
from .geometry import ConvGeometry

conv_input_grad_p = jex_core.Primitive("conv_input_grad")


def bind_input_grad(
    dy: jax.Array,
    rhs: jax.Array,
    geometry: ConvGeometry,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    implementation: Implementation = None,
    function: str = "conv_input_grad",
) -> jax.Array:
    """Binds the primitive for operands that already fit the geometry.

    A kernel has one dtype for dy, rhs and dX; a result of another dtype is computed in
    that dtype, as the transpose of a convolution with `preferred_element_type` is in lax.
    """
    if preferred_element_type is not None:
        dtype = dispatch.result_dtype(dy.dtype, preferred_element_type, function)
        if dispatch.unsupported_dtype(dtype) is None:
            dy, rhs = lax_maps.convert(dy, dtype), lax_maps.convert(rhs, dtype)
            preferred_element_type = None
    reason = dispatch.unsupported(geometry, dy.dtype)
    if reason is not None:
        # Not a case for the primitive: lax has rules for every dtype.
        dispatch.require_not_native(implementation, reason)
        return lax_maps.input_grad(
            dy,
            rhs,
            geometry,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    if out_sharding is not None:
        if not compat.has_explicit_sharding(jax.typeof(dy), jax.typeof(rhs)):
            raise ValueError(
                f"{function} out_sharding is for meshes with explicit axes, which the operands "
                f"are not on, got {out_sharding!r}."
            )
        out_sharding = compat.canonicalize_sharding(out_sharding, function)
    return _bind(
        dy,
        rhs,
        geometry=geometry,
        precision=precision,
        implementation=implementation,
        out_sharding=out_sharding,
    )


def input_cotangent(
    dy: jax.Array,
    rhs: jax.Array,
    lhs_type: Any,
    geometry: ConvGeometry,
    *,
    precision: Any,
    implementation: Implementation = None,
) -> jax.Array:
    """What the transpose of a convolution gives for lhs, of its type.

    As in lax, the arithmetic is done in the cotangent's dtype, which is
    preferred_element_type where that was given.
    """
    dx = bind_input_grad(
        dy,
        lax_maps.convert(rhs, dy.dtype),
        geometry,
        precision=precision,
        out_sharding=compat.explicit_sharding(lhs_type),
        implementation=implementation,
    )
    return lax_maps.convert(dx, lhs_type.dtype)


def filter_cotangent(
    dy: jax.Array, lhs: jax.Array, rhs_type: Any, geometry: ConvGeometry, *, precision: Any
) -> jax.Array:
    """What it gives for rhs, likewise; through lax."""
    dw = lax_maps.filter_grad(
        lax_maps.convert(lhs, dy.dtype),
        dy,
        geometry,
        precision=precision,
        out_sharding=compat.explicit_sharding(rhs_type),
    )
    return lax_maps.convert(dw, rhs_type.dtype)


# --- the primitive's rules. Each takes (dy, rhs) and the same four parameters.


def _bind(dy: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    dy, rhs = compat.match_varying_axes(dy, rhs)
    return conv_input_grad_p.bind(dy, rhs, **params)


def compiled(
    primitive: jex_core.Primitive, parameters: tuple[str, ...]
) -> Callable[..., jax.Array]:
    """What a primitive with these parameters does outside of `jit`."""

    @functools.partial(jax.jit, static_argnames=parameters)
    def bind(*operands: jax.Array, **params: Any) -> jax.Array:
        return primitive.bind(*operands, **params)

    def evaluate(*operands: jax.Array, **params: Any) -> jax.Array:
        # Compiled also where jit is disabled: it would come back here for ever.
        with jax.disable_jit(False):
            return bind(*operands, **params)

    return evaluate


def _abstract_eval(
    dy: Any, rhs: Any, *, geometry: ConvGeometry, out_sharding: Any, **_: Any
) -> Any:
    assert dy.shape == geometry.out_shape, (dy.shape, geometry)
    assert rhs.shape == geometry.rhs_shape, (rhs.shape, geometry)
    assert dy.dtype == rhs.dtype, (dy.dtype, rhs.dtype)
    return result_type(dy, rhs, geometry, out_sharding)


def result_type(
    dy: Any, rhs: Any, geometry: ConvGeometry, out_sharding: NamedSharding | None = None
) -> Any:
    """The type of dX for those of the operands."""
    return jax.core.ShapedArray(
        geometry.lhs_shape,
        dy.dtype,
        weak_type=dy.weak_type and rhs.weak_type,
        sharding=_sharding_in_type(dy, rhs, geometry) if out_sharding is None else out_sharding,
        manual_axis_type=dy.manual_axis_type,
    )


def _sharding_in_type(dy: Any, rhs: Any, geometry: ConvGeometry) -> NamedSharding:
    """The sharding in dX's type. Without explicit axes it says nothing but its mesh."""
    mesh = rhs.sharding.mesh if dy.sharding.mesh.empty else dy.sharding.mesh
    spec: PartitionSpec | None = PartitionSpec()
    if compat.has_explicit_sharding(dy, rhs):
        spec = partition.inferred(geometry, dy, rhs, mesh.shape)
    if spec is None:
        raise compat.ShardingTypeError(
            "Please specify the output sharding via `out_sharding` parameter of "
            f"`conv_input_grad`: got dy {dy.str_short(True)} and w {rhs.str_short(True)}."
        )
    return NamedSharding(mesh, spec)


def _transpose_dy(
    ct: jax.Array, dy: Any, rhs: jax.Array, *, geometry: ConvGeometry, precision: Any, **_: Any
) -> jax.Array:
    """The map is linear in dy with the forward convolution for its transpose."""
    sharding = compat.explicit_sharding(dy.aval)
    return lax_maps.forward(
        ct, rhs, geometry, precision=precision, out_sharding=sharding, differentiated=True
    )


def _transpose_rhs(
    ct: jax.Array, dy: jax.Array, rhs: Any, *, geometry: ConvGeometry, precision: Any, **_: Any
) -> jax.Array:
    """The map is linear in rhs with the filter gradient, ct in the place of x."""
    sharding = compat.explicit_sharding(rhs.aval)
    return lax_maps.filter_grad(ct, dy, geometry, precision=precision, out_sharding=sharding)


def _batch(
    operands: tuple[jax.Array, jax.Array],
    dims: tuple[int | None, int | None],
    *,
    geometry: ConvGeometry,
    out_sharding: Any,
    **params: Any,
) -> tuple[jax.Array, int]:
    """One call for all examples: dy alone joins the batch, rhs alone the input channels,
    both together are groups.
    """
    dy, rhs = operands
    dy_dim, rhs_dim = dims
    whole = geometry
    lhs_spec, rhs_spec, out_spec = geometry.dimension_numbers
    sizes = [x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None]
    size = sizes[0]
    if is_symbolic_dim(size) and dy_dim is not None and rhs_dim is not None:
        # As many groups as that, which neither a custom call nor lax can say.
        dy, rhs = jnp.moveaxis(dy, dy_dim, 0), jnp.moveaxis(rhs, rhs_dim, 0)
        one = functools.partial(_bind, geometry=geometry, out_sharding=out_sharding, **params)
        return lax.map(lambda both: one(*both), (dy, rhs)), 0
    if size == 0:
        return jnp.zeros_like(dy, shape=(0, *geometry.lhs_shape)), 0

    if dy_dim is None:
        assert rhs_dim is not None  # a rule is called for mapped operands only
        dim, groups = lhs_spec[1], geometry.feature_group_count
        rhs = fold(rhs, rhs_dim, rhs_spec[1])
    elif rhs_dim is None:
        dim, groups = lhs_spec[0], geometry.batch_group_count
        dy = fold(dy, dy_dim, out_spec[0])
    else:
        kind = "batch_group_count" if geometry.batch_group_count > 1 else "feature_group_count"
        dim, groups = lhs_spec[0 if kind == "batch_group_count" else 1], 1
        dy, rhs = fold(dy, dy_dim, out_spec[1]), fold(rhs, rhs_dim, rhs_spec[0])
        geometry = geometry.replace(**{kind: getattr(geometry, kind) * size})
    by_size: tuple[str, ...] = ()
    if compat.has_explicit_sharding(*map(jax.typeof, operands)):
        # That of the mapped function's result; in the folded one it need not be inferable.
        dy_type, by_dy = unmapped(jax.typeof(operands[0]), dy_dim)
        rhs_type, by_rhs = unmapped(jax.typeof(operands[1]), rhs_dim)
        by_size = by_rhs if dy_dim is None else by_dy
        if out_sharding is None:
            out_sharding = _sharding_in_type(dy_type, rhs_type, whole)
        out_sharding = folded_sharding(out_sharding, dim, by_size)
    lhs_shape = list(geometry.lhs_shape)
    lhs_shape[dim] *= size
    geometry = geometry.replace(lhs_shape=tuple(lhs_shape), rhs_shape=rhs.shape)
    dx = _bind(dy, rhs, geometry=geometry, out_sharding=out_sharding, **params)
    return unfold(dx, size, dim, groups, by_size), 0


def _bind_shard(dy: jax.Array, rhs: jax.Array, geometry: ConvGeometry, **params: Any) -> jax.Array:
    return conv_input_grad_p.bind(dy, rhs, geometry=geometry, out_sharding=None, **params)


_lower = functools.partial(lowering.lower, bind=_bind_shard)

conv_input_grad_p.def_impl(
    compiled(conv_input_grad_p, ("geometry", "precision", "implementation", "out_sharding"))
)
conv_input_grad_p.def_abstract_eval(_abstract_eval)
ad.defbilinear(conv_input_grad_p, _transpose_dy, _transpose_rhs)
compat.set_bilinear_jet_rule(conv_input_grad_p)
batching.primitive_batchers[conv_input_grad_p] = _batch
lowering.register(conv_input_grad_p, _lower)
