"""The compiled modules: the only file that imports them and registers their handlers.

`cpu` and `cuda` are None where a module was not built; the package then works through
lax. A module that this jaxlib could not load safely is an ImportError at once: XLA
would reject its handlers when the backend starts and leave JAX without that backend.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pathlib
import re
import types
import warnings

import jax

from .maps import FILTER_GRAD, FORWARD, INPUT_GRAD

TARGETS = {map_: map_.target for map_ in (FORWARD, INPUT_GRAD, FILTER_GRAD)}
TARGET, FORWARD_TARGET = TARGETS[INPUT_GRAD], TARGETS[FORWARD]
FUSED_TARGET = "convgrad_input_grad_fused"
MAX_POOL_GRAD_TARGET = "convgrad_max_pool_grad"

try:
    __version__ = importlib.metadata.version("jax-convgrad")
except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+uninstalled"


@functools.cache
def runtime_ffi_version() -> tuple[int, int]:
    """The XLA FFI version that the installed jaxlib supports, (major, minor)."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()

    def number(part: str) -> int:
        match = re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)
        if match is None:
            raise ImportError(f"XLA_FFI_API_{part} not found in jaxlib's FFI headers.")
        return int(match[1])

    return number("MAJOR"), number("MINOR")


def check_module(name: str, version: str, ffi_version: tuple[int, int]) -> None:
    """Raises an ImportError unless a compiled module fits this package and this jaxlib.

    Args:
        name: the module's name, for the message.
        version: the package version that it was built from.
        ffi_version: the FFI version of the headers that it was built with.
    """
    runtime = runtime_ffi_version()
    if ffi_version[0] != runtime[0] or ffi_version[1] > runtime[1]:
        raise ImportError(
            f"{name} was built with XLA FFI {ffi_version[0]}.{ffi_version[1]} headers, but "
            f"jaxlib {importlib.metadata.version('jaxlib')} supports {runtime[0]}.{runtime[1]}. "
            "Reinstall jax-convgrad with pip's build isolation on, or install a newer jax."
        )
    if version != __version__:
        raise ImportError(
            f"{name} was built from jax-convgrad {version}, but the package is {__version__}: "
            "reinstall it."
        )


def _load(name: str, platform: str) -> types.ModuleType | None:
    full_name = f"{__package__}.{name}"
    try:
        module = importlib.import_module(full_name)
    except ModuleNotFoundError as e:
        if e.name != full_name:
            raise
        return None
    check_module(full_name, module.version, module.ffi_api_version)
    if platform == "cpu" and not module.isa():
        warnings.warn(
            f"{full_name} was compiled for {', '.join(module.isas())}, which this processor does "
            "not run: lax computes instead. Rebuild with JAX_CONVGRAD_CPU_ISAS=all.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for target, handler in module.targets().items():
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    return module


cpu = _load("_cpu", "cpu")
# In capitals: under "cuda" a handler is queued where no backend looks for it.
cuda = _load("_cuda", "CUDA")


def module_for(platform: str) -> types.ModuleType | None:
    """The compiled module that serves a lowering platform, if there is one."""
    return {"cpu": cpu, "cuda": cuda}.get(platform)
