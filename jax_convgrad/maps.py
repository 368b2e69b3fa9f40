"""The three maps of a convolution: each of its three arrays is the result of one.

    T(x, w, y') = sum of  y'[n, k, p] * x[n, c, h] * w[k, c, r]

is linear in each array (docs/mathematics.md). A map leaves one of them out: it is the
result, the other two are the operands. Whatever is said of a map's rules (its transposes,
what a mapped or a cut dimension does) follows from which arrays have an index.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from jax import lax

from .geometry import ConvGeometry, dilated_size


class Role(enum.IntEnum):
    """An array of the form, by lax's name for it, and its place where all three are listed."""

    LHS = 0  # x, and its gradient dX
    RHS = 1  # the filter w
    OUT = 2  # y, and its cotangent dY


@dataclasses.dataclass(frozen=True)
class Map:
    """One of the three.

    Attributes:
        name: "forward", "input_grad" or "filter_grad".
        operands: the activation first, or lhs and then dy.
        result: the role that is left.
    """

    name: str
    operands: tuple[Role, Role]
    result: Role

    @property
    def title(self) -> str:
        """Its name in words."""
        return self.name.replace("_grad", " gradient")

    @property
    def target(self) -> str:
        """The custom call's name."""
        return f"convgrad_{self.name}"

    def __repr__(self) -> str:
        return self.name


FORWARD = Map("forward", (Role.LHS, Role.RHS), Role.OUT)
INPUT_GRAD = Map("input_grad", (Role.OUT, Role.RHS), Role.LHS)
FILTER_GRAD = Map("filter_grad", (Role.LHS, Role.OUT), Role.RHS)


def shape_of_role(geometry: ConvGeometry, role: Role) -> tuple[int, ...]:
    """The shape of an array."""
    return (geometry.lhs_shape, geometry.rhs_shape, geometry.out_shape)[role]


@dataclasses.dataclass(frozen=True)
class Index:
    """An index of the form.

    Attributes:
        name: "n", "c", "k", or "g", the groups that are the major part of a dimension.
        dims: the dimension of it, by the roles of the two or three arrays that have it.
        groups: how many groups are the major part of that dimension, by role.
    """

    name: str
    dims: dict[Role, int]
    groups: dict[Role, int]


def indices(geometry: ConvGeometry) -> dict[str, Index]:
    """The indices except the spatial ones, by name."""
    lhs_spec, rhs_spec, out_spec = geometry.dimension_numbers
    of_images, of_features = geometry.batch_group_count, geometry.feature_group_count
    by_groups = lhs_spec[0] if of_images > 1 else lhs_spec[1]
    every = (
        Index("n", {Role.LHS: lhs_spec[0], Role.OUT: out_spec[0]},
              {Role.LHS: of_images, Role.OUT: 1}),
        Index("c", {Role.LHS: lhs_spec[1], Role.RHS: rhs_spec[1]},
              {Role.LHS: of_features, Role.RHS: 1}),
        Index("k", {Role.RHS: rhs_spec[0], Role.OUT: out_spec[1]},
              {Role.RHS: geometry.groups, Role.OUT: geometry.groups}),
        Index("g", {Role.LHS: by_groups, Role.RHS: rhs_spec[0], Role.OUT: out_spec[1]},
              {Role.LHS: 1, Role.RHS: 1, Role.OUT: 1}),
    )  # fmt: skip
    return {index.name: index for index in every}


def swapped(spec: Sequence[int]) -> tuple[int, ...]:
    """A layout with its first two roles (batch and feature, or out and in) exchanged."""
    return (spec[1], spec[0], *spec[2:])


def exchanged(geometry: ConvGeometry) -> ConvGeometry:
    """The convolution that has the filter and y in each other's place, over the same arrays.

    The form has the same products: output position and tap change places, and with them
    window_strides and rhs_dilation; x's images are channels, and its channels images. So the
    filter gradient of one is the forward map of the other.

    Args:
        geometry: a convolution whose y and filter have elements.
    """
    g = geometry
    padding = []
    for axis, (low, _) in enumerate(g.padding):
        reached = dilated_size(g.out_sizes[axis], g.window_strides[axis]) - 1
        reached += dilated_size(g.window_sizes[axis], g.rhs_dilation[axis])
        padding.append((low, reached - dilated_size(g.in_sizes[axis], g.lhs_dilation[axis]) - low))
    lhs_spec, rhs_spec, out_spec = map(swapped, g.dimension_numbers)
    return g.replace(
        rhs_shape=g.out_shape,
        window_strides=g.rhs_dilation,
        padding=tuple(padding),
        rhs_dilation=g.window_strides,
        dimension_numbers=lax.ConvDimensionNumbers(lhs_spec, out_spec, rhs_spec),
        feature_group_count=g.batch_group_count,
        batch_group_count=g.feature_group_count,
    )
