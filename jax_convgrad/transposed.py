"""Transposed convolutions as maps of a convolution: shapes and padding only."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from . import arguments
from .geometry import ConvGeometry, DimensionNumbers, Padding, certainly, dilated_size
from .maps import FORWARD, INPUT_GRAD, Map

_FUNCTION = "conv_transpose"


def transposed_map(
    lhs_shape: tuple[int, ...],
    rhs_shape: tuple[int, ...],
    strides: Sequence[int],
    padding: Padding,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: DimensionNumbers,
    transpose_kernel: bool,
    use_consistent_padding: bool,
) -> tuple[Map, ConvGeometry]:
    """The map, and the convolution whose map it is, that a transposed convolution is.

    Without `transpose_kernel` it is the forward map of a convolution whose input is dilated
    by the strides. With it, the filter comes flipped and its channels swapped: with m its
    dilated extent and (a, b) the padding of the dilated input, output o meets input p and
    tap r where o = p*stride + a - (m - 1) + r*dilation, the input gradient of a convolution
    with that stride and pad_low = m - 1 - a.

    Args:
        lhs_shape: shape of conv_transpose's input.
        rhs_shape: shape of its filter.
        strides: the fractional stride.
        padding: as conv_transpose takes it.
        rhs_dilation: dilation of the filter, or None.
        dimension_numbers: layouts of lhs, rhs and the result.
        transpose_kernel: whether the filter comes flipped, its channel axes swapped.
        use_consistent_padding: whether integer padding is the forward convolution's.

    Returns:
        The map, and the geometry of the convolution.

    Raises:
        ValueError: an argument's value is out of range or contradicts another.
        TypeError: an argument is of the wrong kind.
    """
    axes = len(lhs_shape) - 2
    dnums = lax.conv_dimension_numbers(lhs_shape, rhs_shape, dimension_numbers)
    out_feature, in_feature = dnums.rhs_spec[:2]
    if transpose_kernel:
        out_feature, in_feature = in_feature, out_feature
    # Checks all but the padding, with the messages that every function has.
    probe = ConvGeometry.parse(
        lhs_shape,
        rhs_shape,
        strides,
        [(0, 0)] * axes,
        None,
        rhs_dilation,
        lax.ConvDimensionNumbers(
            dnums.lhs_spec, (out_feature, in_feature, *dnums.rhs_spec[2:]), dnums.out_spec
        ),
        function=_FUNCTION,
    )
    windows = [
        dilated_size(size, dilation)
        for size, dilation in zip(probe.window_sizes, probe.rhs_dilation, strict=True)
    ]
    pads = _input_pads(windows, probe.window_strides, padding, use_consistent_padding)
    out_shape = [0] * len(lhs_shape)
    out_shape[dnums.out_spec[0]] = lhs_shape[dnums.lhs_spec[0]]
    out_shape[dnums.out_spec[1]] = rhs_shape[out_feature]
    forward_padding = []
    for axis, dim in enumerate(dnums.out_spec[2:]):
        low, high = pads[axis]
        dilated = dilated_size(probe.in_sizes[axis], probe.window_strides[axis])
        if certainly(operator.lt, dilated + low + high, 0):
            raise ValueError(
                "Negative padding is larger than the size of the corresponding dimension: got "
                f"{_FUNCTION} padding={pads} for spatial axis {axis} of lhs shape {lhs_shape}."
            )
        out_shape[dim] = jax.core.max_dim(dilated + low + high - windows[axis] + 1, 0)
        # The high side is what makes the forward convolution's sizes come out exactly.
        forward_low = windows[axis] - 1 - low
        forward_high = dilated + windows[axis] - 1 - forward_low - out_shape[dim]
        forward_padding.append((forward_low, forward_high))
    if not transpose_kernel:
        return FORWARD, probe.replace(
            window_strides=(1,) * axes, lhs_dilation=probe.window_strides, padding=pads
        )
    return INPUT_GRAD, ConvGeometry(
        lhs_shape=tuple(out_shape),
        rhs_shape=rhs_shape,
        window_strides=probe.window_strides,
        padding=tuple(forward_padding),
        lhs_dilation=(1,) * axes,
        rhs_dilation=probe.rhs_dilation,
        # In the forward convolution the filter's output features are our input features.
        dimension_numbers=lax.ConvDimensionNumbers(
            dnums.out_spec, (in_feature, out_feature, *dnums.rhs_spec[2:]), dnums.lhs_spec
        ),
    )


def is_worth_a_flip(conv: ConvGeometry) -> bool:
    """Whether a forward map for which there is no kernel is done by that of the gradient.

    Its filter has to be flipped for that. So it is where lax would multiply zeros, between
    the elements of the input.
    """
    return (
        conv.is_static
        and conv.batch_group_count == 1
        and any(
            d > 1 and size > 1 for d, size in zip(conv.lhs_dilation, conv.in_sizes, strict=True)
        )
    )


def forward_as_input_grad(conv: ConvGeometry) -> ConvGeometry:
    """Returns the convolution whose input gradient is this convolution's forward map.

    Output p meets input h and tap r where p*stride = h*lhs_dilation + low - r*rhs_dilation.
    With the filter flipped, r' = R - 1 - r, that is an input gradient's index equation,
    with stride and lhs_dilation exchanged and the low padding (R - 1)*rhs_dilation - low:
    the inserted zeros of one are the stride of the other. The filter is to come from
    `lax_maps.transposed_filter`.

    Args:
        conv: a convolution with batch_group_count 1 and no size that is zero.

    Returns:
        The geometry, conv's result in the place of x and its input in that of dy.
    """
    lhs_spec, rhs_spec, out_spec = conv.dimension_numbers
    groups = conv.feature_group_count
    rhs_shape = list(conv.rhs_shape)
    rhs_shape[rhs_spec[0]] //= groups
    rhs_shape[rhs_spec[1]] *= groups
    return ConvGeometry(
        lhs_shape=conv.out_shape,
        rhs_shape=tuple(rhs_shape),
        window_strides=conv.lhs_dilation,
        padding=conv.transposed_padding,
        lhs_dilation=conv.window_strides,
        rhs_dilation=conv.rhs_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(
            out_spec, (rhs_spec[1], rhs_spec[0], *rhs_spec[2:]), lhs_spec
        ),
        feature_group_count=groups,
    )


def _input_pads(
    windows: list[int], strides: tuple[int, ...], padding: Any, use_consistent_padding: bool
) -> tuple[tuple[int, int], ...]:
    """Padding of the dilated input, low and high of each axis, read as lax reads it."""
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                f"{_FUNCTION} padding must be 'SAME', 'VALID' or a sequence of (low, high) pairs, "
                f"got {padding!r}."
            )
        sizes = list(zip(windows, strides, strict=True))
        if padding == "VALID":
            return tuple((m - 1, max(m, s) - 1) for m, s in sizes)
        lows = [m - 1 if s > m - 1 else (m + s - 1) // 2 for m, s in sizes]
        return tuple((low, m + s - 2 - low) for low, (m, s) in zip(lows, sizes, strict=True))
    pairs = arguments.explicit_padding(padding, _FUNCTION, len(strides))
    if not use_consistent_padding:
        return pairs
    return tuple((m - 1 - low, m - 1 - high) for m, (low, high) in zip(windows, pairs, strict=True))
