"""What the custom call carries: its attributes, by platform, and its operands' layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from .geometry import ConvGeometry

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


def attributes(
    geometry: ConvGeometry, platform: str, precision: Any, kernel: str = AUTO_KERNEL
) -> dict[str, Any]:
    """The custom call's attributes, which are also what the native planner reads.

    Only static values: sizes come from the buffers, and the handler checks them
    against these.
    """

    def ints(values: Any) -> np.ndarray:
        return np.asarray(values, np.int64).reshape(-1)

    dnums = geometry.dimension_numbers
    lhs_layout, rhs_layout, out_layout = layouts(geometry, platform)
    return {
        "window_strides": ints(geometry.window_strides),
        "padding": ints(geometry.padding),
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
