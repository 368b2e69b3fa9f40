"""The CPU module whatever runs it: every instruction set, any number of threads; its size."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import cpu_programs
import numpy as np
import oracles
import pytest
from conftest import SEED

from jax_convgrad import native
from jax_convgrad.maps import FILTER_GRAD, FORWARD, INPUT_GRAD
from jax_convgrad.tools import references
from jax_convgrad.tools.geometries import (
    make_geometry,
    named_cases,
    normwise_error,
    random_cases,
    reduction_taps,
    tolerance,
)

RANDOM_COUNT = 200
# At least one of each class, so that each kernel takes some whatever is drawn.
ALWAYS = (
    "dense_3x3", "dense_s2_nchw", "stem_7x7_s2", "gray_5x5", "odd_channels", "odd_depthwise",
    "depthwise_3x3_nchw", "depthwise_multiplier", "depthwise_1d", "grouped_s2", "all_dilated",
    "batch_groups", "odd_layouts_3d", "dense_3x3_deep", "dense_deep_s2", "dots_rows",
    "no_images", "no_output_channels", "window_beyond_input",
)  # fmt: skip
PER_PROGRAM = 100


def in_programs(problems, map_=INPUT_GRAD):
    """Yields (problem, {kernel: result}); problems share programs, which saves a minute."""
    kernels = functools.partial(oracles.kernels_for, map_=map_)
    for first in range(0, len(problems), PER_PROGRAM):
        some = problems[first : first + PER_PROGRAM]
        yield from zip(some, oracles.call_kernels_of_many(some, kernels, map_), strict=True)


def operands(seed, g, dtype, map_):
    return oracles.operands(np.random.default_rng(seed), g, dtype, map_)


REFERENCES = {INPUT_GRAD: oracles.sliced_input_grad, FILTER_GRAD: references.filter_grad}


def sweep():
    """Compares with float64 on this process's instruction set; prints what it did as JSON."""
    cases = [case for case in named_cases() if case.name in ALWAYS]
    cases += random_cases(RANDOM_COUNT, SEED)
    used, failures = {}, []
    for map_, reference_of in REFERENCES.items():
        problems = [
            (*operands([SEED, index], case.geometry, dtype, map_), case.geometry)
            for index, case in enumerate(cases)
            for dtype in oracles.DTYPES
        ]
        for (first, second, g), results in in_programs(problems, map_):
            dtype = first.dtype.name
            reference = reference_of(first, second, g)
            bound = tolerance(dtype, reduction_taps(g, map_))
            for name, out in results.items():
                assert out.dtype == first.dtype
                used.setdefault(dtype, set()).add(name)
                if not (error := normwise_error(out, reference)) <= bound:
                    failures.append(f"{name} {dtype}: {error:.3e} above {bound:.3e} for {g}")
    print(json.dumps({
        "isa": native.cpu.isa(),
        "used": {dtype: sorted(names) for dtype, names in used.items()},
        "geometries": len(cases),
        "failures": failures,
    }))  # fmt: skip


X64 = "import jax; jax.config.update('jax_enable_x64', True)\n"


def skip_without(isa):
    if (reason := cpu_programs.lacking(isa)) is not None:
        pytest.skip(reason)
    if isa not in native.cpu.isas() and not os.environ.get("JAX_CONVGRAD_REQUIRE_NATIVE"):
        pytest.skip(f"the module was built without {isa}")


def report(run_python, code, **environment):
    return json.loads(run_python("-c", X64 + code, **environment).stdout)


@pytest.mark.native
@pytest.mark.thorough
@pytest.mark.parametrize("isa", cpu_programs.flags_by_set())
def test_random_geometries_against_float64(run_python, isa):
    skip_without(isa)
    found = report(run_python, "import test_isa; test_isa.sweep()", JAX_CONVGRAD_CPU_ISA=isa)
    assert not found["failures"], "\n".join(found["failures"][:20])
    assert found["isa"] == isa
    assert found["geometries"] == RANDOM_COUNT + len(ALWAYS)
    # Every kernel in every dtype, as far as it takes any.
    assert set(found["used"]) == set(oracles.DTYPES)
    names = {*native.cpu.kernel_names(), *native.cpu.kernel_names("filter_grad")}
    assert set().union(*found["used"].values()) == names
    assert set(found["used"]["float32"]) == names


def threads_of_pool():
    """How many threads XLA has for kernels, by the name it gives them; 0 if unknown."""
    names = []
    for path in pathlib.Path("/proc/self/task").glob("*/comm"):
        names.append(path.read_text().strip())
    return names.count("tf_XLAEigen")


# Of few rows, and of 7 panels: tasks of one thread pack their own blocks of the filter, tasks
# of three do not. Short sums, columns that fill no panel, taps that lie side by side, and rows
# that strips serve.
FEW_ROWS = [
    make_geometry((2, 3), (2, 3), (110, 64), batch=1, padding=((1, 1), (2, 2))),
    make_geometry((2, 3), (2, 3), (110, 64), batch=1, padding=1, dimension_numbers="first"),
    make_geometry((2, 3), (2, 2), (99, 90), batch=1, padding=1),
    make_geometry(
        (2, 2), (3, 5), (110, 40), batch=1, padding=((1, 1), (2, 2)), dimension_numbers="first"
    ),
    make_geometry((5,), (2,), (104, 800), batch=1, padding=1),
    make_geometry((8, 14), (3, 1), (64, 128), batch=1, padding=((1, 1), (0, 0))),
]


def all_bits():
    """Prints digests of every kernel's result on all named geometries, of fixed data."""
    problems = [
        (*oracles.operands(np.random.default_rng(index), case.geometry, dtype), case.geometry)
        for index, case in enumerate(named_cases())
        for dtype in ("float32", "bfloat16")
    ]
    # Sums that underflow to zeros of either sign, with and without an Inf in the filter, where
    # tasks pack their own blocks of the filter if there are threads enough.
    g = make_geometry((12, 8), (3, 3), (128, 256), batch=1, padding=1)
    for special in (False, True):
        dy, w = oracles.operands(np.random.default_rng(special), g, "float32")
        dy, w = dy * np.float32(1e-24), w * np.float32(1e-24)
        if special:
            w[(1,) * 4] = np.inf
        problems.append((dy, w, g))
    # An Inf that one phase of a stride has, and the others have not.
    strided = make_geometry((2, 6), (2, 3), (32, 128), batch=1, stride=(1, 2),
                            padding=((0, 1), (1, 1)))  # fmt: skip
    dy, w = oracles.operands(np.random.default_rng(0), strided, "float32")
    dy, w = -abs(dy) * np.float32(1e-24), abs(w) * np.float32(1e-24)
    w[0, 1, 0, 0] = np.inf
    problems.append((dy, w, strided))
    for index, g in enumerate(FEW_ROWS):
        for dtype, scale in (("float32", 1), ("bfloat16", 1), ("float32", np.float32(1e-24))):
            dy, w = oracles.operands(np.random.default_rng(index), g, dtype)
            problems.append((dy * scale, w * scale, g))
    # Sums of several chunks, split over tasks.
    split = make_geometry((65, 66), (3, 3), (40, 24), batch=4, padding=1)
    filters = [
        (*operands(index, g, dtype, FILTER_GRAD), g)
        for index, g in enumerate([*(case.geometry for case in named_cases()), split])
        for dtype in ("float32", "bfloat16")
    ]
    digests = [
        {name: hashlib.sha256(out.tobytes()).hexdigest()[:16] for name, out in results.items()}
        for some, map_ in ((problems, INPUT_GRAD), (filters, FILTER_GRAD))
        for _, results in in_programs(some, map_)
    ]
    print(json.dumps({"threads": threads_of_pool(), "digests": digests}))


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("counts", [(1, 3), pytest.param((1, 2, 4), marks=pytest.mark.thorough)])
def test_the_same_bits_for_every_thread_count(run_python, counts):
    """XLA's own pool with that many threads, whatever number of processors there is."""
    found = {
        # The variable's old name is for the oldest JAX.
        threads: report(
            run_python, "import test_isa; test_isa.all_bits()",
            PJRT_NPROC=str(threads), NPROC=str(threads),
        )
        for threads in counts
    }  # fmt: skip
    assert {threads: each["threads"] for threads, each in found.items()} == {
        count: count for count in counts
    }
    twice = [case.name for case in named_cases() for _ in range(2)]
    few = [f"few rows {index}" for index in range(len(FEW_ROWS)) for _ in range(3)]
    names = [*twice, "underflow", "infinite", "strided", *few, *twice, "split", "split"]
    for threads in counts[1:]:
        differing = {
            name
            for name, one, many in zip(
                names, found[1]["digests"], found[threads]["digests"], strict=True
            )
            if one != many
        }
        assert not differing
    assert sum(map(len, found[1]["digests"])) > len(names)


IMAGES = [
    *FEW_ROWS,
    make_geometry((6, 6), (3, 3), (128, 32), batch=1, padding=1),
    make_geometry((10, 10), (3, 3), (128, 32), batch=1, padding=1),
    make_geometry((4, 4), (3, 3), (40, 96), batch=1, padding=1, dimension_numbers="first"),
    # Where strips serve if there are enough of them; rows of an image that fill no tile.
    make_geometry((4, 14), (3, 1), (64, 128), batch=1, padding=((1, 1), (0, 0))),
    make_geometry((4, 5), (1, 9), (32, 64), batch=1, padding=((0, 0), (4, 4))),
    # One channel and one position, as of a classifier's last layer.
    make_geometry((7, 7), (7, 7), (48, 1), batch=1),
    make_geometry((1, 1), (1, 1), (1, 40), batch=1, dimension_numbers="first"),
]


@pytest.mark.native
@pytest.mark.parametrize("map_", [FORWARD, INPUT_GRAD])
def test_the_bits_of_an_image_do_not_depend_on_the_others(rng, map_):
    """Short sums added the taps of some register tiles in the opposite order.

    And of sums that underflow the sign did: whether a zero is added to -0.
    """
    for g, scale in itertools.product(IMAGES, (1, np.float32(1e-24))):
        many = dataclasses.replace(g, lhs_shape=(17, *g.lhs_shape[1:]))
        first, w = (scale * a for a in oracles.operands(rng, g, "float32", map_))
        both = [(first, w, g), (np.repeat(first, 17, axis=0), w, many)]
        for kernel in [*oracles.kernels_for(many, "float32", map_=map_), "auto"]:
            alone, together = (
                results[kernel]
                for results in oracles.call_kernels_of_many(both, lambda *_, k=kernel: [k], map_)
            )
            for image in together:
                np.testing.assert_array_equal(image, alone[0], err_msg=f"{kernel} {g}")


@pytest.mark.native
def test_the_same_bits_every_run(rng):
    wanted = ("dense_3x3_wide", "dense_s2_nchw", "depthwise_7x7", "grouped", "dense_3d")
    geometries = [case.geometry for case in named_cases() if case.name in wanted]
    problems = [
        (*oracles.operands(rng, g, dtype), g)
        for g in geometries
        for dtype in ("float32", "bfloat16")
    ]
    first, second = (oracles.call_kernels_of_many(problems) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name in one:
            assert one[name].tobytes() == other[name].tobytes(), name


MOST_BYTES = 3_000_000


@pytest.mark.native
def test_module_is_small(tmp_path):
    path = pathlib.Path(native.cpu.__file__)
    assert path.stat().st_size < MOST_BYTES
    if (strip := shutil.which("strip")) is not None:
        stripped = tmp_path / path.name
        subprocess.run([strip, "-o", stripped, path], check=True)
        assert stripped.stat().st_size < MOST_BYTES
