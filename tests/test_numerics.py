"""Every CPU kernel, by name, against float64 and against the definition."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import SEED

import jax_convgrad
from jax_convgrad import native, planner
from jax_convgrad.maps import FILTER_GRAD, FORWARD, INPUT_GRAD
from jax_convgrad.tools.geometries import (
    make_geometry,
    named_cases,
    normwise_error,
    random_case,
    reduction_taps,
    tolerance,
)
from jax_convgrad.tools.random_layers import random_workload

NAMED = {case.name: case.geometry for case in named_cases()}
KERNELS = native.cpu.kernel_names() if native.cpu else []
RANDOM_COUNT = 25


def check_kernels(rng, g, dtype):
    """Compares every kernel that takes this geometry with float64; returns their names."""
    dy, w = oracles.operands(rng, g, dtype)
    reference = oracles.lax_input_grad(dy, w, g)
    bound = tolerance(dtype, reduction_taps(g))
    results = oracles.call_kernels(dy, w, g)
    for name, out in results.items():
        assert out.dtype == dy.dtype
        error = normwise_error(out, reference)
        assert error <= bound, f"{name}: {error:.3e} above {bound:.3e} for {dtype} {g}"
    return list(results)


@pytest.mark.native
@pytest.mark.parametrize(("name", "dtype"), oracles.with_dtypes(NAMED))
def test_named_geometry(rng, x64, name, dtype):
    names = check_kernels(rng, NAMED[name], dtype)
    assert oracles.plan(NAMED[name], dtype)[0] in names


@pytest.mark.native
@pytest.mark.parametrize(("index", "dtype"), oracles.with_dtypes(range(RANDOM_COUNT)))
def test_random_geometry(rng, x64, index, dtype):
    g = random_case(SEED, index).geometry
    names = check_kernels(rng, g, dtype)
    assert oracles.plan(g, dtype)[0] in names


@pytest.mark.native
@pytest.mark.slow
@pytest.mark.parametrize("index", range(RANDOM_COUNT, 1000))
def test_many_random_geometries(rng, x64, index):
    for dtype in oracles.DTYPES:
        check_kernels(rng, random_case(SEED, index).geometry, dtype)


@pytest.mark.native
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_takes_some_named_geometry(kernel):
    assert any(oracles.plan(g, "float32", kernel) is not None for g in NAMED.values())


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_public_function_on_each_platform(device, rng, x64, dtype):
    """Eager and jitted, through dispatch; on a GPU with float32 products kept."""
    for name in ("dense_s2", "depthwise_3x3_nchw", "grouped_s2", "dense_1d"):
        g = NAMED[name]
        dy, w = (jnp.asarray(a) for a in oracles.operands(rng, g, dtype))

        def gradient(dy, w, g=g):
            params = g.conv_params()
            return jax_convgrad.conv_input_grad(dy, w, g.lhs_shape, **params, precision="highest")

        reference = oracles.lax_input_grad(dy, w, g)
        for function in (gradient, jax.jit(gradient)):
            out = function(dy, w)
            assert out.devices() == {device}
            assert normwise_error(out, reference) <= tolerance(dtype, reduction_taps(g))


# Tiny, so that the definition can be looped over, with padding for a kernel to multiply.
NONFINITE = {
    "dense": make_geometry((5, 4), (3, 3), (3, 4), padding=1),
    "wide filter": make_geometry((2, 2), (2, 2), (256, 32), batch=1, padding=1),
    "strided": make_geometry((7, 6), (3, 2), (2, 5), stride=(2, 3), padding=2),
    "few channels": make_geometry((19,), (3,), (3, 17), padding=1),
    "few channels, strided": make_geometry((3, 18), (2, 4), (1, 19), batch=1, stride=2, padding=2),
    "pointwise": make_geometry((3, 4), (1, 1), (5, 6)),
    "depthwise": make_geometry((6, 5), (3, 3), (4, 4), padding=2, feature_groups=4),
    "depthwise, multiplier": make_geometry((9,), (3,), (3, 6), padding=1, feature_groups=3),
    "grouped, channels first": make_geometry(
        (6,), (3,), (6, 4), padding=1, feature_groups=2, dimension_numbers="first"
    ),
    "dilated": make_geometry((9,), (3,), (2, 3), rhs_dilation=2, lhs_dilation=2, padding=3),
    "batch groups": make_geometry((5,), (3,), (2, 4), batch=4, padding=1, batch_groups=2),
    "stride beyond the window": make_geometry((10,), (2,), (2, 2), stride=4, padding=1),
}


@pytest.mark.native
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["dy", "w"])
@pytest.mark.parametrize("name", NONFINITE)
def test_nonfinite_values_reach_connected_outputs_only(rng, x64, name, operand, value):
    g = NONFINITE[name]
    for dtype in ("float32", "bfloat16"):
        dy, w = oracles.operands(rng, g, dtype)
        target = dy if operand == "dy" else w
        target[tuple(rng.integers(size) for size in target.shape)] = value
        expected = oracles.literal_input_grad(dy, w, g)
        for kernel, result in oracles.call_kernels(dy, w, g).items():
            out = result.astype(np.float64)
            np.testing.assert_array_equal(np.isnan(out), np.isnan(expected), err_msg=kernel)
            infinite = np.isinf(expected)
            np.testing.assert_array_equal(np.isinf(out), infinite, err_msg=kernel)
            np.testing.assert_array_equal(out[infinite], expected[infinite], err_msg=kernel)


@pytest.mark.native
@pytest.mark.parametrize("name", ["no_output_channels", "window_beyond_input"])
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_outputs_without_products_are_written_as_zeros(x64, name, dtype):
    g = NAMED[name]
    dy, w = np.ones(g.out_shape, jnp.dtype(dtype)), np.ones(g.rhs_shape, jnp.dtype(dtype))
    results = oracles.call_kernels(dy, w, g)
    assert results
    for kernel, out in results.items():
        np.testing.assert_array_equal(out, np.zeros(g.lhs_shape, out.dtype), err_msg=kernel)


@pytest.mark.parametrize(
    ("batch", "channels", "spatial"), [(0, (2, 3), (5,)), (2, (2, 0), (5,)), (2, (2, 3), (0,))]
)
def test_empty_operands_through_the_public_function(batch, channels, spatial):
    g = make_geometry(spatial, (1,), channels, batch=batch)
    dy, w = np.ones(g.out_shape, "f4"), np.ones(g.rhs_shape, "f4")
    for implementation in (None, "xla"):
        out = jax_convgrad.conv_input_grad(
            dy, w, g.lhs_shape, **g.conv_params(), implementation=implementation
        )
        np.testing.assert_array_equal(out, np.zeros(g.lhs_shape))


@pytest.mark.native
def test_planning_of_empty_arrays_divides_by_no_size():
    """No channels, taps, positions or images: the process died of a division by zero."""
    planned = 0
    sizes = (0, 2), (0, 3), (0, 2), (0, 5), (0, 1, 3), ((0, 0), (2, 2)), (1, 2)
    for batch, lhs_features, rhs_features, size, taps, padding, stride in itertools.product(*sizes):
        spec = jax.lax.ConvDimensionNumbers((0, 2, 1), (2, 1, 0), (0, 2, 1))
        g = jax_convgrad.ConvGeometry.parse(
            (batch, size, lhs_features), (taps, lhs_features, rhs_features),
            (stride,), (padding,), None, None, spec,
        )  # fmt: skip
        for map_ in (FORWARD, INPUT_GRAD, FILTER_GRAD):
            planned += planner.plan(g, "float32", "cpu", map_=map_).kernel is not None
    assert planned > 500


@pytest.mark.native
def test_gradient_of_no_channels_under_install():
    x, w = np.ones((1, 5, 2), "f4"), np.ones((3, 2, 0), "f4")

    def loss(x):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, w, (1,), [(2, 2)], dimension_numbers=numbers).sum()

    with jax_convgrad.installed():
        np.testing.assert_array_equal(jax.grad(loss)(x), np.zeros(x.shape))


@pytest.mark.native
def test_kernel_inside_scan_and_map(rng):
    """The handler shares XLA's threads with the loop that calls it."""
    g = NAMED["dense_s2"]
    dy, w = oracles.operands(rng, g, "float32")
    steps = np.stack([dy * scale for scale in range(1, 9)])

    @jax.jit
    def total(steps):
        def step(carry, dy):
            return carry + oracles.call_kernel(dy, w, g), None

        return jax.lax.scan(step, jnp.zeros(g.lhs_shape, "float32"), steps)[0]

    expected = 36 * oracles.lax_input_grad(dy, w, g)
    assert normwise_error(total(steps), expected) < 1e-6


@pytest.mark.native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_signal_has_the_same_bits_along_either_axis(rng, layout, dtype):
    """As [N, C, T, 1] it took a kernel made for images, and four times as long as lax."""
    shape = {"channels": (3, 12), "stride": 2, "dimension_numbers": layout}
    tall = make_geometry((301, 1), (5, 1), **shape)
    wide = make_geometry((1, 301), (1, 5), **shape)
    assert oracles.plan(tall, dtype) == oracles.plan(wide, dtype)
    dy, w = oracles.operands(rng, tall, dtype)
    dx = oracles.call_kernel(dy, w, tall)
    turned = dy.reshape(wide.out_shape), w.reshape(wide.rhs_shape)
    assert np.asarray(dx).tobytes() == np.asarray(oracles.call_kernel(*turned, wide)).tobytes()


@pytest.mark.native
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("name", ["stride_8_pointwise_nchw", "stride_100_1d"])
def test_epilogue_is_applied_to_what_no_tap_reaches(rng, x64, name, dtype):
    """There dX is only cleared, if nothing else happens to it."""
    g = NAMED[name]
    dy, w = oracles.operands(rng, g, dtype)
    residual = rng.standard_normal(g.lhs_shape).astype(dy.dtype)
    dx = np.asarray(oracles.call_kernel(dy, w, g))
    assert np.mean(dx == 0) > 0.7
    arrays = (residual, np.zeros((0,), dy.dtype))
    fused = np.asarray(oracles.call_kernel(dy, w, g, arrays=arrays))
    expected = (dx.astype(np.float64) + residual.astype(np.float64)).astype(dy.dtype)
    assert fused.tobytes() == expected.tobytes()


LONG_WINDOWS = [name for name in NAMED if name.startswith("long_window")]


@pytest.mark.native
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("name", LONG_WINDOWS)
def test_window_longer_than_the_result_exchanges_the_operands(rng, x64, name, dtype):
    """It took up to 60 times as long as lax: kernels walked along rows of dY that are short."""
    g = NAMED[name]
    dy, w = oracles.operands(rng, g, dtype)
    assert planner.plan(g, dtype, "cpu").exchanged
    (results,) = oracles.call_kernels_of_many([(dy, w, g)], lambda g, dtype: ["auto"])
    bound = tolerance(dtype, reduction_taps(g))
    assert normwise_error(results["auto"], oracles.sliced_input_grad(dy, w, g)) <= bound


@pytest.mark.native
@pytest.mark.parametrize("operand", ["dy", "w"])
@pytest.mark.parametrize("name", LONG_WINDOWS)
def test_exchanged_operands_keep_what_is_not_finite_in_its_place(rng, name, operand):
    g = NAMED[name]
    operands = dict(zip(("dy", "w"), oracles.operands(rng, g, "float32"), strict=True))
    array = operands[operand] = np.array(operands[operand])
    array.reshape(-1)[rng.integers(array.size, size=2)] = (np.inf, np.nan)
    dx = np.asarray(oracles.call_kernel(operands["dy"], operands["w"], g))
    with np.errstate(invalid="ignore"):
        expected = oracles.sliced_input_grad(operands["dy"], operands["w"], g)
    np.testing.assert_array_equal(np.isfinite(dx), np.isfinite(expected))


@pytest.mark.native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LONG_WINDOWS)
def test_exchanged_operands_apply_an_epilogue(rng, name, dtype):
    g = NAMED[name]
    dy, w = oracles.operands(rng, g, dtype)
    residual, mask = (rng.standard_normal(g.lhs_shape).astype(dy.dtype) for _ in range(2))
    dx = oracles.call_kernel(dy, w, g)
    fused = oracles.call_kernel(dy, w, g, arrays=(residual, mask))
    expected = oracles.finish(dx, residual=residual, relu_mask=mask)
    assert np.asarray(fused).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.native
@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("name", [name for name in NAMED if name.startswith("short_sums")])
def test_short_sums_keep_what_is_not_finite_in_its_place(rng, name, value):
    """Zeros stand for what a tap misses: a filter that is not finite must not meet them."""
    g = NAMED[name]
    dy, w = oracles.operands(rng, g, "float32")
    w = np.array(w)
    w.reshape(-1)[rng.integers(w.size)] = value
    dx = np.asarray(oracles.call_kernel(dy, w, g))
    with np.errstate(invalid="ignore"):
        expected = oracles.sliced_input_grad(dy, w, g)
    np.testing.assert_array_equal(np.isfinite(dx), np.isfinite(expected))


# Of one image each, of every way to add up a sum.
IMAGES = {
    f"pointwise {layout} {size} {channels}": make_geometry(
        (size,), (1,), channels, batch=1, dimension_numbers=layout
    )
    for channels in ((8, 40), (3, 5), (20, 33), (1, 1))
    for layout in ("first", "last")
    for size in (5, 40)
} | {
    # Blocks of the filter are packed by tasks, or beforehand, in parts of a tap.
    "parts of a tap": make_geometry((14, 14), (5, 5), (256, 256), batch=1, padding=2),
    "parts of a tap, nchw": make_geometry((7, 7), (3, 3), (512, 256), batch=1, padding=1,
                                          dimension_numbers="first"),
    "strips or parts": make_geometry((24,), (2,), (176, 176), batch=1, padding=1),
    "stem": make_geometry((20, 40), (3, 3), (3, 32), batch=1, stride=2, padding=1),
    "depthwise": make_geometry((9, 9), (3, 3), (32, 32), batch=1, padding=1, feature_groups=32),
    "side by side": make_geometry((280,), (23,), (1, 5), batch=1, rhs_dilation=12,
                                  padding=((3, 4),), dimension_numbers=("CWN", "IWO", "WNC")),
}  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("map_", [FORWARD, INPUT_GRAD], ids=["y", "dx"])
@pytest.mark.parametrize("images", [9, 20])
@pytest.mark.parametrize("name", IMAGES)
def test_bits_of_an_image_do_not_depend_on_its_batch(rng, name, images, map_):
    """How many rows there are to share decided about the parts of a sum; and images may be
    taken for one long row, by a kernel that one of them would get too.
    """
    one = IMAGES[name]
    lhs_spec, _, out_spec = one.dimension_numbers
    at, of_result = lhs_spec[0], out_spec[0]
    shape = tuple(images if dim == at else size for dim, size in enumerate(one.lhs_shape))
    if map_ is INPUT_GRAD:
        at, of_result = of_result, at
    arrays = oracles.operands(rng, one.replace(lhs_shape=shape), "float32", map_)

    def call(first, g):
        problem = (first, arrays[1], g)
        (results,) = oracles.call_kernels_of_many([problem], lambda *_: ["auto"], map_)
        return results["auto"]

    together = call(arrays[0], one.replace(lhs_shape=shape))
    alone = call(np.take(arrays[0], [0], axis=at), one)
    assert np.take(together, [0], axis=of_result).tobytes() == alone.tobytes()


@pytest.mark.native
def test_window_of_a_hundred_thousand_taps_that_meets_one_y(rng):
    """Finding the taps of each phase took as many steps as there are phases: minutes."""
    g = make_geometry((100_000,), (100_000,), (2, 3), batch=2)
    dy, w = oracles.operands(rng, g, "float32")
    dx = oracles.call_kernel(dy, w, g)
    expected = np.einsum("nk,hck->nhc", dy[:, 0].astype(np.float64), w.astype(np.float64))
    assert normwise_error(dx, expected) <= tolerance("float32", 3)


@pytest.mark.native
def test_patches_as_a_grouped_convolution_pack_little():
    """Filters of one input channel were filled up to 16 of them: 340 MB where lax takes 22."""
    g = make_geometry(
        (100, 100), (24, 24), (16, 16 * 576), batch=1, stride=3, feature_groups=16,
        dimension_numbers="first",
    )  # fmt: skip
    operands = sum(map(math.prod, (g.lhs_shape, g.rhs_shape, g.out_shape)))
    assert planner.plan(g, "float32", "cpu").workspace_bytes <= 4 * 4 * operands


# Found by the test below: filters that were packed mostly as padding.
LONG_WINDOWS = {
    "each y once": oracles.geometry(
        (1, 11, 38268), (11, 1, 34442), (52865,), "VALID", feature_group_count=11
    ),
    "three y": oracles.geometry(
        (20, 1, 63521), (15, 1, 63519), (31755,), [(31754, 31754)], batch_group_count=5
    ),
    "a channel a group": oracles.geometry(
        (1, 473, 253, 4), (426, 252, 1, 8), (426, 2), [(189, 190), (125, 126)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4,
    ),
}  # fmt: skip


def check_workspace(g, dtype):
    operands = sum(map(math.prod, (g.lhs_shape, g.rhs_shape, g.out_shape)))
    planned = planner.plan(g, dtype, "cpu")
    bound = 4 * operands * np.dtype(dtype).itemsize + (1 << 20)
    assert planned.workspace_bytes <= bound, (g, planned)


@pytest.mark.native
@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("name", LONG_WINDOWS)
def test_workspace_of_long_windows_of_few_channels_is_bounded(name, dtype):
    check_workspace(LONG_WINDOWS[name], dtype)


@pytest.mark.native
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_workspace_of_random_problems_is_bounded(dtype):
    for index in range(200):
        check_workspace(random_workload(SEED, index, dtype, "default").geometry, dtype)
