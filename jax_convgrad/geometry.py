"""The geometry of a convolution: what its sizes have to be, and what follows from them.

Pure Python over tuples of integers: no arrays, no tracing, no platform. Everything
that the package knows about a convolution's shape is derived here once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
from jax import lax
from jax.export import is_symbolic_dim

from . import arguments
from .compat import InconclusiveDimensionOperation

DimensionNumbers: TypeAlias = tuple[str, str, str] | lax.ConvDimensionNumbers | None
Padding: TypeAlias = str | Sequence[tuple[int, int]]


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def dilated_size(size: Any, dilation: int) -> Any:
    """Returns the extent of `size` elements that lie `dilation` apart."""
    if is_symbolic_dim(size):
        return size if dilation == 1 else jax.core.max_dim((size - 1) * dilation + 1, 0)
    return 0 if size == 0 else (size - 1) * dilation + 1


def is_static(sizes: Sequence[Any]) -> bool:
    """Whether every size is a plain integer, none symbolic (shape polymorphism)."""
    return not any(map(is_symbolic_dim, sizes))


def certainly(compare: Callable[[Any, Any], Any], left: Any, right: Any) -> bool:
    """Whether a comparison of sizes holds whatever values the symbolic ones take.

    Args:
        compare: such as `operator.lt`; for symbolic sizes it raises where it cannot know.
        left: its first argument.
        right: its second argument.
    """
    try:
        return bool(compare(left, right))
    except InconclusiveDimensionOperation:
        return False


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """A validated convolution, hashable, with every default made explicit.

    The names and meanings are those of `jax.lax.conv_general_dilated`; `padding` is
    always explicit. Shapes and padding may hold symbolic sizes (`jax.export`). Build one
    with `ConvGeometry.parse`.
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int = 1
    batch_group_count: int = 1

    @classmethod
    def parse(
        cls,
        lhs_shape: Sequence[int],
        rhs_shape: Sequence[int],
        window_strides: Sequence[int] | None,
        padding: Padding,
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: DimensionNumbers = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        *,
        function: str = "conv_general_dilated",
    ) -> ConvGeometry:
        """Reads lax-style arguments and checks every one of them.

        Args:
            lhs_shape: shape of the input, `n + 2` sizes.
            rhs_shape: shape of the filter, `n + 2` sizes.
            window_strides: `n` strides, or None for ones.
            padding: 'SAME', 'SAME_LOWER', 'VALID' or `n` pairs (low, high) of either sign.
            lhs_dilation: `n` factors, or None for ones.
            rhs_dilation: `n` factors, or None for ones.
            dimension_numbers: as in `jax.lax.conv_general_dilated`.
            feature_group_count: number of feature groups.
            batch_group_count: number of batch groups.
            function: the public function that error messages name.

        Returns:
            The geometry.

        Raises:
            ValueError: an argument's value is out of range or contradicts another.
            TypeError: an argument is of the wrong kind.
        """
        lhs_shape = tuple(arguments.size(size, "lhs shape", function) for size in lhs_shape)
        rhs_shape = tuple(arguments.size(size, "rhs shape", function) for size in rhs_shape)
        for name, shape in (("lhs", lhs_shape), ("rhs", rhs_shape)):
            if any(size < 0 for size in shape if not is_symbolic_dim(size)):
                raise ValueError(f"{function} {name} shape must not be negative, got {shape}.")
        if len(lhs_shape) != len(rhs_shape):
            raise ValueError(
                f"{function} lhs and rhs must have the same number of dimensions, but got "
                f"{lhs_shape} and {rhs_shape}."
            )
        axes = len(lhs_shape) - 2
        if axes < 0:
            raise ValueError(
                f"{function} lhs and rhs must have at least 2 dimensions, but got "
                f"{lhs_shape} and {rhs_shape}."
            )
        dnums = arguments.dimension_numbers(lhs_shape, rhs_shape, dimension_numbers, function)
        ones = (1,) * axes
        window_strides = ones if window_strides is None else window_strides
        strides = arguments.integers(window_strides, "window_strides", function, axes, 1)
        lhs_dilation = ones if lhs_dilation is None else lhs_dilation
        rhs_dilation = ones if rhs_dilation is None else rhs_dilation
        lhs_dilation = arguments.integers(lhs_dilation, "lhs_dilation", function, axes, 1)
        rhs_dilation = arguments.integers(rhs_dilation, "rhs_dilation", function, axes, 1)
        in_sizes = [lhs_shape[d] for d in dnums.lhs_spec[2:]]
        windows = [
            dilated_size(rhs_shape[d], dilation)
            for d, dilation in zip(dnums.rhs_spec[2:], rhs_dilation, strict=True)
        ]
        if isinstance(padding, str):
            if padding.upper() not in arguments.STRING_PADDINGS:
                known = ", ".join(arguments.STRING_PADDINGS)
                raise ValueError(
                    f"{function} padding must be one of {known} or a sequence of (low, high) "
                    f"pairs, got {padding!r}."
                )
            if any(d != 1 for d in lhs_dilation):
                raise ValueError(
                    "String padding is not implemented for transposed convolution using this "
                    "op. Please either exactly specify the required padding or use "
                    f"conv_transpose. ({function} padding={padding!r}, "
                    f"lhs_dilation={lhs_dilation})"
                )
            padding = lax.padtype_to_pads(in_sizes, windows, strides, padding)
        geometry = cls(
            lhs_shape=lhs_shape,
            rhs_shape=rhs_shape,
            window_strides=strides,
            padding=arguments.explicit_padding(padding, function, axes),
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dnums,
            feature_group_count=arguments.integer(
                feature_group_count, "feature_group_count", function
            ),
            batch_group_count=arguments.integer(batch_group_count, "batch_group_count", function),
        )
        geometry._check_groups(function)
        geometry._check_padding(function)
        return geometry

    def _check_groups(self, function: str) -> None:
        lhs_spec, rhs_spec, _ = self.dimension_numbers
        features, batch = self.lhs_shape[lhs_spec[1]], self.lhs_shape[lhs_spec[0]]
        rhs_out, rhs_in = self.rhs_shape[rhs_spec[0]], self.rhs_shape[rhs_spec[1]]
        for name in ("feature_group_count", "batch_group_count"):
            count = getattr(self, name)
            if count <= 0:
                raise ValueError(f"{function} {name} must be a positive integer, got {count}.")
        if self.feature_group_count > 1 and self.batch_group_count > 1:
            raise ValueError(
                "At most one of batch_group_count and feature_group_count may be > 1, got "
                f"batch_group_count={self.batch_group_count} and "
                f"feature_group_count={self.feature_group_count}"
            )
        if features % self.feature_group_count != 0:
            raise ValueError(
                f"{function} feature_group_count must divide lhs feature dimension size, but "
                f"{self.feature_group_count} does not divide {features}."
            )
        if features // self.feature_group_count != rhs_in:
            raise ValueError(
                f"{function} lhs feature dimension size divided by feature_group_count must "
                f"equal the rhs input feature dimension size, but {features} // "
                f"{self.feature_group_count} != {rhs_in}."
            )
        if batch % self.batch_group_count != 0:
            raise ValueError(
                f"{function} batch_group_count must divide lhs batch dimension size, but "
                f"{self.batch_group_count} does not divide {batch}."
            )
        for name in ("feature_group_count", "batch_group_count"):
            if rhs_out % getattr(self, name) != 0:
                raise ValueError(
                    f"{function} rhs output feature dimension size must be a multiple of "
                    f"{name}, but {rhs_out} is not a multiple of {getattr(self, name)}."
                )

    def _check_padding(self, function: str) -> None:
        for axis, padded in enumerate(self._padded_sizes):
            if certainly(operator.lt, padded, 0):
                raise ValueError(
                    "Negative padding is larger than the size of the corresponding dimension: "
                    f"got {function} padding={self.padding} for spatial axis {axis} of lhs "
                    f"shape {self.lhs_shape}."
                )

    @property
    def is_static(self) -> bool:
        """Whether every size and padding is known, none symbolic."""
        return is_static((*self.lhs_shape, *self.rhs_shape, *itertools.chain(*self.padding)))

    @property
    def axes(self) -> int:
        """The number of spatial axes."""
        return len(self.lhs_shape) - 2

    @property
    def in_sizes(self) -> tuple[int, ...]:
        """Spatial sizes of lhs."""
        return tuple(self.lhs_shape[d] for d in self.dimension_numbers.lhs_spec[2:])

    @property
    def window_sizes(self) -> tuple[int, ...]:
        """Spatial sizes of rhs, undilated."""
        return tuple(self.rhs_shape[d] for d in self.dimension_numbers.rhs_spec[2:])

    @property
    def groups(self) -> int:
        """The group count, of whichever kind."""
        return max(self.feature_group_count, self.batch_group_count)

    @property
    def _padded_sizes(self) -> tuple[int, ...]:
        return tuple(
            dilated_size(size, dilation) + low + high
            for size, dilation, (low, high) in zip(
                self.in_sizes, self.lhs_dilation, self.padding, strict=True
            )
        )

    @functools.cached_property
    def out_sizes(self) -> tuple[int, ...]:
        """Spatial sizes of the convolution's result."""
        return tuple(
            # 0 where the window does not fit.
            jax.core.max_dim((padded - dilated_size(size, dilation)) // stride + 1, 0)
            for padded, size, dilation, stride in zip(
                self._padded_sizes,
                self.window_sizes,
                self.rhs_dilation,
                self.window_strides,
                strict=True,
            )
        )

    @property
    def exact_padding(self) -> tuple[tuple[int, int], ...]:
        """The padding less what the last window does not reach, where that is symbolic."""
        pairs = []
        for axis, (low, high) in enumerate(self.padding):
            window = dilated_size(self.window_sizes[axis], self.rhs_dilation[axis])
            reached = (self.out_sizes[axis] - 1) * self.window_strides[axis] + window
            # Less than nothing is what a window reaches that does not fit.
            if certainly(operator.ge, reached, 0):
                size = dilated_size(self.in_sizes[axis], self.lhs_dilation[axis])
                exact = reached - size - low
                high = high if is_static([exact]) else exact
            pairs.append((low, high))
        return tuple(pairs)

    @functools.cached_property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the convolution's result, which is the shape of its cotangent dy."""
        lhs_spec, rhs_spec, out_spec = self.dimension_numbers
        shape = [0] * len(self.lhs_shape)
        shape[out_spec[0]] = self.lhs_shape[lhs_spec[0]] // self.batch_group_count
        shape[out_spec[1]] = self.rhs_shape[rhs_spec[0]]
        for dim, size in zip(out_spec[2:], self.out_sizes, strict=True):
            shape[dim] = size
        return tuple(shape)

    @property
    def transposed_padding(self) -> tuple[tuple[int, int], ...]:
        """Padding of the convolution that maps out_sizes back to in_sizes.

        Its stride and lhs_dilation are exchanged and its filter is flipped, so the low side
        is what the filter lacks; the high side makes the sizes come out exactly.
        """
        pairs = []
        for axis, (low, _) in enumerate(self.padding):
            room = dilated_size(self.window_sizes[axis], self.rhs_dilation[axis]) - 1
            padded = dilated_size(self.in_sizes[axis], self.lhs_dilation[axis]) + room
            total = padded - dilated_size(self.out_sizes[axis], self.window_strides[axis])
            pairs.append((room - low, total - (room - low)))
        return tuple(pairs)

    @functools.cached_property
    def connections(self) -> int:
        """The number of pairs (output position, tap) that reach an input position.

        Products with padding, and with the zeros that a stride or a dilation inserts,
        are not counted.
        """
        return math.prod(map(self._axis_connections, range(self.axes)))

    def _axis_connections(self, axis: int) -> int:
        # Output p and tap r meet input h where h*dilation = p*stride - low + r*rhs_dilation.
        size, out = self.in_sizes[axis], self.out_sizes[axis]
        stride, dilation = self.window_strides[axis], self.lhs_dilation[axis]
        if size == 0 or out == 0:
            return 0
        common = math.gcd(stride, dilation)
        period = dilation // common
        inverse = pow(stride // common, -1, period) if period > 1 else 0
        total = 0
        for r in range(self.window_sizes[axis]):
            shift = r * self.rhs_dilation[axis] - self.padding[axis][0]
            if shift % common:
                continue
            # 0 <= p*stride + shift <= (size - 1)*dilation, with p of one residue class.
            first = max(0, -(shift // stride))
            last = min(out - 1, ((size - 1) * dilation - shift) // stride)
            residue = (-(shift // common) * inverse) % period
            first += (residue - first) % period
            total += max(0, (last - first) // period + 1)
        return total

    @property
    def flops(self) -> int:
        """Floating-point operations of the input gradient (as of the other two maps)."""
        _, rhs_spec, out_spec = self.dimension_numbers
        batch, features = self.out_shape[out_spec[0]], self.out_shape[out_spec[1]]
        return 2 * batch * features * self.rhs_shape[rhs_spec[1]] * self.connections

    def bytes_moved(self, itemsize_bytes: int) -> int:
        """Least memory traffic in bytes: dy and rhs read once, dX written once."""
        elements = math.prod(self.out_shape) + math.prod(self.rhs_shape) + math.prod(self.lhs_shape)
        return itemsize_bytes * elements

    def replace(self, **changes: Any) -> ConvGeometry:
        """Returns a copy with some fields changed, not checked again."""
        return dataclasses.replace(self, **changes)

    def conv_params(self) -> dict[str, Any]:
        """Keyword arguments of `jax.lax.conv_general_dilated` for this geometry."""
        return {
            "window_strides": self.window_strides,
            "padding": self.padding,
            "lhs_dilation": self.lhs_dilation,
            "rhs_dilation": self.rhs_dilation,
            "dimension_numbers": self.dimension_numbers,
            "feature_group_count": self.feature_group_count,
            "batch_group_count": self.batch_group_count,
        }

    def __str__(self) -> str:
        parts = [f"x{list(self.lhs_shape)} w{list(self.rhs_shape)} y{list(self.out_shape)}"]
        parts.append("/".join(_letters(self.dimension_numbers)))
        ones = (1,) * self.axes
        for name in ("window_strides", "lhs_dilation", "rhs_dilation"):
            if getattr(self, name) != ones:
                parts.append(f"{name}={getattr(self, name)}")
        if any(pad != (0, 0) for pad in self.padding):
            parts.append(f"padding={self.padding}")
        for name in ("feature_group_count", "batch_group_count"):
            if getattr(self, name) != 1:
                parts.append(f"{name}={getattr(self, name)}")
        return " ".join(parts).replace(", ", ",")

    __repr__ = __str__  # what a jaxpr shows


def _letters(dnums: lax.ConvDimensionNumbers) -> list[str]:
    """A geometry's layouts as strings, such as NHWC, HWIO and NHWC."""
    axes = len(dnums.lhs_spec) - 2
    spatial = {1: "W", 2: "HW", 3: "DHW"}.get(axes, "0123456789"[:axes])
    result = []
    for spec, ends in zip(dnums, ("NC", "OI", "NC"), strict=True):
        letters = [""] * len(spec)
        for dim, letter in zip(spec, ends + spatial, strict=False):
            letters[dim] = letter
        result.append("".join(letters))
    return result
