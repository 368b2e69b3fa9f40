"""The geometries that tests, `check` and benchmarks share, and what counts as correct.

`named_cases` is a fixed list with one reason per entry; `random_case` draws any valid
geometry. All are small enough for a float64 reference by lax to take milliseconds.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..geometry import ConvGeometry, dilated_size
from ..maps import FILTER_GRAD, FORWARD, INPUT_GRAD, Map, exchanged


@dataclasses.dataclass(frozen=True)
class Case:
    """A geometry with the name that a test id or a report line shows."""

    name: str
    geometry: ConvGeometry


# Normwise error |out - ref| / |ref| against float64: what rounding alone can reach, with
# the operands rounded to the dtype before the reference is computed. To TF32 the kernel
# rounds: Hopper's multiplier cuts both factors off after 10 bits, each wrong by up to
# 2^-10, and always towards zero, so that a sum of few products keeps the error of one.
TOLERANCES = {
    "float64": (0.0, 1e-14),
    "float32": (1e-6, 3e-8),
    "tf32": (2e-3, 0.0),
    "bfloat16": (4e-3, 0.0),
    "float16": (1e-3, 0.0),
}


def tolerance(dtype: Any, taps: int) -> float:
    """The largest normwise error that counts as correct.

    Args:
        dtype: a floating dtype, or "tf32" for float32 with products rounded to TF32.
        taps: length of the sum behind one output, see `reduction_taps`.

    Returns:
        The bound, for `normwise_error` against a float64 reference.

    Raises:
        ValueError: the table has no such dtype.
    """
    name = "tf32" if isinstance(dtype, str) and dtype == "tf32" else np.dtype(dtype).name
    if name not in TOLERANCES:
        raise ValueError(f"tolerance dtype must be one of {', '.join(TOLERANCES)}, got {name}.")
    constant, per_root_tap = TOLERANCES[name]
    return max(constant, per_root_tap * math.sqrt(max(taps, 1)))


def reduction_taps(geometry: ConvGeometry, map_: Map = INPUT_GRAD) -> int:
    """Products that one element of a map's result can sum.

    K*R*S for dX and C*R*S for y, of a group's channels, and N*P*Q for dW.
    """
    out_feature, in_feature, *_ = geometry.dimension_numbers.rhs_spec
    if map_ is FILTER_GRAD:
        images = geometry.out_shape[geometry.dimension_numbers.out_spec[0]]
        return images * math.prod(geometry.out_sizes)
    if map_ is FORWARD:
        return geometry.rhs_shape[in_feature] * math.prod(geometry.window_sizes)
    out_channels = geometry.rhs_shape[out_feature] // geometry.groups
    return out_channels * math.prod(geometry.window_sizes)


def normwise_error(out: Any, ref: Any) -> float:
    """|out - ref| / |ref| in Frobenius norms; infinite if `out` holds a NaN or an Inf.

    Args:
        out: array under test, of any floating dtype.
        ref: reference of the same shape.

    Returns:
        The error. 0 for two empty arrays, and where `ref` is zero 0 or infinity.
    """
    out, ref = np.asarray(out).astype(np.float64), np.asarray(ref).astype(np.float64)
    if out.shape != ref.shape:
        raise ValueError(f"normwise_error shapes must agree, got {out.shape} and {ref.shape}.")
    difference = float(np.linalg.norm((out - ref).ravel()))
    scale = float(np.linalg.norm(ref.ravel()))
    if not math.isfinite(difference):
        return math.inf
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf


def classify(geometry: ConvGeometry) -> str:
    """The class under which a report groups a geometry; the first that fits."""
    lhs_spec, rhs_spec, _ = geometry.dimension_numbers
    if 0 in geometry.lhs_shape + geometry.rhs_shape + geometry.out_shape:
        return "empty"
    if geometry.batch_group_count > 1:
        return "batch groups"
    if max(geometry.lhs_dilation) > 1:
        return "lhs dilation"
    parts = []
    if geometry.groups > 1:
        depthwise = geometry.groups == geometry.lhs_shape[lhs_spec[1]]
        parts.append("depthwise" if depthwise else "grouped")
    elif geometry.rhs_shape[rhs_spec[1]] <= 4:
        parts.append("few channels")
    elif math.prod(geometry.window_sizes) == 1:
        parts.append("pointwise")
    else:
        parts.append("dense")
    if max(geometry.window_strides) > 1:
        parts.append("strided")
    if max(geometry.rhs_dilation) > 1:
        parts.append("dilated")
    return " ".join(parts)


_LAYOUTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "last": (("NWC", "WIO", "NWC"), ("NHWC", "HWIO", "NHWC"), ("NDHWC", "DHWIO", "NDHWC")),
    "first": (("NCW", "OIW", "NCW"), ("NCHW", "OIHW", "NCHW"), ("NCDHW", "OIDHW", "NCDHW")),
    # Layouts that no library uses and lax allows, different for each operand.
    "odd": (("WCN", "IWO", "CNW"), ("CHWN", "IHWO", "HNCW"), ("HNDCW", "WOHID", "CDNHW")),
}


def layout(name: str, axes: int) -> tuple[str, str, str]:
    """Dimension numbers by name ("last", "first" or "odd") for 1 to 3 spatial axes."""
    return _LAYOUTS[name][axes - 1]


def make_geometry(
    spatial: tuple[int, ...],
    window: tuple[int, ...],
    channels: tuple[int, int],
    *,
    batch: int = 2,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[tuple[int, int], ...] = 0,
    lhs_dilation: int | tuple[int, ...] = 1,
    rhs_dilation: int | tuple[int, ...] = 1,
    feature_groups: int = 1,
    batch_groups: int = 1,
    dimension_numbers: tuple[str, str, str] | str = "last",
) -> ConvGeometry:
    """A geometry from sizes by role, whatever the layout. Numbers hold for every axis.

    Args:
        spatial: input sizes, one per axis.
        window: filter sizes, one per axis.
        channels: input and output channels, over all groups.
        batch: images.
        stride: of the window.
        padding: 'SAME', 'VALID', a number for both sides, or pairs (low, high).
        lhs_dilation: of the input.
        rhs_dilation: of the filter.
        feature_groups: groups of channels.
        batch_groups: groups of images.
        dimension_numbers: three strings, or the name of a layout.

    Returns:
        The geometry.

    Raises:
        ValueError: as `ConvGeometry.parse` does.
    """
    axes = len(spatial)
    if isinstance(dimension_numbers, str):
        dimension_numbers = layout(dimension_numbers, axes)
    lhs_spec, rhs_spec, _ = dimension_numbers
    letters = {1: "W", 2: "HW", 3: "DHW"}[axes]
    rhs_sizes = (channels[1], channels[0] // feature_groups, *window)
    lhs: dict[str, int] = dict(zip("NC" + letters, (batch, channels[0], *spatial), strict=True))
    rhs: dict[str, int] = dict(zip("OI" + letters, rhs_sizes, strict=True))

    def per_axis(value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * axes if isinstance(value, int) else value

    return ConvGeometry.parse(
        [lhs[letter] for letter in lhs_spec],
        [rhs[letter] for letter in rhs_spec],
        per_axis(stride),
        ((padding, padding),) * axes if isinstance(padding, int) else padding,
        per_axis(lhs_dilation),
        per_axis(rhs_dilation),
        dimension_numbers,
        feature_groups,
        batch_groups,
    )


def named_cases() -> list[Case]:
    """The fixed list: every class of layer, and every corner that a kernel can get wrong."""
    g = make_geometry
    table: dict[str, ConvGeometry] = {
        # The everyday layers, in both layouts.
        "dense_3x3": g((10, 10), (3, 3), (16, 32), padding=1),
        "dense_3x3_nchw": g((10, 10), (3, 3), (16, 32), padding=1, dimension_numbers="first"),
        "dense_3x3_wide": g((9, 7), (3, 3), (64, 128), padding=1),
        # So few positions that a filter block is used once.
        "dense_3x3_deep": g((5, 6), (3, 3), (256, 48), padding=1),
        "dense_deep_s2": g((7, 5), (3, 2), (192, 100), stride=2, padding=1),
        "dense_5x5_valid": g((11, 12), (5, 5), (8, 24)),
        "dense_1d": g((33,), (5,), (16, 24), padding=2),
        "dense_1d_ncw": g((33,), (5,), (16, 24), padding=2, dimension_numbers="first"),
        "dense_3d": g((5, 6, 7), (3, 3, 3), (8, 16), padding=1),
        "pointwise": g((7, 9), (1, 1), (48, 72)),
        "pointwise_s2": g((9, 9), (1, 1), (32, 64), stride=2),
        "dense_s2": g((12, 12), (3, 3), (16, 32), stride=2, padding=1),
        "dense_s2_same": g((12, 12), (3, 3), (16, 32), stride=2, padding="SAME"),
        "dense_s2_nchw": g((12, 11), (3, 3), (24, 16), stride=2, padding=1,
                           dimension_numbers="first"),
        "stem_7x7_s2": g((20, 20), (7, 7), (3, 32), stride=2, padding=3),
        "patch_4x4_s4": g((16, 16), (4, 4), (3, 48), stride=4),
        "gray_5x5": g((14, 14), (5, 5), (1, 8), padding=2),
        # Few input channels and out channels that fill no vectors, rows that fill no tiles.
        "stem_odd_outputs": g((7, 37), (3, 3), (3, 21), padding=1),
        # Rows long enough for strips of short sums: whole panels and the rest of one, two
        # strips, an axis of phases and one of taps that some rows lack.
        "strips_stem_s2": g((5, 123), (3, 3), (3, 40), stride=2, padding=1),
        "strips_stem_nchw": g((4, 61), (3, 3), (2, 19), padding=1, dimension_numbers="first"),
        "strips_column": g((9, 50), (3, 1), (5, 33), rhs_dilation=(2, 1),
                           padding=((3, 2), (0, 0))),
        "strips_phases": g((5, 27), (4, 1), (24, 17), lhs_dilation=(3, 1),
                           padding=((2, 1), (0, 0))),
        "strips_3d": g((3, 4, 30), (2, 3, 1), (6, 18), batch=1, padding=((1, 1), (1, 0), (0, 0))),
        "strips_of_padding": g((4, 20), (3, 3), (3, 20), padding=((1, 1), (-25, 30))),
        "strips_cropped": g((4, 40), (3, 3), (3, 17), padding=((1, 1), (-7, 2))),
        # The window is longer than x, which is taken for the filter and read backwards.
        "strips_backwards": g((3,), (100,), (1, 8), batch=14, padding=97,
                              dimension_numbers="first"),
        "strips_backwards_one_tap": g((1,), (100,), (1, 8), batch=20, padding=99,
                                      dimension_numbers="first"),
        # Tasks pack their own blocks of the filter on some numbers of threads alone.
        "strips_or_parts": g((24,), (2,), (112, 176), batch=8, padding=1),
        "strips_taps": g((3, 61), (2, 3), (3, 20), stride=(1, 2), rhs_dilation=(1, 2)),
        "strips_groups": g((3, 31), (1, 1), (80, 96), feature_groups=2, padding=((1, 0), (0, 0))),
        # Columns of few channels by few taps, in rows: another kernel would do.
        "patch_2x2_gray": g((64, 64), (2, 2), (1, 16), stride=2, dimension_numbers="first"),
        # Fully connected layers: taps become channels, before or behind the layer's own.
        "whole_window": g((5, 4), (5, 4), (3, 40), batch=7),
        "whole_window_nchw": g((5, 4), (5, 4), (3, 40), batch=7, dimension_numbers="first"),
        "whole_window_gray": g((2, 3, 4), (2, 3, 4), (1, 9), dimension_numbers="first"),
        "whole_window_dilated": g((7, 9), (3, 9), (2, 20), batch=5, rhs_dilation=(3, 1)),
        "whole_window_row": g((6, 31), (3, 31), (4, 18)),
        # Runs of positions that end within a vector, also after the first slice of channels.
        "dots_images": g((5, 7), (1, 1), (7, 9), batch=3, dimension_numbers="first"),
        "dots_rows": g((6, 19), (1, 1), (106, 12), stride=(2, 1), feature_groups=2,
                       padding=((0, 0), (-1, 0)), dimension_numbers="first"),
        "dots_chunks": g((50, 43), (1, 1), (4, 6), dimension_numbers="first"),
        "gray_5x9_s2": g((9, 51), (5, 9), (1, 37), batch=1, stride=2, padding=((1, 2), (3, 0))),
        "two_channels_dilated": g((5, 23), (2, 3), (2, 19), stride=(1, 2), lhs_dilation=(1, 3),
                                  rhs_dilation=2, padding=2),
        "seven_channels_3d": g((3, 4, 11), (2, 3, 3), (7, 33), batch=1, stride=(1, 2, 1),
                               padding=1),
        "dilated_12": g((17, 17), (3, 3), (16, 16), rhs_dilation=12, padding=12),
        "dilated_causal_1d": g((40,), (2,), (12, 20), rhs_dilation=16, padding=((16, 0),)),
        "strided_dilated": g((17, 15), (3, 3), (16, 24), stride=2, rhs_dilation=2, padding=2),
        "depthwise_3x3": g((10, 10), (3, 3), (32, 32), padding=1, feature_groups=32),
        "depthwise_3x3_nchw": g((10, 10), (3, 3), (32, 32), padding=1, feature_groups=32,
                                dimension_numbers="first"),
        "depthwise_7x7": g((12, 12), (7, 7), (24, 24), padding=3, feature_groups=24),
        "depthwise_31x31": g((20, 18), (31, 31), (8, 8), padding=15, feature_groups=8),
        "depthwise_3x3_s2": g((7, 6), (3, 3), (300, 300), batch=1, stride=2, padding=1,
                              feature_groups=300),
        "depthwise_5x5": g((16, 9), (5, 5), (14, 14), padding=2, feature_groups=14),
        "depthwise_lattices": g((21, 17), (3, 3), (4, 4), stride=4, rhs_dilation=6, padding=7,
                                feature_groups=4),
        "depthwise_strided_dilated": g((13, 14), (3, 3), (6, 6), stride=(2, 4),
                                       rhs_dilation=(4, 2), padding=((3, 4), (2, 1)),
                                       feature_groups=6),
        "depthwise_column": g((23, 1), (3, 1), (6, 6), padding=((1, 1), (0, 0)),
                              feature_groups=6),
        "depthwise_long_1d": g((12,), (260,), (32, 32), batch=1, padding=130,
                               feature_groups=32),
        "depthwise_s2": g((13, 13), (5, 5), (20, 20), stride=2, padding=2, feature_groups=20),
        "depthwise_dilated": g((14, 14), (3, 3), (16, 16), rhs_dilation=4, padding=4,
                               feature_groups=16),
        "depthwise_1d": g((37,), (3,), (64, 64), rhs_dilation=8, padding=8, feature_groups=64),
        "depthwise_3d": g((4, 6, 6), (3, 3, 3), (12, 12), padding=1, feature_groups=12),
        "depthwise_multiplier": g((9, 9), (3, 3), (12, 36), padding=1, feature_groups=12),
        "grouped": g((9, 9), (3, 3), (32, 64), padding=1, feature_groups=8),
        "grouped_s2": g((9, 9), (3, 3), (32, 32), stride=2, padding=1, feature_groups=4,
                        dimension_numbers="first"),
        "grouped_pointwise": g((6, 6), (1, 1), (24, 36), feature_groups=3),
        # As ResNeXt and RegNet have them: blocks of a few channels, more than 32 in all.
        "grouped_by_4": g((8, 7), (3, 3), (64, 64), padding=1, feature_groups=16),
        "grouped_by_8_s2": g((9, 7), (3, 3), (48, 48), batch=1, stride=2, padding=1,
                             feature_groups=6),
        "grouped_by_16_s2": g((7, 4), (3, 3), (64, 64), batch=1, stride=2, padding=1,
                              feature_groups=4),
        "grouped_by_24": g((4, 4), (3, 3), (72, 72), batch=1, padding=1, feature_groups=3),
        "grouped_by_32": g((6, 7), (1, 3), (64, 64), batch=1, padding=((0, 0), (1, 1)),
                           feature_groups=2),
        "grouped_uneven": g((5, 6), (2, 3), (24, 48), padding=1, feature_groups=2,
                            rhs_dilation=(2, 1)),
        "grouped_3d": g((4, 4, 3), (3, 2, 3), (32, 16), stride=(2, 1, 2), padding=1,
                        feature_groups=4),
        "grouped_all_dilated": g((9, 10), (3, 3), (16, 16), stride=(2, 3), lhs_dilation=(3, 2),
                                 rhs_dilation=(2, 3), padding=3, feature_groups=4),
        "transposed_4x4_s2": g((6, 6), (4, 4), (16, 8), lhs_dilation=2, padding=2),
        "transposed_1d_s8": g((10,), (16,), (16, 8), lhs_dilation=8, padding=11),
        # No size a multiple of any vector, tile or unroll.
        "odd_channels": g((7, 5), (3, 3), (67, 131), padding=1),
        "odd_channels_nchw": g((7, 5), (3, 3), (19, 21), padding=1, dimension_numbers="first"),
        "odd_depthwise": g((9, 11), (3, 3), (29, 29), padding=1, feature_groups=29),
        "odd_layouts_1d": g((13,), (3,), (5, 7), padding=1, dimension_numbers="odd"),
        "odd_layouts": g((9, 8), (3, 2), (10, 6), stride=(2, 1), padding=1,
                         feature_groups=2, dimension_numbers="odd"),
        "odd_layouts_3d": g((4, 5, 3), (2, 3, 1), (5, 7), dimension_numbers="odd"),
        # A gemm kernel left parts of this unwritten in float64, right in every other dtype.
        "gemm_f64_odd_layouts": g((1, 5), (3, 3), (14, 2), batch=3, padding=((2, 0), (1, 2)),
                                     dimension_numbers=("CHWN", "IHWO", "HNCW")),
        "all_ones": g((1, 1), (1, 1), (1, 1), batch=1),
        # Phases without a tap, and axes that differ.
        "stride_above_window": g((13, 13), (2, 2), (8, 8), stride=3),
        "stride_above_input": g((3, 3), (1, 1), (8, 8), stride=5),
        "stride_leaves_tail": g((12, 12), (3, 3), (8, 16), stride=4),
        # Most of dX is zeros: those are cleared, and a kernel visits the rest.
        "stride_8_pointwise": g((41, 35), (1, 1), (16, 8), stride=(8, 7)),
        "stride_8_pointwise_nchw": g((17, 26), (1, 1), (9, 16), stride=8,
                                     dimension_numbers="first"),
        "stride_100_1d": g((350,), (3,), (6, 16), stride=100, padding=((5, 2),),
                           dimension_numbers="first"),
        "stride_meets_only_padding": g((3, 9), (1, 1), (16, 8), stride=(8, 2),
                                       padding=((3, 5), (0, 0))),
        # Windows many times as large as the result, in which dY is taken for the filter.
        "long_window_1d": g((150,), (130,), (3, 5), batch=4),
        "long_window_1d_ncw": g((230,), (97,), (1, 1), batch=5, stride=11, rhs_dilation=2,
                                padding=3, dimension_numbers="first"),
        "long_window_images": g((14, 13), (12, 11), (5, 3), batch=9),
        "long_window_images_nchw": g((12, 13), (11, 12), (1, 18), batch=20,
                                     padding=((1, 0), (0, 1)), dimension_numbers="first"),
        "long_window_dilated": g((9, 40), (5, 33), (4, 2), lhs_dilation=(2, 1), stride=(3, 2),
                                 dimension_numbers="odd"),
        "long_window_images_last": g((280,), (23,), (1, 5), batch=18, rhs_dilation=12,
                                     padding=((3, 4),),
                                     dimension_numbers=("CWN", "IWO", "WNC")),
        # Sums of few terms, with more columns than a panel has; many taps; a rest of columns.
        "short_sums": g((9, 7), (5, 1), (70, 2), padding=((2, 2), (0, 0))),
        "short_sums_nchw": g((9, 7), (3, 3), (41, 3), padding=1, dimension_numbers="first"),
        "short_sums_many_taps": g((11, 6), (11, 5), (83, 1), batch=3, padding=((5, 5), (2, 2))),
        "short_sums_strided": g((12, 13), (3, 4), (67, 5), stride=(2, 3), padding=1),
        "short_sums_grouped": g((8, 5), (2, 3), (105, 9), feature_groups=3),
        # Two to four taps of a column side by side; planes of a few positions.
        "few_taps_two": g((2,), (2,), (21, 40), batch=5, padding=((1, 0),),
                          dimension_numbers="first"),
        "few_taps_three": g((3, 2), (3, 1), (37, 19), padding=((1, 1), (0, 0)),
                            dimension_numbers="first"),
        "few_taps_four": g((5,), (4,), (18, 50), padding=2, dimension_numbers="first"),
        # A window that meets one y: each of its taps is a phase, or a column.
        "single_y": g((1, 33), (1, 33), (6, 21), batch=9),
        "single_y_padded": g((5, 6), (7, 8), (18, 5), batch=2, padding=1),
        "single_y_dilated": g((9, 4), (4, 2), (5, 12), rhs_dilation=(2, 3),
                              padding=((-1, -1), (0, 0))),
        # Taps that meet padding alone, in front, behind, between.
        "idle_taps": g((1, 2), (3, 5), (18, 7), batch=3, padding=((1, 1), (2, 2))),
        "idle_taps_nchw": g((2, 1), (7, 3), (4, 20), padding=((5, 2), (0, 2)), stride=(2, 1),
                            dimension_numbers="first"),
        "idle_taps_dilated": g((3, 5), (3, 3), (6, 5), rhs_dilation=(4, 7), lhs_dilation=(2, 1),
                               padding=((4, 4), (7, 7))),
        # Pointwise: all axes and images are one row, or must not be.
        "pointwise_row": g((3, 5), (1, 1), (8, 40), batch=19),
        "pointwise_row_nchw": g((6, 7), (1, 1), (3, 5), batch=3, dimension_numbers="first"),
        "pointwise_dilated": g((31,), (1,), (7, 23), rhs_dilation=2),
        # Rows so short that another axis is taken for them.
        "short_rows": g((45, 5), (5, 3), (2, 37), stride=(1, 3)),
        "short_rows_nchw": g((57, 2), (3, 3), (3, 6), stride=2, padding=1,
                             dimension_numbers="first"),
        # Few groups of several channels, for which lanes hold pixels, or gemm is faster.
        "few_groups": g((4, 40), (1, 7), (5, 20), padding=((1, 1), (3, 3)), feature_groups=5),
        "few_groups_short": g((5, 6), (1, 3), (7, 42), stride=(1, 2), feature_groups=7),
        "three_channels_depthwise": g((50,), (15,), (3, 3), padding=7, feature_groups=3),
        # A signal, as a net for images has it: along the first of two axes.
        "signal_in_first_axis": g((61, 1), (5, 1), (3, 12), stride=2),
        "signal_in_first_axis_nchw": g((61, 1), (5, 1), (3, 12), stride=2,
                                       dimension_numbers="first"),
        "signal_in_first_axis_3d": g((47, 1, 1), (4, 1, 1), (12, 5), rhs_dilation=(3, 1, 1),
                                     padding=((2, 1), (0, 0), (0, 0))),
        "axes_differ": g((9, 20), (2, 5), (8, 12), stride=(1, 4), padding=((0, 1), (3, 2)),
                         rhs_dilation=(2, 1)),
        "asymmetric_padding": g((9, 9), (3, 3), (8, 16), stride=2, padding=((0, 1), (0, 1))),
        "negative_padding": g((10, 10), (3, 3), (8, 8), padding=((-1, -2), (2, -1))),
        "negative_padding_s2": g((11, 11), (3, 3), (8, 8), stride=2,
                                 padding=((-2, 1), (0, -3))),
        "padding_beyond_window": g((5, 5), (2, 2), (8, 8), padding=4),
        # Both dilations and the stride, with and without common factors.
        "lhs_dilated_coprime": g((7, 7), (3, 3), (8, 8), stride=2, lhs_dilation=3, padding=2),
        "lhs_dilated_common": g((6, 6), (3, 3), (8, 8), stride=4, lhs_dilation=6, padding=3),
        "all_dilated": g((6, 5), (3, 3), (6, 10), stride=(2, 3), lhs_dilation=(3, 2),
                         rhs_dilation=(2, 3), padding=((4, 3), (5, 2))),
        "lhs_dilated_negative": g((6, 6), (3, 3), (8, 8), lhs_dilation=3,
                                  padding=((-2, -1), (1, -4))),
        "lhs_dilated_grouped": g((6, 6), (3, 3), (12, 12), lhs_dilation=2, padding=1,
                                 feature_groups=3),
        "batch_groups": g((6, 6), (3, 3), (5, 12), batch=6, padding=1, batch_groups=3),
        "batch_groups_s2": g((7, 7), (3, 3), (4, 8), batch=4, stride=2, padding=1,
                             batch_groups=4, dimension_numbers="first"),
        # Nothing to compute, or nothing to sum: dX must still be written.
        "window_beyond_input": g((3, 3), (5, 5), (4, 4)),
        "no_images": g((5, 5), (3, 3), (4, 4), batch=0),
        "no_input": g((0, 5), (1, 3), (4, 4), padding=1),
        "no_output_channels": g((5, 5), (3, 3), (4, 0)),
    }  # fmt: skip
    return [Case(name, geometry) for name, geometry in table.items()]


def random_case(seed: int, index: int) -> Case:
    """The index-th random geometry of a seed; each can be drawn without the others."""
    rng = random.Random(f"{seed}:{index}")
    while True:
        try:
            case = Case(f"random-{seed}-{index}", _draw(rng))
        except ValueError:  # padding took more than there is; draw again
            continue
        # lax computes the filter gradient as the other one.
        if _crops_an_axis(case.geometry) or _crops_an_axis(exchanged(case.geometry)):
            continue
        # Windows beyond the input come up often, and there is not much to learn from them.
        if classify(case.geometry) != "empty" or rng.random() < 0.3:
            return case


def _crops_an_axis(g: ConvGeometry) -> bool:
    """Whether negative padding leaves nothing of an axis: XLA:CPU of jaxlib 0.10.2 crashes on some.

    Such as x [1, 2, 13, 2] and w [1, 1, 2, 18], channels last, with strides (2, 1) and padding
    ((1, -2), (-2, -2)).
    """
    return any(
        size > 0 and dilated_size(size, dilation) + min(low, 0) + min(high, 0) <= 0
        for size, dilation, (low, high) in zip(g.in_sizes, g.lhs_dilation, g.padding, strict=True)
    )


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """The first `count` random geometries of a seed."""
    return (random_case(seed, index) for index in range(count))


def _draw(rng: random.Random) -> ConvGeometry:
    axes = rng.choices((1, 2, 3), weights=(3, 6, 2))[0]
    largest = {1: 40, 2: 13, 3: 6}[axes]
    spatial = tuple(rng.randint(1, largest) for _ in range(axes))
    window = tuple(rng.choice((1, 1, 2, 3, 3, 3, 4, 5)) for _ in range(axes))

    def factors(chance: float, most: int) -> tuple[int, ...]:
        if rng.random() > chance:
            return (1,) * axes
        return tuple(rng.randint(1, most) for _ in range(axes))

    stride, lhs_dilation = factors(0.5, 4), factors(0.2, 4)
    rhs_dilation = factors(0.25, 3)
    padding = tuple(
        (rng.randint(-2, size * dilation), rng.randint(-2, size * dilation))
        for size, dilation in zip(window, rhs_dilation, strict=True)
    )
    feature_groups = batch_groups = 1
    kind = rng.choices(("dense", "depthwise", "grouped", "batch"), weights=(10, 4, 4, 2))[0]
    if kind in ("depthwise", "grouped"):
        feature_groups = rng.randint(2, 20)
    elif kind == "batch":
        batch_groups = rng.randint(2, 4)
    # Above one vector (16 floats) and above one tile now and then, mostly tiny.
    width = rng.choice((3, 8, 20, 40)) if kind == "dense" else 4
    in_channels = 1 if kind == "depthwise" else rng.randint(1, width)
    out_channels = rng.randint(1, 2) if kind == "depthwise" else rng.randint(1, width)
    batch = rng.randint(1, 3) * batch_groups
    if rng.random() < 0.04:
        batch, out_channels, spatial = rng.choice(
            ((0, out_channels, spatial), (batch, 0, spatial),
             (batch, out_channels, (0,) * axes))
        )  # fmt: skip
    letters = {1: "W", 2: "HW", 3: "DHW"}[axes]
    named = rng.choice(("last", "last", "first", "first", "odd", "any"))
    dimension_numbers = layout("last" if named == "any" else named, axes)
    if named == "any":
        lhs, rhs, out = ("".join(rng.sample(s, len(s))) for s in ("NC" + letters, "OI" + letters,
                                                                   "NC" + letters))  # fmt: skip
        dimension_numbers = (lhs, rhs, out)
    return make_geometry(
        spatial,
        window,
        (in_channels * feature_groups, out_channels * feature_groups * batch_groups),
        batch=batch,
        stride=stride,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_groups=feature_groups,
        batch_groups=batch_groups,
        dimension_numbers=dimension_numbers,
    )
