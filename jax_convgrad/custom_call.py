"""The custom call: its attributes and its operands' layouts by platform, and what `jax.export`
has to be told about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import export, lax
from jax.export import is_symbolic_dim

from . import native
from .geometry import ConvGeometry, is_static

AUTO_KERNEL = "auto"


def layouts(geometry: ConvGeometry, platform: str) -> tuple[tuple[int, ...], ...]:
    """Dimensions of lhs, rhs and out from major to minor, as the kernel wants them.

    On a CPU row-major, whatever the roles of the dimensions: the kernels take any
    strides, and asking XLA:CPU for another layout costs a transposition. On a GPU
    channels-last (N..C, filter O..I), which XLA propagates to the neighbours.
    """
    rank = len(geometry.lhs_shape)
    if platform == "cpu":
        return (tuple(range(rank)),) * 3

    def channels_last(spec: Sequence[int]) -> tuple[int, ...]:
        return (spec[0], *spec[2:], spec[1])

    lhs_spec, rhs_spec, out_spec = geometry.dimension_numbers
    return channels_last(lhs_spec), channels_last(rhs_spec), channels_last(out_spec)


def allows_tf32(precision: Any) -> bool:
    """Whether a canonical precision lets float32 products round to TF32 on a GPU.

    As JAX documents it: DEFAULT and HIGH do, HIGHEST does not.
    """
    if precision is None:
        return True
    if isinstance(precision, tuple):
        return all(p in (lax.Precision.DEFAULT, lax.Precision.HIGH) for p in precision)
    return False


def _static_part(size: int) -> int:
    return 0 if is_symbolic_dim(size) else size


def padding_operand(geometry: ConvGeometry) -> tuple[int, ...] | None:
    """Shape of the empty operand that carries padding which is symbolic; None if none is.

    An attribute is static. A shape is not, and is no memory that somebody would have to
    read: (0, low, low + high, ...), what each axis's padding is beyond the attribute. The
    sum, since 'SAME' makes it certainly not negative, which a high side by itself is not.
    """
    if is_static([pad for pair in geometry.padding for pad in pair]):
        return None
    shape = [0]
    for low, high in geometry.padding:
        rest_low = low - _static_part(low)
        shape += [rest_low, rest_low + high - _static_part(high)]
    return tuple(shape)


def attributes(
    geometry: ConvGeometry, platform: str, precision: Any, kernel: str = AUTO_KERNEL
) -> dict[str, Any]:
    """The custom call's attributes, which are also what the native planner reads.

    Only static values: sizes come from the buffers, and the handler checks them
    against these. Symbolic padding is zero here, see `padding_operand`.
    """

    def ints(values: Any) -> np.ndarray:
        return np.asarray(values, np.int64).reshape(-1)

    dnums = geometry.dimension_numbers
    lhs_layout, rhs_layout, out_layout = layouts(geometry, platform)
    return {
        "window_strides": ints(geometry.window_strides),
        "padding": ints([tuple(map(_static_part, pair)) for pair in geometry.padding]),
        "lhs_dilation": ints(geometry.lhs_dilation),
        "rhs_dilation": ints(geometry.rhs_dilation),
        "lhs_spec": ints(dnums.lhs_spec),
        "rhs_spec": ints(dnums.rhs_spec),
        "out_spec": ints(dnums.out_spec),
        "lhs_layout": ints(lhs_layout),
        "rhs_layout": ints(rhs_layout),
        "out_layout": ints(out_layout),
        "feature_group_count": np.int64(geometry.feature_group_count),
        "batch_group_count": np.int64(geometry.batch_group_count),
        "allow_tf32": np.bool_(allows_tf32(precision)),
        "kernel": kernel,
    }


def export_checks() -> list[export.DisabledSafetyCheck]:
    """The safety checks that `jax.export` has to leave out for programs with the kernels.

    `jax.export` refuses custom calls whose stability it cannot vouch for. This package
    vouches for its own (docs/export.md); the process that runs the exported program has
    to import `jax_convgrad`, which registers the handler.

    Returns:
        The value for `disabled_checks` of `jax.export.export`, to which others may be added.

    Examples:
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
