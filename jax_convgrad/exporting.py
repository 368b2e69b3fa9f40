"""What `jax.export` has to be told about the custom calls."""

from __future__ import annotations

from jax import export

from . import native


def export_checks() -> list[export.DisabledSafetyCheck]:
    """The safety checks that `jax.export` has to leave out for programs with the kernels.

    `jax.export` refuses custom calls whose stability it cannot vouch for. This package
    vouches for its own (docs/export.md); the process that runs the exported program has
    to import `jax_convgrad`, which registers the handler.

    Returns:
        The value for `disabled_checks` of `jax.export.export`, to which others may be added.

    Example:
        >>> import jax, jax.numpy as jnp, jax_convgrad
        >>> from jax import export
        >>> w = jnp.ones((4, 3, 3, 3))
        >>> loss = lambda x: jax_convgrad.conv_general_dilated(x, w, (2, 2), "SAME").sum()
        >>> x = jax.ShapeDtypeStruct((8, 3, 32, 32), "float32")
        >>> checks = jax_convgrad.export_checks()
        >>> export.export(jax.jit(jax.grad(loss)), disabled_checks=checks)(x).out_avals
        (ShapedArray(float32[8,3,32,32]),)
    """
    targets = (native.FUSED_TARGET, *native.TARGETS.values())
    return [export.DisabledSafetyCheck.custom_call(target) for target in targets]
