"""Which kinds of convolution XLA computes faster than the kernels on a CPU, and which of 16
bits the kernels compute faster in float32.

A rule belongs here for convolutions that were measured to lose to lax, widened to their
neighbours. `dispatch.choose` asks; `explain` prints the reason.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import native
from .geometry import ConvGeometry
from .maps import FILTER_GRAD, FORWARD, Map


def _meets_its_position_alone(g: ConvGeometry) -> bool:
    """Whether an output position sees the input of its number, by one tap, and no other."""
    return (
        math.prod(g.window_sizes) == 1
        and g.in_sizes == g.out_sizes
        and max(g.lhs_dilation, default=1) == 1
    )


def _is_elementwise(g: ConvGeometry) -> bool:
    """Whether every output is one input times the filter's one number for its channel."""
    channels = g.lhs_shape[g.dimension_numbers.lhs_spec[1]]
    return (
        _meets_its_position_alone(g)
        and g.batch_group_count == 1
        and g.feature_group_count == channels == g.rhs_shape[g.dimension_numbers.rhs_spec[0]]
    )


# Channels of a pointwise layer that XLA computes as a loop over elements.
_FEW_TERMS = 3


def _is_sum_of_elements(g: ConvGeometry) -> bool:
    """Whether every output is a sum of at most three inputs of its position, side by side."""
    lhs_spec, rhs_spec, out_spec = g.dimension_numbers
    last = len(g.lhs_shape) - 1
    return (
        _meets_its_position_alone(g)
        and g.groups == 1
        and max(g.rhs_shape[rhs_spec[0]], g.rhs_shape[rhs_spec[1]]) <= _FEW_TERMS
        and lhs_spec[1] == out_spec[1] == last
    )


_FEW_PAIRS = 8  # of an input and an output channel
_FEW_TAPS = 32


def _leaves_lanes_empty(g: ConvGeometry) -> bool:
    """Whether a filter gradient has so few pairs of channels that XLA's sums are faster.

    The kernels keep channels in vector lanes. XLA is faster with one pair along one axis or
    with few taps, and with up to eight where a window along one axis is longer than the result.
    """
    _, rhs_spec, _ = g.dimension_numbers
    pairs = g.rhs_shape[rhs_spec[0]] * g.rhs_shape[rhs_spec[1]]
    taps = math.prod(g.window_sizes)
    one_axis = sum(max(sizes) > 1 for sizes in zip(g.in_sizes, g.window_sizes, strict=True)) <= 1
    if g.groups > 1 or pairs > _FEW_PAIRS:
        return False
    if pairs == 1 and (one_axis or taps <= _FEW_TAPS):
        return True
    return one_axis and taps > math.prod(g.out_sizes)


def slower_than_xla(geometry: ConvGeometry, platform: str, map_: Map) -> str | None:
    """Why lax is preferred where a kernel could run, or None.

    Args:
        geometry: the convolution; of symbolic sizes the kernel is preferred on a CPU.
        platform: "cpu" or "cuda".
        map_: what is computed.
    """
    if platform == "cuda":
        # Wrong in some cases, but a promise: never slower than lax without being asked.
        return "no GPU measurements yet; JAX_CONVGRAD=on or implementation='native' run the kernel"
    if not geometry.is_static:
        return None
    if map_ is FILTER_GRAD:
        if _leaves_lanes_empty(geometry):
            return "of so few channels that vector lanes, which hold them, would be empty"
        return None
    if _is_elementwise(geometry):
        return "of one tap and one channel a group, which XLA computes as a product of elements"
    if _is_sum_of_elements(geometry):
        return f"of one tap and at most {_FEW_TERMS} channels, which XLA computes as elements"
    return _slower_forward(geometry) if map_ is FORWARD else None


# With a 4x4 filter of 512 and 1024 channels lax was 1.2 times as fast at 170 times.
_LARGE_FILTER = 4


def _slower_forward(geometry: ConvGeometry) -> str | None:
    """Why lax is preferred for a forward pass, beyond what holds for gradients too, or None."""
    # Of a transposed layer. Elsewhere lax is as often far slower: where the window is larger
    # than the image.
    if max(geometry.lhs_dilation, default=1) > 1:
        activations = math.prod(geometry.lhs_shape) + math.prod(geometry.out_shape)
        if math.prod(geometry.rhs_shape) > _LARGE_FILTER * activations:
            return f"a transposed layer with a filter over {_LARGE_FILTER} times its activations"
    if at := geometry.dimension_numbers.lhs_spec[0]:
        if at == len(geometry.lhs_shape) - 1:
            return "images come last in memory, so that channels are gathered one by one"
        # The filter gradient, written as a convolution whose filter is dY and whose images are
        # the channels of x. `conv_filter_grad` computes that faster than either.
        if math.prod(geometry.window_sizes) > math.prod(geometry.out_sizes):
            return "images do not come first, and the window is larger than the result"
    return None


_FEW_SUMMED = 4  # channels
_MANY_TAPS = 9


def is_faster_in_float32(geometry: ConvGeometry, dtype: Any, map_: Map, kernel: str) -> bool:
    """Whether operands of 16 bits are worth widening before the kernel.

    Taps of few channels are merged into one sum where rows are read in place (csrc/cpu/planner),
    which 16-bit types are not. Not where the processor has bfloat16 products.

    Args:
        geometry: the convolution, of static sizes.
        dtype: of the operands.
        map_: what is computed.
        kernel: that the planner chose for this dtype.
    """
    if map_ is FILTER_GRAD or kernel != "gemm" or geometry.groups > 1:
        return False
    name = np.dtype(dtype).name
    if name not in ("bfloat16", "float16"):
        return False
    assert native.cpu is not None
    if name == "bfloat16" and native.cpu.isa() in ("avx512_bf16", "amx"):
        return False
    _, rhs_spec, _ = geometry.dimension_numbers
    summed = geometry.rhs_shape[rhs_spec[1 if map_ is FORWARD else 0]]
    taps = math.prod(geometry.window_sizes)
    # With fewer positions of y than taps, widening the filter outweighs the sums.
    pays = _MANY_TAPS <= taps <= math.prod(geometry.out_sizes)
    return summed <= _FEW_SUMMED and pays
