"""The maps of a convolution as JAX primitives.

One factory makes them from a `Map` (docs/mathematics.md): bilinear in its two operands, with
the maps of the other two arrays for transposes, and a batching rule that folds every
mapped axis into an index of the convolution, for one call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.interpreters import ad, mlir
from jax.sharding import NamedSharding

from . import arguments, batching, compat, dispatch, lax_maps, lowering, sharding
from .dispatch import Implementation
from .geometry import ConvGeometry
from .maps import FILTER_GRAD, FORWARD, INPUT_GRAD, Map, Role, shape_of_role
from .transposed import forward_as_input_grad, is_worth_a_flip


def bind(
    map_: Map,
    first: jax.Array,
    second: jax.Array,
    geometry: ConvGeometry,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    implementation: Implementation = None,
    function: str = "",
) -> jax.Array:
    """Binds the primitive of a map for operands that already fit the geometry.

    A kernel has one dtype for all arrays; a result of another dtype is computed in that
    dtype, as the transpose of a convolution with `preferred_element_type` is in lax.

    Args:
        map_: what is computed.
        first: x, or dy for INPUT_GRAD.
        second: the filter, or dy for FILTER_GRAD.
        geometry: of the convolution.
        precision: a canonical precision.
        preferred_element_type: dtype of the result, None for the operands'.
        out_sharding: of the result, for meshes with explicit axes.
        implementation: "native", "xla" or None.
        function: the public function, for messages; the map's own by default.
    """
    function = function or f"conv_{map_.name}"
    if preferred_element_type is not None:
        dtype = arguments.result_dtype(first.dtype, preferred_element_type, function)
        if dispatch.unsupported_dtype(dtype) is None:
            first, second = lax_maps.convert(first, dtype), lax_maps.convert(second, dtype)
            preferred_element_type = None
    reason = dispatch.unsupported(geometry, first.dtype)
    explicit = compat.has_explicit_sharding(jax.typeof(first), jax.typeof(second))
    if reason is not None:
        dispatch.require_not_native(implementation, reason)
    elif out_sharding is not None and not explicit:
        raise ValueError(
            f"{function} out_sharding is for meshes with explicit axes, which the operands "
            f"are not on, got {out_sharding!r}."
        )
    # Not a case for the primitive: lax has rules for every dtype. And programs with the
    # primitive are lowered for devices that are known, and form one mesh.
    if reason is not None or (dispatch.asks_for_lax(implementation) and not explicit):
        with compat.mark_forward("xla") if implementation == "xla" else contextlib.nullcontext():
            return lax_maps.of(map_)(
                first,
                second,
                geometry,
                precision=precision,
                preferred_element_type=preferred_element_type,
                out_sharding=out_sharding,
            )
    if out_sharding is not None:
        out_sharding = compat.canonicalize_sharding(out_sharding, function)
    return _bind(
        map_,
        first,
        second,
        geometry=geometry,
        precision=precision,
        implementation=implementation,
        out_sharding=out_sharding,
    )


bind_forward = functools.partial(bind, FORWARD)
bind_input_grad = functools.partial(bind, INPUT_GRAD)
bind_filter_grad = functools.partial(bind, FILTER_GRAD)


def cotangent(
    map_: Map,
    first: jax.Array,
    second: jax.Array,
    type_: Any,
    geometry: ConvGeometry,
    *,
    precision: Any,
    implementation: Implementation = None,
) -> jax.Array:
    """What the transpose of a convolution gives for an operand, of that operand's type.

    As in lax, the arithmetic is done in the cotangent's dtype, which is
    preferred_element_type where that was given.
    """
    dtype = (first, second)[map_.operands.index(Role.OUT)].dtype
    result = bind(
        map_,
        lax_maps.convert(first, dtype),
        lax_maps.convert(second, dtype),
        geometry,
        precision=precision,
        out_sharding=compat.explicit_sharding(type_),
        implementation=implementation,
    )
    return lax_maps.convert(result, type_.dtype)


input_cotangent = functools.partial(cotangent, INPUT_GRAD)
"""For lhs: of dy, rhs, the type of lhs and the geometry."""
filter_cotangent = functools.partial(cotangent, FILTER_GRAD)
"""For rhs: of lhs, dy, the type of rhs and the geometry."""


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


def result_type(
    map_: Map,
    first: Any,
    second: Any,
    geometry: ConvGeometry,
    out_sharding: NamedSharding | None = None,
) -> Any:
    """The type of a map's result for those of the operands."""
    if out_sharding is None:
        out_sharding = sharding.of_result_type(map_, first, second, geometry)
    return jax.core.ShapedArray(
        shape_of_role(geometry, map_.result),
        first.dtype,
        weak_type=first.weak_type and second.weak_type,
        sharding=out_sharding,
        manual_axis_type=first.manual_axis_type,
    )


# --- the primitives' rules. Each takes the two operands and the same four parameters.


def _bind(map_: Map, first: jax.Array, second: jax.Array, **params: Any) -> jax.Array:
    first, second = compat.match_varying_axes(first, second)
    return _PRIMITIVES[map_].bind(first, second, **params)


def _abstract_eval(
    map_: Map, first: Any, second: Any, *, geometry: ConvGeometry, out_sharding: Any, **_: Any
) -> Any:
    for role, aval in zip(map_.operands, (first, second), strict=True):
        assert aval.shape == shape_of_role(geometry, role), (role, aval.shape, geometry)
    assert first.dtype == second.dtype, (first.dtype, second.dtype)
    return result_type(map_, first, second, geometry, out_sharding)


def _transpose(
    map_: Map,
    role: Role,
    ct: jax.Array,
    first: Any,
    second: Any,
    *,
    geometry: ConvGeometry,
    precision: Any,
    implementation: Implementation,
    **_: Any,
) -> jax.Array:
    """The map whose result is the operand in that role, ct in the place of the old result."""
    arrays = {map_.operands[0]: first, map_.operands[1]: second, map_.result: ct}
    sharding = compat.explicit_sharding(arrays.pop(role).aval)
    wanted = next(m for m in _PRIMITIVES if m.result is role)
    one, other = (arrays[r] for r in wanted.operands)
    return bind(
        wanted,
        one,
        other,
        geometry,
        precision=precision,
        out_sharding=sharding,
        implementation=dispatch.of_another_map(implementation),
    )


def _bind_shard(
    map_: Map, first: jax.Array, second: jax.Array, geometry: ConvGeometry, **params: Any
) -> jax.Array:
    return _PRIMITIVES[map_].bind(first, second, geometry=geometry, out_sharding=None, **params)


def _lower(map_: Map, ctx: Any, *operands: Any, platform: str, **params: Any) -> Any:
    geometry = params["geometry"]
    # CUDA has no forward kernel. A transposed layer is worth the flip of its filter there.
    if map_ is FORWARD and platform == "cuda" and is_worth_a_flip(geometry):
        params["geometry"] = forward_as_input_grad(geometry)

        def flipped(x: jax.Array, w: jax.Array) -> jax.Array:
            w = lax_maps.transposed_filter(w, geometry)
            return _PRIMITIVES[INPUT_GRAD].bind(x, w, **params)

        return mlir.lower_fun(flipped, multiple_results=False)(ctx, *operands)
    shard = functools.partial(_bind_shard, map_)
    return lowering.lower(map_, ctx, *operands, bind=shard, platform=platform, **params)


def _make(map_: Map) -> jex_core.Primitive:
    primitive = jex_core.Primitive(f"conv_{map_.name}")
    parameters = ("geometry", "precision", "implementation", "out_sharding")
    primitive.def_impl(compiled(primitive, parameters))
    primitive.def_abstract_eval(functools.partial(_abstract_eval, map_))
    transposes = (functools.partial(_transpose, map_, role) for role in map_.operands)
    ad.defbilinear(primitive, *transposes)
    compat.set_bilinear_jet_rule(primitive)
    compat.check_floats_of(primitive)
    batching.register(primitive, map_, functools.partial(_bind, map_))
    lowering.register(primitive, functools.partial(_lower, map_))
    return primitive


_PRIMITIVES = {map_: _make(map_) for map_ in (FORWARD, INPUT_GRAD, FILTER_GRAD)}
conv_forward_p, conv_input_grad_p, conv_filter_grad_p = _PRIMITIVES.values()
