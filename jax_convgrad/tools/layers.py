"""Layers of real nets, from a JSON list of rows to geometries.

A row has `n c h w` (input), `k` (output channels), `r s` (filter height and width),
`stride`, `dilation` (of the filter), `lhs_dilation` (absent: 1), `groups`, `pad`, `net`,
`class` and `source`. Strides and dilations are a number or one per axis; `pad` is a number
for both sides of every axis, or a pair (low, high) per axis. 3-D rows add `d` and `t`,
input and filter depth. A row with h = r = 1 is one-dimensional and runs as such. With
`exchanged` true it stands for the convolution by which lax computes its filter gradient.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from .. import maps
from ..geometry import ConvGeometry
from . import ToolError, machine, read_json
from .geometries import make_geometry

# --batch-budget counts a byte of least traffic as so many FLOP, so that it bounds the
# time of memory-bound layers too. A convention, near a CPU's ratio of the two rates: the
# same budget then means the same shapes on every machine.
FLOP_PER_BYTE = 16

_ITEMSIZE_BYTES = 4  # that of float32, also for other dtypes: the same shapes for all
_REQUIRED = ("n", "c", "h", "w", "k", "r", "s", "stride", "pad", "dilation", "groups", "net",
             "class")  # fmt: skip
_KNOWN = {*_REQUIRED, "lhs_dilation", "source", "d", "t", "exchanged"}
_LAYOUTS = {"NHWC": "last", "NCHW": "first"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row: a geometry and where it comes from.

    Attributes:
        index: position in the file, from 0.
        name: the net.
        class_name: the class that its result is averaged in.
        source: the publication or code that the sizes are from.
        geometry: the convolution, batch possibly reduced.
        batch: images in the geometry.
        batch_in_file: images in the file.
    """

    index: int
    name: str
    class_name: str
    source: str
    geometry: ConvGeometry
    batch: int
    batch_in_file: int


def default_path() -> pathlib.Path:
    """The checkout's list.

    Raises:
        ToolError: this is not a checkout.
    """
    path = machine.ROOT / "benchmarks" / "layers.json"
    if not path.is_file():
        raise ToolError(
            "this installation has no benchmarks/layers.json: bench takes --layers FILE, "
            "calibrate runs in a checkout"
        )
    return path


def load(path: pathlib.Path, layout: str, batch_budget_mflop: float | None = None) -> list[Layer]:
    """Reads and checks a list of layers.

    Args:
        path: the JSON file.
        layout: "NHWC" (filters HWIO) or "NCHW" (OIHW), likewise for 1 and 3 axes.
        batch_budget_mflop: bound on the cost of one gradient, by `cost_mflop`; None for
            the batches in the file.

    Returns:
        The layers in the file's order.

    Raises:
        ToolError: the file cannot be read or a row is wrong; names the row and the key.
    """
    rows = read_json(path, "layers")
    if not isinstance(rows, list):
        raise ToolError(f"{path} must hold a list of rows, got {type(rows).__name__}")
    if batch_budget_mflop is not None and not batch_budget_mflop > 0:
        raise ToolError(f"--batch-budget must be positive, got {batch_budget_mflop}")
    layers = []
    for index, row in enumerate(rows):
        try:
            layers.append(parse(row, index, layout, batch_budget_mflop))
        except (ValueError, TypeError) as e:
            raise ToolError(f"{path} row {index}: {e}") from None
    return layers


def of_geometry(geometry: ConvGeometry, name: str, class_name: str = "", index: int = -1) -> Layer:
    """A geometry that stands in no list, at the batch that it has."""
    batch = geometry.lhs_shape[geometry.dimension_numbers.lhs_spec[0]]
    return Layer(index, name, class_name, "", geometry, batch, batch)


def short(geometry: ConvGeometry) -> str:
    """A geometry in the words of a row: `n32 c256 14x14 k512 3x3 s2 p1`, defaults left out."""
    g = geometry
    lhs_spec, rhs_spec, _ = g.dimension_numbers

    def joined(values: Sequence[object]) -> str:
        return "x".join(map(str, values[:1] if len(set(values)) == 1 else values))

    parts = [
        f"n{g.lhs_shape[lhs_spec[0]]} c{g.lhs_shape[lhs_spec[1]]}",
        "x".join(map(str, g.in_sizes)),
        f"k{g.rhs_shape[rhs_spec[0]]}",
        "x".join(map(str, g.window_sizes)),
    ]
    for letter, values in (("s", g.window_strides), ("d", g.rhs_dilation), ("l", g.lhs_dilation)):
        if max(values) > 1:
            parts.append(letter + joined(values))
    pads = [low if low == high else f"{low}:{high}" for low, high in g.padding]
    if any(pads):
        parts.append("p" + joined(pads))
    if g.groups > 1:
        parts.append(f"g{g.groups}")
    return " ".join(parts)


def cost_mflop(geometry: ConvGeometry) -> float:
    """What --batch-budget bounds: MFLOP, or least traffic if that weighs more."""
    traffic = FLOP_PER_BYTE * geometry.bytes_moved(_ITEMSIZE_BYTES)
    return max(geometry.flops, traffic) / 1e6


def parse(
    row: dict[str, Any], index: int, layout: str, batch_budget_mflop: float | None = None
) -> Layer:
    """Turns one row into a layer.

    Args:
        row: as the module's docstring says.
        index: its position in the file.
        layout: "NHWC" or "NCHW".
        batch_budget_mflop: as in `load`.

    Returns:
        The layer.

    Raises:
        ValueError: a key is missing or unknown, or its value makes no convolution.
        TypeError: a value is of the wrong kind.
    """
    if not isinstance(row, dict):
        raise TypeError(f"must be an object, got {row!r}")
    if missing := [key for key in _REQUIRED if key not in row]:
        raise ValueError(f"lacks {', '.join(missing)}")
    if unknown := sorted(row.keys() - _KNOWN):
        raise ValueError(f"has unknown keys {', '.join(unknown)}")
    if ("d" in row) != ("t" in row):
        raise ValueError("must have both of d and t (3-D), or neither")
    keys = ("dhw", "trs") if "d" in row else ("hw", "rs")
    spatial = tuple(_count(row, key) for key in keys[0])
    window = tuple(_count(row, key) for key in keys[1])
    axes = len(spatial)
    stride = _per_axis(row, "stride", axes)
    dilation = _per_axis(row, "dilation", axes)
    lhs_dilation = _per_axis({"lhs_dilation": 1, **row}, "lhs_dilation", axes)
    padding = _padding(row["pad"], axes)
    exchanged = row.get("exchanged", False)
    if not isinstance(exchanged, bool):
        raise TypeError(f"exchanged must be true or false, got {exchanged!r}")
    if exchanged and row["groups"] != 1:
        raise ValueError(f"is exchanged and must have one group, got {row['groups']}")
    if axes == 2 and spatial[0] == window[0] == 1:
        if padding[0] != (0, 0):
            raise ValueError(f"is 1-D (h = r = 1) and must not pad its height, got {row['pad']}")
        spatial, window, padding = spatial[1:], window[1:], padding[1:]
        stride, dilation, lhs_dilation = stride[1:], dilation[1:], lhs_dilation[1:]

    def with_batch(batch: int) -> ConvGeometry:
        geometry = make_geometry(
            spatial,
            window,
            (_count(row, "c"), _count(row, "k")),
            batch=batch,
            stride=stride,
            padding=padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=dilation,
            feature_groups=_count(row, "groups"),
            dimension_numbers=_LAYOUTS[layout],
        )
        return maps.exchanged(geometry) if exchanged else geometry

    batch = _count(row, "n")
    if batch_budget_mflop is not None:
        while batch > 1 and cost_mflop(with_batch(batch)) > batch_budget_mflop:
            # Halved, not scaled: the filter's bytes do not shrink, and powers of two
            # stay what they are.
            batch = batch // 2
    return Layer(
        index=index,
        name=str(row["net"]),
        class_name=str(row["class"]),
        source=str(row.get("source", "")),
        geometry=with_batch(batch),
        batch=batch,
        batch_in_file=row["n"],
    )


def _count(row: dict[str, Any], key: str) -> int:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{key} must be positive, got {value}")
    return value


def _per_axis(row: dict[str, Any], key: str, axes: int) -> tuple[int, ...]:
    value = row[key]
    if not isinstance(value, list):
        return (_count(row, key),) * axes
    if len(value) != axes:
        raise ValueError(f"{key} must be a number or {axes} numbers, got {value}")
    return tuple(_count({key: v}, key) for v in value)


def _padding(value: Any, axes: int) -> tuple[tuple[int, int], ...]:
    pairs = [[value, value]] * axes if isinstance(value, int) else value
    try:
        padding = tuple((int(low), int(high)) for low, high in pairs)
    except (TypeError, ValueError):
        raise ValueError(f"pad must be a number or pairs (low, high), got {value!r}") from None
    if len(padding) != axes:
        raise ValueError(f"pad must have {axes} pairs, got {value!r}")
    return padding
