"""The gradients of a convolution as public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import arguments, compat
from .dispatch import Implementation
from .epilogue import bind_fused
from .geometry import ConvGeometry, DimensionNumbers, Padding
from .primitive import bind_filter_grad


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
    residual: jax.Array | None = None,
    relu_mask: jax.Array | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Gradient of a convolution with respect to its input, dE/dX.

    For y = conv_general_dilated(x, w, ...) and the cotangent dy = dE/dY, returns
    dE/dX: the sum over output channels k and taps r of dy[n, k, p] * w[k, c, r], where
    h * lhs_dilation = p * stride - pad_low + r * rhs_dilation on every spatial axis.
    Differentiable in dy and w to any order, forward and reverse.

    Two steps that often follow in a backward pass can be done on the way, by most kernels
    without another trip through memory: with dX for the sum above,

        dX + residual, and then zero where relu_mask <= 0,

    each rounded to the result's dtype, bit for bit as if written out (except the bits of a
    NaN). In programs that are split over devices, under `vmap`, and in derivatives they are
    written out.

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
        residual: a cotangent that x has from elsewhere, as past a skip connection; of
            shape `lhs_shape` and the result's dtype.
        relu_mask: x, if x is the result of a ReLU whose argument's cotangent is wanted, or
            a boolean mask; of shape `lhs_shape`. What is positive lets the gradient pass,
            and the result is not differentiable in it.
        implementation: "native" for the kernel, "xla" for lax, None for the kernel where
            it is no slower.

    Returns:
        dE/dX, an array of shape `lhs_shape`. Float16 and bfloat16 accumulate in float32.

    Raises:
        ValueError: shapes or parameters contradict each other, or "native" was asked
            for where no kernel serves.
        TypeError: an argument is of the wrong kind, or dtypes differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> dy, w = jnp.ones((1, 2, 2)), jnp.ones((1, 1, 2, 2))
        >>> conv_input_grad(dy, w, (1, 3, 3))
        Array([[[1., 2., 1.],
                [2., 4., 2.],
                [1., 2., 1.]]], dtype=float32)

        The rest of the way back through y = conv(x) + z with x = relu(z):

        >>> x = jnp.array([[[1., 0., 1.], [0., 1., 0.], [1., 0., 1.]]])
        >>> conv_input_grad(dy, w, (1, 3, 3), residual=-x, relu_mask=x)
        Array([[[0., 0., 0.],
                [0., 3., 0.],
                [0., 0., 0.]]], dtype=float32)
    """
    function = "conv_input_grad"
    arguments.check_implementation(implementation, function)
    arguments.check_out_sharding(out_sharding, function)
    dy_shape, w_shape = arguments.shape_of(dy, "dy", function), arguments.shape_of(w, "w", function)
    lhs_shape = arguments.sequence_of(lhs_shape, "lhs_shape", function, "a sequence of integers")
    dy, w = arguments.as_array(dy, "dy", function), arguments.as_array(w, "w", function)
    arguments.check_dtypes_by_name({"dy": dy, "w": w}, function)
    geometry, batchless = _parse(
        {"lhs_shape": lhs_shape, "w": w_shape},
        dy_shape,
        (window_strides, padding, lhs_dilation, rhs_dilation),
        dimension_numbers,
        (feature_group_count, batch_group_count),
        function,
    )
    lhs_shape = geometry.lhs_shape
    if batchless:
        out_sharding = arguments.sharding_with_batch(out_sharding, function)
    dtype = arguments.result_dtype(dy.dtype, preferred_element_type, function)
    arrays = {}
    for name, value in (("residual", residual), ("relu_mask", relu_mask)):
        if value is None:
            continue
        shape = arguments.shape_of(value, name, function)
        if batchless:
            shape = (1, *shape)
        array = arguments.as_array(value, name, function)
        if shape != lhs_shape:
            raise ValueError(
                f"{function} {name} must have the shape of the result, "
                f"{lhs_shape[1:] if batchless else lhs_shape}, got {array.shape}."
            )
        arrays[name] = array[None] if batchless else array
    if residual is not None and arrays["residual"].dtype != dtype:
        raise TypeError(
            f"{function} residual must have the result's dtype {dtype}, got "
            f"{arrays['residual'].dtype}."
        )
    if relu_mask is not None and jnp.issubdtype(arrays["relu_mask"].dtype, jnp.complexfloating):
        raise TypeError(
            f"{function} relu_mask must be real or boolean, got {arrays['relu_mask'].dtype}."
        )
    dx = bind_fused(
        dy[None] if batchless else dy,
        w,
        geometry,
        **arrays,
        precision=compat.canonicalize_precision(precision),
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        implementation=implementation,
    )
    return dx[0] if batchless else dx


def conv_filter_grad(
    x: jax.Array,
    dy: jax.Array,
    rhs_shape: Sequence[int],
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
    """Gradient of a convolution with respect to its filter, dE/dW.

    For y = conv_general_dilated(x, w, ...) and the cotangent dy = dE/dY, returns dE/dW: the
    sum over images n and positions p of dy[n, k, p] * x[n, c, h], where
    h * lhs_dilation = p * stride - pad_low + r * rhs_dilation on every spatial axis.
    Differentiable in x and dy to any order, forward and reverse. The sum is made of parts
    that depend on the shapes alone: its bits are the same on any number of threads.

    Args:
        x: the convolution's input, its lhs.
        dy: cotangent of the convolution's result, of that result's shape and x's dtype.
        rhs_shape: shape of the filter, and of the result. One size more than `x.ndim` means
            that x and dy are a single image without a batch axis, [C, H, W].
        window_strides: `n` integers; None means ones.
        padding: 'SAME', 'SAME_LOWER', 'VALID' or `n` pairs (low, high), of the forward
            convolution.
        lhs_dilation: `n` integers of the forward convolution; None means ones.
        rhs_dilation: `n` integers; None means ones.
        dimension_numbers: layouts of x, w and y, as in `jax.lax.conv_general_dilated`.
        feature_group_count: of the forward convolution.
        batch_group_count: of the forward convolution.
        precision: as in `jax.lax.conv_general_dilated`.
        preferred_element_type: dtype of the result; None means x's.
        out_sharding: sharding of the result, for meshes with explicit axes.
        implementation: "native" for the kernel, "xla" for lax, None for the kernel where
            it is no slower.

    Returns:
        dE/dW, an array of shape `rhs_shape`. Float16 and bfloat16 accumulate in float32.

    Raises:
        ValueError: shapes or parameters contradict each other, or "native" was asked
            for where no kernel serves.
        TypeError: an argument is of the wrong kind, or dtypes differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, dy = jnp.arange(9.0).reshape(1, 3, 3), jnp.ones((1, 2, 2))
        >>> conv_filter_grad(x, dy, (1, 1, 2, 2))
        Array([[[[ 8., 12.],
                 [20., 24.]]]], dtype=float32)
    """
    function = "conv_filter_grad"
    arguments.check_implementation(implementation, function)
    arguments.check_out_sharding(out_sharding, function)
    x_shape, dy_shape = arguments.shape_of(x, "x", function), arguments.shape_of(dy, "dy", function)
    rhs_shape = arguments.sequence_of(rhs_shape, "rhs_shape", function, "a sequence of integers")
    x, dy = arguments.as_array(x, "x", function), arguments.as_array(dy, "dy", function)
    arguments.check_dtypes_by_name({"x": x, "dy": dy}, function)
    geometry, batchless = _parse(
        {"x": x_shape, "rhs_shape": rhs_shape},
        dy_shape,
        (window_strides, padding, lhs_dilation, rhs_dilation),
        dimension_numbers,
        (feature_group_count, batch_group_count),
        function,
    )
    return bind_filter_grad(
        x[None] if batchless else x,
        dy[None] if batchless else dy,
        geometry,
        precision=compat.canonicalize_precision(precision),
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        implementation=implementation,
    )


def _parse(
    shapes: dict[str, tuple[int, ...]],
    dy_shape: tuple[int, ...],
    window: tuple[Any, Any, Any, Any],
    dimension_numbers: Any,
    groups: tuple[int, int],
    function: str,
) -> tuple[ConvGeometry, bool]:
    """The convolution, and whether x and dy are one image without a batch axis.

    Args:
        shapes: of lhs and rhs, by the names of the arguments that say them.
        dy_shape: which must be that of the convolution's result.
        window: strides, padding and both dilations.
        dimension_numbers: layouts.
        groups: of features and of images.
        function: the public function, for messages.
    """
    (lhs, lhs_shape), (rhs, rhs_shape) = shapes.items()
    batchless = len(lhs_shape) == len(dy_shape) == len(rhs_shape) - 1
    got = dy_shape
    if batchless:
        lhs_shape, dy_shape = (1, *lhs_shape), (1, *dy_shape)
        dimension_numbers = arguments.with_batch(dimension_numbers, len(got), function)
    geometry = ConvGeometry.parse(
        lhs_shape, rhs_shape, *window, dimension_numbers, *groups, function=function
    )
    if dy_shape != geometry.out_shape:
        expected = geometry.out_shape[1:] if batchless else geometry.out_shape
        raise ValueError(
            f"{function} dy must have the shape of the convolution's result, {expected} for "
            f"{lhs} {shapes[lhs]} and {rhs} {rhs_shape}, got {got}."
        )
    return geometry, batchless
