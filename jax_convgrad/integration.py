"""install(): lax's own convolution, and every library built on it, takes the kernels.

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

from . import compat, dispatch, lax_lowering, pooling
from .geometry import ConvGeometry, is_static
from .primitive import filter_cotangent, input_cotangent


def install() -> None:
    """Makes every `jax.lax` convolution in the process take this package's kernels.

    Flax, Equinox, Haiku and Keras use lax's convolution, so their input gradients run the
    kernel with no code changed, forward mode included, and on a CPU so do their forward
    pass, their filter gradients and the gradient of their max pooling. Functions that are
    already jitted pick the change up at their next call. Calling it again does nothing.

    Examples:
        >>> import jax_convgrad
        >>> jax_convgrad.install()
        >>> jax_convgrad.uninstall()
    """
    _register()
    compat.set_for_process(dispatch.installed, True)


def uninstall() -> None:
    """Undoes `install`: lax's convolution is computed and differentiated by lax again."""
    compat.set_for_process(dispatch.installed, False)


@contextlib.contextmanager
def installed(active: bool = True) -> Iterator[None]:
    """A context in which this thread's lax convolutions take the kernel.

    Args:
        active: False restores lax's own computation inside an installed program.

    Examples:
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
        if not dispatch.installed.value or not _covered(dy):
            return lax_lhs_rule(dy, lhs, rhs, **params)
        precision = params.pop("precision")
        geometry = _geometry(lhs.aval, rhs, **params)
        return input_cotangent(dy, rhs, lhs.aval, geometry, precision=precision)

    def rhs_rule(dy: jax.Array, lhs: jax.Array, rhs: Any, **params: Any) -> jax.Array:
        # Of symbolic sizes lax's rule does not take a stride.
        symbolic = not is_static((*lhs.shape, *rhs.aval.shape))
        if not dispatch.installed.value or not (symbolic or _covered(dy)):
            return lax_rhs_rule(dy, lhs, rhs, **params)
        precision = params.pop("precision")
        geometry = _geometry(lhs, rhs.aval, **params)
        return filter_cotangent(lhs, dy, rhs.aval, geometry, precision=precision)

    ad.defbilinear(lax.conv_general_dilated_p, lhs_rule, rhs_rule)
    lax_lowering.register()
    pooling.register()


def _covered(dy: jax.Array) -> bool:
    """Whether the primitives take this convolution; lax's own rules have the rest."""
    if dispatch.switch() == "off" or compat.forward_mark() == "xla":
        return False
    return dispatch.unsupported_dtype(dy.dtype) is None


def _geometry(
    lhs_type: Any, rhs_type: Any, *, preferred_element_type: Any, out_sharding: Any, **params: Any
) -> ConvGeometry:
    """The convolution that the primitive's parameters describe."""
    del preferred_element_type, out_sharding  # those of the cotangent that there is
    return ConvGeometry(lhs_shape=tuple(lhs_type.shape), rhs_shape=tuple(rhs_type.shape), **params)
