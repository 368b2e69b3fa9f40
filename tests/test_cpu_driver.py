"""The CPU kernels without Python: under sanitizers, by other compilers, on another processor."""

import itertools
import math
import platform
import shutil
import subprocess

import cpu_programs
import numpy as np
import pytest
import test_pooling
from conftest import SEED
from emulator import build, cases

from jax_convgrad import ConvGeometry
from jax_convgrad.tools.geometries import Case, make_geometry, named_cases, random_cases

if (reason := build.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

RANDOM_COUNT = 100


def larger_cases():
    """Several tasks for every kernel, with a rest in each direction that is cut up."""
    g = make_geometry
    table = {
        "many_rows": g((19, 21), (3, 3), (35, 37), batch=2, padding=1),
        "many_columns": g((5, 5), (1, 1), (197, 67)),
        "many_columns_first": g((5, 9), (1, 1), (150, 33), dimension_numbers="first"),
        "deep": g((4, 5), (3, 3), (21, 150), padding=1),
        # Tasks pack their own blocks of the filter.
        "local_filter": g((2, 3), (2, 2), (128, 64), batch=1, padding=1),
        "local_filter_strided": g((5, 4), (3, 2), (64, 86), batch=1, stride=2, padding=1),
        "local_filter_rest": g((2, 3), (2, 2), (131, 75), batch=1, padding=1),
        "local_filter_few_taps": g((2, 3), (2, 2), (131, 75), batch=1, padding=1,
                                   dimension_numbers="first"),
        "local_filter_taps": g((2, 2), (3, 5), (60, 40), padding=((1, 1), (2, 2)),
                               dimension_numbers="first"),
        "local_filter_16_bit": g((2, 3), (3, 3), (90, 90), batch=1, padding=1),
        "short_sums": g((2, 3), (2, 3), (110, 64), batch=1, padding=((1, 1), (2, 2))),
        # Images in vector lanes, whose rows at the edges multiply zeros.
        "side_by_side": g((340,), (190,), (1, 16), batch=1, padding=3,
                          dimension_numbers=("CWN", "IWO", "WNC")),
        "patches": g((12, 8), (4, 4), (5, 33), stride=4),
        "long_row": g((3, 300), (3, 3), (3, 9), batch=1, padding=1),
        "long_row_strided": g((5, 211), (3, 5), (2, 12), batch=1, stride=(2, 3), padding=2),
        "long_depthwise": g((2, 270), (3, 3), (5, 5), batch=1, padding=1, feature_groups=5,
                            dimension_numbers="first"),
        "wide_depthwise": g((7, 9), (3, 3), (261, 261), batch=1, padding=1, feature_groups=261),
        "tall_depthwise": g((90, 3), (5, 3), (17, 17), batch=1, padding=((2, 2), (1, 1)),
                            feature_groups=17),
        # Taps of the forward map that are one run of memory, and short sums of such.
        "forward_patches": g((12, 15), (4, 5), (3, 40), stride=(4, 5)),
        "forward_runs": g((9, 47), (3, 6), (2, 33), batch=1, stride=(1, 2)),
        "forward_stem": g((21, 23), (7, 7), (3, 33), batch=1, stride=2, padding=3),
        # Several chunks of the filter gradient's sum, and several tasks.
        "chunks": g((37, 41), (3, 3), (3, 19), batch=2, padding=1),
        "chunks_depthwise": g((40, 40), (3, 3), (21, 21), padding=1, feature_groups=21),
        "grouped_by_5": g((12, 11), (3, 3), (65, 65), padding=1, feature_groups=13),
    }  # fmt: skip
    # Each tap is a column of a matrix product; the filter was read beyond its end.
    table["folded_taps_of_one_position"] = ConvGeometry.parse(
        (2, 2, 33), (33, 25, 3), (2,), [(1, 1)], None, None, ("WNC", "IOW", "CWN"), 1, 1,
        function="larger_cases",
    )  # fmt: skip
    return [Case(name, geometry) for name, geometry in table.items()]


def problems(most_products, random_count=RANDOM_COUNT, dtypes=cases.DTYPES):
    """Lines for the driver: every small case in every dtype, a seventh with NaN and Inf."""
    found = [*named_cases(), *larger_cases(), *cases.wide_cases(), *cases.few_channel_cases()]
    found += random_cases(random_count, SEED)
    return [
        cases.line(case, dtype, platform="cpu", allow_tf32=False, special=index % 7 == SEED % 7)
        for index, case in enumerate(found)
        if 0 not in case.geometry.lhs_shape and cases.products(case.geometry) <= most_products
        for dtype in dtypes
    ]


POOLS = 60


def pool_lines(most_looks):
    """Gradients of max pooling for the driver, a seventh with NaN and Inf."""
    rng = np.random.default_rng(SEED)
    named = [*test_pooling.GEOMETRIES.values(), *test_pooling.LARGE_TILES]
    drawn = itertools.islice(test_pooling.taken(rng), POOLS)
    lines = []
    for index, g in enumerate([*named, *drawn]):
        if math.prod(g[0]) * math.prod(g[1]) > most_looks:
            continue
        lists = (g[0], g[1], g[2], sum(g[3], ()))
        text = " ".join(str(n) for values in lists for n in (len(values), *values))
        special = int(index % 7 == SEED % 7)
        lines += [f"pool pool_{index} {dtype} {special} {text}" for dtype in cases.DTYPES]
    return lines


# variant: threads, the largest problem. Several numbers of threads must give the same bits.
SANITIZERS = {"address": ("1,4", 1 << 21), "thread": ("3", 1 << 18)}


@pytest.mark.sanitizer
@pytest.mark.parametrize("isa", cpu_programs.flags_by_set())
@pytest.mark.parametrize("variant", SANITIZERS)
def test_kernels_under_a_sanitizer(tmp_path, variant, isa):
    if (reason := cpu_programs.lacking(isa)) is not None:
        pytest.skip(reason)
    program = cpu_programs.driver(build.VARIANTS[variant])
    threads, most_products = SANITIZERS[variant]
    lines = problems(most_products) + pool_lines(most_products)
    cpu_programs.check(cpu_programs.run(program, lines, tmp_path, threads=threads, isa=isa), isa)


def reads_to_the_end(g):
    """Whether some window's last tap meets the last element of x."""
    return all(
        (out - 1) * stride + (taps - 1) * dilation - low >= (extent - 1) * lhs_dilation
        for out, stride, taps, dilation, (low, _), extent, lhs_dilation in zip(
            g.out_sizes,
            g.window_strides,
            g.window_sizes,
            g.rhs_dilation,
            g.padding,
            g.in_sizes,
            g.lhs_dilation,
            strict=True,
        )
    )


def faulty_problems(program, folder, prefix=""):
    """{kernel: problems in float32 that it takes, the largest first}, which read all of x.

    The kernels are those of the input gradient, or with the prefix "filter:" of the filter's.
    """
    found = sorted(
        [*named_cases(), *larger_cases()], key=lambda case: cases.products(case.geometry)
    )
    lines = {
        case.name: cases.line(case, "float32", platform="cpu", allow_tf32=False)
        for case in found
        if 0 not in case.geometry.lhs_shape
        and reads_to_the_end(case.geometry)
        and cases.products(case.geometry) <= 1 << 20
    }
    result = cpu_programs.run(program, lines.values(), folder, threads="1")
    assert result.returncode == 0, result.stdout
    passed = (text.split()[1:4] for text in result.stdout.splitlines() if text[:5] == "pass ")
    taken = {}
    for name, _, kernel in passed:
        kernel = kernel.removeprefix(prefix) if kernel.startswith(prefix) else ":"
        if ":" not in kernel:
            line = lines[name].replace(" float32 * ", f" float32 {kernel} ")
            taken[kernel] = [line, *taken.get(kernel, ())]
    return taken


def in_a_kernel(report):
    """Whether a kernel, or memcpy called by one, made the access that is reported first."""
    frames = [line for line in report.splitlines() if line.lstrip().startswith("#")]
    return "csrc/cpu/" in "".join(frames[:3])


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    "fault", ["short_dy", "short_w", "short_dx", "short_x", "short_filter_dy", "short_dw"]
)
def test_access_beyond_a_buffer_is_reported(tmp_path, fault):
    """A buffer that ends a vector too early: what a kernel that reads too far would do."""
    program = cpu_programs.driver(build.VARIANTS["address"])
    of_filter = fault in ("short_x", "short_filter_dy", "short_dw")
    taken = faulty_problems(program, tmp_path, "filter:" if of_filter else "")
    assert len(taken) > 1
    for kernel, lines in taken.items():
        for isa in cpu_programs.flags_by_set():
            if cpu_programs.lacking(isa) is None:
                result = cpu_programs.run(program, lines[:1], tmp_path, isa=isa, fault=fault)
                assert result.returncode == build.SANITIZER_STATUS, (kernel, isa, result.stdout)
                assert "ERROR: AddressSanitizer" in result.stdout, (kernel, isa)
                assert in_a_kernel(result.stdout), (kernel, isa, result.stdout)


@pytest.mark.sanitizer
def test_access_beyond_the_workspace_is_reported(tmp_path):
    program = cpu_programs.driver(build.VARIANTS["address"])
    line = cases.line(larger_cases()[0], "float32", platform="cpu", kernel="gemm")
    result = cpu_programs.run(program, [line], tmp_path, fault="short_workspace")
    assert result.returncode == build.SANITIZER_STATUS, result.stdout
    assert "AddressSanitizer" in result.stdout


@pytest.mark.sanitizer
def test_load_of_a_vector_too_many_is_reported(tmp_path):
    """The fault in the source: each vector load touches the byte behind it."""
    copy = tmp_path / "copy"
    for part in ("csrc", str(build.EMULATOR)):
        shutil.copytree(build.ROOT / part, copy / part)
    path = copy / "csrc/cpu/vec.h"
    good = "__builtin_memcpy(&v, p, sizeof(v));\n  return v;"
    bad = "(void)*(static_cast<const volatile char*>(p) + sizeof(v));\n  " + good
    assert path.read_text().count(good) == 1
    path.write_text(path.read_text().replace(good, bad))
    # Unoptimized, which compiles in a fifth of the time.
    program = cpu_programs.driver(build.VARIANTS["address"], replaced=("portable", copy, ("-O0",)))
    lines = [
        cases.line(case, "float32", platform="cpu", allow_tf32=False)
        for case in named_cases()
        if case.name in ("dense_3x3", "depthwise_3x3")
    ]
    result = cpu_programs.run(program, lines, tmp_path)
    assert result.returncode == build.SANITIZER_STATUS, result.stdout
    assert "buffer-overflow" in result.stdout
    assert "LoadRaw" in result.stdout


@pytest.mark.sanitizer
def test_race_between_tasks_is_reported(tmp_path):
    program = cpu_programs.driver(build.VARIANTS["thread"])
    taken = faulty_problems(program, tmp_path)
    for kernel, lines in taken.items():
        result = cpu_programs.run(program, lines[:1], tmp_path, threads="2,2", fault="twice")
        assert result.returncode == build.SANITIZER_STATUS, (kernel, result.stdout)
        assert "data race" in result.stdout, kernel
        assert in_a_kernel(result.stdout), (kernel, result.stdout)
        # Packing that is still under way when its result is used. One thread alone packs
        # where there is little, and what a task packs for itself is not shared: not every
        # problem shows it. `direct` packs nothing.
        early = (
            cpu_programs.run(program, [line], tmp_path, threads="2,2", fault="early").stdout
            for line in lines
        )
        assert kernel == "direct" or any(
            "data race" in report and in_a_kernel(report) for report in early
        ), kernel


# name: compiler, flags, machine
COMPILERS = {
    "g++ for aarch64": ("aarch64-linux-gnu-g++", ("-O2", "-static"), "aarch64"),
    "clang++": ("clang++", ("-O2",), ""),
    "clang++ for aarch64": (
        "clang++", ("-O2", "-static", "--target=aarch64-linux-gnu"), "aarch64",
    ),
}  # fmt: skip
EMULATORS = {"aarch64": ("qemu-aarch64", "qemu-aarch64-static")}


def runner(machine):
    """The command that runs programs for a machine on this one, and what is missing or None."""
    if machine in ("", platform.machine()):
        return (), None
    names = EMULATORS[machine]
    found = next(filter(None, map(shutil.which, names)), None)
    return (found,), None if found else f"there is no {names[0]}"


def links(cxx, flags, folder):
    """Whether the compiler has the libraries of its target."""
    source = folder / "empty.cc"
    source.write_text("#include <string>\nint main() { return std::string().size(); }\n")
    command = [cxx, *flags, str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.cross
@pytest.mark.parametrize("name", COMPILERS)
def test_kernels_by_another_compiler(tmp_path, name):
    cxx, flags, machine = COMPILERS[name]
    if shutil.which(cxx) is None:
        pytest.skip(f"there is no {cxx}")
    run_by, missing = runner(machine)
    if missing is not None:
        pytest.skip(missing)
    if not links(cxx, flags, tmp_path):
        pytest.skip(f"{cxx} cannot link for {machine or 'this machine'}")
    program = cpu_programs.driver(flags, cxx=cxx, machine=machine)
    lines = problems(1 << 18)
    for isa in cpu_programs.flags_by_set(machine):
        if machine or cpu_programs.lacking(isa) is None:
            result = cpu_programs.run(program, lines, tmp_path, isa=isa, runner=run_by)
            cpu_programs.check(result, isa)
