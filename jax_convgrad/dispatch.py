"""Which implementation computes a map of a convolution, and why.

One function decides (`choose`); the primitive's lowering obeys it and `explain`
prints it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from . import custom_call, gpu_code, native, preference, symbolic
from .geometry import ConvGeometry
from .maps import FILTER_GRAD, FORWARD, INPUT_GRAD, Map
from .transposed import forward_as_input_grad, is_worth_a_flip

Implementation: TypeAlias = Literal["native", "xla"] | None

SWITCH = "JAX_CONVGRAD"
EXCLUDE = "JAX_CONVGRAD_CUDA_EXCLUDE"
NATIVE_DTYPES = ("float64", "float32", "bfloat16", "float16")
MAX_AXES = 3
MAX_AXIS_SIZE = 2**31  # positions of an image or taps of a filter, along one axis

# Whether lax's own convolution takes the kernel: what `install` and `installed` set. A JAX
# user context, so it is part of every jit cache key.
installed = jax.make_user_context(default_value=False)

_FILTER_WORKSPACE_BYTES = 32 << 20  # or four times the filter


@functools.cache
def switch() -> Literal["on", "off"] | None:
    """The value of the environment variable JAX_CONVGRAD.

    "off" sends everything to lax, "on" runs a kernel wherever one covers the case, also
    where it is known or feared to be slower; unset, the rules of `preference` hold.
    Read once: a value that changed later could not reach functions already compiled.
    """
    value = os.environ.get(SWITCH)
    if not value:  # an empty variable counts as unset
        return None
    match value.lower():
        case "on":
            return "on"
        case "off":
            return "off"
    raise ValueError(f"{SWITCH} must be 'on' or 'off', got {value!r}.")


@functools.cache
def excluded() -> tuple[str, ...]:
    """The CUDA kernels that the environment variable JAX_CONVGRAD_CUDA_EXCLUDE leaves out.

    The planner reads the variable too, once: it plans none of them, not even by name. Here
    its value is checked.

    Raises:
        ValueError: there is no such kernel, or it is the one that takes what no other does.
    """
    assert native.cuda is not None
    names = tuple(os.environ.get(EXCLUDE, "").replace(",", " ").split())
    known = [name for name in native.cuda.kernel_names() if name != "direct"]
    for name in names:
        if name not in known:
            raise ValueError(f"{EXCLUDE} must name some of {', '.join(known)}, got {name!r}.")
    return names


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
    kinds = (jax.sharding.Sharding, jax.sharding.PartitionSpec)
    if out_sharding is not None and not isinstance(out_sharding, kinds):
        raise TypeError(
            f"{function} out_sharding must be a jax.sharding.Sharding, a PartitionSpec or None, "
            f"got {out_sharding!r}."
        )


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def result_dtype(operand_dtype: Any, preferred_element_type: Any, function: str) -> Any:
    """The dtype of a result, or a TypeError if the preferred one is narrower or of another kind.

    Args:
        operand_dtype: dtype of the operands.
        preferred_element_type: what the user asked for, None for the operands' dtype.
        function: the public function, for the message.

    Returns:
        A NumPy dtype.
    """
    operand_dtype = jnp.dtype(operand_dtype)
    if preferred_element_type is None:
        return operand_dtype
    try:
        dtype = jnp.dtype(preferred_element_type)
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


@dataclasses.dataclass(frozen=True)
class NativePlan:
    """How a kernel will do a problem, in the native planner's words.

    Attributes:
        kernel: the kernel's name.
        workspace_bytes: scratch memory that the custom call brings as a result.
        exchanged: whether dy is taken for the filter and the filter for dy, as the CPU
            planner does where the window is many times as large as dy.
        tile: rows, columns and slice of the matrix product that a CUDA block computes;
            zeros for kernels that are no such product.
        stages: slices of the operands that a block has in flight.
        split_k: parts of the sum, if more than one kernel adds it up.
        blocks: CUDA blocks of the grid.
        threads: threads of a block.
        resident: blocks that a multiprocessor holds at once.
        shared_bytes: shared memory of a block.
        model_us: the planner's estimate on its reference GPU, 0 on a CPU.
    """

    kernel: str
    workspace_bytes: int
    exchanged: bool
    tile: tuple[int, int, int]
    stages: int
    split_k: int
    blocks: int
    threads: int
    resident: int
    shared_bytes: int
    model_us: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs: "native", with a plan unless sizes are symbolic, or "xla"; and why.

    Attributes:
        implementation: "native" or "xla".
        reason: why, in words.
        plan: of the kernel; None for "xla" and where sizes are symbolic.
        kernel_dtype: dtype that operands are widened to for the kernel, None if they are not.
    """

    implementation: Literal["native", "xla"]
    reason: str
    plan: NativePlan | None = None
    kernel_dtype: str | None = None

    @property
    def kernel(self) -> str | None:
        """The kernel's name, None for "xla"."""
        return None if self.plan is None else self.plan.kernel

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of the kernel."""
        return 0 if self.plan is None else self.plan.workspace_bytes


def unsupported_dtype(dtype: Any) -> str | None:
    """Why no kernel takes this dtype, or None if one does."""
    if np.dtype(dtype).name in NATIVE_DTYPES:
        return None
    return f"dtype {np.dtype(dtype).name} is not one of {', '.join(NATIVE_DTYPES)}"


def unsupported(geometry: ConvGeometry, dtype: Any) -> str | None:
    """Why no kernel takes this problem on any platform, or None if one may."""
    if (reason := unsupported_dtype(dtype)) is not None:
        return reason
    if not 1 <= geometry.axes <= MAX_AXES:
        return f"{geometry.axes} spatial axes, the kernels take 1 to {MAX_AXES}"
    if not geometry.is_static:
        return symbolic.unsupported(geometry)
    if (longest := max(*geometry.in_sizes, *geometry.window_sizes)) > MAX_AXIS_SIZE:
        return f"a spatial axis of {longest} elements, the kernels take {MAX_AXIS_SIZE}"
    return None


def of_another_map(implementation: Implementation) -> Implementation:
    """What is asked of a map where `implementation` was asked for another of the same layer.

    lax is lax for all. But a kernel that is insisted on need not be there for every map.
    """
    return "xla" if implementation == "xla" else None


def require_not_native(implementation: Implementation, reason: str) -> None:
    """Raises a ValueError with the reason if the kernel was insisted on."""
    if implementation == "native":
        raise ValueError(
            f"implementation='native' is not available here: {reason}. "
            'implementation="xla" always is.'
        )


def plan(
    geometry: ConvGeometry,
    dtype: Any,
    platform: str,
    precision: Any = None,
    kernel: str = custom_call.AUTO_KERNEL,
    map_: Map = INPUT_GRAD,
) -> NativePlan:
    """The native planner's word.

    Args:
        geometry: the convolution.
        dtype: a dtype that the kernels take.
        platform: "cpu" or "cuda", whose module was built.
        precision: canonical lax precision.
        kernel: a kernel by name, or "auto".
        map_: what is computed.

    Returns:
        The plan.

    Raises:
        ValueError: there is no such kernel, or it does not take this geometry.
    """
    module = native.module_for(platform)
    assert module is not None, platform
    if platform == "cuda":
        excluded()
    attributes = custom_call.attributes(geometry, platform, precision, kernel)
    shapes = (geometry.lhs_shape, geometry.rhs_shape, geometry.out_shape)
    return NativePlan(**module.plan(np.dtype(dtype).name, *shapes, attributes, map_name=map_.name))


@dataclasses.dataclass(frozen=True)
class ReferenceGpu:
    """The GPU that CUDA plans are made for, which need not be the one that is there.

    Attributes:
        name: the product's.
        multiprocessors: how many it has.
        flops_per_s: most arithmetic in a dtype and precision, on whatever units are fastest.
        bytes_per_s: of a large copy, read and written.
    """

    name: str
    multiprocessors: int
    flops_per_s: float
    bytes_per_s: float


def reference_gpu(dtype: Any, precision: Any = None) -> ReferenceGpu | None:
    """What the CUDA planner's models count with, None if that module was not built."""
    if native.cuda is None:
        return None
    allow_tf32 = custom_call.allows_tf32(precision)
    return ReferenceGpu(**native.cuda.reference_gpu(np.dtype(dtype).name, allow_tf32))


def choose(
    geometry: ConvGeometry,
    dtype: Any,
    platform: str,
    implementation: Implementation = None,
    precision: Any = None,
    *,
    obstacle: str | None = None,
    map_: Map = INPUT_GRAD,
) -> Choice:
    """Decides what computes one map of a convolution on one platform.

    Args:
        geometry: the convolution.
        dtype: dtype of the operands and the result.
        platform: lowering platform: "cpu", "cuda" or another.
        implementation: "native" insists on the kernel, "xla" on lax, None prefers the
            kernel where it is no slower.
        precision: canonical lax precision.
        obstacle: why no kernel can be in the program that is lowered, None if one can.
        map_: what is computed.

    Returns:
        The choice.

    Raises:
        ValueError: "native" was asked for and no kernel can serve; says why.
    """
    if implementation == "xla":
        return Choice("xla", "implementation='xla'")
    reason = unsupported(geometry, dtype)
    if reason is None and switch() == "off":
        reason = f"{SWITCH}=off"
    if reason is None and platform not in ("cpu", "cuda"):
        reason = f"no kernel for platform {platform}"
    if reason is None and native.module_for(platform) is None:
        reason = f"the {platform} module was not built"
    if reason is None and platform == "cuda" and map_ is not INPUT_GRAD:
        if map_ is FORWARD and is_worth_a_flip(geometry):
            geometry, map_ = forward_as_input_grad(geometry), INPUT_GRAD
        else:
            reason = f"no {map_.title} kernel for platform {platform}"
    if reason is None and map_ is FILTER_GRAD and not geometry.is_static:
        reason = "of symbolic sizes, which the filter gradient's kernels do not take"
    if reason is None and platform == "cuda":
        excluded()  # also where sizes are symbolic and nothing is planned yet
        reason = gpu_code.local_obstacle()
    reason = obstacle if reason is None else reason
    if reason is not None:
        require_not_native(implementation, reason)
        return Choice("xla", reason)
    # Where sizes are symbolic the handler chooses the kernel.
    planned = None
    if geometry.is_static:
        planned = plan(geometry, dtype, platform, precision, map_=map_)
    kernel_dtype = None
    if (
        planned is not None
        and platform == "cpu"
        and preference.is_faster_in_float32(geometry, dtype, map_, planned.kernel)
    ):
        kernel_dtype = "float32"
        planned = plan(geometry, kernel_dtype, platform, precision, map_=map_)
    covers = "a kernel covers it" if planned is None else f"the {planned.kernel} kernel covers it"
    if kernel_dtype is not None:
        covers += f", in {kernel_dtype}"
    if implementation == "native":
        return Choice("native", "implementation='native'", planned, kernel_dtype)
    if switch() == "on":
        return Choice("native", f"{covers}, and {SWITCH}=on", planned, kernel_dtype)
    slower = preference.slower_than_xla(geometry, platform, map_)
    if map_ is FILTER_GRAD and planned is not None:
        slower = slower or _beyond_workspace(geometry, dtype, planned)
    if slower is not None:
        return Choice("xla", slower)
    return Choice("native", covers, planned, kernel_dtype)


def _beyond_workspace(geometry: ConvGeometry, dtype: Any, planned: NativePlan) -> str | None:
    """Why the filter gradient's kernel wants too much memory, or None.

    A filter that is much larger than the activations, with few of the channels that are in
    vector lanes: the private sums are mostly empty lanes.
    """
    filter_bytes = max(4, np.dtype(dtype).itemsize) * math.prod(geometry.rhs_shape)
    most = max(_FILTER_WORKSPACE_BYTES, 4 * filter_bytes)
    if planned.workspace_bytes <= most:
        return None
    return f"a workspace of {planned.workspace_bytes} bytes, of at most {most}"
