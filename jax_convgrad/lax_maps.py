"""The maps as plain lax convolutions.

What runs where no kernel does, and what the other transposes are made of. Each is
one explicit convolution. `jax.linear_transpose` over a bare shape would be shorter
and wrong inside `shard_map`: its template is unvarying, so it inserts a psum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The function itself: code that puts this package's convolution in the place of
# `jax.lax.conv_general_dilated` must not send us round in a circle.
from jax.lax import conv_general_dilated as lax_conv_general_dilated

from .geometry import ConvGeometry, is_static
from .maps import FILTER_GRAD, FORWARD, INPUT_GRAD, Map, exchanged, swapped


def of(map_: Map) -> Callable[..., jax.Array]:
    """The function of this file that computes a map."""
    functions: dict[Map, Callable[..., jax.Array]] = {
        FORWARD: forward,
        INPUT_GRAD: input_grad,
        FILTER_GRAD: filter_grad,
    }
    return functions[map_]


def forward(
    lhs: jax.Array,
    rhs: jax.Array,
    geometry: ConvGeometry,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    differentiated: bool = False,
) -> jax.Array:
    """The convolution itself.

    Where sizes are symbolic, lax can differentiate a strided one only if no input is left
    over at the far end. `differentiated` cuts that off, a copy of lhs.
    """
    params = geometry.conv_params()
    if differentiated and not geometry.is_static:
        params["padding"] = geometry.exact_padding
    return _convolve(
        lhs,
        rhs,
        **params,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def input_grad(
    dy: jax.Array,
    rhs: jax.Array,
    geometry: ConvGeometry,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """The map dX of a convolution: dy, dilated by the stride, convolved with the flipped filter."""
    g = geometry
    lhs_spec, rhs_spec, out_spec = g.dimension_numbers
    if 0 in g.window_sizes:  # which is no convolution to XLA
        dtype = dy.dtype if preferred_element_type is None else preferred_element_type
        return jnp.zeros_like(dy, dtype, shape=g.lhs_shape)
    out = _convolve(
        dy,
        transposed_filter(rhs, g),
        window_strides=g.lhs_dilation,
        padding=g.transposed_padding,
        lhs_dilation=g.window_strides,
        rhs_dilation=g.rhs_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(out_spec, swapped(rhs_spec), lhs_spec),
        feature_group_count=g.groups,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    if g.batch_group_count > 1:
        out = _split(out, lhs_spec[1], g.batch_group_count)
        out = _merge(out, lhs_spec[1], lhs_spec[0])
    return out


def transposed_filter(rhs: jax.Array, geometry: ConvGeometry) -> jax.Array:
    """The filter with which the transposed map is a convolution: flipped, groups moved.

    The group axis moves from its output to its input features, which are the output
    features of that convolution.
    """
    out_feature, in_feature, *spatial = geometry.dimension_numbers.rhs_spec
    if geometry.groups > 1:
        rhs = _split(rhs, out_feature, geometry.groups)
        rhs = _merge(rhs, out_feature, in_feature)
    return lax.rev(rhs, spatial)


def convert(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts to a dtype; as in lax, an array that has it already keeps its weak type."""
    return x if x.dtype == dtype else x.astype(dtype)


def filter_grad(
    lhs: jax.Array,
    dy: jax.Array,
    geometry: ConvGeometry,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """The map dW of a convolution: lhs convolved with dy, batch and features exchanged."""
    if dy.size == 0:  # a window of size zero is no convolution
        dtype = dy.dtype if preferred_element_type is None else preferred_element_type
        return jnp.zeros_like(dy, dtype, shape=geometry.rhs_shape)
    return _convolve(
        lhs,
        dy,
        **exchanged(geometry).conv_params(),
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def _convolve(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """The convolution of lax, whose lhs is padded beforehand along axes of symbolic padding.

    lax's function takes no such padding. Its primitive does, but not under `vmap`.
    """
    lhs_spec = params["dimension_numbers"].lhs_spec
    config = [(0, 0, 0)] * lhs.ndim
    padding, lhs_dilation = list(params["padding"]), list(params["lhs_dilation"])
    for axis, dim in enumerate(lhs_spec[2:]):
        if is_static(padding[axis]):
            continue
        low, high = padding[axis]
        config[dim] = (low, high, lhs_dilation[axis] - 1)
        padding[axis], lhs_dilation[axis] = (0, 0), 1
    if any(of != (0, 0, 0) for of in config):
        lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), config)
    params.update(padding=padding, lhs_dilation=lhs_dilation)
    return lax_conv_general_dilated(lhs, rhs, **params)


def _split(x: jax.Array, dim: int, count: int) -> jax.Array:
    """Splits a dimension into `count` major parts: (..., count, size // count, ...)."""
    return x.reshape(*x.shape[:dim], count, x.shape[dim] // count, *x.shape[dim + 1 :])


def _merge(x: jax.Array, src: int, dst: int) -> jax.Array:
    """Merges dimension `src` into `dst` as its major part; `dst` counts without `src`."""
    x = jnp.moveaxis(x, src, dst)
    return x.reshape(*x.shape[:dst], x.shape[dst] * x.shape[dst + 1], *x.shape[dst + 2 :])
