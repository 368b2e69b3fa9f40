"""The problems that the emulated kernels run, and the lines that core.cc reads them from."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from jax_convgrad import ConvGeometry, custom_call
from jax_convgrad.tools.geometries import (
    Case,
    make_geometry,
    named_cases,
    random_cases,
    reduction_taps,
    tolerance,
)

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


def lines(all_cases: Iterable[Case], dtypes: Sequence[str] = DTYPES) -> Iterator[str]:
    """Every case in every dtype, float32 with and without TF32, and some with NaN and Inf."""
    for index, case in enumerate(all_cases):
        for dtype in dtypes:
            yield line(case, dtype, allow_tf32=True)
            if dtype == "float32":
                yield line(case, dtype, allow_tf32=False)
        yield line(case, dtypes[index % len(dtypes)], platform="cpu", allow_tf32=False)
        yield line(case, dtypes[(index + 1) % len(dtypes)], special=True, allow_tf32=False)


# Tiles that a kernel has. The planner gives large ones to problems that are too large for
# an emulator.
TILES = {
    "mma": ((128, 128), (128, 64), (64, 64)),
    "mma_3xtf32": ((128, 64), (64, 64)),
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


def far_lines() -> Iterator[str]:
    """Problems for every rung whose images are far apart in memory."""
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
                yield line(Case(name, geometry), dtype, allow_tf32=allow_tf32, apart=APART)


def write(path: pathlib.Path, lines: Iterable[str]) -> pathlib.Path:
    """Writes a file for core.cc."""
    path.write_text("".join(f"{text}\n" for text in lines))
    return path
