"""The gemm kernel for AMX on any processor: its instructions are csrc/cpu/amx_emulation.h.

What runs is csrc/cpu/gemm_bf16.cc as it is, through JAX; where the tile instructions are
and what is around them is read from the object that a processor with AMX would run.
"""

import platform
import re
import shutil
import subprocess

import jax
import numpy as np
import oracles
import pytest
from conftest import SEED
from emulator import build
from test_numerics import NAMED, NONFINITE

from jax_convgrad import custom_call, native
from jax_convgrad.tools.geometries import (
    classify,
    make_geometry,
    normwise_error,
    random_case,
    reduction_taps,
    tolerance,
)

pytestmark = pytest.mark.emulator

if (reason := build.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

TARGET = "convgrad_input_grad_amx"
DTYPE = "bfloat16"
RANDOM_COUNT = 70  # a few are empty

# What no named case has: more rows than a task takes, whole and partial tiles of each kind,
# rows that are equally spaced and others, blocks of many taps or of part of one.
TILED = {
    "in_place": make_geometry((12, 48), (1, 1), (64, 64), batch=1),
    "in_place_strided": make_geometry((9, 70), (3, 3), (48, 32), batch=1, stride=2, padding=1),
    "edges": make_geometry((11, 19), (3, 3), (80, 96), batch=2, padding=1),
    "many_channels": make_geometry((3, 6), (3, 1), (20, 320), batch=3, padding=((1, 1), (0, 0))),
    "odd_channels": make_geometry((5, 7), (3, 3), (33, 65), batch=1, padding=1),
    "many_taps": make_geometry((9, 9), (5, 5), (17, 32), batch=1, padding=2),
    "channels_first": make_geometry((6, 20), (3, 3), (50, 70), padding=1,
                                    dimension_numbers="first"),
    "narrow_groups": make_geometry((6, 23), (3, 3), (96, 96), padding=1, feature_groups=3),
    "narrow_groups_first": make_geometry((7, 9), (3, 3), (40, 80), padding=1, feature_groups=5,
                                         dimension_numbers="first"),
    "patches": make_geometry((16, 32), (4, 4), (3, 64), stride=4),
}  # fmt: skip


@pytest.fixture(scope="session")
def amx():
    """The module with the emulated kernel, its handler registered for the CPU."""
    module = build.amx_module()
    assert module.isa() == "amx"
    jax.ffi.register_ffi_target(TARGET, module.targets()[native.TARGET], platform="cpu")
    return module


def input_grad(module, dy, w, g):
    """dX by the emulated kernel, as a NumPy array; None if it does not take the problem."""
    attributes = custom_call.attributes(g, "cpu", None, "gemm")
    try:
        plan = module.plan(DTYPE, g.lhs_shape, g.rhs_shape, g.out_shape, attributes)
    except ValueError:
        return None
    lhs, rhs, out = custom_call.layouts(g, "cpu")
    results = (
        jax.ShapeDtypeStruct(g.lhs_shape, dy.dtype),
        jax.ShapeDtypeStruct((plan["workspace_bytes"],), np.uint8),
    )
    call = jax.ffi.ffi_call(TARGET, results, input_layouts=[out, rhs], output_layouts=[lhs, (0,)])
    # Freed at once, so that the results and the workspace are likely to land on NaNs.
    for shape in (g.lhs_shape, (max(plan["workspace_bytes"] // 2, 1),)):
        jax.numpy.full(shape, np.nan, dy.dtype).block_until_ready()
    return np.asarray(jax.jit(lambda dy, w: call(dy, w, **attributes)[0])(dy, w))


def check(module, rng, g):
    """Compares with float64; False if the kernel does not take the problem."""
    dy, w = oracles.operands(rng, g, DTYPE)
    with jax.enable_x64(True):
        dx = input_grad(module, dy, w, g)
    if dx is None:
        return False
    error = normwise_error(dx, oracles.lax_input_grad(dy, w, g))
    assert error <= tolerance(DTYPE, reduction_taps(g)), g
    return True


# Emulation is slow; other kernels are for these.
OTHERS = {name: g for name, g in NAMED.items() if not name.startswith("depthwise")}


@pytest.mark.parametrize("name", [*TILED, *OTHERS])
def test_named_geometry(amx, rng, name):
    g = TILED[name] if name in TILED else NAMED[name]
    empty = 0 in g.lhs_shape + g.rhs_shape + g.out_shape
    assert check(amx, rng, g) or empty


@pytest.mark.parametrize("index", range(RANDOM_COUNT))
def test_random_geometry(amx, rng, index):
    g = random_case(SEED, index).geometry
    assert check(amx, rng, g) or classify(g) == "empty"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["dy", "w"])
@pytest.mark.parametrize(
    "name", [*NONFINITE, "edges", "odd_channels", "narrow_groups", "many_taps"]
)
def test_nonfinite_values_reach_connected_outputs_only(amx, rng, name, operand, value):
    g = NONFINITE[name] if name in NONFINITE else TILED[name]
    dy, w = oracles.operands(rng, g, DTYPE)
    target = dy if operand == "dy" else w
    target[tuple(rng.integers(size) for size in target.shape)] = value
    with np.errstate(invalid="ignore"):
        # The definition's own sum is what a NaN for the padding would have changed.
        reached = oracles.lax_input_grad(*_ones_where(dy, w), g) if name in TILED else None
        expected = oracles.literal_input_grad(dy, w, g) if reached is None else None
    with jax.enable_x64(True):
        dx = input_grad(amx, dy, w, g).astype(np.float64)
    if expected is None:
        # Each output sums at most one product with the value: finite elsewhere.
        np.testing.assert_array_equal(np.isfinite(dx), reached == 0)
        assert np.isnan(dx).any() == np.isnan(value)
        return
    np.testing.assert_array_equal(np.isnan(dx), np.isnan(expected))
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(np.isinf(dx), infinite)
    np.testing.assert_array_equal(dx[infinite], expected[infinite])


def _ones_where(dy, w):
    """Operands whose products are one where they hold what is not finite, else zero."""
    if np.isfinite(dy.astype(np.float64)).all():
        return np.ones(dy.shape), (~np.isfinite(w.astype(np.float64))).astype(float)
    return (~np.isfinite(dy.astype(np.float64))).astype(float), np.ones(w.shape)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the object is for x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_tiles_stay_in_registers():
    """The inner loop is four loads and four products; nothing stores a tile within it."""
    try:
        path = build.amx_object()
    except build.BuildError as e:
        if "-mamx" not in str(e).splitlines()[-1]:
            raise
        pytest.skip("this compiler knows no AMX")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(path)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$", listing, re.MULTILINE)
    code = [(int(at, 16), name, rest) for at, name, rest in lines]
    position = {at: i for i, (at, _, _) in enumerate(code)}
    loops = []
    for i, (at, name, rest) in enumerate(code):
        jump = re.match(r"([0-9a-f]+)", rest) if name.startswith("j") else None
        to = int(jump[1], 16) if jump else at
        if to < at and to in position:
            body = [name for _, name, _ in code[position[to] : i]]
            # Innermost: a loop around it has a jump of its own.
            if "tdpbf16ps" in body and not any(n.startswith("j") for n in body):
                loops.append(body)
    products = sorted(body.count("tdpbf16ps") for body in loops)
    assert products[-1] == 4
    assert products[0] >= 1
    for body in loops:
        assert not {"tilestored", "ldtilecfg", "vmovaps", "vmovups"} & set(body)
        if body.count("tdpbf16ps") == 4:
            assert body.count("tileloadd") == 4
            assert len(body) <= 16
    names = [name for _, name, _ in code]
    assert names.count("ldtilecfg") == names.count("tilerelease") > 0
