"""The maps under `vmap`: mapped axes go into a dimension of the operands, for one call, and
come out of the result's again.

On meshes with explicit axes a reshape has to say where the mesh axes of the dimensions
go: here with the part that they cut, as long as the sizes allow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jax.extend import core as jex_core
from jax.interpreters import batching
from jax.sharding import NamedSharding, PartitionSpec

from . import compat, sharding
from .geometry import ConvGeometry
from .maps import Map, Role, indices, shape_of_role
from .sharding import spec_of

Axes = tuple[str, ...]


def register(primitive: jex_core.Primitive, map_: Map, bind: Callable[..., jax.Array]) -> None:
    """Gives a map's primitive its rule; `bind` binds it, in any operands' types."""
    batching.primitive_batchers[primitive] = functools.partial(_batch, map_, bind)


def _batch(
    map_: Map,
    bind: Callable[..., jax.Array],
    operands: tuple[jax.Array, jax.Array],
    dims: tuple[int | None, int | None],
    *,
    geometry: ConvGeometry,
    out_sharding: Any,
    **params: Any,
) -> tuple[jax.Array, int]:
    """One call for all examples. A mapped operand's axis joins an index that it shares with
    the result, images or channels; both together join the groups.
    """
    mapped = {
        role: (x, dim)
        for role, x, dim in zip(map_.operands, operands, dims, strict=True)
        if dim is not None
    }
    size = next(x.shape[dim] for x, dim in mapped.values())
    if len(mapped) == 2 and is_symbolic_dim(size):
        # As many groups as that, which neither a custom call nor lax can say.
        pair = tuple(jnp.moveaxis(x, dim, 0) for x, dim in mapped.values())
        one = functools.partial(bind, geometry=geometry, out_sharding=out_sharding, **params)
        return lax.map(lambda both: one(*both), pair), 0
    if size == 0:
        shape = (0, *shape_of_role(geometry, map_.result))
        return jnp.zeros_like(operands[0], shape=shape), 0

    every = indices(geometry)
    name = (
        "g"
        if len(mapped) == 2
        else next(n for n in "nck" if {*mapped, map_.result} <= every[n].dims.keys())
    )
    index = every[name]
    folded = [
        x if dim is None else fold(x, dim, index.dims[role], index.groups[role])
        for role, x, dim in zip(map_.operands, operands, dims, strict=True)
    ]
    dim, groups = index.dims[map_.result], index.groups[map_.result]
    by_size: tuple[str, ...] = ()
    if compat.has_explicit_sharding(*map(jax.typeof, operands)):
        # That of the mapped function's result; in the folded one it need not be inferable.
        types = [unmapped(jax.typeof(x), d) for x, d in zip(operands, dims, strict=True)]
        by_size = types[1 if dims[0] is None else 0][1]
        if out_sharding is None:
            out_sharding = sharding.of_result_type(map_, types[0][0], types[1][0], geometry)
        out_sharding = folded_sharding(out_sharding, dim, by_size)
    shapes = {role: list(shape_of_role(geometry, role)) for role in (Role.LHS, Role.RHS)}
    for role, sizes in shapes.items():
        if role in index.dims:
            sizes[index.dims[role]] *= size
    changes: dict[str, Any] = {
        "lhs_shape": tuple(shapes[Role.LHS]),
        "rhs_shape": tuple(shapes[Role.RHS]),
    }
    if name == "g":
        kind = "batch_group_count" if geometry.batch_group_count > 1 else "feature_group_count"
        changes[kind] = getattr(geometry, kind) * size
    out = bind(*folded, geometry=geometry.replace(**changes), out_sharding=out_sharding, **params)
    return unfold(out, size, dim, groups, by_size), 0


def fold(x: jax.Array, mapped: int, dim: int, groups: int = 1) -> jax.Array:
    """Folds the mapped axis into dimension `dim` of the array without it.

    The dimension becomes (groups, mapped, rest): groups stay outermost.
    """
    x = jnp.moveaxis(x, mapped, 0)
    size, *shape = x.shape
    spec = _explicit_spec(x)
    by_size, *entries = spec or ((),) * x.ndim
    by_groups, by_rest = _split(x, entries[dim], groups, shape[dim] // groups)
    x = _reshape(
        x,
        (size, *shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :]),
        (by_size, *entries[:dim], by_groups, by_rest, *entries[dim + 1 :]),
    )
    x = jnp.moveaxis(x, 0, dim + 1)
    entries[dim] = by_groups + by_size + by_rest
    return _reshape(x, (*shape[:dim], size * shape[dim], *shape[dim + 1 :]), tuple(entries))


def unfold(x: jax.Array, size: int, dim: int, groups: int = 1, by_size: Axes = ()) -> jax.Array:
    """The inverse of `fold`, with the mapped axis in front, cut by the mesh axes `by_size`."""
    shape, entries = x.shape, list(_explicit_spec(x) or ((),) * x.ndim)
    rest = shape[dim] // size
    others = tuple(name for name in entries[dim] if name not in by_size)
    by_groups, by_rest = _split(x, others, groups, rest // groups)
    x = _reshape(
        x,
        (*shape[:dim], groups, size, rest // groups, *shape[dim + 1 :]),
        (*entries[:dim], by_groups, by_size, by_rest, *entries[dim + 1 :]),
    )
    x = jnp.moveaxis(x, dim + 1, 0)
    entries[dim] = by_groups + by_rest
    return _reshape(x, (size, *shape[:dim], rest, *shape[dim + 1 :]), (by_size, *entries))


def unmapped(aval: Any, mapped: int | None) -> tuple[Any, Axes]:
    """A type as the mapped function sees it, and the mesh axes of its mapped axis."""
    if mapped is None:
        return aval, ()
    spec = spec_of(aval)
    entries = (axes or None for axes in (*spec[:mapped], *spec[mapped + 1 :]))
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*entries))
    shape = (*aval.shape[:mapped], *aval.shape[mapped + 1 :])
    return jax.core.ShapedArray(shape, aval.dtype, sharding=sharding), spec[mapped]


def folded_sharding(sharding: NamedSharding, dim: int, by_size: Axes) -> NamedSharding:
    """The sharding of a result whose `dim` has taken in an axis that `by_size` cuts."""
    entries = list(sharding.spec) + [None] * (dim + 1 - len(sharding.spec))
    own = entries[dim] or ()
    entries[dim] = (*by_size, *((own,) if isinstance(own, str) else own)) or None
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def _explicit_spec(x: jax.Array) -> tuple[Axes, ...] | None:
    aval = jax.typeof(x)
    return spec_of(aval) if compat.has_explicit_sharding(aval) else None


def _split(x: jax.Array, axes: Axes, major: int, minor: int) -> tuple[Axes, Axes]:
    """Mesh axes of the two parts of a dimension: as many as cut the major one, then the minor."""
    if not axes:
        return (), ()
    sizes = jax.typeof(x).sharding.mesh.shape
    by_major: list[str] = []
    for name in axes:
        if major % math.prod(sizes[n] for n in (*by_major, name)):
            break
        by_major.append(name)
    by_minor = axes[len(by_major) :]
    if minor % math.prod(sizes[name] for name in by_minor):
        by_minor = ()
    return tuple(by_major), by_minor


def _reshape(x: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...]) -> jax.Array:
    aval = jax.typeof(x)
    if not compat.has_explicit_sharding(aval):
        return x.reshape(shape)
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*(axes or None for axes in spec)))
    return lax.reshape(x, shape, out_sharding=sharding)
