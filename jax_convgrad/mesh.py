"""Where XLA's partitioner has put the shards of an array, in axes of a mesh.

A dimension may be cut over a part of a mesh axis: a reshape of 16 channels over eight
devices to two groups of eight cuts the groups in two and the channels in four. No
`PartitionSpec` of that mesh says so, but one of a finer mesh of the same devices does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from jax.sharding import Mesh

from . import compat

# Mesh axes by dimension: those over which it is sharded, the major one first.
Spec: TypeAlias = tuple[tuple[str, ...], ...]


def axes_by_dimension(partition_spec: Iterable[Any], rank: int) -> Spec:
    """A `PartitionSpec` with a tuple of axes for each dimension."""
    entries = (*partition_spec, *(None,) * rank)
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries[:rank]
    )


def located(mesh: Mesh, arrays: Sequence[Any]) -> tuple[Mesh, list[Spec]]:
    """A mesh in whose axes the shardings can be said, and what they are.

    Args:
        mesh: the program's.
        arrays: `jax.ShapeDtypeStruct`s with shardings of XLA's.

    Returns:
        The mesh, or a finer one of the same devices in the same order, and a Spec for each
        array. An array that fits no such mesh counts as whole on every device, which has
        XLA gather it.
    """
    for candidate in itertools.chain((mesh,), _finer(mesh)):
        specs = [_spec_on(candidate, array) for array in arrays]
        if None not in specs:
            break
    return candidate, [
        ((),) * len(array.shape) if spec is None else spec
        for array, spec in zip(arrays, specs, strict=True)
    ]


def _spec_on(mesh: Mesh, array: Any) -> Spec | None:
    partition_spec = compat.partition_spec(array.sharding, mesh)
    return None if partition_spec is None else axes_by_dimension(partition_spec, len(array.shape))


def _finer(mesh: Mesh) -> Iterator[Mesh]:
    """Meshes whose axes are the prime factors of this one's, small ones major, then minor."""
    factors = {name: _prime_factors(size) for name, size in mesh.shape.items()}
    for step in (1, -1):
        sizes = [size for of_axis in factors.values() for size in of_axis[::step]]
        names = [f"{name}/{i}" for name, of_axis in factors.items() for i in range(len(of_axis))]
        yield Mesh(mesh.devices.reshape(sizes), names)


def _prime_factors(size: int) -> list[int]:
    result, prime = [], 2
    while size > 1:
        while size % prime == 0:
            result.append(prime)
            size //= prime
        prime += 1
    return result
