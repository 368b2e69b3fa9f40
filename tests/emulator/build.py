"""Builds the CUDA sources for the CPU with a host compiler, at test time, or by nvcc for a GPU.

Objects are cached by the hash of their preprocessed source and flags, so that nothing is
compiled twice, not even for a copy of the sources in which one file was changed.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sysconfig
import tempfile
import types
from collections.abc import Mapping

import machine_code

ROOT = pathlib.Path(__file__).resolve().parents[2]
EMULATOR = pathlib.Path("tests/emulator")
MODULE = "_emulated"

# Every kernel that there is: the module's build leaves some out.
_ALL_KERNELS = ("-DCONVGRAD_SPECIALISED", "-DCONVGRAD_WGMMA")
# On a GPU a wait for a copy that never comes stops the program after so many seconds.
_BOUNDED_WAITS = "-DCONVGRAD_BOUNDED_WAITS=2"
_COMMON = (
    "-std=c++17",
    *_ALL_KERNELS,
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)
# -O1 keeps a sanitizer's compile times down; its run time is in the checks.
_SANITIZED = ("-O1", "-g", "-fno-working-directory", "-fno-omit-frame-pointer")
VARIANTS = {
    "plain": ("-O2",),
    "address": (*_SANITIZED, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": (*_SANITIZED, "-fsanitize=thread"),
}
# A report is a failure, with a status that no test returns.
SANITIZER_STATUS = 99
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": f"exitcode={SANITIZER_STATUS}:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": f"exitcode={SANITIZER_STATUS}:print_stacktrace=1",
    "TSAN_OPTIONS": f"exitcode={SANITIZER_STATUS}:halt_on_error=1",
}


def missing() -> str | None:
    """Why the emulator's tests cannot run here, or None; never where they must run."""
    required = os.environ.get("JAX_CONVGRAD_REQUIRE_NATIVE") == "1"
    return None if required or compiler() else "no host compiler"


class BuildError(Exception):
    """The compiler's complaint."""


def compiler() -> str | None:
    """The host compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def gpu_compiler() -> str | None:
    """nvcc, or None."""
    return machine_code.tool("nvcc")


def gpu_architecture(capability: str) -> str:
    """What nvcc compiles for, by a compute capability such as "9.0"."""
    number = capability.replace(".", "")
    return f"{number}a" if number == "90" else number  # wgmma exists on that one chip


def cache_folder() -> pathlib.Path:
    """Where objects are kept: CONVGRAD_EMULATOR_CACHE, or this user's temporary folder."""
    default = pathlib.Path(tempfile.gettempdir(), f"convgrad-emulator-{os.getuid()}")
    folder = pathlib.Path(os.environ.get("CONVGRAD_EMULATOR_CACHE", default))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to somebody else")
    return folder


def _run(command: list[str], cwd: pathlib.Path) -> bytes:
    result = subprocess.run(command, cwd=cwd, capture_output=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr.decode(errors='replace')}")
    return result.stdout


def _cached(name: str, key: bytes, command: list[str], cwd: pathlib.Path) -> pathlib.Path:
    """Runs a command that ends in `-o PATH`, unless the cache has its output."""
    digest = hashlib.sha256("\0".join(command).encode() + key).hexdigest()[:24]
    path = cache_folder() / f"{digest}-{name}"
    if path.exists():
        return path
    # Several test processes may want it at once: one makes it. Renamed when complete.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
                unfinished = pathlib.Path(folder, name)
                _run([*command, "-o", str(unfinished)], cwd)
                unfinished.rename(path)
    return path


def _object(
    source: pathlib.Path, flags: tuple[str, ...], root: pathlib.Path, cxx: str | None = None
) -> pathlib.Path:
    # Relative paths, from the root: those in diagnostics are then the same for any copy.
    language = ("-x", "c++", str(source))
    command = [cxx or str(compiler()), *_COMMON, *flags, f"-I{EMULATOR}", "-Icsrc"]
    preprocessed = _run([*command, "-E", *language], root)
    return _cached(source.stem + ".o", preprocessed, [*command, "-c", *language], root)


def _objects(
    sources: list[pathlib.Path], flags: tuple[str, ...], root: pathlib.Path
) -> list[pathlib.Path]:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: _object(source, flags, root), sources))


def _link(
    name: str, objects: list[pathlib.Path], flags: tuple[str, ...], root: pathlib.Path
) -> pathlib.Path:
    command = [str(compiler()), *map(str, objects), *flags, "-pthread"]
    return _cached(name, b"", command, root)


def program_of(
    name: str,
    parts: list[tuple[pathlib.Path, tuple[str, ...], pathlib.Path]],
    flags: tuple[str, ...],
    cxx: str | None = None,
) -> pathlib.Path:
    """Compiles and links a program whose sources have flags of their own.

    Args:
        name: of the program.
        parts: source, more flags for it, and the root it is in, as `program`'s.
        flags: for all.
        cxx: another compiler than $CXX.

    Returns:
        The executable's path.

    Raises:
        BuildError: something does not compile.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = pool.map(lambda part: _object(part[0], (*flags, *part[1]), part[2], cxx), parts)
        command = [cxx or str(compiler()), *map(str, objects), *flags, "-pthread"]
    return _cached(name, b"", command, ROOT)


def kernel_sources(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """The CUDA sources, relative to the root."""
    found = [root / "csrc/kernel.cu", *sorted((root / "csrc/cuda").glob("*.cu"))]
    return [path.relative_to(root) for path in found]


def program(
    sources: list[pathlib.Path],
    variant: str = "plain",
    root: pathlib.Path = ROOT,
    flags: tuple[str, ...] = (),
) -> pathlib.Path:
    """Compiles and links a program that needs neither Python nor JAX.

    Args:
        sources: C++ and CUDA sources, relative to the root.
        variant: a key of `VARIANTS`.
        root: the checkout, or a copy of its `csrc` and `tests/emulator`.
        flags: more flags for the compiler.

    Returns:
        The executable's path.

    Raises:
        BuildError: something does not compile.
    """
    flags = (*VARIANTS[variant], *flags)
    return _link(sources[0].stem, _objects(sources, flags, root), flags, root)


def gpu_object(source: pathlib.Path, architecture: str) -> pathlib.Path:
    """Compiles a source for a GPU; arguments and errors as `gpu_program`'s."""
    command = [str(gpu_compiler()), "-std=c++17", "-O2", "--expt-relaxed-constexpr", "-lineinfo"]
    command += ["-Xptxas=-Werror"]  # as what runs products one after the other is a warning
    command += [*_ALL_KERNELS, _BOUNDED_WAITS]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += [f"-I{EMULATOR}", "-Icsrc"]
    language = ["-x", "cu", str(source)]
    preprocessed = _run([*command, "-E", *language], ROOT)
    return _cached(source.stem + ".o", preprocessed, [*command, "-c", *language], ROOT)


def gpu_program(
    sources: list[pathlib.Path],
    architecture: str,
    objects: Mapping[str, pathlib.Path] | None = None,
    flags: tuple[str, ...] = (),
) -> pathlib.Path:
    """Compiles and links a program for a GPU.

    Args:
        sources: C++ and CUDA sources, relative to the root.
        architecture: such as "90a".
        objects: of sources, by their file's name, that are compiled already.
        flags: more for the linker.

    Returns:
        The executable's path.

    Raises:
        BuildError: something does not compile.
    """
    made = objects or {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(
            pool.map(
                lambda source: made.get(source.name) or gpu_object(source, architecture), sources
            )
        )
    # Those that this file did not compile may change under their name.
    key = b"".join(hashlib.sha256(part.read_bytes()).digest() for part in made.values())
    command = [str(gpu_compiler()), *map(str, parts), *flags]
    return _cached(sources[0].stem, key, command, ROOT)


def core_sources(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """Those of core.cc's program."""
    return [EMULATOR / "core.cc", pathlib.Path("csrc/problem.cc"), *kernel_sources(root)]


def layers_sources(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """Those of benchmarks/gpu_layers.cu's program."""
    source = pathlib.Path("benchmarks/gpu_layers.cu")
    return [source, pathlib.Path("csrc/problem.cc"), *kernel_sources(root)]


def core(
    variant: str = "plain", root: pathlib.Path = ROOT, flags: tuple[str, ...] = ()
) -> pathlib.Path:
    """The program of core.cc, all kernels over a list of problems; arguments as `program`'s."""
    return program(core_sources(root), variant, root, flags)


def planner(root: pathlib.Path) -> pathlib.Path:
    """The program of planner.cc, every plan function and no kernel; some twenty seconds.

    Args:
        root: a copy of `csrc` and `tests/emulator`, which is changed: launches become
            nothing, so that no kernel is instantiated.

    Returns:
        The executable's path.

    Raises:
        BuildError: something does not compile.
    """
    with (root / EMULATOR / "cuda_emulator.h").open("a") as header:
        header.write("\n#undef CU_LAUNCH\n#define CU_LAUNCH(...) cudaSuccess\n")
    sources = [EMULATOR / "planner.cc", pathlib.Path("csrc/problem.cc"), *kernel_sources(root)]
    flags = ("-O0", "-w")
    return _link("planner", _objects(sources, flags, root), flags, root)


def copy_sources(folder: pathlib.Path) -> pathlib.Path:
    """Copies what the programs of this file are built from, for a test to change."""
    for part in ("csrc", str(EMULATOR)):
        shutil.copytree(ROOT / part, folder / part)
    return folder


def _handlers(
    name: str,
    sources: list[pathlib.Path],
    definitions: tuple[str, ...],
    libraries: tuple[pathlib.Path, ...] = (),
) -> types.ModuleType:
    """The module of csrc/ffi.cc, csrc/bindings.cc and other sources."""
    import jax
    import pybind11

    from jax_convgrad import native

    includes = (sysconfig.get_paths()["include"], pybind11.get_include(), jax.ffi.include_dir())
    flags = (
        "-O1",
        f"-DCONVGRAD_MODULE={name}",
        f'-DCONVGRAD_VERSION="{native.__version__}"',
        "-fvisibility=hidden",
        *definitions,
        *(f"-isystem{path}" for path in includes),
    )
    handlers = ["csrc/ffi.cc", "csrc/bindings.cc", "csrc/problem.cc"]
    sources = [*map(pathlib.Path, handlers), *sources]
    objects = _objects(sources, flags, ROOT)
    file_name = name + sysconfig.get_config_var("EXT_SUFFIX")
    path = _link(file_name, [*objects, *libraries], ("-shared",), ROOT)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


_EMULATED = ("-DCONVGRAD_CUDA", "-DCONVGRAD_EMULATED", '-DCONVGRAD_CUDA_CODE="emulated"')


def module() -> types.ModuleType:
    """The Python module with the FFI handlers, like `_cuda`, but for a CPU.

    Raises:
        BuildError: something does not compile.
    """
    # In a library of its own, whose only thread-local data are the kernels' static shared
    # memory: the emulator fills them all with NaNs.
    objects = _objects(kernel_sources(), VARIANTS["plain"], ROOT)
    kernels = _link("kernels.so", objects, ("-shared",), ROOT)
    return _handlers(MODULE, [], _EMULATED, (kernels,))


def cpu_planner() -> list[pathlib.Path]:
    """The sources of the CPU planner, compiled once and not for each instruction set."""
    found = sorted((ROOT / "csrc/cpu/planner").glob("*.cc"))
    parts = ("kernel_cpu.cc", "cpu/filter/plan.cc", "cpu/pooling/plan.cc")
    planners = [pathlib.Path("csrc", part) for part in parts]
    return [*planners, *(path.relative_to(ROOT) for path in found)]


def amx_module() -> types.ModuleType:
    """The CPU module with one kernel, gemm in bfloat16 on AMX, whose instructions are emulated.

    Raises:
        BuildError: something does not compile.
    """
    own = ("csrc/ffi_pooling.cc", "csrc/cpu/gemm_bf16.cc", EMULATOR / "no_kernels.cc")
    sources = [*cpu_planner(), *own]
    definitions = ("-DCONVGRAD_EMULATE_AMX", "-DCONVGRAD_AMX", "-DCONVGRAD_ISA=amx")
    return _handlers("_emulated_amx", [pathlib.Path(source) for source in sources], definitions)


def amx_object() -> pathlib.Path:
    """The object of the gemm kernel for AMX as CMakeLists.txt builds it, not emulated.

    Raises:
        BuildError: something does not compile, or the compiler knows no AMX.
    """
    vectors = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
    flags = (*vectors, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
    definitions = ("-DCONVGRAD_ISA=amx", "-DNDEBUG", "-fvisibility=hidden")
    return _object(pathlib.Path("csrc/cpu/gemm_bf16.cc"), ("-O3", *flags, *definitions), ROOT)
