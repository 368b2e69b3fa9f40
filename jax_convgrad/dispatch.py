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
import numpy as np

from . import gpu_code, native, planner, preference, symbolic
from .geometry import ConvGeometry
from .maps import FILTER_GRAD, FORWARD, INPUT_GRAD, Map, exchanged
from .transposed import forward_as_input_grad, is_worth_a_flip

Implementation: TypeAlias = Literal["native", "xla"] | None

SWITCH = "JAX_CONVGRAD"
NATIVE_DTYPES = ("float64", "float32", "bfloat16", "float16")
MAX_AXES = 3

# Whether lax's own convolution takes the kernel: what `install` and `installed` set. A JAX
# user context, so it is part of every jit cache key.
installed = jax.make_user_context(default_value=False)


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


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs: "native", with a plan unless sizes are symbolic, or "xla"; and why.

    Attributes:
        implementation: "native" or "xla".
        reason: why, in words.
        plan: of the kernel; None for "xla" and where sizes are symbolic.
        kernel_dtype: dtype that operands are widened to for the kernel, None if they are not.
        computes: the convolution and the map of it that the kernel computes, None if as asked.
    """

    implementation: Literal["native", "xla"]
    reason: str
    plan: planner.NativePlan | None = None
    kernel_dtype: str | None = None
    computes: tuple[ConvGeometry, Map] | None = None

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
    static = geometry.is_static
    return planner.out_of_range(geometry) if static else symbolic.unsupported(geometry)


def of_another_map(implementation: Implementation) -> Implementation:
    """What is asked of a map where `implementation` was asked for another of the same layer.

    lax is lax for all. But a kernel that is insisted on need not be there for every map.
    """
    return "xla" if implementation == "xla" else None


def asks_for_lax(implementation: Implementation) -> bool:
    """Whether lax is to compute every convolution. Where it is off, "native" is an error."""
    return implementation == "xla" or (implementation is None and switch() == "off")


def require_not_native(implementation: Implementation, reason: str) -> None:
    """Raises a ValueError with the reason if the kernel was insisted on."""
    if implementation == "native":
        raise ValueError(
            f"implementation='native' is not available here: {reason}. "
            'implementation="xla" always is.'
        )


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
        planner.excluded()  # also where sizes are symbolic and nothing is planned yet
        reason = gpu_code.local_obstacle()
    reason = obstacle if reason is None else reason
    if reason is not None:
        require_not_native(implementation, reason)
        return Choice("xla", reason)
    choice = Choice("native", "a kernel covers it")  # which the handler chooses
    if geometry.is_static:
        choice = _planned(geometry, dtype, platform, precision, map_)
    if implementation == "native":
        return dataclasses.replace(choice, reason=f"implementation='native', {choice.reason}")
    if switch() == "on":
        return dataclasses.replace(choice, reason=f"{choice.reason}, and {SWITCH}=on")
    if choice.computes is not None:
        return choice
    slower = preference.slower_than_xla(geometry, platform, map_)
    if slower is None and choice.kernel_dtype is not None:
        slower = preference.slower_widened(geometry, map_)
    if slower is None and choice.plan is not None:
        # Of few channels lanes are mostly empty: packed filters, and the private sums of one.
        most_bytes = _most_workspace_bytes(geometry, dtype, map_)
        if choice.workspace_bytes > most_bytes:
            slower = f"a workspace of {choice.workspace_bytes} bytes, of at most {most_bytes}"
    return choice if slower is None else Choice("xla", slower)


def _planned(
    geometry: ConvGeometry, dtype: Any, platform: str, precision: Any, map_: Map
) -> Choice:
    """The native planner's choice, for what the kernel is best asked."""
    computes = planned = None
    if platform == "cpu" and preference.is_faster_exchanged(geometry, map_):
        computes = exchanged(geometry), FORWARD if map_ is FILTER_GRAD else FILTER_GRAD
        planned = planner.plan(computes[0], dtype, platform, precision, map_=computes[1])
        if planned.workspace_bytes > _most_workspace_bytes(geometry, dtype, map_):
            computes = planned = None
    if planned is None:
        planned = planner.plan(geometry, dtype, platform, precision, map_=map_)
    kernel, asks = planned.kernel, computes or (geometry, map_)
    if platform == "cpu" and preference.is_faster_in_float32(*asks, dtype, kernel):
        wide = _planned(geometry, "float32", platform, precision, map_)
        reason = f"{wide.reason}, in float32"
        return dataclasses.replace(wide, reason=reason, kernel_dtype="float32")
    how = f", as the {computes[1].title} map with filter and y exchanged" if computes else ""
    return Choice("native", f"the {kernel} kernel covers it{how}", planned, computes=computes)


def _most_workspace_bytes(geometry: ConvGeometry, dtype: Any, map_: Map) -> int:
    """The most workspace that a map may bring, unless a kernel is insisted on."""
    itemsize_bytes = np.dtype(dtype).itemsize
    if map_ is not FILTER_GRAD:
        return max(1 << 20, 4 * geometry.bytes_moved(itemsize_bytes))
    return max(32 << 20, 4 * max(4, itemsize_bytes) * math.prod(geometry.rhs_shape))
