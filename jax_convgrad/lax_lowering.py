"""The lowering of lax's convolution: where asked, the forward map is the kernel's.

Asked by `install` for every convolution of lax, and by this package's own for itself, which
is lax's with a mark. So its place in a program is not touched: jaxpr, types, derivatives,
batching and the policies of `jax.checkpoint` are lax's, only the code is not.

`install`'s flag is read when a program is lowered, and for gradients when it is traced. So
a program that was traced where the flag is set and lowered where it is not holds lax's
forward convolutions: right ones, that are slower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.interpreters import mlir

from . import compat, dispatch
from .dispatch import Implementation
from .geometry import ConvGeometry, is_static
from .lowering import choice_in
from .maps import FORWARD
from .primitive import bind_forward


@functools.cache
def register() -> None:
    """Puts a lowering that asks `dispatch.installed` and the mark in front of lax's own."""
    for platform in ("cpu", "cuda"):
        lax_rule = compat.lax_lowering(lax.conv_general_dilated_p, platform)
        rule = functools.partial(_lower, lax_rule, platform)
        mlir.register_lowering(lax.conv_general_dilated_p, rule, platform=platform)


def _lower(
    lax_rule: Callable[..., Any], platform: str, ctx: Any, lhs: Any, rhs: Any, **params: Any
) -> Any:
    mark = compat.forward_mark_of(ctx)
    asked = dispatch.installed.value if mark is None else mark != "xla"
    conv = _covered(ctx, **params) if asked else None
    if conv is None:
        return lax_rule(ctx, lhs, rhs, **params)
    (out,) = ctx.avals_out
    precision = params["precision"]
    # Of a kernel that there is not, one cannot insist on: the mark is also the gradient's.
    implementation: Implementation = "native" if mark == "native" and platform == "cpu" else None
    choice = choice_in(ctx, FORWARD, conv, out.dtype, platform, implementation, precision)
    if choice.implementation == "xla":
        return lax_rule(ctx, lhs, rhs, **params)

    def kernel(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return bind_forward(
            lhs,
            rhs,
            conv,
            precision=precision,
            preferred_element_type=out.dtype,
            implementation=implementation,
        )

    return mlir.lower_fun(kernel, multiple_results=False)(ctx, lhs, rhs)


def _covered(
    ctx: Any, *, precision: Any, preferred_element_type: Any, out_sharding: Any, **params: Any
) -> ConvGeometry | None:
    """The convolution, if it is one that the kernel may take."""
    del precision, preferred_element_type, out_sharding
    (lhs, rhs), (out,) = ctx.avals_in, ctx.avals_out
    if not all(is_static(aval.shape) and math.prod(aval.shape) for aval in (lhs, rhs, out)):
        return None
    if any(dispatch.unsupported_dtype(aval.dtype) is not None for aval in (lhs, out)):
        return None
    if compat.has_explicit_sharding(lhs, rhs):
        return None
    # `jax.export` refuses custom calls that nobody vouched for: a program without a gradient,
    # whose author may not know of the package, would no longer be exported.
    if compat.is_exported(ctx):
        return None
    return ConvGeometry(lhs_shape=lhs.shape, rhs_shape=rhs.shape, **params)
