"""The values that bench compares results with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..geometry import ConvGeometry
from .geometries import normwise_error, reduction_taps, tolerance
from .workloads import Operands, Workload

# A float64 reference by lax beyond this takes longer than the measurement.
_REFERENCE_FLOPS = 1e9
_REFERENCE_IMAGES = 3


@dataclasses.dataclass(frozen=True)
class Reference:
    """Trusted values of a result, or of some images of it, and the error allowed against them.

    Attributes:
        images: those images; None for a filter gradient, which has none.
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


def filter_grad(x: np.ndarray, dy: np.ndarray, geometry: ConvGeometry) -> np.ndarray:
    """The filter gradient by NumPy: for each tap the positions that it connects, and a product.

    lax would take minutes for a layer of many groups.
    """
    g = geometry
    lhs_spec, rhs_spec, out_spec = g.dimension_numbers
    if 0 in (x.size, dy.size):
        return np.zeros(g.rhs_shape)
    x = np.asarray(x, np.float64).transpose(lhs_spec)
    dy = np.asarray(dy, np.float64).transpose(out_spec)
    channels, features = g.rhs_shape[rhs_spec[1]], dy.shape[1] // g.groups
    # Groups first: [groups, C, images, positions] and [groups, K, images, positions].
    if g.batch_group_count > 1:
        x = x.reshape(g.groups, dy.shape[0], channels, *x.shape[2:]).swapaxes(1, 2)
    else:
        x = np.moveaxis(x.reshape(x.shape[0], g.groups, channels, *x.shape[2:]), 0, 2)
    dy = np.moveaxis(dy.reshape(dy.shape[0], g.groups, features, *dy.shape[2:]), 0, 2)
    dw = np.zeros((g.groups, features, channels, *g.window_sizes))
    for r in itertools.product(*map(range, g.window_sizes)):
        read, met = connected_by(g, r)
        here = (slice(None),) * 3
        rows = x[here + np.ix_(*read)].reshape(g.groups, channels, -1)
        columns = dy[here + np.ix_(*met)].reshape(g.groups, features, -1)
        dw[(slice(None),) * 3 + r] = columns @ rows.swapaxes(1, 2)
    dw = dw.reshape(g.groups * features, *dw.shape[2:])
    return dw.transpose(np.argsort(rhs_spec))


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
