"""How XLA's partitioner splits one map of a convolution over the devices of a mesh.

`sharding` says which dimensions may be cut, and what a cut needs. Here XLA is told so, and
a device's program is written: halos from its neighbours, its part of the result, the sum
of partial sums.
"""

from __future__ import annotations

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
from jax.sharding import Mesh, NamedSharding

from . import compat
from .geometry import ConvGeometry
from .maps import Map, shape_of_role
from .mesh import located
from .sharding import (
    Halo,
    assign,
    factors,
    halo,
    local_geometry,
    reduced,
    sharding_rule,
    spec_for,
)

# The result of one device's operands.
Compute: TypeAlias = Callable[[jax.Array, jax.Array, ConvGeometry], jax.Array]


def _with_halo(
    x: jax.Array, dim: int, edges: Halo, axes: tuple[str, ...], mesh_shape: Mapping[str, int]
) -> jax.Array:
    """A device's rows between those of its neighbours, zeros where there is none."""
    # ppermute counts devices in the mesh's order of axes, shards count in the order of `axes`.
    in_mesh_order = tuple(name for name in mesh_shape if name in axes)
    ranks = np.arange(math.prod(mesh_shape[name] for name in axes))
    ranks = ranks.reshape([mesh_shape[name] for name in in_mesh_order])
    ranks = ranks.transpose([in_mesh_order.index(name) for name in axes]).reshape(-1)
    up = [(int(a), int(b)) for a, b in itertools.pairwise(ranks)]
    down = [(b, a) for a, b in up]
    parts = [x]
    if edges.before:
        last = lax.slice_in_dim(x, edges.rows - edges.before, edges.rows, axis=dim)
        parts.insert(0, lax.ppermute(last, in_mesh_order, up))
    if edges.after:
        first = lax.slice_in_dim(x, 0, edges.after, axis=dim)
        parts.append(lax.ppermute(first, in_mesh_order, down))
    return lax.concatenate(parts, dim) if len(parts) > 1 else x


def _device_program(
    first: jax.Array,
    second: jax.Array,
    *,
    geometry: ConvGeometry,
    map_: Map,
    assignment: Mapping[str, tuple[str, ...]],
    mesh_shape: Mapping[str, int],
    compute: Compute,
) -> jax.Array:
    """What one device does with its shards: halos, its part of the result, sums of parts."""
    shards = {name: math.prod(mesh_shape[a] for a in axes) for name, axes in assignment.items()}
    for factor in factors(geometry):
        if factor.axis is not None and factor.name in shards:
            edges = halo(geometry, factor.axis, shards[factor.name], map_)
            assert edges is not None, (geometry, factor)
            axes = assignment[factor.name]
            dim = factor.dims[map_.operands[0]]
            first = _with_halo(first, dim, edges, axes, mesh_shape)
    out = compute(first, second, local_geometry(geometry, shards, map_))
    summed = [axes for name, axes in assignment.items() if name in reduced(geometry, map_)]
    return lax.psum(out, tuple(itertools.chain(*summed))) if summed else out


def _partition(
    geometry: ConvGeometry,
    map_: Map,
    compute: Compute,
    mesh: Mesh,
    operands: Sequence[Any],
    result: Any,
) -> tuple[Mesh, Callable[..., jax.Array], NamedSharding, tuple[NamedSharding, ...]]:
    """Called by XLA's partitioner once shardings have been propagated along the rule."""
    mesh, specs = located(mesh, (*operands, result))
    mesh_shape = dict(mesh.shape)
    roles = (*map_.operands, map_.result)
    assignment = assign(geometry, dict(zip(roles, specs, strict=True)), mesh_shape, map_)
    *wanted, out = (NamedSharding(mesh, spec_for(geometry, i, assignment)) for i in roles)
    program = functools.partial(
        _device_program,
        geometry=geometry,
        map_=map_,
        assignment=assignment,
        mesh_shape=mesh_shape,
        compute=compute,
    )
    shape = out.shard_shape(shape_of_role(geometry, map_.result))
    return mesh, functools.partial(_device_p.bind, program=program, shape=shape), out, (*wanted,)


# The program of one device as a primitive of its own, to be lowered without the mesh that the
# caller has set: where its axes are explicit, collectives would be lowered with shardings.
_device_p = jex_core.Primitive("convgrad_of_one_device")


def _device_type(first: Any, second: Any, *, program: Any, shape: tuple[int, ...]) -> Any:
    del second, program
    return jax.core.ShapedArray(shape, first.dtype)


def _lower_device(ctx: Any, *operands: Any, program: Any, shape: tuple[int, ...]) -> Any:
    with compat.without_mesh():
        avals = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        result = jax.core.ShapedArray(shape, avals[0].dtype)
        rule = mlir.lower_fun(program, multiple_results=False)
        return rule(ctx.replace(avals_in=avals, avals_out=[result]), *operands)


_device_p.def_abstract_eval(_device_type)
mlir.register_lowering(_device_p, _lower_device)


def _sharding_rule(
    geometry: ConvGeometry, map_: Map, compute: Compute, mesh: Mesh, *types: Any
) -> Any:
    del compute, types
    return sharding_rule(geometry, dict(mesh.shape), map_)


def _whole(
    first: jax.Array, second: jax.Array, geometry: ConvGeometry, map_: Map, compute: Compute
) -> jax.Array:
    del map_
    return compute(first, second, geometry)


partitioned = custom_partitioning(_whole, static_argnums=(2, 3, 4))
"""`compute(first, second, geometry)` where XLA splits the program, with the rule above."""
# JAX decodes shardings along whole axes of the mesh only, and fails on others.
partitioned.def_partition(
    partition=_partition, sharding_rule=_sharding_rule, decode_shardings=False
)
