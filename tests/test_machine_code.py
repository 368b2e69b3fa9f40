"""The CUDA kernels as ptxas compiled them, for every architecture that is shipped."""

import pathlib
import re
import subprocess

import machine_code
import pytest
from conftest import lacks
from emulator import build
from machine_code import Row

from jax_convgrad import native, planner
from jax_convgrad.tools import layers

pytestmark = pytest.mark.static


@pytest.fixture(scope="module")
def kernels():
    """The CUDA module's, for every architecture."""
    if missing := set(machine_code.shipped()) - set(native.cuda.code.split()):
        lacks("static", f"the CUDA module was built without {', '.join(sorted(missing))}")
    return machine_code.read(pathlib.Path(native.cuda.__file__))


def test_every_kernel_is_what_its_row_says(kernels, capsys):
    with capsys.disabled():
        print(f"\n{machine_code.table(kernels)}")
    wrong = {
        f"{kernel.name} {kernel.arch}": found
        for kernel in kernels
        if (found := machine_code.complaints(kernel))
    }
    assert wrong == {}


def test_every_architecture_has_every_kernel(kernels):
    built = {(kernel.name, kernel.arch) for kernel in kernels}
    assert built == {
        (kernel.name, arch)
        for kernel in kernels
        for arch in machine_code.row_of(kernel).only or machine_code.shipped()
    }


def test_every_row_describes_a_kernel(kernels):
    used = {machine_code.row_of(kernel).kernel for kernel in kernels}
    assert [row.kernel for row in machine_code.ROWS if row.kernel not in used] == []


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """{name: kernel} of planted_machine_code.cu."""
    path = tmp_path_factory.mktemp("planted") / "planted.sm_90a.cubin"
    source = build.ROOT / "tests/planted_machine_code.cu"
    code = "-gencode=arch=compute_90a,code=sm_90a"
    command = [build.gpu_compiler(), "-std=c++17", "-O3", code, "-cubin", source, "-o", path]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return {kernel.name: kernel for kernel in machine_code.read(path)}


PLANTED = [
    ("Spills", Row("Spills", 1024, 1), r"local memory: \d+ bytes of stack, [1-9]"),
    ("HasLocalArray", Row("HasLocalArray", 128, 1), r"local memory: [1-9]\d* bytes of stack"),
    ("Divides", Row("Divides", 128, 1), r"64-bit division: calls .*__cuda_sm20_div_s64"),
    ("OtherThreads", Row("OtherThreads", 128, 1), r"launch bounds of 256 threads, expected 128"),
    ("MuchShared", Row("MuchShared", 128, 5), r"4 blocks fit, expected 5"),
    ("MuchShared", Row("MuchShared", 128, 1, 190 << 10), r"a block has no room for 243712 bytes"),
    ("Copies<float>", Row("Copies<.*>", 128, 1, needs=("STG.128",)), r"lacks STG\.128"),
    ("Copies<float4>", Row("Copies<.*>", 128, 1, never=("STG",)), r"has 1 STG"),
    (
        "Copies<float4>",
        Row("Copies<.*>", 128, 1, at_most=(("STG", 0),)),
        r"1 STG, expected at most 0",
    ),
    ("Copies<float>", Row("Copies<.*>", 128, 1, at_most=(("", 3),)), r"\d+ instructions, exp"),
    ("Copies<float>", Row("Copies<int>", 128, 1), r"0 rows .* describe Copies<float>"),
]


@pytest.mark.parametrize(("name", "row", "complaint"), PLANTED, ids=lambda value: str(value)[:20])
def test_planted_fault_is_reported(planted, name, row, complaint):
    found = machine_code.complaints(planted[name], [row])
    assert any(re.match(complaint, text) for text in found), found


CORRECT = [
    (
        "Copies<float4>",
        Row("Copies<float4>", 128, 16, needs=("LDG.128", "STG.128"), never=("LDL",)),
    ),
    ("Copies<float>", Row("Copies<.*>", 128, 1, at_most=(("STG", 1), ("", 1000)))),
    ("OtherThreads", Row("Other.*", 256, 8, never=machine_code.NO_TENSOR_CORES)),
    ("Divides", Row("Divides", 128, 1, divides="its purpose")),
    ("HasLocalArray", Row("HasLocalArray", 128, 1, local="its purpose")),
    ("MuchShared", Row("MuchShared", 128, 4)),
]


@pytest.mark.parametrize(("name", "row"), CORRECT, ids=lambda value: str(value)[:20])
def test_what_is_allowed_is_not_reported(planted, name, row):
    assert machine_code.complaints(planted[name], [row]) == []


FAMILIES = {
    "direct": "DirectKernel",
    "tiled": "TiledKernel",
    "mma": "MmaKernel",
    "mma_3xtf32": "MmaKernel",
    "depthwise": "Depthwise",
    "grouped": "GroupedKernel",
    "few_channels": "FewChannelsKernel",
    "few_channels_3xtf32": "FewChannelsKernel",
    "wgmma": "WgmmaKernel",
}


@pytest.mark.parametrize("kernel_name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans_agree_with_the_kernels(kernels, dtype, kernel_name):
    """Each plan has the threads and shared memory of a kernel of which so many blocks fit."""
    assert set(native.cuda.kernel_names()) == set(FAMILIES)
    family = [
        kernel
        for kernel in kernels
        if kernel.arch.startswith("sm_90") and kernel.name.startswith(FAMILIES[kernel_name])
    ]

    def fits(kernel, planned):
        row = machine_code.row_of(kernel)
        dynamic = planned.shared_bytes - kernel.static_shared
        if not row.planned_shared and planned.shared_bytes > kernel.static_shared:
            dynamic = row.dynamic_shared
            if planned.shared_bytes != dynamic:
                return False
        if planned.threads != kernel.threads and not (
            row.planned_shared and planned.threads < kernel.threads
        ):
            return False
        return kernel.resident(max(dynamic, 0), planned.threads) >= planned.resident

    planned_for = 0
    for layer in layers.load(build.ROOT / "benchmarks/layers.json", "NHWC"):
        try:
            planned = planner.plan(layer.geometry, dtype, "cuda", None, kernel_name)
        except ValueError:  # the kernel does not take the layer
            continue
        planned_for += 1
        assert any(fits(kernel, planned) for kernel in family), planned
    assert planned_for > 0 or (kernel_name.endswith("3xtf32") and dtype == "bfloat16")


@pytest.mark.parametrize("program", ["primitives", "hopper_primitives", "core"])
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_gpu_programs_compile(program, architecture):
    """Those of test_gpu.py, which needs a GPU to run them."""
    only = [build.EMULATOR / f"{program}.cu"]
    for source in build.core_sources()[:2] if program == "core" else only:
        build.gpu_object(source, architecture)
