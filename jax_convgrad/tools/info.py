"""`info`: what is installed, what was compiled, and what would run where."""

from __future__ import annotations

import jax

from .. import cpu_code, dispatch, gpu_code, native, planner
from ..geometry import ConvGeometry
from . import machine
from .geometries import make_geometry


def typical_layers() -> dict[str, ConvGeometry]:
    """A few layers of known nets, channels-last, one of each kind."""
    g = make_geometry
    return {
        "dense 3x3": g((28, 28), (3, 3), (128, 128), batch=8, padding=1),
        "pointwise": g((28, 28), (1, 1), (256, 128), batch=8),
        "dense 3x3, stride 2": g((28, 28), (3, 3), (128, 256), batch=8, stride=2, padding=1),
        "stem 7x7, stride 2": g((224, 224), (7, 7), (3, 64), batch=8, stride=2, padding=3),
        "depthwise 3x3": g((56, 56), (3, 3), (144, 144), batch=8, padding=1, feature_groups=144),
        "depthwise 3x3, stride 2": g(
            (56, 56), (3, 3), (144, 144), batch=8, stride=2, padding=1, feature_groups=144
        ),
        "grouped 3x3, 32 groups": g(
            (28, 28), (3, 3), (256, 256), batch=8, padding=1, feature_groups=32
        ),
        "dilated 3x3": g((33, 33), (3, 3), (256, 256), batch=8, padding=12, rhs_dilation=12),
        "transposed 4x4, stride 2": g(
            (16, 16), (4, 4), (256, 128), batch=8, padding=2, lhs_dilation=2
        ),
    }


def _module_line(platform: str) -> str:
    module = native.module_for(platform)
    if module is None:
        return f"{platform} module".ljust(14) + "not built"
    ffi = ".".join(map(str, module.ffi_api_version))
    isa = ""
    if platform == "cpu":
        isa = f", {module.isa()} instructions (of {' '.join(module.isas())})"
    left_out = planner.excluded() if platform == "cuda" else ()
    kernels = ", ".join(name for name in module.kernel_names() if name not in left_out)
    if left_out:
        kernels += f"; left out by {planner.EXCLUDE}: {', '.join(left_out)}"
    code = f" for {module.code}" if platform == "cuda" else ""
    built = f"built with XLA FFI {ffi}{isa}{code}; kernels: {kernels}"
    return f"{platform} module".ljust(14) + built


def _lacking_lines() -> list[str]:
    """What the modules lack for this machine's processor and GPUs."""
    notes = {
        "CPU code": cpu_code.local_missing_isa(),
        "GPU code": gpu_code.local_obstacle() or gpu_code.local_missing_kernel(),
    }
    return [name.ljust(14) + note for name, note in notes.items() if note is not None]


def report() -> list[str]:
    """The lines that `info` prints."""
    found = machine.versions()
    runtime_ffi = ".".join(map(str, native.runtime_ffi_version()))
    state = {
        "off": "off: every gradient runs through lax",
        "on": "on: a kernel runs wherever one covers the case",
        None: "unset: a kernel runs where it is no slower than lax",
    }[dispatch.switch()]
    commit = machine.git_commit()
    devices = ", ".join(f"{d.id}: {d.device_kind}" for d in jax.devices())
    driver = machine.gpu_driver() if machine.is_gpu() else None
    lines = [
        "versions      " + ", ".join(f"{name} {version}" for name, version in found.items()),
        *([f"checkout      {machine.ROOT} at {commit}"] if commit else []),
        f"processor     {machine.cpu_model()}, {machine.usable_cores()} cores",
        f"devices       {machine.lowering_platform()}: {devices}"
        + (f" (driver {driver})" if driver else ""),
        f"XLA FFI       {runtime_ffi} in this jaxlib",
        _module_line("cpu"),
        _module_line("cuda"),
        *_lacking_lines(),
        f"kill switch   {dispatch.SWITCH}={state}",
        "",
        f"what runs for typical layers on {machine.lowering_platform()} (NHWC, batch 8):",
    ]
    platform = machine.lowering_platform()
    width = max(map(len, typical_layers()))
    for name, geometry in typical_layers().items():
        for dtype in ("float32", "bfloat16"):
            choice = dispatch.choose(geometry, dtype, platform)
            runs = "lax" if choice.kernel is None else f"native, kernel {choice.kernel}"
            lines.append(f"  {name.ljust(width)}  {dtype.ljust(8)}  {runs} ({choice.reason})")
    return lines


def main() -> int:
    """Prints the report."""
    print("\n".join(report()))
    return 0
