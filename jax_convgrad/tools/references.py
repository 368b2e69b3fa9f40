"""The values that `bench` and `check` compare results with."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..geometry import ConvGeometry
from ..maps import FILTER_GRAD, FORWARD, Map, Role, shape_of_role
from .geometries import normwise_error, reduction_taps, tolerance
from .workloads import Operands, Workload

# A float64 reference by lax beyond this takes longer than the measurement.
_REFERENCE_FLOPS = 1e9
_REFERENCE_IMAGES = 3


@dataclasses.dataclass(frozen=True)
class Reference:
    """Trusted values of a result, or of some images of it, and the error allowed against them.

    Attributes:
        images: those images; None where the values are those of the whole result: of a filter
            gradient, and with batch groups, where images of x and of y are not the same ones.
        batch_dimension: of the result.
        values: the trusted ones.
        bound: on the normwise error.
        dtype: that the values were computed in.
    """

    images: tuple[int, ...] | None
    batch_dimension: int
    values: np.ndarray
    bound: float
    dtype: str

    def error(self, out: Any) -> float:
        """Normwise error of what this holds."""
        out = np.asarray(out)
        if self.images is not None:
            out = np.take(out, self.images, self.batch_dimension)
        return normwise_error(out, self.values)


def connected_by(
    geometry: ConvGeometry, tap: Sequence[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The positions of x and of y that a tap connects, by axis, in step.

    The definition: h * lhs_dilation = p * stride - pad_low + r * rhs_dilation.
    """
    g = geometry
    of_x, of_y = [], []
    for a, r in enumerate(tap):
        p = np.arange(g.out_sizes[a])
        at = p * g.window_strides[a] - g.padding[a][0] + r * g.rhs_dilation[a]
        d = g.lhs_dilation[a]
        inside = (at >= 0) & (at % d == 0) & (at // d < g.in_sizes[a])
        of_x.append(at[inside] // d)
        of_y.append(p[inside])
    return of_x, of_y


def by_definition(
    map_: Map, first: np.ndarray, second: np.ndarray, geometry: ConvGeometry
) -> np.ndarray:
    """A map in float64 by NumPy: for each tap the positions that it connects, and a product.

    It shares no code with lax, compiles nothing, and takes milliseconds where lax would take
    minutes: for the filter gradient of a layer of many groups.

    Args:
        map_: what is computed.
        first: operand of the map, at its shape in the geometry.
        second: likewise.
        geometry: of the convolution.

    Returns:
        The result, at its shape in the geometry.
    """
    g = geometry
    arrays = [np.zeros(shape_of_role(g, role)) for role in Role]
    for role, operand in zip(map_.operands, (first, second), strict=True):
        arrays[role] = np.asarray(operand, np.float64)
    if 0 in (first.size, second.size):
        return arrays[map_.result]
    lhs_spec, rhs_spec, out_spec = g.dimension_numbers
    x, w, y = (
        np.ascontiguousarray(array.transpose(spec))
        for array, spec in zip(arrays, (lhs_spec, rhs_spec, out_spec), strict=True)
    )
    channels, features = w.shape[1], w.shape[0] // g.groups
    # Views, groups first: x[G, C, N, positions], y[G, K, N, positions] and w[G, K, C, taps].
    if g.batch_group_count > 1:
        x_ = x.reshape(g.groups, y.shape[0], channels, *x.shape[2:]).swapaxes(1, 2)
    else:
        x_ = np.moveaxis(x.reshape(x.shape[0], g.groups, channels, *x.shape[2:]), 0, 2)
    y_ = np.moveaxis(y.reshape(y.shape[0], g.groups, features, *y.shape[2:]), 0, 2)
    w_ = w.reshape(g.groups, features, *w.shape[1:])
    everything = (slice(None),) * 3
    for r in itertools.product(*map(range, g.window_sizes)):
        of_x, of_y = connected_by(g, r)
        if not all(positions.size for positions in of_x):
            continue
        in_x, in_y = everything + np.ix_(*of_x), everything + np.ix_(*of_y)
        tap = w_[everything + r]
        if map_ is FILTER_GRAD:
            rows = x_[in_x].reshape(g.groups, channels, -1)
            columns = y_[in_y].reshape(g.groups, features, -1)
            w_[everything + r] = columns @ rows.swapaxes(1, 2)
        elif map_ is FORWARD:
            y_[in_y] += np.einsum("gkc,gc...->gk...", tap, x_[in_x], optimize=True)
        else:
            x_[in_x] += np.einsum("gkc,gk...->gc...", tap, y_[in_y], optimize=True)
    result = (x, w, y)[map_.result]
    return result.transpose(np.argsort((lhs_spec, rhs_spec, out_spec)[map_.result]))


filter_grad = functools.partial(by_definition, FILTER_GRAD)


def reference(workload: Workload, operands: Operands) -> Reference:
    """The result in float64: a filter gradient by NumPy, or some images by lax.

    Those are the first, last and middle one, fewer where they are large. One image of the
    largest layers would take minutes in float64: those are compared with lax in float32 at
    precision HIGHEST, and the bound is widened by float32's own.
    """
    g = workload.geometry
    if workload.direction == "dw":
        return Reference(None, 0, filter_grad(*operands, g), workload.bound, "float64")
    lhs_spec, _, out_spec = g.dimension_numbers
    batch_in, batch_out = (
        (out_spec[0], lhs_spec[0]) if workload.direction == "dx" else (lhs_spec[0], out_spec[0])
    )
    batch = workload.layer.batch
    flops_per_image = g.flops / batch
    many = max(1, min(_REFERENCE_IMAGES, int(_REFERENCE_FLOPS // max(1.0, flops_per_image))))
    images = None
    if g.batch_group_count == 1:
        order = (0, batch - 1, batch // 2)
        images = tuple(sorted({*order}, key=order.index)[:many])
    exact = workload.dtype == "float64" or flops_per_image <= _REFERENCE_FLOPS
    dtype = "float64" if exact else "float32"
    bound = workload.bound
    if not exact:
        bound += tolerance("float32", reduction_taps(g))
    part, data = workload, operands[0]
    if images is not None:
        shape = list(g.lhs_shape)
        shape[lhs_spec[0]] = len(images)
        layer = dataclasses.replace(workload.layer, geometry=g.replace(lhs_shape=(*shape,)))
        part = dataclasses.replace(workload, layer=layer)
        data = np.take(operands[0], images, batch_in)
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
