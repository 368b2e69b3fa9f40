"""The planner's model: what rates.h changes in it, by every plan function and no kernel.

The program of emulator/planner.cc is compiled with a table in which every factor is another.
"""

import dataclasses
import subprocess

import pytest
from emulator import build, cases

from jax_convgrad.tools import layers, rates
from jax_convgrad.tools.geometries import Case, make_geometry

pytestmark = pytest.mark.emulator  # compiles every kernel

if (reason := build.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

TABLE = build.ROOT / "csrc/cuda/rates.h"
PRESENT = rates.parse(TABLE.read_text())
# All factors differ, and none is 1.
OTHER = dataclasses.replace(
    PRESENT,
    launch_us=3.25,
    corrections=tuple(
        dataclasses.replace(
            row, arithmetic=rates.rounded(0.61 + 0.037 * i), memory=rates.rounded(1.93 - 0.041 * i)
        )
        for i, row in enumerate(PRESENT.corrections)
    ),
)
# Beyond 32-bit offsets, so that the batch is launched in two parts.
IN_PARTS = {
    "depthwise": make_geometry((64, 64), (3, 3), (64, 64), batch=9000, padding=1,
                               feature_groups=64),
    "grouped": make_geometry((64, 64), (3, 3), (64, 64), batch=9000, padding=1, feature_groups=8),
}  # fmt: skip
LAYERS = [layer.geometry for layer in layers.load(build.ROOT / "benchmarks/layers.json", "NHWC")]
GEOMETRIES = [*IN_PARTS.values(), *LAYERS[::3]]
REQUESTS = [(dtype, True) for dtype in cases.DTYPES] + [("float32", False)]


def kind(dtype, allow_tf32, kernel, table):
    """The row of a kernel that a problem belongs to."""
    if dtype != "float32":
        return "f64" if dtype == "float64" else "16bit"
    has_tf32 = any((row.kernel, row.operands) == (kernel, "tf32") for row in table.corrections)
    return "tf32" if allow_tf32 and has_tf32 else "f32"


def plans(program, folder):
    """{(geometry, dtype, allow_tf32): ({kernel: (cost, model_us)}, planned kernel)}."""
    keys = [(i, *request) for i in range(len(GEOMETRIES)) for request in REQUESTS]
    lines = [
        cases.line(Case(f"p{n}", GEOMETRIES[i]), dtype, allow_tf32=allow_tf32)
        for n, (i, dtype, allow_tf32) in enumerate(keys)
    ]
    path = cases.write(folder / "problems.txt", lines)
    done = subprocess.run([program, path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found, planned = {key: {} for key in keys}, {}
    for line in done.stdout.splitlines():
        name, kernel, *numbers = line.split()
        key = keys[int(name[1:].removesuffix("=planned"))]
        if name.endswith("=planned"):
            planned[key] = kernel
        else:
            *cost, model_us = map(float, numbers)
            found[key][kernel] = (rates.Cost(*cost), model_us)
    return {key: (found[key], planned[key]) for key in keys}


def compiled(folder, table):
    """planner.cc's program with a table."""
    build.copy_sources(folder)
    (folder / "csrc/cuda/rates.h").write_text(rates.render(table))
    return build.planner(folder)


def complaints(found, table):
    """What is not as the model says: estimates, launches of parts, the least one planned."""
    for (index, dtype, allow_tf32), (kernels, planned) in found.items():
        problem = f"{GEOMETRIES[index]} {dtype} {allow_tf32}"
        for kernel, (cost, model_us) in kernels.items():
            row = table.correction(kernel, kind(dtype, allow_tf32, kernel, table))
            if model_us != pytest.approx(table.model_us(cost, row), rel=1e-12):
                yield f"{problem} {kernel}: {model_us} us, {cost}, {row}"
        if planned != min(kernels, key=lambda kernel, kernels=kernels: kernels[kernel][1]):
            yield f"{problem}: {planned} planned, {kernels}"
    for index, kernel in enumerate(IN_PARTS):
        cost, _ = found[index, "bfloat16", True][0][kernel]
        if cost.launches != 2:
            yield f"{kernel} in two parts: {cost}"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The plans by the other table."""
    folder = tmp_path_factory.mktemp("planner")
    return plans(compiled(folder / "copy", OTHER), folder)


def test_every_kernel_counts_with_its_row_of_the_table(found):
    reached = {
        (kernel, kind(dtype, allow_tf32, kernel, OTHER))
        for (_, dtype, allow_tf32), (kernels, _) in found.items()
        for kernel in kernels
    }
    assert reached == {(row.kernel, row.operands) for row in OTHER.corrections}
    assert list(complaints(found, OTHER)) == []


def test_another_table_plans_other_kernels(found):
    changed = 0
    for (_, dtype, allow_tf32), (kernels, planned) in found.items():
        present = {
            kernel: PRESENT.model_us(
                cost, PRESENT.correction(kernel, kind(dtype, allow_tf32, kernel, PRESENT))
            )
            for kernel, (cost, _) in kernels.items()
        }
        changed += planned != min(present, key=lambda kernel, present=present: present[kernel])
    assert changed > 20


@pytest.mark.mutation
def test_another_table_cuts_problems_up_differently(found, tmp_path):
    before = plans(compiled(tmp_path / "copy", PRESENT), tmp_path)
    changed = {
        kernel
        for key, (kernels, _) in before.items()
        for kernel, (cost, _) in kernels.items()
        if cost != found[key][0][kernel][0]
    }
    assert changed >= {"few_channels", "grouped", "mma", "wgmma"}
    assert changed.isdisjoint({"direct", "tiled"})  # which are cut up in one way only


MISTAKES = {
    "traffic adds to arithmetic": (
        "kernel_table.h", "std::max(arithmetic_us, memory_us)", "(arithmetic_us + memory_us)"),
    "TF32 counts as float32": (
        "kernel_table.h", "problem.allow_tf32 ? Operands::kTf32 : Operands::kF32",
        "Operands::kF32"),
    "one launch, whatever the plan": (
        "kernel_table.h", "kRatesLaunchUs * cost.launches", "kRatesLaunchUs"),
    "wgmma takes the row of mma": ("wgmma.cu", 'CorrectionOf("wgmma"', 'CorrectionOf("mma"'),
    "mma_3xtf32 takes the row of mma": (
        "mma.cu", 'kThreeProducts ? "mma_3xtf32" : "mma"', '"mma"'),
    "grouped is not repeated for parts of the batch": (
        "grouped.cu", "Repeated(cut.cost, CeilDiv(problem.batch, part.batch))", "cut.cost"),
    "depthwise forgets parts of the batch": (
        "depthwise.cu", "Repeated(c.cost, parts)", "Repeated(c.cost, 1)"),
    "few_channels keeps the first cut's cost": (
        "few_channels.cu", "plan->cost = cost", "if (cuts == 1) plan->cost = cost"),
}  # fmt: skip


@pytest.mark.mutation
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_the_model_is_caught(name, tmp_path):
    file, old, new = MISTAKES[name]
    path = build.copy_sources(tmp_path / "copy") / "csrc/cuda" / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    (tmp_path / "copy/csrc/cuda/rates.h").write_text(rates.render(OTHER))
    assert next(complaints(plans(build.planner(tmp_path / "copy"), tmp_path), OTHER), None)
