"""What bench measures: one map of one layer, its operands, and its JAX implementations."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import dispatch, lax_maps
from ..compat import canonicalize_precision
from ..conv import conv_general_dilated
from ..dispatch import Choice, Implementation
from ..geometry import ConvGeometry
from ..gradients import conv_filter_grad, conv_input_grad
from ..maps import FORWARD, INPUT_GRAD, Map, shape_of_role
from . import MAPS, machine
from .geometries import reduction_taps, tolerance
from .layers import Layer

# Operand sets that calls rotate through: as many as a call can take, within this memory.
_POOL_LIMITS = {"cpu": (32, 2**28), "gpu": (64, 2**32)}

Function = Callable[[Any, Any], Any]
Direction = Literal["dx", "fwd", "dw"]
# As results files spell what the command line names as in MAPS.
_DIRECTIONS: dict[str, Direction] = {"dx": "dx", "y": "fwd", "dw": "dw"}
_MAPS = {direction: MAPS[name] for name, direction in _DIRECTIONS.items()}


def public_function(map_: Map, geometry: ConvGeometry, **options: Any) -> Function:
    """This package's function for a map of a convolution, of the map's operands."""
    options |= geometry.conv_params()
    if map_ is FORWARD:
        return functools.partial(conv_general_dilated, **options)
    function = conv_input_grad if map_ is INPUT_GRAD else conv_filter_grad
    shape = shape_of_role(geometry, map_.result)
    return lambda first, second: function(first, second, shape, **options)


@dataclasses.dataclass(frozen=True)
class Workload:
    """The input gradient ("dx") of a layer, its forward map ("fwd") or its filter gradient ("dw").

    Each takes two operands: dy and the filter, x and the filter, or x and dy.
    """

    layer: Layer
    direction: Direction
    dtype: str
    precision: str

    @property
    def geometry(self) -> ConvGeometry:
        """The layer's convolution."""
        return self.layer.geometry

    @property
    def map_(self) -> Map:
        """What is computed."""
        return _MAPS[self.direction]

    @property
    def name(self) -> str:
        """The net, with the map appended unless it is the input gradient."""
        return self.layer.name + self._suffix

    @property
    def class_name(self) -> str:
        """The class to average in; each map is averaged by itself."""
        return self.layer.class_name + self._suffix

    @property
    def _suffix(self) -> str:
        return "" if self.direction == "dx" else f" {self.direction}"

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two operands."""
        first, second = self.map_.operands
        return shape_of_role(self.geometry, first), shape_of_role(self.geometry, second)

    @property
    def bytes_moved(self) -> int:
        """Least memory traffic in bytes, the same for all maps."""
        return self.geometry.bytes_moved(np.dtype(self.dtype).itemsize)

    @property
    def bound(self) -> float:
        """The normwise error allowed against float64."""
        tf32 = machine.is_gpu() and self.dtype == "float32" and self.precision != "highest"
        taps = reduction_taps(self.geometry, self.map_)
        return tolerance("tf32" if tf32 else self.dtype, taps)

    def lax_function(self, precision: Any = None) -> Function:
        """The peer: lax's convolution, or the vjp that jax.grad takes of it."""
        g, precision = self.geometry, precision or self.precision
        if self.direction == "fwd":
            return functools.partial(lax_maps.forward, geometry=g, precision=precision)
        result = shape_of_role(g, self.map_.result)

        # The convolution at zeros is dead code: jit drops it and keeps its transpose.
        def gradient(dy: Any, other: Any) -> Any:
            def forward(wanted: Any) -> Any:
                x, w = (other, wanted) if self.direction == "dw" else (wanted, other)
                return lax_maps.forward(x, w, g, precision=precision)

            _, pull = jax.vjp(forward, jnp.zeros(result, dy.dtype))
            return pull(dy)[0]

        return (lambda x, dy: gradient(dy, x)) if self.direction == "dw" else gradient

    def our_function(self, implementation: Implementation) -> Function:
        """This package's public function for the same map."""
        return public_function(
            self.map_, self.geometry, precision=self.precision, implementation=implementation
        )

    def choice(self, implementation: Implementation) -> Choice:
        """What runs in `our_function`, asked of dispatch.

        Raises:
            ValueError: "native" was asked for and there is no kernel.
        """
        return dispatch.choose(
            self.geometry,
            self.dtype,
            machine.lowering_platform(),
            implementation,
            canonicalize_precision(self.precision),
            map_=self.map_,
        )


def workloads(layer: Layer, dtype: str, precision: str, maps: Sequence[str]) -> list[Workload]:
    """The maps of a layer, by their names in MAPS, that are measured."""
    return [Workload(layer, _DIRECTIONS[name], dtype, precision) for name in maps]


Operands = tuple[np.ndarray, np.ndarray]


def make_pool(workload: Workload, seed: int, count: int | None = None) -> list[Operands]:
    """Random normal operands, one pair per instance, all different.

    Values are drawn once; the others are rotations of them, which costs a copy.

    Args:
        workload: what they are for.
        seed: of the values.
        count: how many pairs; None for as many as a call can take.
    """
    if count is None:
        most, most_bytes = _POOL_LIMITS["gpu" if machine.is_gpu() else "cpu"]
        count = max(2, min(most, most_bytes // max(1, workload.bytes_moved)))
    rng = np.random.default_rng(seed)
    bases = [
        rng.standard_normal(shape, dtype=np.float32).astype(workload.dtype)
        for shape in workload.operand_shapes
    ]

    def rotated(base: np.ndarray, instance: int) -> np.ndarray:
        return np.roll(base.reshape(-1), 7919 * instance).reshape(base.shape)

    return [(rotated(bases[0], i), rotated(bases[1], i)) for i in range(count)]


class JaxPeer:
    """A JAX function over the pool, jitted over a tuple of instances.

    On a GPU the time is the wall time of calls issued back to back, each of the whole
    pool, which is device time once the device is the slower side.
    """

    def __init__(self, name: str, function: Function, pool: Sequence[tuple[Any, Any]]) -> None:
        self.name = name
        self._pool = list(pool)
        self._many = jax.jit(lambda pairs: [function(*pair) for pair in pairs])

    def result(self) -> Any:
        """The result for the pool's first operands."""
        (out,) = self._many([self._pool[0]])
        return out.block_until_ready()

    def run(self, first: int, instances: int, calls: int) -> float:
        """As `timing.Peer.run` says."""
        size = len(self._pool)
        batches = [
            [self._pool[(first + call * instances + i) % size] for i in range(instances)]
            for call in range(calls)
        ]
        start = time.perf_counter()
        for batch in batches:
            out = self._many(batch)
        for array in out:
            array.block_until_ready()
        return 1e6 * (time.perf_counter() - start) / (instances * calls)


class ScanPeer:
    """A JAX function as the body of a `lax.scan` over the whole pool.

    As in the backward pass of a scanned net, operands are cut from stacked ones, last step
    first, and the result is carried. The loop's own work, a copy of the operands for every
    step, is part of the time.
    """

    def __init__(self, name: str, function: Function, pool: Sequence[tuple[Any, Any]]) -> None:
        self.name = name
        self._operands = tuple(map(jnp.stack, zip(*pool, strict=True)))
        result = jax.eval_shape(function, *pool[0])

        def scan(operands: Any) -> Any:
            start = jnp.zeros(result.shape, result.dtype)
            return lax.scan(lambda _, pair: (function(*pair), None), start, operands, reverse=True)[
                0
            ]

        self._scan = jax.jit(scan)

    def result(self) -> Any:
        """The result for the pool's first operands."""
        return self._scan(self._operands).block_until_ready()

    def run(self, first: int, instances: int, calls: int) -> float:
        """As `timing.Peer.run` says, the instances being the pool."""
        del first
        start = time.perf_counter()
        for _ in range(calls):
            out = self._scan(self._operands)
        out.block_until_ready()
        return 1e6 * (time.perf_counter() - start) / (instances * calls)
