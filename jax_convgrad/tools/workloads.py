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
from ..input_grad import conv_input_grad
from ..maps import FORWARD, INPUT_GRAD, Map
from . import machine
from .geometries import normwise_error, reduction_taps, tolerance
from .layers import Layer

# Operand sets that calls rotate through: as many as a call can take, within this memory.
_POOL_LIMITS = {"cpu": (32, 2**28), "gpu": (64, 2**32)}
# A float64 reference beyond this takes longer than the measurement.
_REFERENCE_FLOPS = 1e9
_REFERENCE_IMAGES = 3

Function = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """The input gradient ("dx") of a layer, or its forward map ("fwd").

    Either takes two operands: dy and the filter, or x and the filter.
    """

    layer: Layer
    direction: Literal["dx", "fwd"]
    dtype: str
    precision: str

    @property
    def geometry(self) -> ConvGeometry:
        """The layer's convolution."""
        return self.layer.geometry

    @property
    def map_(self) -> Map:
        """What is computed."""
        return FORWARD if self.direction == "fwd" else INPUT_GRAD

    @property
    def name(self) -> str:
        """The net, with " fwd" appended for a forward."""
        return self.layer.name + (" fwd" if self.direction == "fwd" else "")

    @property
    def class_name(self) -> str:
        """The class to average in; forwards are averaged by themselves."""
        return self.layer.class_name + (" fwd" if self.direction == "fwd" else "")

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two operands."""
        g = self.geometry
        return (g.out_shape if self.direction == "dx" else g.lhs_shape), g.rhs_shape

    @property
    def bytes_moved(self) -> int:
        """Least memory traffic in bytes, the same for both directions."""
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

        def gradient(dy: Any, w: Any) -> Any:
            # The convolution at zeros is dead code: jit drops it and keeps its transpose.
            def forward(x: Any) -> Any:
                return lax_maps.forward(x, w, g, precision=precision)

            _, pull = jax.vjp(forward, jnp.zeros(g.lhs_shape, dy.dtype))
            (dx,) = pull(dy)
            return dx

        return gradient

    def our_function(self, implementation: Implementation) -> Function:
        """This package's public function for the same map."""
        g = self.geometry
        if self.direction == "fwd":
            return functools.partial(
                conv_general_dilated,
                **g.conv_params(),
                precision=self.precision,
                implementation=implementation,
            )

        def gradient(dy: Any, w: Any) -> Any:
            return conv_input_grad(
                dy,
                w,
                g.lhs_shape,
                **g.conv_params(),
                precision=self.precision,
                implementation=implementation,
            )

        return gradient

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
    directions: dict[str, Literal["dx", "fwd"]] = {"dx": "dx", "y": "fwd"}
    return [Workload(layer, directions[name], dtype, precision) for name in maps]


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


@dataclasses.dataclass(frozen=True)
class Reference:
    """Trusted values of some images of a result, and the error allowed against them."""

    images: tuple[int, ...]
    batch_dimension: int
    values: np.ndarray
    bound: float
    dtype: str

    def error(self, out: Any) -> float:
        """Normwise error of the images that this holds."""
        return normwise_error(np.take(np.asarray(out), self.images, self.batch_dimension),
                              self.values)  # fmt: skip


def reference(workload: Workload, operands: Operands) -> Reference:
    """The result by lax in float64: first, last and middle image, fewer where they are large.

    One image of the largest layers would take minutes in float64: those are compared with
    lax in float32 at precision HIGHEST, and the bound is widened by float32's own.
    """
    g = workload.geometry
    lhs_spec, _, out_spec = g.dimension_numbers
    batch_in, batch_out = (
        (out_spec[0], lhs_spec[0]) if workload.direction == "dx" else (lhs_spec[0], out_spec[0])
    )
    batch = workload.layer.batch
    flops_per_image = g.flops / batch
    many = max(1, min(_REFERENCE_IMAGES, int(_REFERENCE_FLOPS // max(1.0, flops_per_image))))
    images = tuple(sorted({0, batch // 2, batch - 1}, key=(0, batch - 1, batch // 2).index)[:many])
    if g.batch_group_count > 1:  # images of dX and of dy are not the same ones
        images = tuple(range(batch))
    exact = workload.dtype == "float64" or flops_per_image <= _REFERENCE_FLOPS
    dtype = "float64" if exact else "float32"
    bound = workload.bound
    if not exact:
        bound += tolerance("float32", reduction_taps(g))
    shape = list(g.lhs_shape)
    shape[lhs_spec[0]] = len(images)
    part = dataclasses.replace(
        workload, layer=dataclasses.replace(workload.layer, geometry=g.replace(lhs_shape=(*shape,)))
    )
    data = operands[0] if g.batch_group_count > 1 else np.take(operands[0], images, batch_in)
    with jax.enable_x64(True):
        function = jax.jit(part.lax_function(lax.Precision.HIGHEST))
        values = np.asarray(function(data.astype(dtype), operands[1].astype(dtype)))
    return Reference(images, batch_out, values, bound, dtype)


@jax.jit
def distance(out: jax.Array, other: jax.Array) -> jax.Array:
    """Normwise distance of two whole results, on the device."""
    wide = jnp.promote_types(out.dtype, jnp.float32)
    out, other = out.astype(wide), other.astype(wide)
    return jnp.sqrt(jnp.sum((out - other) ** 2) / jnp.sum(other**2))
