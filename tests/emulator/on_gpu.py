"""Brings the emulator's test programs to a GPU, where sanitizers watch them without JAX.

    python tests/emulator/on_gpu.py FOLDER

Builds FOLDER/core, FOLDER/primitives and FOLDER/hopper_primitives for the GPU that is here.
For each kernel it writes FOLDER/all.KERNEL, small problems in every dtype, and
FOLDER/few.KERNEL, some that the kernel takes, small enough for a sanitizer that follows every
access.
"""

import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from emulator import build, cases
from jax_convgrad import dispatch, native
from jax_convgrad.tools.geometries import Case

FEW = 12


def takes(kernel: str, case: Case, dtype: str) -> bool:
    """Whether the planner gives a problem to a kernel that is asked for by name."""
    try:
        dispatch.plan(case.geometry, dtype, "cuda", None, kernel)
    except ValueError:
        return False
    return True


def spread(lines: list[str]) -> list[str]:
    """Some of the lines, from the first to nearly the last."""
    return lines[:: max(1, len(lines) // FEW)][:FEW]


def all_problems(kernel: str) -> list[str]:
    """Lines for core.cc, of which the kernel skips what it does not take."""
    small = list(cases.small_cases(10, 0, 1 << 18))
    if kernel == "wgmma":
        hopper = cases.hopper_sweep(40, 0)
        walking = [
            cases.line(case, "bfloat16", kernel=kernel) for case in cases.hopper_walking_cases()
        ]
        return [*walking, *cases.hopper_lines(hopper), *cases.tile_lines(kernel, hopper)]
    return [
        cases.line(case, dtype, kernel=kernel, special=special, allow_tf32=allow_tf32)
        for index, case in enumerate(small)
        for dtype in cases.DTYPES
        for allow_tf32 in ((True, False) if dtype == "float32" else (True,))
        for special in ((False, True) if index % 3 == 0 else (False,))
    ] + list(cases.tile_lines(kernel, small))


def few_problems(kernel: str) -> list[str]:
    """Lines for core.cc, spread over what the kernel takes."""
    if kernel == "wgmma":
        engine, copied = cases.hopper_cases(), cases.copied_cases()
        return [
            *spread(list(cases.hopper_lines(engine))),
            *spread(list(cases.hopper_lines(copied))),
        ]
    taken = []
    for index, case in enumerate(cases.small_cases(0, 0, 1 << 16)):
        turn = index % len(cases.DTYPES)
        for dtype in (*cases.DTYPES[turn:], *cases.DTYPES[:turn]):
            if takes(kernel, case, dtype):
                special = len(taken) % 3 == 2
                taken.append(cases.line(case, dtype, kernel=kernel, special=special))
                break
    tiles = list(cases.tile_lines(kernel, cases.small_cases(0, 0, 1 << 16)))
    return [*spread(taken), *spread(tiles)]


def main(folder: pathlib.Path) -> None:
    """Does what the module says."""
    architecture = build.gpu_architecture(jax.devices("cuda")[0].compute_capability)
    for name, sources in (
        ("core", build.core_sources()),
        ("primitives", [build.EMULATOR / "primitives.cu"]),
        ("hopper_primitives", [build.EMULATOR / "hopper_primitives.cu"]),
    ):
        shutil.copy(build.gpu_program(sources, architecture), folder / name)
    assert native.cuda is not None
    for kernel in native.cuda.kernel_names():
        cases.write(folder / f"all.{kernel}", all_problems(kernel))
        cases.write(folder / f"few.{kernel}", few_problems(kernel))
        print(kernel)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
