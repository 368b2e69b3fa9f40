"""explain(): which implementation would compute a convolution, why, and how fast at best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import arguments, compat, cpu_code, dispatch, gpu_code, native, planner, roofline
from .dispatch import Implementation
from .geometry import ConvGeometry, DimensionNumbers, Padding, is_static
from .maps import FILTER_GRAD, FORWARD

# JAX has two words for it. Lowering uses the second.
_LOWERING_PLATFORM = {"gpu": "cuda"}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What computes the three maps of a convolution. Prints as a paragraph.

    Attributes:
        geometry: the convolution.
        dtype: name of the dtype that the gradient is computed in.
        platform: the lowering platform asked about.
        implementation: what computes the input gradient, "native" or "xla".
        kernel: name of the kernel, None for "xla".
        reason: why this implementation.
        plan: how the kernel does it, None for "xla".
        flops: floating-point operations, products with padding and zeros not counted.
        bytes_moved: least memory traffic: dy and rhs read, dX written, once each.
        roofline_us: least time in microseconds on this machine's default device, from
            rates that were measured on it; None for a platform that it is not.
        roofs: those rates.
        reference: the GPU that the plan is made for, None if not on "cuda".
        forward: what computes the convolution itself.
        filter_grad: what computes the gradient for the filter.
        rebuild: what a rebuild of the package would add for this machine's GPU or
            processor, None if it has all.
    """

    geometry: ConvGeometry
    dtype: str
    platform: str
    implementation: str
    kernel: str | None
    reason: str
    plan: planner.NativePlan | None
    flops: int
    bytes_moved: int
    roofline_us: float | None
    roofs: roofline.Roofs | None
    reference: planner.ReferenceGpu | None
    forward: dispatch.Choice
    filter_grad: dispatch.Choice
    rebuild: str | None = None

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of the kernel."""
        return 0 if self.plan is None else self.plan.workspace_bytes

    @property
    def instruction_set(self) -> str | None:
        """Name of the set that the CPU module uses in this process; None if it does not run."""
        if self.plan is None or self.platform != "cpu" or native.cpu is None:
            return None
        return native.cpu.isa()

    @property
    def waves(self) -> float | None:
        """The grid's blocks over the blocks that the reference GPU holds at once."""
        if self.plan is None or self.reference is None:
            return None
        return self.plan.blocks / (self.plan.resident * self.reference.multiprocessors)

    @property
    def reference_roofline_us(self) -> float | None:
        """Least time in microseconds on the reference GPU."""
        gpu = self.reference
        if gpu is None:
            return None
        return 1e6 * max(self.flops / gpu.flops_per_s, self.bytes_moved / gpu.bytes_per_s)

    def _reference_lines(self) -> list[str]:
        """How a CUDA kernel cuts the problem up, and what the planner expects of it."""
        plan, gpu, least_us = self.plan, self.reference, self.reference_roofline_us
        if plan is None or gpu is None or least_us is None:
            return []
        tile = " x ".join(map(str, plan.tile)) if any(plan.tile) else "none"
        split = f", sum in {plan.split_k} parts" if plan.split_k > 1 else ""
        return [
            f"  grid      tile {tile}, {plan.stages} stages, {plan.shared_bytes} B shared{split}; "
            f"{plan.blocks} blocks of {plan.threads} threads, {self.waves:.3g} waves of "
            f"{plan.resident} on each of {gpu.multiprocessors} multiprocessors",
            f"  model     {plan.model_us:.4g} us on an {gpu.name}; its roofline, "
            f"{least_us:.4g} us, is {100 * least_us / plan.model_us:.3g} % of that",
        ]

    def __str__(self) -> str:
        name = self.implementation if self.kernel is None else f"native, kernel {self.kernel}"
        if self.plan is not None and self.plan.exchanged:
            name += " with dy for the filter"
        if self.instruction_set is not None:
            name += f", {self.instruction_set} instructions"
        lines = [
            f"input gradient of {self.geometry} in {self.dtype} on {self.platform}",
            f"  runs as   {name}: {self.reason}",
            f"  forward   {_line(self.forward)}",
            f"  filter gradient: {_line(self.filter_grad)}",
            f"  work      {self.flops / 1e6:.6g} MFLOP, {self.bytes_moved / 1e6:.6g} MB, "
            f"workspace {self.workspace_bytes / 1e6:.6g} MB",
        ]
        if self.rebuild is not None:
            lines.append(f"  rebuild   {self.rebuild}")
        lines += self._reference_lines()
        if self.roofs is not None and self.roofline_us is not None:
            lines.append(
                f"  roofline  {self.roofline_us:.4g} us at {self.roofs.flops_per_s / 1e9:.4g} "
                f"GFLOP/s and {self.roofs.bytes_per_s / 1e9:.4g} GB/s ({self.roofs.source})"
            )
        return "\n".join(lines)


def _rebuild(platform: str) -> str | None:
    if platform == "cuda":
        return gpu_code.local_missing_kernel()
    return cpu_code.local_missing_isa() if platform == "cpu" else None


def _line(choice: dispatch.Choice) -> str:
    runs = "xla" if choice.plan is None else f"native, kernel {choice.kernel}"
    workspace = f", workspace {choice.workspace_bytes / 1e6:.6g} MB" if choice.plan else ""
    return f"{runs}: {choice.reason}{workspace}"


def explain(
    lhs: jax.Array | jax.ShapeDtypeStruct,
    rhs: jax.Array | jax.ShapeDtypeStruct,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: DimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    implementation: Implementation = None,
    platform: str | None = None,
) -> Explanation:
    """Says what `conv_general_dilated(lhs, rhs, ...)` and its input gradient would run.

    Takes the arguments of `conv_general_dilated`. Computes nothing, except that it measures the
    rates of the default device once for each dtype (about a second).

    Args:
        lhs: input, an array or a `jax.ShapeDtypeStruct`.
        rhs: filter, likewise.
        window_strides: as in `conv_general_dilated`, like all that follow.
        padding: see there.
        lhs_dilation: see there.
        rhs_dilation: see there.
        dimension_numbers: see there.
        feature_group_count: see there.
        batch_group_count: see there.
        precision: see there.
        preferred_element_type: see there.
        out_sharding: see there.
        implementation: see there.
        platform: "cpu", "cuda" or another; None means that of the default device.

    Returns:
        An `Explanation`.

    Raises:
        ValueError: as `conv_general_dilated` does.
        TypeError: as `conv_general_dilated` does.

    Examples:
        >>> import jax, jax_convgrad
        >>> x = jax.ShapeDtypeStruct((8, 64, 32, 32), "float32")
        >>> w = jax.ShapeDtypeStruct((64, 1, 3, 3), "float32")
        >>> e = jax_convgrad.explain(x, w, (1, 1), "SAME", feature_group_count=64)
        >>> e.flops
        9048064
    """
    function = "explain"
    arguments.check_implementation(implementation, function)
    if platform is not None and not isinstance(platform, str):
        raise TypeError(f"{function} platform must be a string or None, got {platform!r}.")
    lhs_shape, rhs_shape = (
        arguments.shape_of(lhs, "lhs", function),
        arguments.shape_of(rhs, "rhs", function),
    )
    if not is_static((*lhs_shape, *rhs_shape)):
        raise ValueError(
            f"{function} needs shapes without symbolic sizes, got lhs {lhs_shape} and rhs "
            f"{rhs_shape}."
        )
    # What the arrays are in JAX: 32 bits wide unless 64-bit types are enabled.
    dtype, rhs_dtype = (jax.dtypes.canonicalize_dtype(x.dtype) for x in (lhs, rhs))
    arguments.check_dtypes(dtype, rhs_dtype, function)
    dtype = arguments.result_dtype(dtype, preferred_element_type, function)
    geometry = ConvGeometry.parse(
        lhs_shape,
        rhs_shape,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        function=function,
    )
    arguments.check_out_sharding(out_sharding, function)
    here = _LOWERING_PLATFORM.get(jax.default_backend(), jax.default_backend())
    platform = here if platform is None else _LOWERING_PLATFORM.get(platform, platform)
    precision = compat.canonicalize_precision(precision)
    choice = dispatch.choose(geometry, dtype, platform, implementation, precision)
    # A kernel can be insisted on where the platform has one (lax_lowering.py).
    asked = None if implementation == "native" and platform != "cpu" else implementation
    forward = dispatch.choose(geometry, dtype, platform, asked, precision, map_=FORWARD)
    asked = dispatch.of_another_map(implementation)
    filter_grad = dispatch.choose(geometry, dtype, platform, asked, precision, map_=FILTER_GRAD)
    reference = None
    if choice.plan is not None and platform == "cuda":
        reference = planner.reference_gpu(dtype, precision)
    roofs = None
    if platform == here and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 2:
        roofs = roofline.measure(dtype.name)
    bytes_moved = geometry.bytes_moved(dtype.itemsize)
    return Explanation(
        geometry=geometry,
        dtype=dtype.name,
        platform=platform,
        implementation=choice.implementation,
        kernel=choice.kernel,
        reason=choice.reason,
        plan=choice.plan,
        flops=geometry.flops,
        bytes_moved=bytes_moved,
        roofline_us=None if roofs is None else roofs.time_us(geometry.flops, bytes_moved),
        roofs=roofs,
        reference=reference,
        forward=forward,
        filter_grad=filter_grad,
        rebuild=_rebuild(platform),
    )
