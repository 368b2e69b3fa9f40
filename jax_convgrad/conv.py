"""The public convolutions: lax's signatures, this package's maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.lax import conv_transpose as lax_conv_transpose

from . import arguments, compat, dispatch, lax_lowering, lax_maps
from .dispatch import Implementation
from .geometry import ConvGeometry, DimensionNumbers, Padding, is_static
from .primitive import bind, filter_cotangent, input_cotangent
from .transposed import transposed_map


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of one convolution, and the types of its operands."""

    geometry: ConvGeometry
    precision: Any
    preferred_element_type: Any
    out_sharding: Any
    implementation: Implementation
    lhs_type: Any  # jax.core.ShapedArray: dtype and sharding, for the cotangent
    rhs_type: Any


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
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
    """`jax.lax.conv_general_dilated`, computed and differentiated by this package's kernels.

    On a CPU kernels compute the result and both gradients, on CUDA the gradient for lhs if
    asked for. A `jax.custom_vjp`: reverse mode, to any order and forward over reverse, works;
    jvp of the function itself does not (use `jax_convgrad.install` for that).

    Args:
        lhs: input, `n + 2` dimensions.
        rhs: filter, `n + 2` dimensions, of lhs's dtype.
        window_strides: `n` integers.
        padding: 'SAME', 'SAME_LOWER', 'VALID' or `n` pairs (low, high) of either sign.
        lhs_dilation: `n` integers; None means ones.
        rhs_dilation: `n` integers; None means ones.
        dimension_numbers: layouts of lhs, rhs and the result; None means 'NCHW', 'OIHW',
            'NCHW' with as many spatial letters as there are axes.
        feature_group_count: number of groups of channels.
        batch_group_count: number of groups of images.
        precision: as in `jax.lax.conv_general_dilated`; also used for the gradients.
        preferred_element_type: dtype of the result, None for that of the operands.
        out_sharding: sharding of the result, for meshes with explicit axes.
        implementation: "native" for the kernels that the platform has, "xla" for lax,
            None for the kernel where it is no slower.

    Returns:
        The convolution.

    Raises:
        ValueError: parameters contradict each other, or "native" was asked for where no
            kernel serves.
        TypeError: an argument is of the wrong kind, or dtypes differ.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> x, w = jnp.ones((1, 1, 3, 3)), jnp.ones((1, 1, 2, 2))
        >>> loss = lambda x: conv_general_dilated(x, w, (1, 1), "VALID").sum()
        >>> jax.grad(loss)(x)[0, 0]
        Array([[1., 2., 1.],
               [2., 4., 2.],
               [1., 2., 1.]], dtype=float32)
    """
    function = "conv_general_dilated"
    arguments.check_implementation(implementation, function)
    arguments.check_out_sharding(out_sharding, function)
    lhs_shape = arguments.shape_of(lhs, "lhs", function)
    rhs_shape = arguments.shape_of(rhs, "rhs", function)
    geometry = ConvGeometry.parse(
        lhs_shape,
        rhs_shape,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        function=function,
    )
    lhs, rhs = arguments.as_array(lhs, "lhs", function), arguments.as_array(rhs, "rhs", function)
    arguments.check_dtypes(lhs.dtype, rhs.dtype, function)
    arguments.result_dtype(lhs.dtype, preferred_element_type, function)  # raises if it does not fit
    if (reason := dispatch.unsupported(geometry, lhs.dtype)) is not None:
        dispatch.require_not_native(implementation, reason)
    lhs, rhs = compat.match_varying_axes(lhs, rhs)
    call = _Call(
        geometry=geometry,
        precision=compat.canonicalize_precision(precision),
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        implementation=implementation,
        lhs_type=jax.typeof(lhs),
        rhs_type=jax.typeof(rhs),
    )
    return _conv(lhs, rhs, call)


def _forward(
    lhs: jax.Array, rhs: jax.Array, call: _Call, *, differentiated: bool = False
) -> jax.Array:
    lax_lowering.register()
    with compat.mark_forward(call.implementation or "auto"):
        return lax_maps.forward(
            lhs,
            rhs,
            call.geometry,
            precision=call.precision,
            preferred_element_type=call.preferred_element_type,
            out_sharding=call.out_sharding,
            differentiated=differentiated,
        )


_forward.__name__ = "conv_general_dilated"  # the name that a jaxpr shows
_conv = jax.custom_vjp(_forward, nondiff_argnums=(2,))


def _conv_fwd(
    lhs: CustomVJPPrimal, rhs: CustomVJPPrimal, call: _Call
) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    # An operand is kept only if the other one needs a gradient.
    residuals = (
        lhs.value if rhs.perturbed else None,
        rhs.value if lhs.perturbed else None,
    )
    return _forward(lhs.value, rhs.value, call, differentiated=True), residuals


def _conv_bwd(
    call: _Call, residuals: tuple[jax.Array | None, jax.Array | None], dy: Any
) -> tuple[jax.Array | None, jax.Array | None]:
    if isinstance(dy, SymbolicZero):
        return None, None
    lhs, rhs = residuals
    d_lhs = d_rhs = None
    if rhs is not None:
        d_lhs = input_cotangent(
            dy,
            rhs,
            call.lhs_type,
            call.geometry,
            precision=call.precision,
            implementation=call.implementation,
        )
    if lhs is not None:
        d_rhs = filter_cotangent(
            lhs,
            dy,
            call.rhs_type,
            call.geometry,
            precision=call.precision,
            implementation=dispatch.of_another_map(call.implementation),
        )
    return d_lhs, d_rhs


_conv.defvjp(_conv_fwd, _conv_bwd, symbolic_zeros=True)


def conv_transpose(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    padding: Padding,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: DimensionNumbers = None,
    transpose_kernel: bool = False,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    use_consistent_padding: bool = False,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """`jax.lax.conv_transpose` whose forward computation is this package's kernel.

    No inserted zero is multiplied and no filter flipped: with `transpose_kernel` this is
    the input gradient of a strided convolution as it stands, without it the forward map of
    one with lhs_dilation. Differentiable in forward and reverse mode, to any order.

    Args:
        lhs: input, `n + 2` dimensions, n from 0 to 3.
        rhs: filter, `n + 2` dimensions, of lhs's dtype.
        strides: `n` integers, the fractional stride.
        padding: 'SAME', 'VALID' or `n` pairs (low, high), read as lax reads them.
        rhs_dilation: `n` integers; None means ones.
        dimension_numbers: layouts; None means channels-last, as in lax: ('NHWC', 'HWIO',
            'NHWC') for two axes.
        transpose_kernel: flip the spatial axes of rhs and swap its channel axes, which
            makes this the gradient of the convolution with rhs.
        precision: as in `jax.lax.conv_transpose`.
        preferred_element_type: dtype of the result, None for that of the operands.
        use_consistent_padding: read integer padding as that of the forward convolution,
            as PyTorch does.
        implementation: "native" for the kernel, "xla" for lax, None for the kernel where
            it is no slower.

    Returns:
        The transposed convolution.

    Raises:
        ValueError: parameters contradict each other, or "native" was asked for where no
            kernel serves.
        TypeError: an argument is of the wrong kind, or dtypes differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, w = jnp.ones((1, 2, 1)), jnp.arange(3.0).reshape(3, 1, 1)
        >>> conv_transpose(x, w, (2,), "VALID")[0, :, 0]
        Array([2., 1., 2., 1., 0.], dtype=float32)
    """
    function = "conv_transpose"
    arguments.check_implementation(implementation, function)
    lhs_shape = arguments.shape_of(lhs, "lhs", function)
    rhs_shape = arguments.shape_of(rhs, "rhs", function)
    if len(lhs_shape) != len(rhs_shape) or len(lhs_shape) < 2:
        raise ValueError(
            f"{function} lhs and rhs must have the same number of dimensions, at least 2, but "
            f"got {lhs_shape} and {rhs_shape}."
        )
    axes = len(lhs_shape) - 2
    if dimension_numbers is None:
        if axes > 3:
            raise ValueError(f"{function} has no default dimension_numbers for {axes} axes.")
        letters = "HWD"[:axes]
        dimension_numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    if not is_static(rhs_shape):
        dispatch.require_not_native(implementation, "the filter's shape is symbolic")
        return lax_conv_transpose(
            lhs,
            rhs,
            strides,
            padding,
            rhs_dilation,
            dimension_numbers,
            transpose_kernel,
            precision,
            preferred_element_type,
            use_consistent_padding,
        )
    lhs, rhs = arguments.as_array(lhs, "lhs", function), arguments.as_array(rhs, "rhs", function)
    arguments.check_dtypes(lhs.dtype, rhs.dtype, function)
    map_, geometry = transposed_map(
        lhs_shape,
        rhs_shape,
        strides,
        padding,
        rhs_dilation,
        dimension_numbers,
        transpose_kernel,
        use_consistent_padding,
    )
    return bind(
        map_,
        lhs,
        rhs,
        geometry,
        precision=compat.canonicalize_precision(precision),
        preferred_element_type=preferred_element_type,
        implementation=implementation,
        function=function,
    )
