"""What the modules are compiled for: cmake/CudaArchitectures.cmake, CpuInstructionSets.cmake."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

SCRIPT = """
cmake_minimum_required(VERSION 3.24)
include(cmake/CudaArchitectures.cmake)
message("${CONVGRAD_GENCODE}|${CONVGRAD_HOPPER_GENCODE}|${CONVGRAD_CUDA_CODE}|"
  "${CONVGRAD_CUDA_DEFINITIONS}|${CONVGRAD_CUDA_SUMMARY}")
"""
DRIVER = """
static const int capabilities[] = {GPUS};
int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGetCount(int* count) { *count = sizeof(capabilities) / sizeof(int) - 1; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? capabilities[device] / 10 : capabilities[device] % 10;
  return attribute != 75 && attribute != 76;
}
"""


@pytest.fixture
def configure(tmp_path):
    """Runs the file for some wish, GPUs, and architectures that nvcc knows."""
    cmake, compiler = shutil.which("cmake"), shutil.which("gcc") or shutil.which("cc")
    if cmake is None or compiler is None:
        pytest.skip("no cmake or no C compiler")

    def run(wish, gpus=(), known=(75, 80, 86, 89, 90, 100, 120)):
        (tmp_path / "script.cmake").write_text(SCRIPT)
        nvcc = tmp_path / "nvcc"
        nvcc.write_text("#!/bin/sh\n" + "".join(f"echo sm_{number}\n" for number in known))
        nvcc.chmod(0o755)
        environment = {"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
        (tmp_path / "cuda.c").write_text(DRIVER.replace("GPUS", ", ".join(map(str, [*gpus, 0]))))
        subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "cuda.c", "-o",
                        tmp_path / "libcuda.so.1"], check=True)  # fmt: skip
        done = subprocess.run(
            [cmake, f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPython_EXECUTABLE={sys.executable}",
             f"-DJAX_CONVGRAD_CUDA_ARCHITECTURES={wish}", "-P", tmp_path / "script.cmake"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return run


def result(text):
    return next(line for line in text.splitlines() if line.count("|") == 4).split("|")


FROM_80 = "-gencode=arch=compute_80,code=[{}]"
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"

CASES = [
    # wish, GPUs, code of all kernels, wgmma, all code
    ("", (), "compute_80", False, "compute_80"),
    ("generic", (80,), "compute_80", False, "compute_80"),
    ("", (80,), "sm_80", False, "sm_80"),
    ("", (90, 80, 90), "sm_80,sm_90", True, "sm_80 sm_90 sm_90a"),
    ("", (75,), "compute_80", False, "compute_80"),
    ("", (75, 86), "sm_86", False, "sm_86"),
    ("", (130,), "compute_80", False, "compute_80"),  # newer than nvcc
    ("native", (120,), "sm_120", False, "sm_120"),
    ("ptx", (), "compute_80", False, "compute_80"),
    ("ptx", (90,), "compute_80", False, "compute_80"),
    ("80,90", (), "sm_80,sm_90", True, "sm_80 sm_90 sm_90a"),
    ("89 ptx", (), "sm_89,compute_80", False, "sm_89 compute_80"),
    (" 80, 86 ,", (), "sm_80,sm_86", False, "sm_80 sm_86"),
    ("all", (), "sm_80,sm_90,sm_100,sm_120,compute_80", True,
     "sm_80 sm_90 sm_100 sm_120 compute_80 sm_90a"),
]  # fmt: skip
# What gets the kernels direct and tiled alone, as nothing here would run the others.
GENERIC = {("", ()), ("", (75,)), ("generic", (80,))}


@pytest.mark.parametrize(("wish", "gpus", "codes", "wgmma", "code"), CASES)
def test_what_is_compiled(configure, wish, gpus, codes, wgmma, code):
    status, text = configure(wish, gpus)
    assert status == 0, text
    gencode, hopper, all_code, definitions, summary = result(text)
    assert gencode == FROM_80.format(codes)
    assert hopper == (HOPPER if wgmma else "")
    assert ("CONVGRAD_WGMMA" in definitions) == wgmma
    assert all_code == code
    generic = (wish, gpus) in GENERIC
    assert ("CONVGRAD_SPECIALISED" in definitions) != generic
    assert ("of the kernels direct and tiled" in summary) == generic
    if not wish:  # what was not asked for is explained, and how to ask
        assert "JAX_CONVGRAD_CUDA_ARCHITECTURES=all" in summary
    if 75 in gpus:
        assert "below 80: lax will run on it" in text


def test_an_older_nvcc_leaves_out_what_it_does_not_know(configure):
    status, text = configure("all", known=(80, 86, 90))
    assert status == 0
    assert result(text)[2] == "sm_80 sm_90 compute_80 sm_90a"
    assert "capability 120 (times ten): left out" in text


@pytest.mark.parametrize("wish", ["70", "sm_90", "90a", "95", "everything", "native"])
def test_what_cannot_be_compiled_is_refused(configure, wish):
    status, text = configure(wish)
    assert status != 0
    assert "JAX_CONVGRAD_CUDA_ARCHITECTURES" in text


CPU_SCRIPT = """
cmake_minimum_required(VERSION 3.24)
include(cmake/CpuInstructionSets.cmake)
message("${CONVGRAD_CPU_ISAS}|${CONVGRAD_CPU_BF16_ISAS}|${CONVGRAD_CPU_SUMMARY}")
"""
# In place of CMake's own, which wants a compiler.
CHECK = "macro(check_cxx_compiler_flag flag result)\n set(${result} ON)\nendmacro()\n"
AVX2 = "fpu sse2 avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq"
AMX = f"{AVX512} avx512_bf16 amx_tile amx_bf16"


@pytest.fixture
def configure_cpu(tmp_path):
    """Runs the file for some wish and processor, and a compiler that knows all."""
    if (cmake := shutil.which("cmake")) is None:
        pytest.skip("no cmake")

    def run(wish, flags, machine="x86_64"):
        (tmp_path / "script.cmake").write_text(CPU_SCRIPT)
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n" * 2)
        (tmp_path / "CheckCXXCompilerFlag.cmake").write_text(CHECK)
        done = subprocess.run(
            [cmake, f"-DCMAKE_MODULE_PATH={tmp_path}", f"-DCMAKE_SYSTEM_PROCESSOR={machine}",
             f"-DCONVGRAD_CPUINFO={tmp_path / 'cpuinfo'}", f"-DJAX_CONVGRAD_CPU_ISAS={wish}",
             "-P", tmp_path / "script.cmake"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    ("wish", "flags", "machine", "isas", "bf16_isas"),
    [
        ("", "fpu sse2", "x86_64", "avx2;portable", ""),
        ("", AVX2, "x86_64", "avx2", ""),
        (" native ", AVX512, "x86_64", "avx512;avx2", ""),
        ("", f"{AVX512} avx512_bf16", "x86_64", "avx512;avx2", "avx512_bf16"),
        ("", AMX, "x86_64", "avx512;avx2", "avx512_bf16;amx"),
        ("all", AVX2, "AMD64", "avx512;avx2;portable", "avx512_bf16;amx"),
        ("", "", "aarch64", "portable", ""),
        ("all", "", "aarch64", "portable", ""),
    ],
)
def test_instruction_sets_that_are_compiled(configure_cpu, wish, flags, machine, isas, bf16_isas):
    status, text = configure_cpu(wish, flags, machine)
    assert status == 0, text
    found = next(line for line in text.splitlines() if line.count("|") == 2).split("|")
    assert found[:2] == [isas, bf16_isas]
    assert ("JAX_CONVGRAD_CPU_ISAS=all" in found[2]) == (wish != "all" and bool(flags))


def test_an_unknown_wish_for_instruction_sets_is_refused(configure_cpu):
    status, text = configure_cpu("avx2", AVX2)
    assert status != 0
    assert "JAX_CONVGRAD_CPU_ISAS must be native or all, got 'avx2'" in " ".join(text.split())


@pytest.mark.parametrize("wish", ["off", "TRUE", " ON"])
def test_an_unknown_wish_for_the_cuda_module_is_refused(tmp_path, wish):
    if (cmake := shutil.which("cmake")) is None:
        pytest.skip("no cmake")
    done = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path, f"-DJAX_CONVGRAD_CUDA={wish}",
         "-DSKBUILD_PROJECT_VERSION=0.0.0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"JAX_CONVGRAD_CUDA must be AUTO, ON or OFF, got '{wish}'" in done.stderr
