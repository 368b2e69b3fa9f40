"""Which dimensions of a convolution's arrays are cut together, and what a cut needs.

XLA cannot look inside a custom call: it is told which dimensions belong together (the
factors of a sharding rule), and `partition` computes each device's part. With N, C and K
the images, input and output channels, and S a spatial axis:

    factor   dimensions              a device holding its shard of the factor
    n        N of x and y            y, dX: works alone; dW: has a partial sum, one all-reduce
    c        C of x and the filter   dX, dW: works alone; y: has a partial sum, one all-reduce
    k        K of y and the filter   y, dW: works alone; dX: has a partial sum, one all-reduce
    g        K of y and the filter,  works alone on whole groups
             C of x (N of x for batch groups)
    s        S of x and y            takes a halo of rows from its neighbours, of dy for dX,
                                     else of x; dW: has a partial sum, one all-reduce

An index of the result works alone, one that is summed over gives partial sums. Every other
sharded dimension is gathered first. docs/sharding.md counts the bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from . import compat
from .geometry import ConvGeometry, dilated_size
from .maps import INPUT_GRAD, Map, Role, indices, shape_of_role
from .mesh import Spec, axes_by_dimension


@dataclasses.dataclass(frozen=True)
class Factor:
    """Dimensions of x, the filter and y that are split together or not at all.

    Attributes:
        name: "n", "c", "k", "g", or "s" with the number of a spatial axis.
        dims: the dimension in each of the arrays that has it, by role.
        size: what the number of shards has to divide.
        axis: the spatial axis, None for the others.
    """

    name: str
    dims: Mapping[Role, int]
    size: int
    axis: int | None = None


@dataclasses.dataclass(frozen=True)
class Halo:
    """Rows of a map's first operand along one axis that a device needs from its neighbours.

    Attributes:
        before: rows of the shard before, its last ones.
        after: rows of the shard after, its first ones.
        rows: rows that a device has itself.
    """

    before: int
    after: int
    rows: int


def factors(geometry: ConvGeometry) -> list[Factor]:
    """What a convolution's maps may be split along: images, channels, each spatial axis."""
    g = geometry
    lhs_spec, rhs_spec, out_spec = g.dimension_numbers
    sizes = {
        "n": g.out_shape[out_spec[0]],
        "c": g.rhs_shape[rhs_spec[1]],
        "k": g.rhs_shape[rhs_spec[0]],
        "g": g.groups,
    }
    names = "ng" if g.feature_group_count > 1 else "gc" if g.batch_group_count > 1 else "nck"
    of = indices(g)
    result = [Factor(name, of[name].dims, sizes[name]) for name in names]
    for axis in range(g.axes):
        dims = {Role.LHS: lhs_spec[2 + axis], Role.OUT: out_spec[2 + axis]}
        size = math.gcd(g.out_sizes[axis], g.in_sizes[axis])
        result.append(Factor(f"s{axis}", dims, size, axis))
    return result


def halo(geometry: ConvGeometry, axis: int, shards: int, map_: Map = INPUT_GRAD) -> Halo | None:
    """What a spatial axis that is cut in equal parts exchanges, None if it cannot be cut.

    Device i holds rows [i * P / shards, ...) of y and rows [i * H / shards, ...) of x: one
    of the two is what it computes, or for the filter gradient sums over. All devices run one
    program, so the two cuts must move in step: P * stride = H * lhs_dilation. And a neighbour
    can give only what it has.

    Args:
        geometry: the convolution.
        axis: the spatial axis.
        shards: the number of parts.
        map_: what is computed.

    Returns:
        The halo, whose `before` and `after` may be zero.
    """
    size, out = geometry.in_sizes[axis], geometry.out_sizes[axis]
    stride, dilation = geometry.window_strides[axis], geometry.lhs_dilation[axis]
    if 0 in (size, out) or size % shards or out % shards or out * stride != size * dilation:
        return None
    low = geometry.padding[axis][0]
    reach = (geometry.window_sizes[axis] - 1) * geometry.rhs_dilation[axis]
    if map_.operands[0] is Role.LHS:  # the input gradient read the other way (csrc/problem.h)
        size, out, stride, dilation, low = out, size, dilation, stride, reach - low
    rows = out // shards
    # dX row h takes the rows p of dy with h * dilation + low - reach <= p * stride
    # <= h * dilation + low; first and last of the device's h, p counted from its first.
    before = max(0, (reach - low) // stride)
    after = max(0, ((size // shards - 1) * dilation + low) // stride - (rows - 1))
    return Halo(before, after, rows) if max(before, after) <= rows else None


def fits(factor: Factor, geometry: ConvGeometry, shards: int, map_: Map = INPUT_GRAD) -> bool:
    """Whether a factor can be cut in so many equal parts."""
    if factor.axis is not None:
        return halo(geometry, factor.axis, shards, map_) is not None
    return factor.size % shards == 0


def assign(
    geometry: ConvGeometry,
    specs: Mapping[Role, Spec],
    mesh_shape: Mapping[str, int],
    map_: Map = INPUT_GRAD,
) -> dict[str, tuple[str, ...]]:
    """Which mesh axes split which factor.

    Where arrays disagree about a mesh axis, the factor wins for which more elements
    already lie right; the other arrays are moved. A factor that cannot be cut in as many
    parts gives up its minor axes.

    Args:
        geometry: the convolution.
        specs: how the three arrays are sharded, or are wanted to be.
        mesh_shape: sizes of the mesh axes.
        map_: what is computed.

    Returns:
        Mesh axes by the factor's name; factors that stay whole are left out.
    """
    elements = {role: math.prod(shape_of_role(geometry, role)) for role in Role}
    votes: dict[str, dict[str, int]] = {}
    every = factors(geometry)
    for factor in every:
        for array, dim in factor.dims.items():
            for name in specs[array][dim]:
                of_axis = votes.setdefault(name, {})
                of_axis[factor.name] = of_axis.get(factor.name, 0) + elements[array]
    winner = {name: max(of_axis, key=lambda f: of_axis[f]) for name, of_axis in votes.items()}
    assignment: dict[str, tuple[str, ...]] = {}
    for factor in every:
        # In the order of the largest array, so that it need not be permuted.
        arrays = sorted(factor.dims, key=lambda array: elements[array], reverse=True)
        names = dict.fromkeys(n for array in arrays for n in specs[array][factor.dims[array]])
        axes = [name for name in names if winner[name] == factor.name]
        while axes:
            if fits(factor, geometry, math.prod(mesh_shape[name] for name in axes), map_):
                break
            axes.pop()
        if axes:
            assignment[factor.name] = tuple(axes)
    return assignment


def local_geometry(
    geometry: ConvGeometry, shards: Mapping[str, int], map_: Map = INPUT_GRAD
) -> ConvGeometry:
    """The convolution whose map one device computes.

    Args:
        geometry: the whole convolution.
        shards: number of parts by factor, each of which `fits`.
        map_: what is computed.

    Returns:
        A geometry of the device's sizes, whose operand has the halos.
    """
    lhs_shape, rhs_shape = list(geometry.lhs_shape), list(geometry.rhs_shape)
    padding = list(geometry.padding)
    groups = {
        "feature_group_count": geometry.feature_group_count,
        "batch_group_count": geometry.batch_group_count,
    }
    for factor in factors(geometry):
        parts = shards.get(factor.name, 1)
        if parts == 1:
            continue
        if Role.RHS in factor.dims:
            rhs_shape[factor.dims[Role.RHS]] //= parts
        if Role.LHS in factor.dims:
            lhs_shape[factor.dims[Role.LHS]] //= parts
        if factor.name == "g":
            groups = {name: max(1, count // parts) for name, count in groups.items()}
        if factor.axis is not None:
            size, pads = _local_axis(geometry, factor.axis, parts, map_)
            lhs_shape[factor.dims[Role.LHS]], padding[factor.axis] = size, pads
    return geometry.replace(
        lhs_shape=tuple(lhs_shape), rhs_shape=tuple(rhs_shape), padding=tuple(padding), **groups
    )


def _local_axis(
    geometry: ConvGeometry, axis: int, shards: int, map_: Map
) -> tuple[int, tuple[int, int]]:
    """Size of a device's x, and the padding with which the operand's halo meets the result."""
    edges = halo(geometry, axis, shards, map_)
    assert edges is not None, (geometry, axis, shards)
    size, out = geometry.in_sizes[axis] // shards, geometry.out_sizes[axis] // shards
    low, _ = geometry.padding[axis]
    rows = edges.before + edges.rows + edges.after
    if map_.operands[0] is Role.LHS:
        size, low = rows, low - edges.before * geometry.lhs_dilation[axis]
    else:
        out, low = rows, low + edges.before * geometry.window_strides[axis]
    window = dilated_size(geometry.window_sizes[axis], geometry.rhs_dilation[axis])
    reached = (out - 1) * geometry.window_strides[axis] + window
    return size, (low, reached - dilated_size(size, geometry.lhs_dilation[axis]) - low)


def reduced(geometry: ConvGeometry, map_: Map) -> list[str]:
    """Names of the factors that a map sums over."""
    return [factor.name for factor in factors(geometry) if map_.result not in factor.dims]


def spec_of(shaped: Any) -> Spec:
    """The mesh axes of each dimension, of anything with a shape and a `NamedSharding`."""
    return axes_by_dimension(shaped.sharding.spec, len(shaped.shape))


def inferred(
    geometry: ConvGeometry,
    types: Sequence[Any],
    mesh_shape: Mapping[str, int],
    map_: Map = INPUT_GRAD,
) -> PartitionSpec | None:
    """How the result is sharded where the sharding is part of types (explicit mesh axes).

    So that every shard of the operands, whose `types` they are, stays where it is. None if
    that cannot be: a channel that is summed over is cut, or the operands disagree.
    """
    specs = {role: spec_of(aval) for role, aval in zip(map_.operands, types, strict=True)}
    shape = shape_of_role(geometry, map_.result)
    entries: list[tuple[str, ...] | None] = [None] * len(shape)
    placed: set[str] = set()
    for factor in factors(geometry):
        cuts = {specs[role][factor.dims[role]] for role in specs if role in factor.dims} - {()}
        if not cuts:
            continue
        axes = cuts.pop()
        dim = factor.dims.get(map_.result)
        size = factor.size if factor.axis is None or dim is None else shape[dim]
        if cuts or dim is None or size % math.prod(mesh_shape[name] for name in axes):
            return None
        entries[dim] = axes
        placed.update(axes)
    asked = [name for spec in specs.values() for axes in spec for name in axes]
    used = [name for axes in entries if axes is not None for name in axes]
    if set(asked) != placed or len(used) != len(placed):
        return None
    return PartitionSpec(*entries)


def of_result_type(map_: Map, first: Any, second: Any, geometry: ConvGeometry) -> NamedSharding:
    """The sharding in the result's type. Without explicit axes it says nothing but its mesh."""
    mesh = second.sharding.mesh if first.sharding.mesh.empty else first.sharding.mesh
    spec: PartitionSpec | None = PartitionSpec()
    if compat.has_explicit_sharding(first, second):
        spec = inferred(geometry, (first, second), mesh.shape, map_)
    if spec is None:
        names = {Role.LHS: "x", Role.RHS: "w", Role.OUT: "dy"}
        got = " and ".join(
            f"{names[role]} {aval.str_short(True)}"
            for role, aval in zip(map_.operands, (first, second), strict=True)
        )
        raise compat.ShardingTypeError(
            "Please specify the output sharding via `out_sharding` parameter of "
            f"`conv_{map_.name}`: got {got}."
        )
    return NamedSharding(mesh, spec)


def spec_for(
    geometry: ConvGeometry, role: Role, assignment: Mapping[str, tuple[str, ...]]
) -> PartitionSpec:
    """How an array has to lie for an assignment of mesh axes to factors."""
    entries: list[tuple[str, ...] | None] = [None] * len(geometry.lhs_shape)
    for factor in factors(geometry):
        if role in factor.dims:
            entries[factor.dims[role]] = assignment.get(factor.name)
    return PartitionSpec(*entries)


def sharding_rule(
    geometry: ConvGeometry, mesh_shape: Mapping[str, int], map_: Map = INPUT_GRAD
) -> tuple[str, dict[str, Any]]:
    """The Shardy rule, its text and keyword arguments: which shardings may be propagated.

    Examples:
        >>> from jax_convgrad import ConvGeometry
        >>> g = ConvGeometry.parse((8, 3, 16), (4, 3, 3), (1,), "SAME")
        >>> sharding_rule(g, {"data": 8})[0]
        'n w0 s0, w1 w2 w3 -> n w4 s0'
        >>> sharding_rule(g, {"data": 2, "model": 3})[0]
        'n k s0, k c w0 -> n c s0'
    """
    rank = len(geometry.lhs_shape)
    roles = (*map_.operands, map_.result)
    words = {role: [""] * rank for role in roles}
    used = set()
    for factor in factors(geometry):
        # One that no axis of this mesh can cut must not attract shardings.
        if any(fits(factor, geometry, size, map_) for size in mesh_shape.values() if size > 1):
            used.add(factor.name)
            for role, dim in factor.dims.items():
                words[role][dim] = factor.name
    whole: list[str] = []
    for row in words.values():
        for dim, word in enumerate(row):
            if not word:
                row[dim] = f"w{len(whole)}"
                whole.append(row[dim])
    first, second, out = (" ".join(words[role]) for role in roles)
    arguments: dict[str, Any] = {"need_replication_factors": tuple(whole)}
    if partial_sums := tuple(name for name in reduced(geometry, map_) if name in used):
        arguments["reduction_factors"] = partial_sums
    return f"{first}, {second} -> {out}", arguments
