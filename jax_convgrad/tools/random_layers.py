"""Convolutions drawn over the whole space that lax accepts, for `bench --random`.

`geometries.random_case` draws small ones to find wrong results; these are large enough to
be timed, and drawn to find what is slow. People differentiate more than layers of nets:
filters as long as a signal, images in the place of filters (the derivatives of a filter
gradient), axes of size one anywhere, strides beyond the filter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ..geometry import ConvGeometry
from ..maps import exchanged
from . import MAPS, layers
from .geometries import classify, layout, make_geometry
from .workloads import Workload, workloads

# A problem of more takes lax seconds where it has no fast route; one of less is all call.
_FLOPS = (1e5, 4e8)
_MOST_ELEMENTS = 2**23  # of an operand or the result
_LONGEST = {1: 100_000, 2: 1000, 3: 100}  # of an axis, by their number
_DTYPES = ("float32", "float32", "float32", "bfloat16", "float16", "float64")


def random_workload(
    seed: int,
    index: int,
    dtype: str | None,
    precision: str,
    maps: Sequence[str] = tuple(MAPS),
) -> Workload:
    """The index-th problem of a seed; each can be drawn without the others.

    Args:
        seed: of the sequence.
        index: position in it.
        dtype: name of a floating dtype; None draws one.
        precision: as in `Workload`.
        maps: which maps it may be, by their names in MAPS.

    Returns:
        One map of a convolution.
    """
    rng = random.Random(f"{seed}:{index}")
    drawn_dtype, name = rng.choice(_DTYPES), rng.choice(maps)
    while True:
        try:
            geometry = _draw(rng)
        except ValueError:  # padding took more than there is; draw again
            continue
        # lax's filter gradient of groups is a dense one. It keeps a part of that.
        times = geometry.groups if name == "dw" else 1
        sizes = [math.prod(s) for s in (geometry.lhs_shape, geometry.rhs_shape, geometry.out_shape)]
        if (
            max(sizes) <= _MOST_ELEMENTS
            and _FLOPS[0] <= geometry.flops <= _FLOPS[1] / times
            and _ends_meet_input(geometry)
        ):
            break
    layer = layers.of_geometry(geometry, f"random-{seed}-{index}", classify(geometry), index)
    (workload,) = workloads(layer, dtype or drawn_dtype, precision, [name])
    return workload


def _ends_meet_input(g: ConvGeometry) -> bool:
    """Whether the first and last tap along every axis read more than padding.

    XLA of JAX 0.10.2 ends the process, by a failed check in its algebraic simplifier, when it
    compiles lax's gradient of some convolutions where they do not.
    """
    return all(
        (g.out_sizes[i] - 1) * g.window_strides[i] >= g.padding[i][0]
        and (g.window_sizes[i] - 1) * g.rhs_dilation[i] - g.padding[i][0]
        <= (g.in_sizes[i] - 1) * g.lhs_dilation[i]
        for i in range(g.axes)
    )


def _log_uniform(rng: random.Random, low: float, high: float) -> int:
    """An integer from `low` to `high`, every factor of two as likely as another."""
    return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))


def _draw(rng: random.Random) -> ConvGeometry:
    axes = rng.choices((1, 2, 3), weights=(4, 6, 2))[0]
    spatial = tuple(_draw_size(rng, axes) for _ in range(axes))
    window = tuple(_draw_window(rng, size) for size in spatial)
    stride, lhs_dilation, rhs_dilation = (1,) * axes, (1,) * axes, (1,) * axes
    if rng.random() < 0.5:
        stride = tuple(rng.choice((1, 2, 2, w, _log_uniform(rng, 1, 2 * w + 8))) for w in window)
    if rng.random() < 0.2:
        rhs_dilation = tuple(rng.choice((1, 2, 2, 3, 6)) for _ in window)
    if rng.random() < 0.2:
        lhs_dilation = tuple(rng.choice((1, 2, 2, 3, 4)) for _ in window)
        stride = (1,) * axes if rng.random() < 0.8 else stride
    reach = [(w - 1) * d + 1 for w, d in zip(window, rhs_dilation, strict=True)]
    padding: str | tuple[tuple[int, int], ...] = rng.choice(("SAME", "SAME", "VALID", "pairs"))
    if padding == "pairs" or (padding == "SAME" and max(lhs_dilation) > 1):
        padding = tuple((rng.randint(0, r), rng.randint(0, r)) for r in reach)

    feature_groups = batch_groups = 1
    kind = rng.choices(("dense", "depthwise", "grouped", "batch"), weights=(12, 3, 3, 1))[0]
    in_channels, out_channels = (_log_uniform(rng, 1, 1024) for _ in range(2))
    if kind == "depthwise":
        feature_groups, in_channels = _log_uniform(rng, 2, 1024), 1
        out_channels = rng.choice((1, 1, 1, 2, 4))
    elif kind == "grouped":
        feature_groups = _log_uniform(rng, 2, 64)
        in_channels, out_channels = (_log_uniform(rng, 1, 64) for _ in range(2))
    elif kind == "batch":
        batch_groups = rng.randint(2, 8)
    batch = _log_uniform(rng, 1, 64) * batch_groups
    named = rng.choice(("last", "first", "odd") if rng.random() < 0.2 else ("last", "first"))

    drawn = make_geometry(
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
        dimension_numbers=layout(named, axes),
    )
    # Odd layouts are not exchanged, so that the problems of a seed stay what they were.
    if kind != "dense" or named == "odd" or rng.random() > 0.15:
        return drawn
    return exchanged(drawn)


def _draw_size(rng: random.Random, axes: int) -> int:
    return 1 if rng.random() < 0.05 else _log_uniform(rng, 1, _LONGEST[axes])


def _draw_window(rng: random.Random, size: int) -> int:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice((1, 1, 2, 3, 3, 3, 4, 5, 7))
    if kind < 0.85:
        return _log_uniform(rng, 1, size)
    return max(1, size - rng.choice((0, 0, 1, 2, size // 10)))
