"""The input gradient as a JAX primitive, and its public function.

`conv_input_grad_p` is bilinear in dy and rhs, the map dX = dT/dx of
docs/mathematics.md. Its transposes are the other two maps of the same form, its
batching rules fold every mapped axis into the batch, the channels or the groups of one
call, and its lowering is the custom call where dispatch says so and lax elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

from . import compat, custom_call, dispatch, lax_maps, native, partition, symbolic
from .dispatch import Implementation
from .geometry import ConvGeometry, DimensionNumbers, Padding, sequence_of, shape_of

conv_input_grad_p = jex_core.Primitive("conv_input_grad")


def conv_input_grad(
    dy: jax.Array,
    w: jax.Array,
    lhs_shape: Sequence[int],
    window_strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: DimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """Gradient of a convolution with respect to its input, dE/dX.

    For y = conv_general_dilated(x, w, ...) and the cotangent dy = dE/dY, returns
    dE/dX: the sum over output channels k and taps r of dy[n, k, p] * w[k, c, r], where
    h * lhs_dilation = p * stride - pad_low + r * rhs_dilation on every spatial axis.
    Differentiable in dy and w to any order, forward and reverse.

    Args:
        dy: cotangent of the convolution's result, of that result's shape.
        w: the filter, the convolution's rhs, of dy's dtype.
        lhs_shape: shape of the convolution's input x, and of the result. One size
            fewer than `w.ndim` means a single image without a batch axis, [C, H, W].
        window_strides: `n` integers; None means ones.
        padding: 'SAME', 'SAME_LOWER', 'VALID' or `n` pairs (low, high), of the forward
            convolution.
        lhs_dilation: `n` integers of the forward convolution; None means ones.
        rhs_dilation: `n` integers; None means ones.
        dimension_numbers: layouts of x, w and y, as in `jax.lax.conv_general_dilated`.
        feature_group_count: of the forward convolution.
        batch_group_count: of the forward convolution.
        precision: as in `jax.lax.conv_general_dilated`.
        preferred_element_type: dtype of the result; None means dy's.
        out_sharding: sharding of the result, for meshes with explicit axes.
        implementation: "native" for the kernel, "xla" for lax, None for the kernel where
            it is no slower.

    Returns:
        dE/dX, an array of shape `lhs_shape`. Float16 and bfloat16 accumulate in float32.

    Raises:
        ValueError: shapes or parameters contradict each other, or "native" was asked
            for where no kernel serves.
        TypeError: an argument is of the wrong kind, or dtypes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> dy, w = jnp.ones((1, 2, 2)), jnp.ones((1, 1, 2, 2))
        >>> conv_input_grad(dy, w, (1, 3, 3))
        Array([[[1., 2., 1.],
                [2., 4., 2.],
                [1., 2., 1.]]], dtype=float32)
    """
    function = "conv_input_grad"
    dispatch.check_implementation(implementation, function)
    dispatch.check_out_sharding(out_sharding, function)
    dy_shape, w_shape = shape_of(dy, "dy", function), shape_of(w, "w", function)
    lhs_shape = sequence_of(lhs_shape, "lhs_shape", function, "a sequence of integers")
    dy, w = as_array(dy, "dy", function), as_array(w, "w", function)
    if dy.dtype != w.dtype:
        raise TypeError(
            f"{function} requires arguments to have the same dtypes, got {dy.dtype} for dy and "
            f"{w.dtype} for w."
        )
    batchless = len(lhs_shape) == len(dy_shape) == len(w_shape) - 1
    if batchless:
        lhs_shape, dy_shape = (1, *lhs_shape), (1, *dy_shape)
        dimension_numbers = _with_batch(dimension_numbers, len(dy_shape), function)
    geometry = ConvGeometry.parse(
        lhs_shape,
        w_shape,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        function=function,
    )
    if dy_shape != geometry.out_shape:
        expected = geometry.out_shape[1:] if batchless else geometry.out_shape
        raise ValueError(
            f"{function} dy must have the shape of the convolution's result, {expected} for "
            f"lhs_shape {lhs_shape[1:] if batchless else lhs_shape} and w {w_shape}, got "
            f"{dy_shape[1:] if batchless else dy_shape}."
        )
    dx = bind_input_grad(
        dy[None] if batchless else dy,
        w,
        geometry,
        precision=compat.canonicalize_precision(precision),
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        implementation=implementation,
    )
    return dx[0] if batchless else dx


def as_array(value: Any, argument: str, function: str) -> jax.Array:
    """Returns `jnp.asarray(value)`, or raises a TypeError that names the argument."""
    try:
        return jnp.asarray(value)
    except TypeError:
        raise TypeError(
            f"{function} {argument} must be an array, got {type(value).__name__}."
        ) from None


def _with_batch(dimension_numbers: Any, rank: int, function: str) -> Any:
    """Dimension numbers of a single image, with the batch put in front."""
    if dimension_numbers is None:
        return None
    what = "None or three strings such as ('CHW', 'OIHW', 'CHW') for an image without a batch axis"
    specs = sequence_of(dimension_numbers, "dimension_numbers", function, what)
    strings = len(specs) == 3 and all(isinstance(spec, str) for spec in specs)
    if not strings or [len(spec) for spec in specs] != [rank, rank + 1, rank]:
        raise TypeError(f"{function} dimension_numbers must be {what}, got {dimension_numbers!r}.")
    return ("N" + specs[0], specs[1], "N" + specs[2])


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
    if reason is None and compat.has_explicit_sharding(jax.typeof(dy), jax.typeof(rhs)):
        reason = "the mesh has explicit axes"
    if reason is not None:
        # Not a case for the primitive: lax has rules for every dtype and sharding in types.
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
        raise ValueError(
            f"{function} out_sharding is for meshes with explicit axes, which the operands are "
            f"not on, got {out_sharding!r}."
        )
    return _bind(dy, rhs, geometry=geometry, precision=precision, implementation=implementation)


# --- the primitive's rules. Each takes (dy, rhs) and the same three parameters.


def _bind(dy: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    dy, rhs = compat.match_varying_axes(dy, rhs)
    return conv_input_grad_p.bind(dy, rhs, **params)


def _bind_shard(dy: jax.Array, rhs: jax.Array, geometry: ConvGeometry, **params: Any) -> jax.Array:
    return conv_input_grad_p.bind(dy, rhs, geometry=geometry, **params)


@functools.partial(jax.jit, static_argnames=("geometry", "precision", "implementation"))
def _compiled(dy: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    return conv_input_grad_p.bind(dy, rhs, **params)


def _evaluate(dy: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    # A primitive is compiled also where jit is disabled: it would come back here for ever.
    with jax.disable_jit(False):
        return _compiled(dy, rhs, **params)


def _abstract_eval(dy: Any, rhs: Any, *, geometry: ConvGeometry, **_: Any) -> Any:
    assert dy.shape == geometry.out_shape, (dy.shape, geometry)
    assert rhs.shape == geometry.rhs_shape, (rhs.shape, geometry)
    assert dy.dtype == rhs.dtype, (dy.dtype, rhs.dtype)
    # No mesh axis is explicit here, so the type's sharding says nothing but its mesh.
    sharding = jax.sharding.NamedSharding(dy.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.core.ShapedArray(
        geometry.lhs_shape,
        dy.dtype,
        weak_type=dy.weak_type and rhs.weak_type,
        sharding=sharding,
        manual_axis_type=dy.manual_axis_type,
    )


def _transpose_dy(
    ct: jax.Array, dy: Any, rhs: jax.Array, *, geometry: ConvGeometry, precision: Any, **_: Any
) -> jax.Array:
    """The map is linear in dy with the forward convolution for its transpose."""
    del dy
    return lax_maps.forward(ct, rhs, geometry, precision=precision, differentiated=True)


def _transpose_rhs(
    ct: jax.Array, dy: jax.Array, rhs: Any, *, geometry: ConvGeometry, precision: Any, **_: Any
) -> jax.Array:
    """The map is linear in rhs with the filter gradient, ct in the place of x."""
    del rhs
    return lax_maps.filter_grad(ct, dy, geometry, precision=precision)


def _fold(x: jax.Array, mapped: int, dim: int, groups: int = 1) -> jax.Array:
    """Folds the mapped axis into dimension `dim` of the array without it.

    The dimension becomes (groups, mapped, rest): groups stay outermost.
    """
    size = x.shape[mapped]
    x = jnp.moveaxis(x, mapped, 0)
    shape = x.shape[1:]
    x = x.reshape(size, *shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :])
    x = jnp.moveaxis(x, 0, dim + 1)
    return x.reshape(*shape[:dim], size * shape[dim], *shape[dim + 1 :])


def _unfold(x: jax.Array, size: int, dim: int, groups: int = 1) -> jax.Array:
    """The inverse of `_fold`, with the mapped axis in front."""
    shape = x.shape
    rest = shape[dim] // size
    x = x.reshape(*shape[:dim], groups, size, rest // groups, *shape[dim + 1 :])
    x = jnp.moveaxis(x, dim + 1, 0)
    return x.reshape(size, *shape[:dim], rest, *shape[dim + 1 :])


def _batch(
    operands: tuple[jax.Array, jax.Array],
    dims: tuple[int | None, int | None],
    *,
    geometry: ConvGeometry,
    **params: Any,
) -> tuple[jax.Array, int]:
    """One call for all examples: dy alone joins the batch, rhs alone the input channels,
    both together are groups.
    """
    dy, rhs = operands
    dy_dim, rhs_dim = dims
    lhs_spec, rhs_spec, out_spec = geometry.dimension_numbers
    sizes = [x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None]
    size = sizes[0]
    if is_symbolic_dim(size) and dy_dim is not None and rhs_dim is not None:
        # As many groups as that, which neither a custom call nor lax can say.
        dy, rhs = jnp.moveaxis(dy, dy_dim, 0), jnp.moveaxis(rhs, rhs_dim, 0)
        one = functools.partial(_bind, geometry=geometry, **params)
        return lax.map(lambda both: one(*both), (dy, rhs)), 0
    if size == 0:
        return jnp.zeros_like(dy, shape=(0, *geometry.lhs_shape)), 0

    if dy_dim is None:
        assert rhs_dim is not None  # a rule is called for mapped operands only
        dim, groups = lhs_spec[1], geometry.feature_group_count
        rhs = _fold(rhs, rhs_dim, rhs_spec[1])
    elif rhs_dim is None:
        dim, groups = lhs_spec[0], geometry.batch_group_count
        dy = _fold(dy, dy_dim, out_spec[0])
    else:
        kind = "batch_group_count" if geometry.batch_group_count > 1 else "feature_group_count"
        dim, groups = lhs_spec[0 if kind == "batch_group_count" else 1], 1
        dy, rhs = _fold(dy, dy_dim, out_spec[1]), _fold(rhs, rhs_dim, rhs_spec[0])
        geometry = geometry.replace(**{kind: getattr(geometry, kind) * size})
    lhs_shape = list(geometry.lhs_shape)
    lhs_shape[dim] *= size
    geometry = geometry.replace(lhs_shape=tuple(lhs_shape), rhs_shape=rhs.shape)
    return _unfold(_bind(dy, rhs, geometry=geometry, **params), size, dim, groups), 0


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


def _lower(
    ctx: Any,
    dy: Any,
    rhs: Any,
    *,
    platform: str,
    geometry: ConvGeometry,
    precision: Any,
    implementation: Implementation,
) -> Any:
    (out,) = ctx.avals_out
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
        shard = functools.partial(_bind_shard, precision=precision, implementation=implementation)
        split = functools.partial(partition.partitioned, geometry=geometry, compute=shard)
        return mlir.lower_fun(split, multiple_results=False)(ctx, dy, rhs)
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


conv_input_grad_p.def_impl(_evaluate)
conv_input_grad_p.def_abstract_eval(_abstract_eval)
ad.defbilinear(conv_input_grad_p, _transpose_dy, _transpose_rhs)
batching.primitive_batchers[conv_input_grad_p] = _batch
compat.requires_devices_during_lowering(conv_input_grad_p)
mlir.register_lowering(conv_input_grad_p, functools.partial(_lower, platform="other"))
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(
        conv_input_grad_p, functools.partial(_lower, platform=_platform), platform=_platform
    )
