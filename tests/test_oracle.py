"""The package's lax formulas against the definition, one Python loop over every index."""

import itertools
import math

import numpy as np
import oracles
import pytest
from jax import lax

import jax_convgrad
from jax_convgrad import lax_maps
from jax_convgrad.geometry import dilated_size
from jax_convgrad.maps import FILTER_GRAD, FORWARD, INPUT_GRAD, shape_of_role
from jax_convgrad.tools import references
from jax_convgrad.tools.geometries import tolerance

# name: lhs_shape, rhs_shape and the parameters that are not defaults
SMALL = {
    "plain 1-D": ((2, 3, 7), (4, 3, 3), {}),
    "plain 2-D": ((2, 2, 5, 4), (3, 2, 3, 2), {}),
    "plain 3-D": ((1, 2, 3, 4, 3), (2, 2, 2, 2, 3), {}),
    "no spatial axis": ((3, 4), (5, 4), {"window_strides": (), "padding": ()}),
    "pointwise": ((2, 3, 4, 4), (5, 3, 1, 1), {}),
    "stride that leaves a remainder": ((1, 2, 8), (2, 2, 3), {"window_strides": (2,)}),
    "stride beyond the window": ((1, 1, 11), (1, 1, 2), {"window_strides": (4,)}),
    "one stride per axis": ((1, 2, 7, 6), (2, 2, 3, 2), {"window_strides": (3, 2)}),
    "positive padding": ((1, 2, 5), (2, 2, 3), {"padding": [(2, 1)]}),
    "padding beyond the window": ((1, 1, 3), (1, 1, 2), {"padding": [(5, 4)]}),
    "negative padding": ((1, 2, 9), (2, 2, 3), {"padding": [(-2, -1)]}),
    "padding of both signs": ((1, 2, 6, 6), (2, 2, 3, 3), {"padding": [(-1, 3), (2, -2)]}),
    "filter dilation": ((1, 2, 9), (2, 2, 3), {"rhs_dilation": (3,), "padding": [(2, 2)]}),
    "input dilation": ((1, 2, 4), (2, 2, 3), {"lhs_dilation": (3,), "padding": [(2, 1)]}),
    "stride, both dilations, padding": (
        (1, 1, 6, 5),
        (2, 1, 3, 2),
        {
            "window_strides": (4, 3),
            "lhs_dilation": (6, 2),
            "rhs_dilation": (2, 3),
            "padding": [(3, -2), (-1, 4)],
        },
    ),
    "feature groups": ((2, 6, 5), (9, 2, 3), {"feature_group_count": 3}),
    "depthwise with multiplier": ((1, 3, 5, 5), (6, 1, 3, 3), {"feature_group_count": 3}),
    "batch groups": ((6, 2, 5), (9, 2, 3), {"batch_group_count": 3}),
    "batch groups, stride": (
        (4, 2, 7),
        (4, 2, 3),
        {"batch_group_count": 2, "window_strides": (2,), "padding": [(1, 0)]},
    ),
    "channels-last": (
        (2, 5, 6, 3),
        (3, 2, 3, 4),
        {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "window_strides": (2, 1)},
    ),
    "layouts that differ": (
        (5, 3, 6, 2),
        (3, 3, 4, 2),
        {"dimension_numbers": ("HCWN", "HIOW", "CWNH"), "padding": [(1, 2), (0, -1)]},
    ),
    "channels-last feature groups": (
        (2, 5, 6),
        (3, 2, 6),
        {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": 3},
    ),
    "empty result": ((1, 1, 2), (1, 1, 4), {}),
}


@pytest.fixture(params=SMALL)
def small(request):
    lhs_shape, rhs_shape, params = SMALL[request.param]
    return oracles.geometry(
        lhs_shape, rhs_shape, **{"window_strides": None, "padding": "VALID"} | params
    )


def assert_equal_sums(actual, expected):
    """The same few float64 products, summed in some order."""
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-12, atol=1e-12)


def test_input_grad_is_the_literal_sum(small, rng, x64):
    dy, w = oracles.operands(rng, small)
    expected = oracles.literal_input_grad(dy, w, small)
    assert_equal_sums(lax_maps.input_grad(dy, w, small), expected)
    assert_equal_sums(oracles.lax_input_grad(dy, w, small), expected)
    assert_equal_sums(oracles.sliced_input_grad(dy, w, small), expected)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_conv_input_grad_is_the_literal_sum(small, rng, x64, implementation):
    dy, w = oracles.operands(rng, small)
    params = small.conv_params()
    actual = jax_convgrad.conv_input_grad(
        dy, w, small.lhs_shape, **params, implementation=implementation
    )
    assert actual.dtype == np.float64
    assert_equal_sums(actual, oracles.literal_input_grad(dy, w, small))


def test_filter_grad_is_the_literal_sum(small, rng, x64):
    x, (dy, _) = rng.standard_normal(small.lhs_shape), oracles.operands(rng, small)
    literal = oracles.literal_filter_grad(x, dy, small)
    assert_equal_sums(lax_maps.filter_grad(x, dy, small), literal)
    params = small.conv_params()
    actual = jax_convgrad.conv_filter_grad(x, dy, small.rhs_shape, **params)
    assert_equal_sums(actual, literal)


@pytest.mark.parametrize("map_", [FORWARD, INPUT_GRAD, FILTER_GRAD], ids=str)
def test_reference_of_the_tools_is_the_literal_sum(small, rng, map_):
    literal = {
        FORWARD: oracles.literal_forward,
        INPUT_GRAD: oracles.literal_input_grad,
        FILTER_GRAD: oracles.literal_filter_grad,
    }[map_]
    pair = [rng.standard_normal(shape_of_role(small, role)) for role in map_.operands]
    assert_equal_sums(references.by_definition(map_, *pair, small), literal(*pair, small))


def test_forward_is_the_literal_sum(small, rng, x64):
    x, (_, w) = rng.standard_normal(small.lhs_shape), oracles.operands(rng, small)
    assert_equal_sums(lax_maps.forward(x, w, small), oracles.literal_forward(x, w, small))


def seed_case(rng):
    """X of [C, H, W], W of [M, C, K, K], dY of [M, H-K+1, W-K+1]: stride 1, no padding."""
    c, m, height, width, k = 3, 4, 6, 7, 3
    dy = rng.standard_normal((m, height - k + 1, width - k + 1))
    return dy, rng.standard_normal((m, c, k, k)), (c, height, width)


def sum_over_taps(dy, w, shape, filter_index, dy_index):
    """sum_m sum_{p,q} dY[m, *dy_index(h, p)] * W[m, c, *filter_index(p)], where dY has it."""
    dx = np.zeros(shape)
    k, (out_h, out_w) = w.shape[-1], dy.shape[1:]
    for (h, v), (p, q) in itertools.product(
        np.ndindex(shape[1:]), itertools.product(range(k), repeat=2)
    ):
        i, j = dy_index(h, p), dy_index(v, q)
        if 0 <= i < out_h and 0 <= j < out_w:
            dx[:, h, v] += dy[:, i, j] @ w[:, :, filter_index(p), filter_index(q)]
    return dx


def test_one_image_without_a_batch_axis(rng, x64):
    dy, w, shape = seed_case(rng)
    expected = sum_over_taps(dy, w, shape, lambda p: p, lambda h, p: h - p)
    actual = jax_convgrad.conv_input_grad(dy, w, shape)
    assert actual.shape == shape
    assert_equal_sums(actual, expected)


@pytest.mark.parametrize("layouts", [("HWC", "HWIO", "HWC"), ("CHW", "OIHW", "CHW")])
def test_layouts_of_one_image_without_a_batch_axis(rng, x64, layouts):
    """They were refused, whatever they were."""
    with_batch = ("N" + layouts[0], layouts[1], "N" + layouts[2])
    last = layouts[0][-1] == "C"
    x, w, dy = (
        rng.standard_normal(shape)
        for shape in (
            [(5, 6, 2), (3, 2, 2, 4), (3, 5, 4)] if last else [(2, 5, 6), (4, 2, 3, 2), (4, 3, 5)]
        )
    )
    for function, operands, shape in (
        (jax_convgrad.conv_input_grad, (dy, w), x.shape),
        (jax_convgrad.conv_filter_grad, (x, dy), w.shape),
    ):
        found = function(*operands, shape, dimension_numbers=layouts)
        batched = [a[None] if a.ndim == 3 else a for a in operands]
        shape = (1, *shape) if len(shape) == 3 else shape
        expected = function(*batched, shape, dimension_numbers=with_batch)
        np.testing.assert_array_equal(found, expected.reshape(found.shape))


def test_flipping_the_filter_and_reading_dy_backwards_flips_twice(rng, x64):
    dy, w, shape = seed_case(rng)
    k = w.shape[-1]
    right = np.asarray(jax_convgrad.conv_input_grad(dy, w, shape))
    padded = np.pad(dy, [(0, 0), (k - 1, k - 1), (k - 1, k - 1)])
    once = sum_over_taps(padded, w, shape, lambda p: k - 1 - p, lambda h, p: h + p)
    twice = sum_over_taps(dy, w, shape, lambda p: k - 1 - p, lambda h, p: h - p)
    assert_equal_sums(once, right)
    assert np.linalg.norm(twice - right) > 0.1 * np.linalg.norm(right)


@pytest.mark.parametrize("stride", range(1, 8))
@pytest.mark.parametrize("lhs_dilation", [1, 2, 3, 4, 6])
def test_taps_of_a_position_are_one_residue_class_of_its_phase(rng, stride, lhs_dilation):
    """The statement that every kernel rests on, for each filter dilation and some padding."""
    for rhs_dilation in range(1, 7):
        low = int(rng.integers(-3, 7))
        g = oracles.geometry(
            (1, 1, 9), (1, 1, 5), (stride,), [(low, 9)], (lhs_dilation,), (rhs_dilation,)
        )
        found = {}
        for (h,), (p,), (r,) in oracles.connected(g):
            found.setdefault(h, {})[r] = p
        phases = stride // math.gcd(stride, lhs_dilation)
        tap_step = stride // math.gcd(stride, rhs_dilation)
        p_per_h = lhs_dilation // math.gcd(stride, lhs_dilation)
        p_per_r = rhs_dilation // math.gcd(stride, rhs_dilation)
        for h in range(9):
            first = h % phases
            taps = [
                r for r in range(5) if (first * lhs_dilation + low - r * rhs_dilation) % stride == 0
            ]
            assert len({r % tap_step for r in taps}) <= 1
            expected = {}
            for t, r in enumerate(taps):
                p0 = (first * lhs_dilation + low - taps[0] * rhs_dilation) // stride
                p = p0 + h // phases * p_per_h - t * p_per_r
                assert r == taps[0] + t * tap_step
                if 0 <= p < g.out_sizes[0]:
                    expected[r] = p
            assert found.get(h, {}) == expected


def test_tolerance_covers_two_factors_cut_off_to_tf32(rng):
    """A sum of one product: what the multiplier loses there, the tolerance must allow."""
    a, b = rng.uniform(1, 1.01, (2, 1000)).astype(np.float32)
    cut = [(v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for v in (a, b)]
    exact = a.astype(np.float64) * b
    errors = np.abs(np.prod(np.asarray(cut, np.float64), axis=0) - exact) / exact
    assert 1e-3 < errors.max() <= tolerance("tf32", 1)


def test_dilated_size_of_nothing_is_nothing():
    assert [dilated_size(n, 3) for n in range(4)] == [0, 1, 4, 7]


def test_definition_matches_lax_forward_on_integers(rng):
    """The oracle itself: integers are exact, so lax must agree to the last bit."""
    g = oracles.geometry((2, 4, 9), (6, 2, 3), (2,), [(1, -2)], (2,), (3,), None, 2)
    x, w = rng.integers(-9, 9, g.lhs_shape), rng.integers(-9, 9, g.rhs_shape)
    y = lax.conv_general_dilated(x.astype("f4"), w.astype("f4"), **g.conv_params())
    np.testing.assert_array_equal(y, oracles.literal_forward(x, w, g))
