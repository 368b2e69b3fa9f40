"""Mapped axes under `vmap`: into a dimension of the operands, and out of the result again.

On meshes with explicit axes a reshape has to say where the mesh axes of the dimensions
go: here with the part that they cut, as long as the sizes allow.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from . import compat
from .partition import spec_of

Axes = tuple[str, ...]


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
