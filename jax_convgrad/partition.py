"""How XLA's partitioner splits one input gradient over the devices of a mesh.

XLA cannot look inside a custom call. It is told here which dimensions belong together
(the factors of a sharding rule), and what one device computes of its shards. With N, C
and K the images, input and output channels, and S a spatial axis:

    factor   dimensions                   a device holding its shard of the factor
    n        N of dy and dX               works alone
    c        C of the filter and dX       works alone
    k        K of dy and the filter       has a partial sum: one all-reduce of dX
    g        K of dy and the filter,      works alone on whole groups
             C of dX (N of dX for batch groups)
    s        S of dy and dX               takes a halo of rows of dy from its neighbours

Every other sharded dimension is gathered first. docs/sharding.md counts the bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core as jex_core
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import compat, placement
from .geometry import ConvGeometry, dilated_size
from .placement import Spec

# The three arrays of the map, as positions in a tuple.
DY, RHS, DX = range(3)
# dX of one device's dy and rhs.
Compute: TypeAlias = Callable[[jax.Array, jax.Array, ConvGeometry], jax.Array]


@dataclasses.dataclass(frozen=True)
class Factor:
    """Dimensions of dy, rhs and dX that are split together or not at all.

    Attributes:
        name: "n", "c", "k", "g", or "s" with the number of a spatial axis.
        dims: the dimension in each of the arrays that has it, by DY, RHS or DX.
        size: what the number of shards has to divide.
        axis: the spatial axis, None for the others.
    """

    name: str
    dims: Mapping[int, int]
    size: int
    axis: int | None = None


@dataclasses.dataclass(frozen=True)
class Halo:
    """Rows of dy along one axis that a shard of dX needs from the devices beside it.

    Attributes:
        before: rows of the shard before, its last ones.
        after: rows of the shard after, its first ones.
        rows: rows of dy that a device has itself.
    """

    before: int
    after: int
    rows: int


def factors(geometry: ConvGeometry) -> list[Factor]:
    """The factors along which this gradient may be split.

    Args:
        geometry: the convolution.

    Returns:
        The channel and batch factors, then one for each spatial axis.
    """
    g = geometry
    lhs_spec, rhs_spec, out_spec = g.dimension_numbers
    images = Factor("n", {DY: out_spec[0], DX: lhs_spec[0]}, g.out_shape[out_spec[0]])
    channels = Factor("c", {RHS: rhs_spec[1], DX: lhs_spec[1]}, g.rhs_shape[rhs_spec[1]])
    out = {DY: out_spec[1], RHS: rhs_spec[0]}
    if g.feature_group_count > 1:
        result = [images, Factor("g", {**out, DX: lhs_spec[1]}, g.groups)]
    elif g.batch_group_count > 1:
        result = [Factor("g", {**out, DX: lhs_spec[0]}, g.groups), channels]
    else:
        result = [images, channels, Factor("k", out, g.rhs_shape[rhs_spec[0]])]
    for axis in range(g.axes):
        dims = {DY: out_spec[2 + axis], DX: lhs_spec[2 + axis]}
        size = math.gcd(g.out_sizes[axis], g.in_sizes[axis])
        result.append(Factor(f"s{axis}", dims, size, axis))
    return result


def halo(geometry: ConvGeometry, axis: int, shards: int) -> Halo | None:
    """What a spatial axis that is cut in equal parts exchanges, None if it cannot be cut.

    Device i holds rows [i * P / shards, ...) of dy and computes rows [i * H / shards, ...)
    of dX. All devices run one program, so the two cuts must move in step: P * stride =
    H * lhs_dilation. And a neighbour can give only what it has.

    Args:
        geometry: the convolution.
        axis: the spatial axis.
        shards: the number of parts.

    Returns:
        The halo, whose `before` and `after` may be zero.
    """
    size, out = geometry.in_sizes[axis], geometry.out_sizes[axis]
    stride, dilation = geometry.window_strides[axis], geometry.lhs_dilation[axis]
    if 0 in (size, out) or size % shards or out % shards or out * stride != size * dilation:
        return None
    rows = out // shards
    low = geometry.padding[axis][0]
    reach = (geometry.window_sizes[axis] - 1) * geometry.rhs_dilation[axis]
    # dX row h takes the rows p of dy with h * dilation + low - reach <= p * stride
    # <= h * dilation + low; first and last of the device's h, p counted from its first.
    before = max(0, (reach - low) // stride)
    after = max(0, ((size // shards - 1) * dilation + low) // stride - (rows - 1))
    return Halo(before, after, rows) if max(before, after) <= rows else None


def fits(factor: Factor, geometry: ConvGeometry, shards: int) -> bool:
    """Whether a factor can be cut in so many equal parts."""
    if factor.axis is not None:
        return halo(geometry, factor.axis, shards) is not None
    return factor.size % shards == 0


def assign(
    geometry: ConvGeometry, specs: Sequence[Spec], mesh_shape: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """Which mesh axes split which factor.

    Where arrays disagree about a mesh axis, the factor wins for which more elements
    already lie right; the other arrays are moved. A factor that cannot be cut in as many
    parts gives up its minor axes.

    Args:
        geometry: the convolution.
        specs: how dy, rhs and dX are sharded, or are wanted to be.
        mesh_shape: sizes of the mesh axes.

    Returns:
        Mesh axes by the factor's name; factors that stay whole are left out.
    """
    elements = tuple(map(math.prod, (geometry.out_shape, geometry.rhs_shape, geometry.lhs_shape)))
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
        while axes and not fits(factor, geometry, math.prod(mesh_shape[name] for name in axes)):
            axes.pop()
        if axes:
            assignment[factor.name] = tuple(axes)
    return assignment


def local_geometry(geometry: ConvGeometry, shards: Mapping[str, int]) -> ConvGeometry:
    """The convolution whose input gradient one device computes.

    Args:
        geometry: the whole convolution.
        shards: number of parts by factor, each of which `fits`.

    Returns:
        A geometry of the device's sizes, whose dy has the halos.
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
        if RHS in factor.dims:
            rhs_shape[factor.dims[RHS]] //= parts
        if DX in factor.dims:
            lhs_shape[factor.dims[DX]] //= parts
        if factor.name == "g":
            groups = {name: max(1, count // parts) for name, count in groups.items()}
        if factor.axis is not None:
            padding[factor.axis] = _local_padding(geometry, factor.axis, parts)
    return geometry.replace(
        lhs_shape=tuple(lhs_shape), rhs_shape=tuple(rhs_shape), padding=tuple(padding), **groups
    )


def _local_padding(geometry: ConvGeometry, axis: int, shards: int) -> tuple[int, int]:
    """Padding with which the device's rows of dX meet its rows of dy and their halo."""
    edges = halo(geometry, axis, shards)
    assert edges is not None, (geometry, axis, shards)
    stride = geometry.window_strides[axis]
    window = dilated_size(geometry.window_sizes[axis], geometry.rhs_dilation[axis])
    size = dilated_size(geometry.in_sizes[axis] // shards, geometry.lhs_dilation[axis])
    low = geometry.padding[axis][0] + edges.before * stride
    rows = edges.before + edges.rows + edges.after
    return low, (rows - 1) * stride + window - size - low


def _with_halo(
    dy: jax.Array, dim: int, edges: Halo, axes: tuple[str, ...], mesh_shape: Mapping[str, int]
) -> jax.Array:
    """A device's rows of dy between those of its neighbours, zeros where there is none."""
    # ppermute counts devices in the mesh's order of axes, shards count in the order of `axes`.
    in_mesh_order = tuple(name for name in mesh_shape if name in axes)
    ranks = np.arange(math.prod(mesh_shape[name] for name in axes))
    ranks = ranks.reshape([mesh_shape[name] for name in in_mesh_order])
    ranks = ranks.transpose([in_mesh_order.index(name) for name in axes]).reshape(-1)
    up = [(int(a), int(b)) for a, b in itertools.pairwise(ranks)]
    down = [(b, a) for a, b in up]
    parts = [dy]
    if edges.before:
        last = lax.slice_in_dim(dy, edges.rows - edges.before, edges.rows, axis=dim)
        parts.insert(0, lax.ppermute(last, in_mesh_order, up))
    if edges.after:
        first = lax.slice_in_dim(dy, 0, edges.after, axis=dim)
        parts.append(lax.ppermute(first, in_mesh_order, down))
    return lax.concatenate(parts, dim) if len(parts) > 1 else dy


def device_program(
    dy: jax.Array,
    rhs: jax.Array,
    *,
    geometry: ConvGeometry,
    assignment: Mapping[str, tuple[str, ...]],
    mesh_shape: Mapping[str, int],
    compute: Compute,
) -> jax.Array:
    """What one device does with its shards: halos, its part of dX, the sum over parts of k."""
    shards = {name: math.prod(mesh_shape[a] for a in axes) for name, axes in assignment.items()}
    for factor in factors(geometry):
        if factor.axis is not None and factor.name in shards:
            edges = halo(geometry, factor.axis, shards[factor.name])
            assert edges is not None, (geometry, factor)
            axes = assignment[factor.name]
            dy = _with_halo(dy, factor.dims[DY], edges, axes, mesh_shape)
    dx = compute(dy, rhs, local_geometry(geometry, shards))
    return lax.psum(dx, assignment["k"]) if "k" in assignment else dx


def spec_of(shaped: Any) -> Spec:
    """The mesh axes of each dimension, of anything with a shape and a `NamedSharding`."""
    return placement.spec_of(shaped.sharding.spec, len(shaped.shape))


def inferred(
    geometry: ConvGeometry, dy: Any, rhs: Any, mesh_shape: Mapping[str, int]
) -> PartitionSpec | None:
    """How dX is sharded where the sharding is part of types (explicit mesh axes).

    Args:
        geometry: the convolution.
        dy: the type of dy.
        rhs: the type of the filter.
        mesh_shape: sizes of the mesh axes.

    Returns:
        A specification for dX that leaves every shard where it is, or None if there is
        no such one: the output channels are cut, or the operands disagree.
    """
    specs = (spec_of(dy), spec_of(rhs))
    entries: list[tuple[str, ...] | None] = [None] * len(geometry.lhs_shape)
    placed: set[str] = set()
    for factor in factors(geometry):
        cuts = {specs[array][dim] for array, dim in factor.dims.items() if array != DX} - {()}
        if not cuts:
            continue
        axes = cuts.pop()
        dim = factor.dims.get(DX)
        size = factor.size if factor.axis is None or dim is None else geometry.lhs_shape[dim]
        if cuts or dim is None or size % math.prod(mesh_shape[name] for name in axes):
            return None
        entries[dim] = axes
        placed.update(axes)
    asked = [name for spec in specs for axes in spec for name in axes]
    used = [name for axes in entries if axes is not None for name in axes]
    if set(asked) != placed or len(used) != len(placed):
        return None
    return PartitionSpec(*entries)


def _spec_for(
    geometry: ConvGeometry, array: int, assignment: Mapping[str, tuple[str, ...]]
) -> PartitionSpec:
    """How an array has to lie for an assignment of mesh axes to factors."""
    entries: list[tuple[str, ...] | None] = [None] * len(geometry.lhs_shape)
    for factor in factors(geometry):
        if array in factor.dims:
            entries[factor.dims[array]] = assignment.get(factor.name)
    return PartitionSpec(*entries)


def _partition(
    geometry: ConvGeometry,
    compute: Compute,
    mesh: Mesh,
    operands: Sequence[Any],
    result: Any,
) -> tuple[Mesh, Callable[..., jax.Array], NamedSharding, tuple[NamedSharding, ...]]:
    """Called by XLA's partitioner once shardings have been propagated along the rule."""
    mesh, specs = placement.located(mesh, (*operands, result))
    mesh_shape = dict(mesh.shape)
    assignment = assign(geometry, specs, mesh_shape)
    dy, rhs, dx = (NamedSharding(mesh, _spec_for(geometry, i, assignment)) for i in (DY, RHS, DX))
    program = functools.partial(
        device_program,
        geometry=geometry,
        assignment=assignment,
        mesh_shape=mesh_shape,
        compute=compute,
    )
    shape = dx.shard_shape(geometry.lhs_shape)
    return mesh, functools.partial(_device_p.bind, program=program, shape=shape), dx, (dy, rhs)


# The program of one device as a primitive of its own, to be lowered without the mesh that the
# caller has set: where its axes are explicit, collectives would be lowered with shardings.
_device_p = jex_core.Primitive("conv_input_grad_of_one_device")


def _device_type(dy: Any, rhs: Any, *, program: Any, shape: tuple[int, ...]) -> Any:
    del rhs, program
    return jax.core.ShapedArray(shape, dy.dtype)


def _lower_device(ctx: Any, *operands: Any, program: Any, shape: tuple[int, ...]) -> Any:
    with compat.without_mesh():
        avals = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        result = jax.core.ShapedArray(shape, avals[DY].dtype)
        rule = mlir.lower_fun(program, multiple_results=False)
        return rule(ctx.replace(avals_in=avals, avals_out=[result]), *operands)


_device_p.def_abstract_eval(_device_type)
mlir.register_lowering(_device_p, _lower_device)


def sharding_rule(
    geometry: ConvGeometry, mesh_shape: Mapping[str, int]
) -> tuple[str, dict[str, Any]]:
    """The Shardy rule: which shardings may be propagated through this gradient.

    Args:
        geometry: the convolution.
        mesh_shape: sizes of the mesh axes.

    Returns:
        The rule's text, and its keyword arguments.

    Example:
        >>> from jax_convgrad import ConvGeometry
        >>> g = ConvGeometry.parse((8, 3, 16), (4, 3, 3), (1,), "SAME")
        >>> sharding_rule(g, {"data": 8})[0]
        'n w0 s0, w1 w2 w3 -> n w4 s0'
        >>> sharding_rule(g, {"data": 2, "model": 3})[0]
        'n k s0, k c w0 -> n c s0'
    """
    rank = len(geometry.lhs_shape)
    words = [[""] * rank for _ in range(3)]
    for factor in factors(geometry):
        # One that no axis of this mesh can cut must not attract shardings.
        if any(fits(factor, geometry, size) for size in mesh_shape.values() if size > 1):
            for array, dim in factor.dims.items():
                words[array][dim] = factor.name
    whole: list[str] = []
    for row in words:
        for dim, word in enumerate(row):
            if not word:
                row[dim] = f"w{len(whole)}"
                whole.append(row[dim])
    dy, rhs, dx = map(" ".join, words)
    arguments: dict[str, Any] = {"need_replication_factors": tuple(whole)}
    if "k" in words[DY]:
        arguments["reduction_factors"] = ("k",)
    return f"{dy}, {rhs} -> {dx}", arguments


def _sharding_rule(geometry: ConvGeometry, compute: Compute, mesh: Mesh, *types: Any) -> Any:
    del compute, types
    return sharding_rule(geometry, dict(mesh.shape))


def _whole(dy: jax.Array, rhs: jax.Array, geometry: ConvGeometry, compute: Compute) -> jax.Array:
    return compute(dy, rhs, geometry)


partitioned = custom_partitioning(_whole, static_argnums=(2, 3))
"""`compute(dy, rhs, geometry)` in a program that XLA splits over a mesh, with the rule above."""
# JAX decodes shardings along whole axes of the mesh only, and fails on others.
partitioned.def_partition(
    partition=_partition, sharding_rule=_sharding_rule, decode_shardings=False
)
