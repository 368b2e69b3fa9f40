"""Which kinds of convolution XLA computes faster than the kernels on a CPU, and which of 16
bits the kernels compute faster in float32.

A rule belongs here for convolutions that were measured to lose to lax, widened to their
neighbours. `dispatch.choose` asks; `explain` prints the reason.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import native, planner
from .geometry import ConvGeometry
from .maps import FILTER_GRAD, FORWARD, INPUT_GRAD, Map, exchanged

_FEW_TERMS = 3  # channels of a pointwise layer that XLA computes as a loop over elements


def _as_elements(g: ConvGeometry) -> str | None:
    """Why XLA computes a layer as products of whole arrays, or sums of few of them, or None.

    So it does where an output position sees the input of its number and no other.
    """
    (_, lhs_feature, *_), (out_feature, in_feature, *_), (_, feature, *_) = g.dimension_numbers
    if (
        math.prod(g.window_sizes) != 1
        or g.in_sizes != g.out_sizes
        or max(g.lhs_dilation, default=1) > 1
    ):
        return None
    channels = g.lhs_shape[lhs_feature]
    if g.batch_group_count == 1 and channels == g.feature_group_count == g.rhs_shape[out_feature]:
        return "of one tap and one channel a group, which XLA computes as a product of elements"
    few = max(g.rhs_shape[out_feature], g.rhs_shape[in_feature]) <= _FEW_TERMS
    if g.groups == 1 and few and lhs_feature == feature == len(g.lhs_shape) - 1:
        return f"of one tap and at most {_FEW_TERMS} channels, which XLA computes as elements"
    return None


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


_FEW_POSITIONS = 4  # of all images


def _is_outer_product(g: ConvGeometry) -> bool:
    """Whether a filter gradient has hardly more products than elements."""
    positions = math.prod(g.out_sizes) * g.lhs_shape[g.dimension_numbers.lhs_spec[0]]
    return math.prod(g.window_sizes) == 1 and g.groups == 1 and positions <= _FEW_POSITIONS


_MOST_SUMMED = 1 << 14  # products of an element of dW, which a forward map adds one by one


def is_faster_exchanged(geometry: ConvGeometry, map_: Map) -> bool:
    """Whether a map is better asked of the convolution with filter and y exchanged.

    What decides is whether the filter or y has more positions. The filter gradient's kernels
    add to all of dW, position of y by position, and so carry a large dW through memory again
    and again. The forward map's finish one sum after another. Sizes are static.
    """
    g = geometry
    lhs_spec, rhs_spec, _ = g.dimension_numbers
    taps, positions = math.prod(g.window_sizes), math.prod(g.out_sizes)
    if map_ is INPUT_GRAD or g.groups > 1 or not 0 < positions <= taps:
        return False
    if planner.out_of_range(other := exchanged(g)):
        return False
    if map_ is FORWARD:
        is_gradient = lhs_spec[0] > 0 and taps > positions  # as lax writes one of the filter
        return is_gradient and slower_than_xla(other, "cpu", FILTER_GRAD) is None
    images, features = g.lhs_shape[lhs_spec[0]], g.rhs_shape[rhs_spec[0]]
    if images * positions > _MOST_SUMMED:
        return False
    rows_lie_in_memory = lhs_spec[-1] == rhs_spec[-1] == len(g.lhs_shape) - 1
    if rows_lie_in_memory and features <= 8:
        pays = taps >= 4 * positions  # lanes hold dW's rows
    else:
        is_large = images >= 3 and math.prod(g.rhs_shape) >= 100_000
        pays = is_large and (rows_lie_in_memory or features >= 24)
    # The forward map's kernels multiply the zeros of padding.
    return pays and 2 * other.connections >= taps * positions


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
        if _is_outer_product(geometry):
            return f"of one tap and at most {_FEW_POSITIONS} positions, all of it writing dW"
        return None
    slower = _as_elements(geometry)
    return _slower_forward(geometry) if slower is None and map_ is FORWARD else slower


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
        # A filter gradient, as lax writes it, that `is_faster_exchanged` leaves to lax.
        if math.prod(geometry.window_sizes) > math.prod(geometry.out_sizes):
            return "images do not come first, and the window is larger than the result"
    return None


_FEW_SUMMED = 4  # channels
_MANY_TAPS = 9


def is_faster_in_float32(geometry: ConvGeometry, map_: Map, dtype: Any, kernel: str) -> bool:
    """Whether operands of 16 bits are worth widening before the kernel.

    Taps of few channels are merged into one sum where rows are read in place (csrc/cpu/planner),
    which 16-bit types are not. Not where the processor has bfloat16 products. Sizes are static,
    and `kernel` is what the planner chose for this dtype.
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
    # With few positions of y, and fewer than taps, widening the filter outweighs the sums.
    positions = math.prod(geometry.out_sizes)
    return summed <= _FEW_SUMMED and taps >= _MANY_TAPS and (taps <= positions or positions >= 512)


def slower_widened(geometry: ConvGeometry, map_: Map) -> str | None:
    """Why lax is preferred to a kernel for widened operands, or None."""
    if map_ is INPUT_GRAD and max(geometry.lhs_dilation) > 1:
        return "the input gradient of a transposed layer of few channels, in 16 bits"
    return None
