"""What a result depends on: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from .. import native

ROOT = pathlib.Path(__file__).resolve().parents[2]


def lowering_platform() -> str:
    """The default backend as lowering rules call it: "cpu", "cuda" or another."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def is_gpu() -> bool:
    """Whether the default device is a GPU."""
    return lowering_platform() in ("cuda", "rocm")


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def cpu_model() -> str:
    """The processor's name as the kernel reports it."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on, which is what every thread pool gets."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def gpu_driver() -> str | None:
    """Version of the NVIDIA driver, None where there is none."""
    lines = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0].strip() if lines else None


def last_level_cache_bytes() -> int | None:
    """Size of the cache that stands before the default device's memory, if it can be read."""
    if is_gpu():
        try:
            import torch

            return int(torch.cuda.get_device_properties(0).L2_cache_size)
        except (ImportError, RuntimeError, AssertionError, AttributeError):
            return None
    text = _read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    return int(text[:-1]) << 10 if text.endswith("K") and text[:-1].isdigit() else None


def git_commit() -> str | None:
    """The checkout's commit, "-dirty" appended if files differ; None outside a checkout."""
    if not (ROOT / ".git").exists() or not (ROOT / "pyproject.toml").exists():
        return None
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("-dirty" if _output_of("git", "-C", str(ROOT), "status", "--short") else "")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of everything that computes or compiles."""
    packages = ("jax", "jaxlib", "numpy", "torch", "jax-cuda13-plugin", "jax-cuda12-plugin")
    found = {name: version_of(name) for name in packages}
    return {
        "jax-convgrad": native.__version__,
        "python": platform.python_version(),
        **{name: version for name, version in found.items() if version is not None},
    }


def modules() -> dict[str, dict[str, Any] | None]:
    """The compiled modules by platform: kernels and FFI version, None if not built."""
    return {
        name: None
        if module is None
        else {
            "kernels": list(module.kernel_names()),
            "ffi_api_version": ".".join(map(str, module.ffi_api_version)),
        }
        for name, module in (("cpu", native.cpu), ("cuda", native.cuda))
    }


def describe() -> dict[str, Any]:
    """The machine and its software, as JSON."""
    device = jax.devices()[0]
    return {
        "machine": {
            "cpu_model": cpu_model(),
            "cpu_cores": usable_cores(),
            "cpu_isa": None if native.cpu is None else native.cpu.isa(),
            "platform": lowering_platform(),
            "device_kind": device.device_kind,
            "device_count": jax.device_count(),
            "driver": gpu_driver() if is_gpu() else None,
            "last_level_cache_bytes": last_level_cache_bytes(),
            "os": platform.platform(),
        },
        "versions": versions(),
        "modules": modules(),
        "git_commit": git_commit(),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
