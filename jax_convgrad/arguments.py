"""Every argument that a user passes, read or refused: in lax's words where lax has some.

A message names the function, the argument, what came and what was expected. For that
`function` below is the public function, `argument` the name of one of its arguments, and
`value` what the user passed for it. What only the sizes of a whole convolution can tell is in
`geometry`.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jax.sharding import NamedSharding, PartitionSpec

from . import compat

# A size beyond this cannot be memory, and native arithmetic stays inside 64 bits.
MAX_PARAMETER = 2**31
STRING_PADDINGS = ("SAME", "SAME_LOWER", "VALID")


def shape_of(value: Any, argument: str, function: str) -> tuple[int, ...]:
    """Returns `value.shape` as a tuple, or raises a TypeError unless `value` is like an array."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        raise TypeError(f"{function} {argument} must be an array, got {type(value).__name__}.")
    try:
        numbers = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    except TypeError:  # some other library's dtype
        numbers = False
    if not numbers:
        raise TypeError(f"{function} {argument} must be an array of numbers, got dtype {dtype}.")
    return tuple(shape)


def sequence_of(value: Any, argument: str, function: str, what: str) -> tuple[Any, ...]:
    """Returns a sequence as a tuple, or raises a TypeError: it must be `what`, and no string."""
    try:
        if not isinstance(value, str):
            return tuple(value)
    except TypeError:
        pass
    raise TypeError(f"{function} {argument} must be {what}, got {value!r}.")


def integer(value: Any, what: str, function: str) -> int:
    """Returns an integer, or raises a TypeError that names `what` it was for."""
    if isinstance(value, bool):
        raise TypeError(f"{function} {what} must be an integer, got {value!r}.")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{function} {what} must be an integer, got {value!r}.") from None


def size(value: Any, what: str, function: str) -> Any:
    """Returns an integer, or a symbolic one as it is; raises a TypeError for anything else."""
    return value if is_symbolic_dim(value) else integer(value, what, function)


def _index(value: Any) -> Any:
    return value if is_symbolic_dim(value) else operator.index(value)


def integers(value: Any, argument: str, function: str, length: int, low: int) -> tuple[int, ...]:
    """Returns `length` integers from `low` to 2**31 as a tuple, or raises.

    Raises:
        TypeError: something is no integer.
        ValueError: there are more or fewer, or one is out of range.
    """
    value = sequence_of(value, argument, function, f"a sequence of {length} integers")
    if len(value) != length:
        raise ValueError(
            f"{function} window and {argument} must have the same number of dimensions, "
            f"but got {length} and {len(value)} ({argument}={value})."
        )
    result = tuple(integer(v, f"{argument}[{i}]", function) for i, v in enumerate(value))
    if any(v < low or v >= MAX_PARAMETER for v in result):
        raise ValueError(
            f"{function} {argument} must be integers from {low} to 2**31, got {result}."
        )
    return result


def dimension_numbers(
    lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...], value: Any, function: str
) -> lax.ConvDimensionNumbers:
    """Returns the layouts as permutations of the dimensions, or raises, in lax's words."""
    dnums = lax.conv_dimension_numbers(lhs_shape, rhs_shape, value)  # raises lax's own errors
    specs = []
    for name, spec in zip(dnums._fields, dnums, strict=True):
        name = f"dimension_numbers.{name}"
        spec = sequence_of(spec, name, function, f"{len(lhs_shape)} dimensions")
        spec = tuple(integer(d, name, function) for d in spec)
        if sorted(spec) != list(range(len(lhs_shape))):
            raise ValueError(
                f"{function} {name} must be a permutation of the "
                f"{len(lhs_shape)} dimensions, got {spec}."
            )
        specs.append(spec)
    return lax.ConvDimensionNumbers(*specs)


def explicit_padding(value: Any, function: str, axes: int) -> tuple[tuple[int, int], ...]:
    """Returns `axes` pairs (low, high) of integers, static or symbolic, or raises lax's error."""
    message = (
        f"padding argument to {function} should be a string or a sequence of (low, high) "
        f"pairs, got {value}"
    )
    try:
        pairs = tuple((_index(low), _index(high)) for low, high in value)
    except (TypeError, ValueError) as e:
        raise ValueError(message) from e
    if len(pairs) != axes:
        raise TypeError(
            f"Wrong number of explicit pads for convolution: expected {axes}, got {len(pairs)} "
            f"({function} padding={pairs})."
        )
    if any(abs(pad) >= MAX_PARAMETER for pair in pairs for pad in pair if not is_symbolic_dim(pad)):
        raise ValueError(f"{function} padding must lie within 2**31 of zero, got {pairs}.")
    return pairs


def check_dtypes(lhs: Any, rhs: Any, function: str) -> None:
    """Raises lax's TypeError unless both operands have one dtype."""
    if lhs != rhs:
        raise TypeError(
            f"{function} requires arguments to have the same dtypes, got {lhs}, "
            f"{rhs}. (Tip: jnp.convert_element_type may be useful here.)"
        )


def check_dtypes_by_name(arrays: dict[str, jax.Array], function: str) -> None:
    """Raises a TypeError that names two arguments unless they have one dtype."""
    (first, a), (second, b) = arrays.items()
    if a.dtype != b.dtype:
        raise TypeError(
            f"{function} requires arguments to have the same dtypes, got {a.dtype} for {first} "
            f"and {b.dtype} for {second}."
        )


def as_array(value: Any, argument: str, function: str) -> jax.Array:
    """Returns `jnp.asarray(value)`, or raises a TypeError that names the argument."""
    try:
        return jnp.asarray(value)
    except TypeError:
        raise TypeError(
            f"{function} {argument} must be an array, got {type(value).__name__}."
        ) from None


def with_batch(dimension_numbers: Any, rank: int, function: str) -> Any:
    """Dimension numbers of a single image, with the batch put in front."""
    if dimension_numbers is None:
        return None
    what = "None or three strings such as ('CHW', 'OIHW', 'CHW') for an image without a batch axis"
    specs = sequence_of(dimension_numbers, "dimension_numbers", function, what)
    strings = len(specs) == 3 and all(isinstance(spec, str) for spec in specs)
    if not strings or [len(spec) for spec in specs] != [rank, rank + 1, rank]:
        raise TypeError(f"{function} dimension_numbers must be {what}, got {dimension_numbers!r}.")
    return ("N" + specs[0], specs[1], "N" + specs[2])


def check_implementation(implementation: Any, function: str) -> None:
    """Raises unless `implementation` is one that the public functions document."""
    known = implementation is None or (
        isinstance(implementation, str) and implementation in ("native", "xla")
    )
    if not known:
        raise ValueError(
            f"{function} implementation must be None, 'native' or 'xla', got {implementation!r}."
        )


def check_out_sharding(out_sharding: Any, function: str) -> None:
    """Raises unless `out_sharding` is a sharding, a partition specification or None."""
    kinds = (jax.sharding.Sharding, PartitionSpec)
    if out_sharding is not None and not isinstance(out_sharding, kinds):
        raise TypeError(
            f"{function} out_sharding must be a jax.sharding.Sharding, a PartitionSpec or None, "
            f"got {out_sharding!r}."
        )


def sharding_with_batch(out_sharding: Any, function: str) -> Any:
    """The sharding of a single image, with a batch of one that is not cut put in front."""
    if out_sharding is None:
        return None
    of_image = compat.canonicalize_sharding(out_sharding, function)
    if (spec := getattr(of_image, "spec", None)) is None:  # of no mesh
        return out_sharding
    spec = PartitionSpec(None, *spec, unreduced=spec.unreduced, reduced=spec.reduced)
    return NamedSharding(of_image.mesh, spec)


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def result_dtype(operand_dtype: Any, preferred_element_type: Any, function: str) -> Any:
    """The dtype of a result, or a TypeError if the preferred one is narrower or of another kind.

    None asks for the operands' dtype. Without x64 no result has 64 bits, as in lax.
    """
    operand_dtype = jnp.dtype(operand_dtype)
    try:
        # Programs that were traced with x64 may be lowered without: no other dtype is asked for.
        if preferred_element_type is None or jnp.dtype(preferred_element_type) == operand_dtype:
            return operand_dtype
        dtype = jax.dtypes.canonicalize_dtype(jnp.dtype(preferred_element_type))
    except TypeError:
        raise TypeError(
            f"{function} preferred_element_type must be a dtype, got {preferred_element_type!r}."
        ) from None
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    operand_kind, kind = (
        jnp.integer if d == jnp.bool_ else next((k for k in kinds if jnp.issubdtype(d, k)), None)
        for d in (operand_dtype, dtype)
    )
    if kind is None or (kind != operand_kind and (operand_kind, kind) != kinds[:2]):
        raise TypeError(
            f"{function} preferred_element_type must be of the operands' kind, or floating for "
            f"integers, got {dtype} for operands of dtype {operand_dtype}."
        )
    # By width alone, as in lax: promotion may be forbidden, and 8-bit floats have none.
    if _bits(dtype) < _bits(operand_dtype):
        raise TypeError(
            f"{function} preferred_element_type must not be narrower than the operands' dtype "
            f"{operand_dtype}, got {dtype}."
        )
    return dtype
