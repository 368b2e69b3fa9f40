"""Which GPUs the CUDA module holds code for, and what to rebuild for others.

A module built for one machine may meet another GPU, or an older driver. Machine code of
"sm_80" runs on compute capability 8.0 and later 8.x; that of "sm_90a" on 9.0 alone; PTX,
"compute_80", is translated by the driver, if that is as new as the toolkit, for every
later GPU. (CUDA C++ Programming Guide, "Application Compatibility".)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import jax

from . import native

ARCHITECTURES = "JAX_CONVGRAD_CUDA_ARCHITECTURES"
LOWEST_CAPABILITY = 80  # times ten, as everywhere in this file
_HOPPER = 90


def _version(number: int) -> str:
    """CUDA's number for a version of its own, 13000, as people write it: 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _capability(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def _has_machine_code(code: str, capability: int) -> bool:
    for major, minor, suffix in re.findall(r"sm_(\d+)(\d)(\w*)", code):
        built = 10 * int(major) + int(minor)
        same_major = built // 10 == capability // 10 and built <= capability
        if built == capability if suffix else same_major:
            return True
    return False


def _rebuild(capabilities: Iterable[int]) -> str:
    """The rebuild that suits all of these GPUs, or any where none is known."""
    wanted = sorted({c for c in capabilities if c >= LOWEST_CAPABILITY})
    return f"rebuild with {ARCHITECTURES}={','.join(map(str, wanted)) or 'all'}"


def obstacle(
    capability: int,
    code: str,
    toolkit_version: int,
    driver_version: int,
    others: Iterable[int] = (),
) -> str | None:
    """Why a module's kernels cannot run on a GPU, or None.

    Args:
        capability: the GPU's compute capability, times ten.
        code: what the module holds, such as "sm_80 sm_90a compute_80".
        toolkit_version: of the CUDA that it was built with, such as 13000.
        driver_version: the newest CUDA that the driver serves, 0 if that is not known.
        others: capabilities of the machine's other GPUs, which a rebuild is to serve too.

    Returns:
        The reason, with the rebuild that helps.
    """
    gpu = f"a GPU of compute capability {_capability(capability)}"
    if capability < LOWEST_CAPABILITY:
        return f"{gpu}, the kernels need {_capability(LOWEST_CAPABILITY)}"
    if driver_version and driver_version // 1000 < toolkit_version // 1000:
        return (
            f"the cuda module was built with CUDA {_version(toolkit_version)}, the driver "
            f"serves {_version(driver_version)}: update it, or rebuild with an older CUDA"
        )
    if _has_machine_code(code, capability):
        return None
    rebuild = _rebuild((capability, *others))
    if "compute_" not in code:
        return f"the cuda module holds {code}, none of it for {gpu}: {rebuild}"
    if driver_version and driver_version < toolkit_version:
        return (
            f"the cuda module holds PTX of CUDA {_version(toolkit_version)} for {gpu}, which the "
            f"driver, for CUDA {_version(driver_version)}, cannot translate: {rebuild}"
        )
    return None


def missing_kernel(
    capability: int, code: str, kernels: Iterable[str], others: Iterable[int] = ()
) -> str | None:
    """What a rebuild for a GPU would add to a module with such kernels that runs on it, or None."""
    lacks = None
    if "mma" not in kernels:
        lacks = "the specialised kernels, which builds leave out that see no GPU for them"
    elif capability == _HOPPER and "sm_90a" not in code:
        lacks = "the wgmma kernel, which Hopper GPUs alone run"
    return lacks and f"the cuda module lacks {lacks}: {_rebuild((capability, *others))}"


def local_capabilities() -> list[int]:
    """Compute capabilities, times ten, of this process's GPUs; empty without any."""
    if jax.default_backend() != "gpu":
        return []
    found = {str(getattr(device, "compute_capability", "")) for device in jax.local_devices()}
    return sorted(int(c.replace(".", "")) for c in found if re.fullmatch(r"\d+\.\d", c))


def local_obstacle() -> str | None:
    """Why the CUDA module's kernels cannot run on some GPU of this process, or None.

    Without a GPU there is no obstacle: a program may be lowered here and run elsewhere.
    """
    module = native.cuda
    if module is None or not (found := local_capabilities()):
        return None
    reasons = (
        obstacle(c, module.code, module.toolkit_version, module.driver_version(), found)
        for c in found
    )
    return next((reason for reason in reasons if reason is not None), None)


def local_missing_kernel() -> str | None:
    """What a rebuild for this process's GPUs, or for any if it has none, would add, or None."""
    if (module := native.cuda) is None:
        return None
    found, kernels = local_capabilities(), module.kernel_names()
    usable = [c for c in found if c >= LOWEST_CAPABILITY] if found else [0]  # 0: of any
    notes = (missing_kernel(c, module.code, kernels, found) for c in usable)
    return next((note for note in notes if note is not None), None)
