"""Builds and runs cpu_driver.cc: the CPU kernels without Python, by any compiler."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterable

from emulator import build, cases

DRIVER = pathlib.Path("tests/cpu_driver.cc")
# Sets that add a kernel to another's, from a source and with a definition of their own.
ADDED_KERNELS = pathlib.Path("csrc/cpu/gemm_bf16.cc")
FILTER_KERNEL = pathlib.Path("csrc/cpu/filter/outer.cc")
POOLING_KERNEL = pathlib.Path("csrc/cpu/pooling/max_grad.cc")
ADDED = ("avx512_bf16", "amx")
SHARED = (DRIVER, *build.cpu_planner(), pathlib.Path("csrc/problem.cc"))

# What a processor must have for a set, in the kernel's words (/proc/cpuinfo).
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
FEATURES = {
    "portable": set(),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512 | {"avx512_bf16"},
    "amx": _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
}


def flags_by_set(machine: str = "") -> dict[str, tuple[str, ...]]:
    """{instruction set: compiler flags} that CMakeLists.txt compiles for a machine."""
    text = (build.ROOT / "csrc/CMakeLists.txt").read_text()
    values: dict[str, str] = {}
    for name, value in re.findall(r'set\(_flags_(\w+)\s+"?([^")]*)"?\)', text):
        values[name] = re.sub(r"\$\{_flags_(\w+)\}", lambda m: values[m[1]], value)
    if (machine or platform.machine()) not in ("x86_64", "AMD64"):
        values = {"portable": values["portable"]}
    return {name: tuple(value.split()) for name, value in values.items()}


def lacking(isa: str) -> str | None:
    """Why this processor cannot run an instruction set, or None."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return "there is no /proc/cpuinfo" if FEATURES[isa] else None
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    lacks = FEATURES[isa] - set(flags)
    return f"this processor has no {', '.join(sorted(lacks))}" if lacks else None


def kernel_sources(root: pathlib.Path = build.ROOT) -> list[pathlib.Path]:
    """The sources of the kernels that every instruction set has, relative to the root."""
    found = [path.relative_to(root) for path in sorted((root / "csrc/cpu").glob("*.cc"))]
    found += [FILTER_KERNEL, POOLING_KERNEL]
    return [path for path in found if path != ADDED_KERNELS]


def driver(
    flags: tuple[str, ...],
    *,
    cxx: str | None = None,
    machine: str = "",
    root: pathlib.Path = build.ROOT,
    replaced: tuple[str, pathlib.Path, tuple[str, ...]] | None = None,
) -> pathlib.Path:
    """Compiles and links the driver.

    Args:
        flags: for all sources.
        cxx: another compiler than $CXX.
        machine: that the compiler builds for, if not this one.
        root: of the sources, if they are a copy.
        replaced: an instruction set, another root for its kernels and more flags for them.

    Returns:
        The executable's path.

    Raises:
        BuildError: something does not compile.
    """
    sets = flags_by_set(machine)
    compiled = tuple(f"-DCONVGRAD_{isa.upper()}" for isa in sets)
    parts = []
    # The slowest first.
    for isa, isa_flags in reversed(sets.items()):
        of_kernels, more = root, ()
        if replaced is not None and replaced[0] == isa:
            of_kernels, more = replaced[1:]
        for source in (ADDED_KERNELS,) if isa in ADDED else kernel_sources(of_kernels):
            parts.append((source, (f"-DCONVGRAD_ISA={isa}", *isa_flags, *more), of_kernels))
    parts += [(source, compiled, root) for source in SHARED]
    return build.program_of(DRIVER.stem, parts, flags, cxx)


def run(
    program: pathlib.Path,
    lines: Iterable[str],
    folder: pathlib.Path,
    *,
    threads: str = "1,2,4",
    isa: str = "portable",
    fault: str = "",
    runner: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Runs the driver over lines of problems; its status and output."""
    problems = cases.write(folder / "problems.txt", lines)
    environment = {**os.environ, **build.SANITIZER_OPTIONS, "JAX_CONVGRAD_CPU_ISA": isa}
    # An access by a vector's length and more beside an array is still seen.
    environment["ASAN_OPTIONS"] += ":redzone=256"
    return subprocess.run(
        [*runner, str(program), str(problems), threads, *([fault] if fault else [])],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )


def check(result: subprocess.CompletedProcess[str], isa: str) -> None:
    """Asserts that a run was one of that instruction set, and that it passed."""
    lines = result.stdout.splitlines()
    failed = [line for line in lines if not line.startswith(("pass ", "instruction"))]
    last = [line for line in lines if line.startswith("pass ")][-1:]
    assert result.returncode == 0, "\n".join([*failed[:60], *last])
    assert result.stdout.startswith(f"instruction set {isa}\n")
    assert result.stdout.count("pass ") > 0
