"""The CUDA kernels on the CPU, through JAX: every kernel that takes a problem, in every dtype.

csrc/kernel.cu and csrc/cuda/*.cu are compiled as they are, see emulator/cuda_emulator.h.
"""

import collections
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import SEED
from emulator import build, cases
from jax import lax
from jax.interpreters import mlir

import jax_convgrad
from jax_convgrad import __main__, custom_call, dispatch, native, planner, primitive
from jax_convgrad.maps import INPUT_GRAD
from jax_convgrad.tools import calibrate, layers, rate_fit, rate_problems, rates
from jax_convgrad.tools.geometries import (
    make_geometry,
    normwise_error,
    random_cases,
    reduction_taps,
    tolerance,
)
from jax_convgrad.tools.workloads import Workload

pytestmark = pytest.mark.emulator

if (reason := build.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

TARGET = "convgrad_input_grad_emulated"
FUSED_TARGET = "convgrad_input_grad_fused_emulated"
# Kernels that may round float32 products to TF32 where the precision allows it.
TF32_KERNELS = {"few_channels", "grouped", "mma", "wgmma"}
LITERAL = {case.name for case in cases.wide_cases()}
CASES = list(cases.small_cases(8, SEED))


@pytest.fixture(scope="session")
def emulated():
    """The emulated CUDA module, its handler registered for the CPU."""
    module = build.module()
    for name, target in ((TARGET, native.TARGET), (FUSED_TARGET, native.FUSED_TARGET)):
        jax.ffi.register_ffi_target(name, module.targets()[target], platform="cpu")
    return module


@pytest.fixture
def set_mode(monkeypatch):
    """Sets the emulator's copies and thread order, by a row of `cases.MODES`."""

    def set_mode(mode):
        for name, value in cases.environment(mode).items():
            monkeypatch.setenv(name, value)

    return set_mode


def plans(module, g, dtype, precision=None):
    """{kernel: workspace bytes} of the kernels that take a problem."""
    found = {}
    for name in module.kernel_names():
        attributes = custom_call.attributes(g, "cuda", precision, name)
        try:
            plan = module.plan(dtype, g.lhs_shape, g.rhs_shape, g.out_shape, attributes)
        except ValueError:
            continue
        found[name] = plan["workspace_bytes"]
    return found


def program(module, g, dtype, precision=None):
    """A jitted function of (dy, w) that computes {kernel: dX} by every kernel.

    With two more arguments, residual and relu, either of which may have the shape (0,), it is
    the fused call.
    """
    planned = plans(module, g, dtype, precision)
    lhs, rhs, out = custom_call.layouts(g, "cuda")

    def call(name, dy, w, *arrays):
        results = (
            jax.ShapeDtypeStruct(g.lhs_shape, dy.dtype),
            jax.ShapeDtypeStruct((planned[name],), np.uint8),
        )
        call = jax.ffi.ffi_call(
            FUSED_TARGET if arrays else TARGET,
            results,
            input_layouts=[out, rhs, *((0,) if x.shape == (0,) else lhs for x in arrays)],
            output_layouts=[lhs, (0,)],
        )
        return call(dy, w, *arrays, **custom_call.attributes(g, "cuda", precision, name))[0]

    return jax.jit(lambda *operands: {name: call(name, *operands) for name in planned})


def check(module, case, dtype, rng, precision=None):
    """Compares every kernel with float64."""
    g = case.geometry
    dy, w = oracles.operands(rng, g, dtype)
    reference = (oracles.literal_input_grad if case.name in LITERAL else oracles.lax_input_grad)(
        dy, w, g
    )
    with jax.enable_x64(True):
        results = program(module, g, dtype, precision)(dy, w)
    assert "direct" in results
    for name, dx in results.items():
        tf32 = name in TF32_KERNELS and custom_call.allows_tf32(precision)
        bound = cases.bound(g, dtype, allow_tf32=tf32)
        assert normwise_error(dx, reference) <= bound, (name, g)


# Two dtypes for each: test_emulator_core.py has all, except many groups, and is faster.
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_kernels_against_float64(emulated, set_mode, rng, index, turn):
    dtype = cases.DTYPES[(index + 2 * turn) % 4]
    set_mode(cases.MODES[(index + turn) % len(cases.MODES)])
    highest = (lax.Precision.HIGHEST,) * 2 if index % 2 else None
    check(emulated, CASES[index], dtype, rng, highest)


@pytest.mark.slow
@pytest.mark.parametrize("mode", cases.MODES, ids="eager{0[0]}-order{0[1]}".format)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_kernels_against_float64_in_every_mode(emulated, set_mode, rng, dtype, mode):
    set_mode(mode)
    sweep = [*CASES, *random_cases(60, SEED + 1)]
    for index, case in enumerate(sweep):
        if 0 not in case.geometry.lhs_shape:
            check(emulated, case, dtype, rng, (lax.Precision.HIGHEST,) * 2 if index % 2 else None)
        if index % 20 == 19:
            jax.clear_caches()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dense", "pointwise_strided", "depthwise", "few_channels"])
def test_epilogues_have_the_bits_of_their_steps(emulated, rng, name, dtype):
    # The core program has the kernels and dtypes: here are the handler and its operands.
    strided = make_geometry((5, 4), (1, 1), (72, 8), stride=2)
    g = strided if name == "pointwise_strided" else SPECIAL[name]
    operands = oracles.operands(rng, g, dtype)
    plain = program(emulated, g, dtype)(*operands)
    residual = rng.standard_normal(g.lhs_shape).astype(dtype)
    mask = np.maximum(rng.standard_normal(g.lhs_shape), 0).astype(dtype)
    none = np.zeros(0, dtype)
    for arrays in ((residual, none), (none, mask), (residual, mask)):
        fused = program(emulated, g, dtype)(*operands, *arrays)
        steps = [array if array.size else None for array in arrays]
        for kernel, dx in plain.items():
            np.testing.assert_array_equal(fused[kernel], oracles.finish(dx, *steps), kernel)


SPECIAL = {
    "dense": make_geometry((6, 5), (3, 3), (5, 7), padding=1),
    "strided": make_geometry((9, 8), (3, 2), (4, 6), stride=(2, 3), padding=((2, 1), (0, 1))),
    "dilated": make_geometry((7,), (3,), (9, 8), lhs_dilation=2, rhs_dilation=3, padding=4),
    "depthwise": make_geometry((5, 6), (3, 3), (8, 8), padding=1, feature_groups=8),
    "depthwise_multiplier": make_geometry((5, 6), (3, 2), (5, 10), padding=1, feature_groups=5),
    "grouped": make_geometry((6, 7), (3, 3), (32, 16), stride=2, padding=1, feature_groups=4),
    "pointwise": make_geometry((4, 5), (1, 1), (16, 24)),
    "few_channels": make_geometry((9, 9), (3, 3), (3, 16), stride=2, padding=1),
}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("operand", ["dy", "w", "both"])
@pytest.mark.parametrize("name", SPECIAL)
def test_nan_and_inf_reach_what_the_definition_connects(emulated, rng, name, operand, dtype):
    g = SPECIAL[name]
    dy, w = oracles.operands(rng, g, dtype)
    for array in {"dy": (dy,), "w": (w,), "both": (dy, w)}[operand]:
        places = rng.choice(array.size, 3, replace=False)
        array.reshape(-1)[places] = np.array([np.nan, np.inf, -np.inf], array.dtype)
    expected = oracles.literal_input_grad(dy, w, g)
    finite = np.isfinite(expected)
    with jax.enable_x64(True):
        results = program(emulated, g, dtype)(dy, w)
    for kernel, dx in results.items():
        dx = np.asarray(dx).astype(np.float64)
        np.testing.assert_array_equal(dx[~finite], expected[~finite], err_msg=kernel)
        assert normwise_error(dx[finite], expected[finite]) <= cases.bound(g, dtype), kernel


@pytest.mark.parametrize(
    "name", ["dense", "strided", "depthwise", "grouped", "pointwise", "few_channels"]
)
def test_same_bits_in_every_thread_order(emulated, set_mode, monkeypatch, rng, name):
    # Several blocks of rows and of channels.
    shapes = {
        "dense": make_geometry((14, 14), (3, 3), (72, 24), batch=3, padding=1),
        "strided": make_geometry((15, 15), (3, 3), (70, 20), batch=4, stride=2, padding=1),
        "depthwise": make_geometry((9, 8), (3, 3), (24, 24), padding=1, feature_groups=24),
        "grouped": make_geometry((13, 13), (3, 3), (64, 64), padding=1, feature_groups=8),
        "pointwise": make_geometry((12, 12), (1, 1), (80, 48)),
        "few_channels": make_geometry((31, 31), (5, 5), (3, 32), stride=2, padding=2),
    }
    g = shapes[name]
    for dtype in ("float32", "bfloat16"):
        dy, w = oracles.operands(rng, g, dtype)
        function = program(emulated, g, dtype)
        first = None
        for threads, mode in enumerate(cases.MODES, start=1):
            set_mode(mode)
            monkeypatch.setenv("CUDA_EMULATOR_THREADS", str(threads))
            results = {kernel: np.asarray(dx) for kernel, dx in function(dy, w).items()}
            first = first or results
            for kernel, dx in results.items():
                assert dx.tobytes() == first[kernel].tobytes(), (kernel, dtype, mode)


@pytest.mark.parametrize("case", cases.wide_cases(), ids=lambda case: case.name)
def test_64_bit_arithmetic_is_what_the_wide_cases_take(emulated, case):
    # As FitsIn32Bits: phases beyond its table, or positions beyond 2^31.
    g = case.geometry
    phases = [s // np.gcd(s, d) for s, d in zip(g.window_strides, g.lhs_dilation, strict=True)]
    spans = [(n - 1) * d for n, d in zip(g.in_sizes, g.lhs_dilation, strict=True)]
    assert max(phases) > 32 or max(spans) >= 1 << 31
    assert "direct" in plans(emulated, g, "float32")


@pytest.fixture
def lowered_for_cuda(emulated, monkeypatch):
    """Makes the CPU lowering of the primitive the CUDA one, on the emulated module."""
    monkeypatch.setattr(native, "cuda", emulated)
    monkeypatch.setitem(native.TARGETS, INPUT_GRAD, TARGET)

    def register(platform):
        rule = functools.partial(primitive._lower, INPUT_GRAD, platform=platform)
        mlir.register_lowering(primitive.conv_input_grad_p, rule, platform="cpu")
        jax.clear_caches()

    register("cuda")
    yield
    register("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["first", "last", "odd"])
def test_grad_reaches_the_emulated_kernels(lowered_for_cuda, rng, layout, dtype):
    g = make_geometry((9, 8), (3, 3), (6, 10), stride=2, padding=1, dimension_numbers=layout)
    x = jnp.asarray(rng.standard_normal(g.lhs_shape), dtype)
    dy, w = (jnp.asarray(v) for v in oracles.operands(rng, g, dtype))
    assert dispatch.choose(g, dtype, "cuda").implementation == "native"

    def loss(conv):
        return lambda x, w: (conv(x, w, **g.conv_params()) * dy).astype(jnp.float32).sum()

    grad = jax.jit(jax.grad(loss(jax_convgrad.conv_general_dilated), argnums=(0, 1)))
    assert grad.lower(x, w).as_text().count(f"@{TARGET}(") == 1
    dx, dw = grad(x, w)
    expected_dw = jax.grad(loss(lax.conv_general_dilated), argnums=1)(x, w)
    assert normwise_error(dx, oracles.lax_input_grad(dy, w, g)) <= cases.bound(g, dtype)
    assert normwise_error(dw, expected_dw) <= cases.bound(g, dtype)


def test_a_driver_older_than_the_module_is_told_in_its_own_words(emulated, monkeypatch, rng):
    g = make_geometry((9, 8), (3, 3), (6, 10))
    operands = oracles.operands(rng, g, "float32")
    function = program(emulated, g, "float32")
    monkeypatch.setenv("CUDA_EMULATOR_DRIVER", "0")
    text = "no GPU can be used: CUDA driver version is insufficient"
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        jax.block_until_ready(function(*operands))


def test_vmap_of_grad_reaches_the_emulated_kernels(lowered_for_cuda, rng):
    g = make_geometry((7, 7), (3, 3), (4, 6), padding=1)
    dy = jnp.asarray(rng.standard_normal((3, *g.out_shape)), jnp.float32)
    w = jnp.asarray(rng.standard_normal(g.rhs_shape), jnp.float32)
    function = functools.partial(
        jax_convgrad.conv_input_grad, lhs_shape=g.lhs_shape, **g.conv_params()
    )
    dx = jax.jit(jax.vmap(function, (0, None)))(dy, w)
    for each, expected in zip(dx, dy, strict=True):
        error = normwise_error(each, oracles.lax_input_grad(expected, w, g))
        assert error <= cases.bound(g, "float32")


def test_calibrate_measures_fits_and_writes(lowered_for_cuda, emulated, monkeypatch, tmp_path):
    """On emulated kernels, whose times mean nothing: that the command does all its work."""
    device = types.SimpleNamespace(
        device_kind="emulated GPU", compute_capability="9.0", core_count=132
    )
    monkeypatch.setattr(calibrate, "_require_gpu", lambda: (device, emulated))
    monkeypatch.setattr(calibrate.machine, "is_gpu", lambda: True)
    geometries = {
        "dense": make_geometry((4, 3), (3, 3), (8, 8), padding=1),
        "grouped": make_geometry((3, 4), (3, 3), (16, 16), padding=1, feature_groups=2),
    }
    few = [rate_problems.layer_of(name, g) for name, g in geometries.items()]
    monkeypatch.setattr(rate_problems, "constructed", lambda: few)
    monkeypatch.setattr(rate_problems.layers, "default_path", lambda: None)
    monkeypatch.setattr(rate_problems.layers, "load", lambda *_: [])
    monkeypatch.setattr(rate_problems, "_RANGE_US", (0, 1e9))
    monkeypatch.setattr(rate_problems, "_SHARE", 0)
    monkeypatch.setattr(calibrate, "_POOL", 2)
    requests = {name: rate_problems.REQUESTS[name] for name in ("tf32", "16bit", "f32")}
    monkeypatch.setattr(rate_problems, "REQUESTS", requests)
    monkeypatch.setattr(calibrate.timing, "MIN_ROUNDS", 1)
    table, path = tmp_path / "rates.h", tmp_path / "measured.json"
    arguments = [
        "--per-bound",
        "1",
        "--row-seconds",
        "0.001",
        "--write",
        str(table),
        "--json",
        str(path),
    ]
    assert __main__.main(["calibrate", *arguments]) == 0
    report = json.loads(path.read_text())
    assert report["complete"]
    present = rates.parse((build.ROOT / "csrc/cuda/rates.h").read_text())
    assert rates.Rates.from_json(report["rates"]) == present
    measured = [(p, row) for p in report["problems"] for row in p["kernels"] if not p["launch"]]
    assert {row["kernel"] for _, row in measured} >= {"direct", "tiled", "mma", "grouped", "wgmma"}
    assert {row["operands"] for _, row in measured} == set(requests)
    for problem, row in measured:
        assert row["time_us"]["median"] > 0
        g = geometries[problem["name"]]
        precision = (lax.Precision.HIGHEST,) * 2 if problem["precision"] == "highest" else None
        plan = planner.plan(g, problem["dtype"], "cuda", precision, row["kernel"])
        correction = present.correction(row["kernel"], row["operands"])
        model_us = present.model_us(rates.Cost(**row["cost"]), correction)
        assert plan.model_us == pytest.approx(model_us, rel=1e-12)
        planned = planner.plan(g, problem["dtype"], "cuda", precision)
        assert problem["planned"] == planned.kernel
    # The kept measurements give the same table again.
    written = rates.parse(table.read_text())
    assert written == rate_fit.fit(report).after


def test_calibrate_has_problems_for_every_factor(emulated, monkeypatch):
    monkeypatch.setattr(native, "cuda", emulated)
    # The package that is tested may be no checkout.
    listed = build.ROOT / "benchmarks/layers.json"
    monkeypatch.setattr(rate_problems.layers, "default_path", lambda: listed)
    table = rates.Rates.from_json(emulated.rates())
    candidates = rate_problems.candidates_on(90)
    chosen = rate_problems.select(candidates, table, 6)
    counts = collections.Counter()
    for workload, kernels in chosen:
        assert workload.bytes_moved <= 3e8
        for p in kernels:
            bound, clearness = table.correction(p.kernel, p.operands).bound(p.cost)
            counts[p.kernel, p.operands, bound] += clearness >= 1.25
    # By their models device memory bounds nothing of these (docs/cuda.md).
    without = {("few_channels", "tf32"), ("few_channels", "16bit"), ("few_channels_3xtf32", "f32"),
               ("depthwise", "f64"), ("mma_3xtf32", "f32"), ("tiled", "16bit")}  # fmt: skip
    for row in table.corrections:
        assert counts[row.kernel, row.operands, "arithmetic"] >= 6, row
        if (row.kernel, row.operands) not in without:
            assert counts[row.kernel, row.operands, "memory"] >= rate_fit.MIN_ROWS, row
    # The first of a run that is stopped are one of each.
    first = {(p.kernel, p.operands) for _, kernels in chosen[:40] for p in kernels}
    assert first == {(row.kernel, row.operands) for row in table.corrections}


def test_calibrate_reports_a_kernel_that_is_wrong(lowered_for_cuda, monkeypatch):
    monkeypatch.setattr(calibrate, "_POOL", 2)
    right = calibrate.forced_kernel

    def forced(geometry, dtype, platform, kernel, precision):
        function = right(geometry, dtype, platform, kernel, precision)
        return (lambda dy, w: 1.1 * function(dy, w)) if kernel == "mma" else function

    monkeypatch.setattr(calibrate, "forced_kernel", forced)
    layer = rate_problems.layer_of("dense", make_geometry((4, 3), (3, 3), (8, 8), padding=1))
    workload = Workload(layer, "dx", "bfloat16", "default")
    found = rate_problems.plans(workload, 90)
    rows = calibrate.measure(workload, list(found.values()), seed=0, row_seconds=0.001)
    for row in rows:
        assert (row["failure"] is not None) == (row["kernel"] == "mma"), row
        assert (row["time_us"] is None) == (row["kernel"] == "mma")

    def no_memory(*_):
        raise MemoryError("none left")

    monkeypatch.setattr(calibrate, "make_pool", no_memory)
    rows = calibrate.measure(workload, list(found.values()), seed=0, row_seconds=0.001)
    assert {row["failure"] for row in rows} == {"MemoryError: none left"}


LAYERS = layers.load(build.ROOT / "benchmarks/layers.json", "NHWC")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_planner_names_a_kernel_for_every_layer_of_the_table(emulated, dtype):
    for layer in LAYERS:
        g = layer.geometry
        attributes = custom_call.attributes(g, "cuda", None)
        plan = emulated.plan(dtype, g.lhs_shape, g.rhs_shape, g.out_shape, attributes)
        assert plan["kernel"] in emulated.kernel_names()
        assert plan["model_us"] > 0
        _, rhs_spec, _ = g.dimension_numbers
        out_channels, in_channels = (g.rhs_shape[d] for d in rhs_spec[:2])
        if g.groups == 1 and min(out_channels, in_channels) >= 32:
            assert plan["kernel"] != "direct", layer


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_plans_say_how_the_grid_runs(emulated, monkeypatch, dtype):
    """For every kernel that takes a layer: explain() prints waves and the roofline from it."""
    monkeypatch.setattr(native, "cuda", emulated)
    gpu = planner.reference_gpu(dtype, None)
    exact = planner.reference_gpu(dtype, (lax.Precision.HIGHEST,) * 2)
    assert exact.flops_per_s == gpu.flops_per_s / (3 if dtype == "float32" else 1)
    for layer in LAYERS[::10]:
        g = layer.geometry
        for name in plans(emulated, g, dtype):
            plan = planner.plan(g, dtype, "cuda", None, name)
            assert min(plan.blocks, plan.threads, plan.resident) > 0, plan
            assert plan.resident * plan.threads <= 2048, plan
            assert plan.resident * plan.shared_bytes <= 227 << 10, plan
            bytes_us = 1e6 * g.bytes_moved(jnp.dtype(dtype).itemsize) / gpu.bytes_per_s
            assert plan.model_us >= bytes_us, (plan, bytes_us)


def test_planner_takes_the_grouped_kernel_where_groups_have_few_channels(emulated):
    few = [layer.geometry for layer in LAYERS if layer.class_name == "grouped"]
    wide = make_geometry((28, 28), (3, 3), (512, 512), batch=32, padding=1, feature_groups=2)
    for g in (*few, wide):
        attributes = custom_call.attributes(g, "cuda", None)
        plan = emulated.plan("bfloat16", g.lhs_shape, g.rhs_shape, g.out_shape, attributes)
        assert plan["kernel"] == ("wgmma" if g is wide else "grouped"), g


def uses_tma(emulated, g, dtype):
    """Whether a plan of wgmma has no room for the rows that copying threads keep."""
    attributes = custom_call.attributes(g, "cuda", None, "wgmma")
    plan = emulated.plan(dtype, g.lhs_shape, g.rhs_shape, g.out_shape, attributes)
    m, n, _ = plan["tile"]
    ring_and_barriers = plan["stages"] * (128 * (m + n) + 2 * 8)
    assert plan["shared_bytes"] in (ring_and_barriers, ring_and_barriers + 4 * m)
    return plan["shared_bytes"] == ring_and_barriers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_wgmma_copies_the_cases_that_are_meant_for_it(emulated, dtype):
    # core.cc skips what a kernel declines, and either producer may do what the other can,
    # neither of which must go unnoticed.
    tma = [*cases.hopper_cases(), *cases.hopper_walking_cases()[:1]]
    threads = [*cases.copied_cases(), *cases.hopper_walking_cases()[1:]]
    other = {
        case.name
        for case in (*tma, *threads)
        if uses_tma(emulated, case.geometry, dtype) != (case in tma)
    }
    assert other == ({"copied_4"} if dtype == "float32" else {"hopper_f32_only"})


@pytest.mark.parametrize("case", cases.hopper_walking_cases(), ids=lambda case: case.name)
def test_wgmma_walks_where_the_tests_mean_it(emulated, case):
    g = case.geometry
    attributes = custom_call.attributes(g, "cuda", None, "wgmma")
    plan = emulated.plan("bfloat16", g.lhs_shape, g.rhs_shape, g.out_shape, attributes)
    least_rows = g.lhs_shape[0] * 10 * 10  # of a phase, of which there are four
    assert 4 * (least_rows // plan["tile"][0]) > plan["blocks"] + 4


@pytest.mark.parametrize("channels", [(64, 80), (36, 256)])
def test_wgmma_takes_groups_of_whole_slices_and_vectors_only(emulated, channels):
    g = make_geometry((7, 7), (3, 3), channels, padding=1, feature_groups=4)
    for dtype in ("bfloat16", "float32"):
        found = plans(emulated, g, dtype)
        assert "wgmma" not in found, dtype
        assert "mma" in found, dtype


def test_planner_takes_mma_where_copies_are_of_single_values(emulated):
    for channels in (256, 255):
        g = make_geometry((56, 56), (3, 3), (channels, channels), batch=32, padding=1)
        attributes = custom_call.attributes(g, "cuda", None)
        shapes = (g.lhs_shape, g.rhs_shape, g.out_shape)
        planned = emulated.plan("bfloat16", *shapes, attributes, 90)["kernel"]
        assert planned == ("wgmma" if channels == 256 else "mma"), channels


def test_wgmma_is_for_one_compute_capability(emulated):
    g = make_geometry((56, 56), (3, 3), (256, 256), batch=32, padding=1)
    attributes = custom_call.attributes(g, "cuda", None)
    shapes = (g.lhs_shape, g.rhs_shape, g.out_shape)
    planned = {
        capability: emulated.plan("bfloat16", *shapes, attributes, capability)["kernel"]
        for capability in (80, 90, 100, 120)
    }
    assert planned == {80: "mma", 90: "wgmma", 100: "mma", 120: "mma"}


def test_blocks_take_several_tiles_where_the_tests_mean_it(emulated):
    g = cases.walking_case().geometry
    attributes = custom_call.attributes(g, "cuda", None, "grouped")
    plan = emulated.plan("bfloat16", g.lhs_shape, g.rhs_shape, g.out_shape, attributes)
    rows = g.lhs_shape[0] * g.lhs_shape[1] * g.lhs_shape[2]
    tiles = rows // plan["tile"][0] * (g.lhs_shape[3] // plan["tile"][1])
    assert tiles >= 2 * plan["blocks"]


EMPTY = {
    "batch": make_geometry((5, 5), (3, 3), (4, 8), batch=0, padding=1),
    "height": make_geometry((0, 5), (3, 3), (4, 8), padding=1),
    "width": make_geometry((5, 0), (3, 3), (4, 8), padding=1),
    "in_channels": make_geometry((5, 5), (3, 3), (0, 8), padding=1),
    "out_channels": make_geometry((5, 5), (3, 3), (4, 0), padding=1),
    "window": make_geometry((5, 5), (3, 0), (1, 4), padding=1),
    "depthwise": make_geometry((5, 0), (3, 3), (8, 8), padding=1, feature_groups=8),
    "outputs": make_geometry((2, 2), (3, 3), (4, 8)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_problems_are_planned_for_direct_alone(emulated, name):
    for dtype in cases.DTYPES:
        assert set(plans(emulated, EMPTY[name], dtype)) == {"direct"}
        assert set(plans(emulated, EMPTY[name], dtype, (lax.Precision.HIGHEST,) * 2)) == {"direct"}


def test_grad_of_an_empty_array_is_lowered_for_cuda(lowered_for_cuda):
    g = EMPTY["width"]
    x, w = jnp.zeros(g.lhs_shape), jnp.zeros(g.rhs_shape)

    def loss(x):
        return jax_convgrad.conv_general_dilated(x, w, **g.conv_params()).sum()

    assert jax.jit(jax.grad(loss))(x).shape == g.lhs_shape


# The most shared memory of a block, in KiB, by compute capability: CUDA's documentation.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans_fit_the_gpu_that_runs_them(emulated, dtype):
    for layer in LAYERS[::3]:
        g = layer.geometry
        attributes = custom_call.attributes(g, "cuda", None)
        for capability, kib in SHARED_KIB.items():
            plan = emulated.plan(
                dtype, g.lhs_shape, g.rhs_shape, g.out_shape, attributes, capability=capability
            )
            assert plan["shared_bytes"] <= kib << 10, (layer, capability)


@pytest.mark.parametrize("kernel", ["auto", "mma", "tiled"])
def test_workspace_does_not_depend_on_the_gpu(emulated, kernel):
    # Small M, so that the sum is split.
    g = make_geometry((7, 7), (3, 3), (512, 512), batch=4, padding=1)
    attributes = custom_call.attributes(g, "cuda", None, kernel)
    shapes = (g.lhs_shape, g.rhs_shape, g.out_shape)
    plans = [emulated.plan("bfloat16", *shapes, attributes, capability=c) for c in SHARED_KIB]
    assert len({plan["workspace_bytes"] for plan in plans}) == 1
    with pytest.raises(ValueError, match="kernel"):
        emulated.plan("bfloat16", *shapes, attributes, capability=75)


def test_symbolic_programs_find_their_plan(emulated, rng):
    """Less workspace than a split sum wants, and padding as the shape of an operand."""
    g = make_geometry((7, 7), (3, 3), (64, 1024), batch=1, padding=1)  # whose sum is split
    shapes = (g.lhs_shape, g.rhs_shape, g.out_shape)
    attributes = custom_call.attributes(g, "cuda", None)
    assert emulated.plan("bfloat16", *shapes, attributes)["workspace_bytes"] > 0
    assert emulated.workspace_bound("bfloat16", *shapes, attributes)[1] == 0
    attributes["padding"] = np.zeros(4, np.int64)
    dy, w = oracles.operands(rng, g, "bfloat16")
    lhs, rhs, out = custom_call.layouts(g, "cuda")
    results = (jax.ShapeDtypeStruct(g.lhs_shape, dy.dtype), jax.ShapeDtypeStruct((0,), np.uint8))
    call = jax.ffi.ffi_call(
        TARGET, results, input_layouts=[out, rhs, None], output_layouts=[lhs, (0,)]
    )
    dx, _ = jax.jit(lambda *operands: call(*operands, **attributes))(
        dy, w, np.zeros((0, 1, 2, 1, 2), np.uint8)
    )
    error = normwise_error(dx, oracles.sliced_input_grad(dy, w, g))
    assert error <= tolerance("bfloat16", reduction_taps(g)), error
