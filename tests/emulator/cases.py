"""The problems that the emulated kernels run, and the lines that core.cc reads them from."""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from jax_convgrad import ConvGeometry, custom_call
from jax_convgrad.tools import layers
from jax_convgrad.tools.geometries import (
    Case,
    make_geometry,
    named_cases,
    random_cases,
    reduction_taps,
    tolerance,
)

LAYERS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks/layers.json"
DTYPES = ("float64", "float32", "bfloat16", "float16")
# (CUDA_EMULATOR_EAGER, CUDA_EMULATOR_ORDER): spread over cases, so that each sees one.
MODES = (("0", "0"), ("1", "1"), ("0", "7"), ("1", "0"), ("0", "1"), ("1", "7"))


# Bytes of memory that was never written: NaNs, or numbers that are finite and large. The
# latter show mistakes that a kernel repairs because their results are not finite.
NAN_POISON, FINITE_POISON = "255", "71"


def environment(mode: tuple[str, str]) -> dict[str, str]:
    """The emulator's settings by a row of `MODES`: with the natural order NaNs as poison."""
    return {
        "CUDA_EMULATOR_EAGER": mode[0],
        "CUDA_EMULATOR_ORDER": mode[1],
        "CUDA_EMULATOR_POISON": NAN_POISON if mode[1] == "0" else FINITE_POISON,
    }


def products(g: ConvGeometry) -> int:
    """Products behind the whole of dX, an upper bound."""
    return math.prod(g.lhs_shape) * reduction_taps(g)


def wide_cases() -> list[Case]:
    """Geometries whose offsets take the kernels' 64-bit arithmetic, though they are small."""
    table = {
        # More phases than the table of the 32-bit kernels has.
        "phases_beyond_table": make_geometry((75,), (40,), (5, 6), stride=37, padding=((3, 2),)),
        "phases_beyond_table_2d": make_geometry((41, 5), (35, 2), (3, 4), stride=(33, 1)),
        # h*lhs_dilation and r*rhs_dilation beyond 2^31.
        "span_beyond_int32": make_geometry(
            (3,), (2,), (4, 5), stride=1 << 30, lhs_dilation=1 << 30,
            rhs_dilation=1 << 30,
        ),
    }  # fmt: skip
    return [Case(name, geometry) for name, geometry in table.items()]


def walking_case() -> Case:
    """More tiles than a GPU computes at once: blocks that stay take several each."""
    geometry = make_geometry((16, 16), (1, 2), (8448, 8448), batch=3,
                             padding=((0, 0), (1, 0)), feature_groups=4224)  # fmt: skip
    return Case("walking", geometry)


def few_channel_cases() -> list[Case]:
    """Small geometries for every path of the kernels for few input channels and for patches."""
    g = make_geometry
    table = {
        # 4 taps of a phase along the rows, in one slice of K and in two; 2; 3; 7.
        "few_stem": g((11, 12), (7, 7), (3, 5), batch=1, stride=2, padding=3),
        "few_stem_two_slices": g((8, 9), (7, 1), (1, 40), batch=1, stride=(2, 1),
                                 padding=((3, 3), (0, 0))),
        "few_3x3_s2": g((9, 10), (3, 3), (3, 20), stride=2),
        "few_two_slices": g((5, 6), (3, 3), (1, 40), padding=1),
        "few_7x7": g((9, 9), (7, 7), (2, 5), batch=1, padding=3),
        "few_1d": g((31,), (10,), (1, 12), stride=5, padding=2),
        # One row, so that it is stored in vectors though its end is none.
        "few_one_row": g((1, 61), (1, 10), (1, 12), batch=1, stride=(1, 5),
                         padding=((0, 0), (2, 2))),
        "few_one_row_in_tiles": g((231,), (3,), (3, 9), batch=1, padding=1),
        # K in parts, a row in tiles, rows in classes, phases in groups, planes, many strips.
        "few_deep": g((4, 5), (3, 3), (2, 200), batch=1, padding=1),
        "few_long_row": g((2, 110), (3, 3), (1, 100), batch=1, padding=1),
        "few_rows_dilated": g((9, 8), (3, 2), (2, 9), rhs_dilation=(2, 3), padding=3),
        "few_many_phases": g((9, 9), (8, 9), (4, 3), batch=1, stride=(8, 2), padding=1),
        "few_planes": g((2, 5, 6), (1, 3, 3), (2, 5), padding=((0, 0), (1, 1), (1, 1))),
        "few_many_images": g((2, 3), (2, 2), (1, 2), batch=1700),
        # Windows side by side: exactly, with a rest, on three axes, beyond one vector.
        "patches": g((8, 12), (4, 4), (3, 8), batch=1, stride=4),
        "patches_rest": g((10, 9), (4, 4), (3, 6), batch=1, stride=4),
        "patches_3d": g((4, 6, 4), (2, 3, 2), (3, 8), stride=(2, 3, 2)),
        "patches_2x2": g((6, 8), (2, 2), (24, 17), stride=2),
    }  # fmt: skip
    return [Case(name, geometry) for name, geometry in table.items()]


def rescaled(
    g: ConvGeometry, spatial: Sequence[int], channels: tuple[int, int], batch: int
) -> ConvGeometry:
    """A dense geometry with its windows, strides, paddings and dilations, and other sizes."""
    rhs_spec = g.dimension_numbers.rhs_spec
    return make_geometry(
        tuple(spatial),
        tuple(g.rhs_shape[d] for d in rhs_spec[2:]),
        channels,
        batch=batch,
        stride=tuple(g.window_strides),
        padding=tuple(map(tuple, g.padding)),
        lhs_dilation=tuple(g.lhs_dilation),
        rhs_dilation=tuple(g.rhs_dilation),
    )


def _channels(g: ConvGeometry) -> tuple[int, int]:
    """Input and output channels of a dense geometry."""
    out_channels, in_channels = (g.rhs_shape[d] for d in g.dimension_numbers.rhs_spec[:2])
    return in_channels, out_channels


def hopper_cases() -> list[Case]:
    """Geometries for every path of the kernel for sm_90a."""
    g = make_geometry
    table = {
        "hopper_dense": g((7, 6), (3, 3), (64, 64), padding=1),
        "hopper_strided": g((11, 9), (3, 3), (72, 40), stride=2, padding=((1, 2), (0, 1))),
        "hopper_pointwise": g((5, 4), (1, 1), (72, 8), stride=2),  # phases without taps
        "hopper_1d": g((31,), (10,), (16, 16), stride=5, padding=2),
        "hopper_3d": g((4, 5, 6), (3, 2, 3), (16, 24), stride=(1, 2, 1),
                       padding=((1, 1), (0, 1), (2, 1))),
        "hopper_dilated": g((9, 8), (3, 3), (16, 72), rhs_dilation=(2, 3), padding=3),
        "hopper_strided_dilated": g((9, 9), (3, 3), (16, 16), stride=(2, 3),
                                    rhs_dilation=(3, 2), padding=3),
        "hopper_lhs_dilated": g((6, 5), (3, 3), (16, 16), stride=(4, 2), lhs_dilation=2,
                                padding=2),
        "hopper_transposed": g((6, 5), (4, 3), (16, 16), stride=(1, 2), lhs_dilation=(2, 3),
                               padding=2),
        # Several tiles of channels, K that ends within a slice.
        "hopper_wide": g((5, 5), (3, 3), (264, 136), padding=1),
        "hopper_patches": g((8, 12), (4, 4), (8, 16), batch=1, stride=4),
        "hopper_long_sum": g((4, 4), (3, 3), (8, 264), batch=1, padding=1),  # in parts
        "hopper_long_strided_sum": g((5, 5), (3, 3), (16, 520), batch=1, stride=2, padding=1),
        "hopper_images": g((2, 3), (2, 2), (16, 16), batch=50),
        "hopper_64": g((9, 9), (3, 3), (64, 72), batch=3, padding=1),
        "hopper_far_padding": g((6, 6), (3, 3), (16, 16), padding=((4, 0), (0, 5))),
        "hopper_cropped": g((9, 8), (3, 3), (16, 16), padding=((-2, 1), (0, -3))),
        "hopper_large_window": g((3, 4), (5, 7), (16, 16), padding=3),
        "hopper_16_phases": g((9, 9), (5, 5), (16, 16), stride=4, padding=2),
        "hopper_groups": g((6, 7), (3, 3), (72, 192), padding=1, feature_groups=3),
        "hopper_strided_groups": g((9, 8), (3, 2), (32, 128), stride=2, padding=1,
                                   feature_groups=2),
        "hopper_long_groups": g((3, 3), (3, 3), (16, 1024), batch=1, padding=1,
                                feature_groups=2),  # in parts
        "hopper_f32_only": g((5, 5), (3, 3), (6, 12), padding=1),
    }  # fmt: skip
    return [Case(name, geometry) for name, geometry in table.items()]


def copied_cases() -> list[Case]:
    """Geometries that the kernel for sm_90a takes without TMA, for every path."""
    g = make_geometry
    table = {
        # Rows of dY, of W and of dX in pieces of 16, 8, 4 and, of 16-bit types, 2 bytes.
        "copied_4": g((7, 6), (3, 3), (12, 20), padding=1),
        "copied_2": g((7, 6), (3, 3), (10, 6), padding=1),
        "copied_odd": g((5, 6), (3, 3), (9, 11), padding=1),
        "copied_odd_out": g((5, 5), (3, 3), (16, 7), batch=3, padding=((1, 0), (1, 1))),
        "copied_odd_in": g((5, 5), (3, 3), (7, 16), batch=3, padding=((0, 1), (1, 1))),
        "copied_few": g((9, 8), (3, 3), (5, 3), stride=2, padding=1),
        "copied_one": g((6, 5), (2, 2), (1, 1), padding=1),
        # Several tiles of rows and of channels, K that ends within a slice.
        "copied_wide": g((9, 9), (3, 3), (270, 77), batch=1, padding=1),
        "copied_rows": g((12, 12), (3, 3), (66, 66), batch=3, padding=1),
        "copied_strided": g((11, 9), (3, 3), (9, 5), stride=2, padding=((1, 2), (0, 1))),
        "copied_pointwise": g((5, 4), (1, 1), (74, 9), stride=2),  # phases without taps
        "copied_1d": g((31,), (10,), (17, 15), stride=5, padding=2),
        "copied_3d": g((4, 5, 6), (3, 2, 3), (15, 22), stride=(1, 2, 1),
                       padding=((1, 1), (0, 1), (2, 1))),
        "copied_dilated": g((9, 8), (3, 3), (17, 70), rhs_dilation=(2, 3), padding=3),
        "copied_cropped": g((9, 8), (3, 3), (14, 18), padding=((-2, 1), (0, -3))),
        "copied_patches": g((8, 12), (4, 4), (3, 17), batch=1, stride=4),
        "copied_long_sum": g((4, 4), (3, 3), (7, 267), batch=1, padding=1),  # in parts
        "copied_long_strided_sum": g((5, 5), (3, 3), (18, 522), batch=1, stride=2, padding=1),
        "copied_groups": g((6, 5), (3, 3), (48, 192), stride=2, padding=((2, 2), (1, 1)),
                           lhs_dilation=(9, 1), feature_groups=3),
        "copied_batch_groups": g((5, 4), (3, 3), (8, 128), batch=4, stride=2,
                                 padding=((2, 2), (1, 1)), lhs_dilation=(9, 1), batch_groups=2),
        # Beyond TMA: its steps, its corners, its offsets, one map for each phase.
        "copied_lhs_dilated": g((4, 5), (3, 3), (16, 16), lhs_dilation=(9, 11), padding=3),
        "copied_far_padding": g((6, 5), (3, 3), (16, 16), padding=((130, 2), (1, 140))),
        "copied_3d_dilated": g((3, 3, 20), (1, 1, 3), (16, 8), rhs_dilation=(1, 1, 17),
                               padding=((0, 0), (0, 0), (18, 18))),
        "copied_25_phases": g((11, 10), (6, 5), (16, 16), stride=5, padding=2),
        "copied_32_phases": g((70,), (33,), (16, 16), stride=32, padding=((3, 1),)),
    }  # fmt: skip
    return [Case(name, geometry) for name, geometry in table.items()]


def hopper_random_cases(count: int, seed: int) -> Iterator[Case]:
    """Random dense geometries: with whole rows, for TMA, and as they are."""
    for case in random_cases(count, seed):
        g = case.geometry
        if g.groups == 1 and 0 not in (*g.lhs_shape, *g.rhs_shape, *g.out_shape):
            whole = tuple(-(-size // 8) * 8 for size in _channels(g))
            spatial = tuple(g.lhs_shape[d] for d in g.dimension_numbers.lhs_spec[2:])
            batch = g.lhs_shape[g.dimension_numbers.lhs_spec[0]]
            yield Case(f"hopper_{case.name}", rescaled(g, spatial, whole, batch))
            yield Case(f"copied_{case.name}", rescaled(g, spatial, _channels(g), batch))


def layer_cases() -> Iterator[Case]:
    """The dense layers of the table, each window with its strides and paddings once, made small."""
    seen = set()
    for layer in layers.load(LAYERS, "NHWC"):
        g = layer.geometry
        lhs_spec, rhs_spec, _ = g.dimension_numbers
        window = tuple(g.rhs_shape[d] for d in rhs_spec[2:])
        key = (window, tuple(g.window_strides), g.padding, g.lhs_dilation, g.rhs_dilation)
        if g.groups != 1 or str(key) in seen:
            continue
        seen.add(str(key))
        spatial = [
            min(g.lhs_shape[d], -(-((size - 1) * rhs + 6) // lhs))
            for d, size, rhs, lhs in zip(
                lhs_spec[2:], window, g.rhs_dilation, g.lhs_dilation, strict=True
            )
        ]
        most = 72 if math.prod(window) <= 9 else 16
        channels = tuple(-(-min(size, most) // 8) * 8 for size in _channels(g))
        yield Case(f"layer_{len(seen)}_{layer.class_name.replace(' ', '_')}",
                   rescaled(g, spatial, channels, 2))  # fmt: skip


def hopper_sweep(random_count: int, seed: int) -> list[Case]:
    """All of them: named, random, and the layers of the table."""
    return [
        *hopper_cases(), *copied_cases(), *hopper_random_cases(random_count, seed),
        *layer_cases(),
    ]  # fmt: skip


def hopper_walking_cases() -> list[Case]:
    """More tiles than there are multiprocessors, of phases with more and fewer taps."""
    g = make_geometry
    return [
        Case("hopper_walking", g((21, 21), (3, 3), (8, 16), batch=90, stride=2)),
        Case("copied_walking", g((21, 21), (3, 3), (7, 10), batch=90, stride=2)),
    ]


def hopper_lines(all_cases: Iterable[Case]) -> Iterator[str]:
    """Every case for the kernel for sm_90a in every dtype that it takes, some special."""
    for index, case in enumerate(all_cases):
        for turn, dtype in enumerate(("bfloat16", "float16", "float32")):
            special = (index + turn) % 4 == 3
            yield line(case, dtype, kernel="wgmma", special=special)


def small_cases(random_count: int, seed: int, most_products: int = 1 << 20) -> Iterator[Case]:
    """Named and random geometries that an emulated kernel computes in a fraction of a second."""
    for case in [
        *named_cases(), *wide_cases(), *few_channel_cases(), *random_cases(random_count, seed)
    ]:  # fmt: skip
        if 0 not in case.geometry.lhs_shape and products(case.geometry) <= most_products:
            yield case


def bound(g: ConvGeometry, dtype: str, *, allow_tf32: bool = True) -> float:
    """The tolerance on a GPU, where float32 may be TF32."""
    return tolerance("tf32" if dtype == "float32" and allow_tf32 else dtype, reduction_taps(g))


def line(
    case: Case,
    dtype: str,
    *,
    kernel: str = "*",
    special: bool = False,
    allow_tf32: bool = True,
    platform: str = "cuda",
    tile: tuple[int, int] = (0, 0),
    apart: int = 0,
) -> str:
    """A problem in the words of core.cc. The platform says which layouts."""
    g = case.geometry
    attributes = custom_call.attributes(g, platform, None)
    lists = [g.lhs_shape, g.rhs_shape, g.out_shape]
    lists += [
        attributes[name]
        for name in (
            "window_strides", "padding", "lhs_dilation", "rhs_dilation", "lhs_spec", "rhs_spec",
            "out_spec", "lhs_layout", "rhs_layout", "out_layout",
        )
    ]  # fmt: skip
    words = [case.name, dtype, kernel, int(special)]
    words += [f"{bound(g, dtype, allow_tf32=allow_tf32):.17g}", int(allow_tf32)]
    for values in lists:
        words += [len(values), *values]
    words += [g.feature_group_count, g.batch_group_count, *tile, apart]
    return " ".join(map(str, words))


# A group is at least one tile of a product, which an emulator computes in full: some seconds.
MOST_GROUPS = 8
WITHOUT_PRODUCTS = ("direct", "depthwise", "grouped")


def lines(
    all_cases: Iterable[Case],
    dtypes: Sequence[str] = DTYPES,
    most_groups: float = math.inf,
    first: int = 0,
) -> Iterator[str]:
    """Every case in every dtype, float32 with and without TF32, and some with NaN and Inf.

    Of a case of more groups than `most_groups` only two lines are for the kernels that
    multiply matrices too, with dtypes in turn from the `first`.
    """
    for index, case in enumerate(all_cases, first):
        kernels = ("*",) if case.geometry.groups <= most_groups else WITHOUT_PRODUCTS
        for dtype, kernel in itertools.product(dtypes, kernels):
            yield line(case, dtype, kernel=kernel, allow_tf32=True)
            if dtype == "float32":
                yield line(case, dtype, kernel=kernel, allow_tf32=False)
        yield line(case, dtypes[index % len(dtypes)], platform="cpu", allow_tf32=False)
        yield line(case, dtypes[(index + 1) % len(dtypes)], special=True, allow_tf32=index % 8 < 4)


# Tiles that a kernel has. The planner gives large ones to problems that are too large for
# an emulator.
TILES = {
    "mma": ((128, 128), (128, 64), (64, 64)),
    "mma_3xtf32": ((128, 64), (64, 64)),
    "wgmma": ((128, 256), (128, 128), (256, 64), (64, 128)),
}


def tile_lines(kernel: str, all_cases: Iterable[Case]) -> Iterator[str]:
    """Every case with every tile of a kernel, each in one of the dtypes, some special."""
    dtypes = ("float32",) if kernel == "mma_3xtf32" else ("bfloat16", "float32", "float16")
    for index, case in enumerate(all_cases):
        for turn, tile in enumerate(TILES.get(kernel, ())):
            dtype = dtypes[(index + turn) % len(dtypes)]
            special = index % 4 == 3
            yield line(case, dtype, kernel=kernel, special=special, tile=tile)


# Three images fit in 32-bit offsets, five do not: kernels without a 64-bit version are
# launched for three of them, then for two.
APART = (1 << 29) + 64
# What core.cc takes for arrays that are not aligned.
SHIFTED = -1


def _of_every_kernel(apart: int) -> Iterator[str]:
    """Small problems for every kernel, their images so far apart."""
    g = make_geometry
    table = {
        "far_dense": g((5, 6), (3, 3), (16, 24), batch=5, stride=2, padding=1),
        "far_odd": g((5, 4), (3, 3), (7, 9), batch=5, padding=1),
        "far_depthwise": g((6, 5), (3, 3), (16, 16), batch=5, padding=1, feature_groups=16),
        "far_depthwise_large": g((6, 5), (5, 4), (16, 16), batch=5, padding=2, feature_groups=16),
        "far_grouped": g((6, 5), (3, 3), (32, 32), batch=5, padding=1, feature_groups=4),
        "far_few": g((9, 8), (3, 3), (3, 16), batch=5, stride=2, padding=1),
        "far_patches": g((8, 8), (4, 4), (3, 16), batch=5, stride=4),
    }  # fmt: skip
    for name, geometry in table.items():
        for dtype in DTYPES:
            for allow_tf32 in (True, False) if dtype == "float32" else (True,):
                yield line(Case(name, geometry), dtype, allow_tf32=allow_tf32, apart=apart)


def far_lines() -> Iterator[str]:
    """Problems for every kernel whose images are far apart in memory."""
    return _of_every_kernel(APART)


def shifted_lines() -> Iterator[str]:
    """Problems for every kernel whose arrays begin an element later than aligned ones would."""
    return _of_every_kernel(SHIFTED)


def write(path: pathlib.Path, lines: Iterable[str]) -> pathlib.Path:
    """Writes a file for core.cc."""
    path.write_text("".join(f"{text}\n" for text in lines))
    return path
