"""The lowering of lax's convolution under `install`: transposed layers run the kernel.

`lax.conv_transpose`, and every library's transposed layer, is to JAX a convolution with
lhs_dilation, for which XLA inserts zeros and multiplies them. It is also the input
gradient of a strided convolution. Its place in a program is not touched: jaxpr, types,
derivatives and batching are lax's, only the code is not.

That is decided when a program is lowered, the gradient of other convolutions when it is
traced. So a program that was traced where the flag is set and lowered where it is not
holds lax's transposed convolutions: a right one, that is slower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.interpreters import mlir

from . import compat, dispatch, lax_maps
from .geometry import ConvGeometry, is_static
from .lowering import choice_in
from .primitive import bind_input_grad
from .transposed import forward_as_input_grad


def register() -> None:
    """Puts a lowering that asks `dispatch.installed` in front of lax's own, once."""
    for platform in ("cpu", "cuda"):
        rule = functools.partial(_lower, compat.lax_lowering(platform), platform)
        mlir.register_lowering(lax.conv_general_dilated_p, rule, platform=platform)


def _lower(
    lax_rule: Callable[..., Any], platform: str, ctx: Any, lhs: Any, rhs: Any, **params: Any
) -> Any:
    conv = _transposed_layer(ctx, **params) if dispatch.installed.value else None
    if conv is None:
        return lax_rule(ctx, lhs, rhs, **params)
    (out,) = ctx.avals_out
    gradient = forward_as_input_grad(conv)
    precision = params["precision"]
    choice = choice_in(ctx, gradient, out.dtype, platform, None, precision)
    if choice.implementation == "xla":
        return lax_rule(ctx, lhs, rhs, **params)

    def kernel(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return bind_input_grad(
            lhs,
            lax_maps.transposed_filter(rhs, conv),
            gradient,
            precision=precision,
            preferred_element_type=out.dtype,
        )

    return mlir.lower_fun(kernel, multiple_results=False)(ctx, lhs, rhs)


def _transposed_layer(
    ctx: Any, *, precision: Any, preferred_element_type: Any, out_sharding: Any, **params: Any
) -> ConvGeometry | None:
    """The convolution, if it is one that the kernel takes as an input gradient."""
    del precision, preferred_element_type, out_sharding
    (lhs, rhs), (out,) = ctx.avals_in, ctx.avals_out
    if not all(is_static(aval.shape) and math.prod(aval.shape) for aval in (lhs, rhs, out)):
        return None
    if any(dispatch.unsupported_dtype(aval.dtype) is not None for aval in (lhs, out)):
        return None
    if compat.has_explicit_sharding(lhs, rhs) or params["batch_group_count"] > 1:
        return None
    # `jax.export` refuses custom calls that nobody vouched for: a program without a gradient,
    # whose author may not know of the package, would no longer be exported.
    if compat.is_exported(ctx):
        return None
    conv = ConvGeometry(lhs_shape=lhs.shape, rhs_shape=rhs.shape, **params)
    if not any(
        d > 1 and size > 1 for d, size in zip(conv.lhs_dilation, conv.in_sizes, strict=True)
    ):
        return None  # no zeros are inserted
    # In the gradient for the filter of such a layer, which has lhs_dilation too, channels
    # are in the place of the batch: a filter as large as the images, which no one measured.
    if conv.dimension_numbers.lhs_spec[0] != 0:
        return None
    activations = math.prod(lhs.shape) + math.prod(out.shape)
    if dispatch.flip_outweighs_rest(math.prod(rhs.shape), activations):
        return None
    return conv
