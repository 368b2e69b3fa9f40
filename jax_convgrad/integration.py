"""install(): lax's own convolution, and every library built on it, takes the kernel.

The convolution primitive of lax is registered once with a transpose rule and with
lowerings that ask a flag. The flag is a JAX user context, so it is part of every jit
cache key: turning it on or off retraces functions that are already compiled, and
`installed()` is scoped to one thread.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
from jax import lax
from jax.interpreters import ad

from . import compat, dispatch, lax_lowering, lax_maps
from .geometry import ConvGeometry, is_static
from .primitive import bind_input_grad


def install() -> None:
    """Makes every `jax.lax` convolution in the process take this package's input gradient.

    Flax, Equinox, Haiku and Keras use lax's convolution, so their gradients run the
    kernel with no code changed, forward mode included, and so does the forward pass of
    their transposed convolutions. Functions that are already
    jitted pick the change up at their next call. Calling it again does nothing.

    Example:
        >>> import jax_convgrad
        >>> jax_convgrad.install()
        >>> jax_convgrad.uninstall()
    """
    _register()
    compat.set_for_process(dispatch.installed, True)


def uninstall() -> None:
    """Undoes `install`: lax's convolution has its own input gradient again."""
    compat.set_for_process(dispatch.installed, False)


@contextlib.contextmanager
def installed(active: bool = True) -> Iterator[None]:
    """A context in which this thread's lax convolutions take the kernel.

    Args:
        active: False restores lax's own gradient inside an installed program.

    Example:
        >>> import jax, jax.numpy as jnp, jax_convgrad
        >>> x, w = jnp.ones((1, 1, 4, 4)), jnp.ones((1, 1, 2, 2))
        >>> loss = lambda x: jax.lax.conv(x, w, (1, 1), "VALID").sum()
        >>> with jax_convgrad.installed():
        ...     gradient = jax.grad(loss)(x)
    """
    _register()
    with dispatch.installed(active):
        yield


@functools.cache
def _register() -> None:
    lax_lhs_rule, lax_rhs_rule = compat.lax_transpose_rules()

    def lhs_rule(dy: jax.Array, lhs: Any, rhs: jax.Array, **params: Any) -> jax.Array:
        if not dispatch.installed.value or not _covered(lhs.aval, rhs, dy):
            return lax_lhs_rule(dy, lhs, rhs, **params)
        return _input_grad(dy, lhs.aval, rhs, **params)

    def rhs_rule(dy: jax.Array, lhs: jax.Array, rhs: Any, **params: Any) -> jax.Array:
        if not dispatch.installed.value or is_static((*lhs.shape, *rhs.aval.shape)):
            return lax_rhs_rule(dy, lhs, rhs, **params)
        # Of symbolic sizes lax's rule does not take a stride.
        return _filter_grad(dy, lhs, rhs.aval, **params)

    ad.defbilinear(lax.conv_general_dilated_p, lhs_rule, rhs_rule)
    lax_lowering.register()


def _covered(lhs_type: Any, rhs: jax.Array, dy: jax.Array) -> bool:
    """Whether the primitive takes this convolution; lax's own rule has the rest."""
    if dispatch.switch() == "off":
        return False
    return dispatch.unsupported_dtype(dy.dtype) is None


def _input_grad(
    dy: jax.Array,
    lhs_type: Any,
    rhs: jax.Array,
    *,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
    **geometry: Any,
) -> jax.Array:
    # As in lax, in the cotangent's dtype: that is preferred_element_type where given.
    del preferred_element_type, out_sharding
    d_lhs = bind_input_grad(
        dy,
        lax_maps.convert(rhs, dy.dtype),
        ConvGeometry(lhs_shape=tuple(lhs_type.shape), rhs_shape=tuple(rhs.shape), **geometry),
        precision=precision,
        out_sharding=compat.explicit_sharding(lhs_type),
    )
    return lax_maps.convert(d_lhs, lhs_type.dtype)


def _filter_grad(
    dy: jax.Array,
    lhs: jax.Array,
    rhs_type: Any,
    *,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
    **geometry: Any,
) -> jax.Array:
    del preferred_element_type, out_sharding
    d_rhs = lax_maps.filter_grad(
        lax_maps.convert(lhs, dy.dtype),
        dy,
        ConvGeometry(lhs_shape=tuple(lhs.shape), rhs_shape=tuple(rhs_type.shape), **geometry),
        precision=precision,
    )
    return lax_maps.convert(d_rhs, rhs_type.dtype)
