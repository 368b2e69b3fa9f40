"""The filter gradient by every CPU kernel, against float64; its primitive's own rules."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import SEED

import jax_convgrad
from jax_convgrad import dispatch, native
from jax_convgrad.maps import FILTER_GRAD
from jax_convgrad.primitive import bind_filter_grad
from jax_convgrad.tools import references
from jax_convgrad.tools.geometries import (
    make_geometry,
    named_cases,
    normwise_error,
    random_case,
    reduction_taps,
    tolerance,
)

pytestmark = pytest.mark.native

NAMED = {case.name: case.geometry for case in named_cases()}
RANDOM_COUNT = 25

# What decides how the kernels cut a problem up (csrc/cpu/filter/plan.cc).
CUTS = {
    "several chunks, and a rest": make_geometry((37, 41), (3, 3), (7, 19), batch=3, padding=1),
    "several slices of channels": make_geometry((5, 5), (2, 2), (101, 3), batch=2),
    "more dY channels than x channels": make_geometry((6, 6), (3, 3), (40, 3), padding=1),
    "a long row": make_geometry((5000,), (7,), (2, 3), batch=2, stride=2),
    "a window longer than the image": make_geometry((9,), (30,), (3, 5), batch=2, padding=25),
    "depthwise, several chunks": make_geometry(
        (40, 40), (3, 3), (21, 21), batch=2, feature_groups=21, padding=1
    ),
    "narrow groups": make_geometry((9, 9), (3, 3), (32, 32), feature_groups=8, padding=1),
    "narrow groups, wider": make_geometry((9, 9), (3, 3), (12, 24), feature_groups=6, padding=1),
    "stride beyond a dilated filter": make_geometry((30, 30), (2, 2), (3, 17), stride=6,
                                                    rhs_dilation=4),
    "groups that a block does not fill": make_geometry((5, 5), (3, 3), (63, 42), feature_groups=21),
    "dilated input": make_geometry((9, 8), (4, 3), (5, 20), lhs_dilation=3, stride=2, padding=2),
    "a window that spans padding": make_geometry(
        (9, 8), (3, 3), (5, 20), rhs_dilation=7, padding=7
    ),
    "depthwise, a window that spans padding": make_geometry(
        (9, 8), (3, 3), (6, 6), rhs_dilation=7, padding=7, feature_groups=6
    ),
    "images next to each other": make_geometry(
        (6, 5), (3, 2), (4, 7), batch=19, padding=1, dimension_numbers="odd"
    ),
    "images next to each other, a long window": make_geometry(
        (60, 2), (12, 1), (5, 7), batch=150, rhs_dilation=(5, 1), dimension_numbers="odd"
    ),
    # These write rows in order of memory.
    "one position": make_geometry((1, 1), (1, 1), (50, 72), batch=7),
    "few positions": make_geometry((3, 2), (3, 3), (101, 40), padding=1),
    "few positions of a dilated input": make_geometry((3,), (3,), (7, 40), lhs_dilation=2,
                                                      padding=1),
    "negative padding": make_geometry((9, 8), (3, 2), (4, 5), padding=((-2, 1), (1, -3))),
    "dilated input of groups": make_geometry((9, 8), (4, 3), (6, 6), lhs_dilation=2, padding=2,
                                             feature_groups=6),
}  # fmt: skip


def operands(rng, g, dtype):
    return oracles.operands(rng, g, dtype, FILTER_GRAD)


def call_kernels(x, dy, g):
    return oracles.call_kernels_of_map((x, dy), g, FILTER_GRAD)


def check_kernels(rng, g, dtype):
    x, dy = operands(rng, g, dtype)
    oracles.check_kernels((x, dy), g, FILTER_GRAD, references.filter_grad(x, dy, g))


@pytest.mark.parametrize(("name", "dtype"), oracles.with_dtypes(NAMED))
def test_named_geometry(rng, x64, name, dtype):
    check_kernels(rng, NAMED[name], dtype)


@pytest.mark.parametrize(("name", "dtype"), oracles.with_dtypes(CUTS))
def test_cuts(rng, x64, name, dtype):
    check_kernels(rng, CUTS[name], dtype)
    check_kernels(rng, channels_first(CUTS[name]), dtype)


def channels_first(g):
    """The same convolution with channels before the spatial axes."""
    assert g.dimension_numbers.lhs_spec[1] != 1
    rank = len(g.lhs_shape)
    moved = {
        "lhs_shape": tuple(g.lhs_shape[d] for d in g.dimension_numbers.lhs_spec),
        "rhs_shape": tuple(g.rhs_shape[d] for d in g.dimension_numbers.rhs_spec),
        "dimension_numbers": jax.lax.ConvDimensionNumbers(*[tuple(range(rank))] * 3),
    }
    return g.replace(**moved)


# Extents of 2^62 elements, if padding were packed: nearly all of it is.
FAR = {
    "dilation": make_geometry((2, 2), (2, 2), (1, 1), batch=1, rhs_dilation=2**31 - 1,
                              padding=((2**30, 2**30),) * 2),
    "stride": make_geometry((2, 2), (2, 2), (1, 1), batch=1, stride=2**31 - 2,
                            padding=((2**30, 2**30 - 2),) * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FAR)
def test_padding_as_far_as_it_may_be(rng, x64, name):
    g = FAR[name]
    _, workspace_bytes = oracles.plan(g, "float32", map_=FILTER_GRAD)
    assert workspace_bytes <= 1 << 16
    check_kernels(rng, g, "float32")


def test_windows_that_span_padding_keep_their_chunks():
    """A window of DeepLab's: its span does not shrink with the positions of a chunk."""
    for rate in (12, 18, 24, 36):
        g = make_geometry((33, 33), (3, 3), (2048, 256), batch=16, rhs_dilation=rate, padding=rate)
        _, workspace_bytes = oracles.plan(g, "float32", map_=FILTER_GRAD)
        assert workspace_bytes <= max(32 << 20, 16 * math.prod(g.rhs_shape))


@pytest.mark.parametrize(("index", "dtype"), oracles.with_dtypes(range(RANDOM_COUNT)))
def test_random_geometry(rng, x64, index, dtype):
    check_kernels(rng, random_case(SEED, index).geometry, dtype)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("where", [0, 1], ids=["x", "dy"])
@pytest.mark.parametrize(
    "name",
    [
        "dense_3x3",
        "a window longer than the image",
        "depthwise, several chunks",
        "narrow groups",
        "dilated input",
        "dilated input of groups",
        "several chunks, and a rest",
        "a window that spans padding",
        "images next to each other",
        "negative padding",
        "few positions",
        "batch_groups",
        "dots_images",
    ],
)
def test_what_is_not_finite_reaches_what_the_definition_connects(rng, name, where, value):
    """At a corner too, where most taps meet padding, and where two vectors overlap (-5)."""
    g = CUTS.get(name) or NAMED[name]
    for at in (0, -1, -5, None):
        arrays = list(operands(rng, g, "float32"))
        values = np.array(arrays[where])
        index = rng.integers(values.size) if at is None else at
        values.reshape(-1)[index] = value
        arrays[where] = values
        with np.errstate(invalid="ignore"):
            reached = ~np.isfinite(references.filter_grad(*arrays, g))
        for kernel, dw in call_kernels(*arrays, g).items():
            np.testing.assert_array_equal(~np.isfinite(dw), reached, err_msg=kernel)


def test_error_of_a_long_sum_is_that_of_pairwise_addition(rng):
    """Ten million products of one sign: added one by one they would be wrong by 1e-5."""
    count = 10_000_000
    g = make_geometry((count,), (1,), (1, 1))
    x, dy = (rng.uniform(0.5, 1.5, (1, count, 1)).astype(np.float32) for _ in range(2))
    exact = float(np.sum(x.astype(np.float64) * dy))
    pairwise = abs(float(np.sum(x * dy)) - exact)
    for name, dw in call_kernels(x, dy, g).items():
        assert abs(float(dw.item()) - exact) <= 4 * max(pairwise, 6e-8 * exact), name


@pytest.mark.parametrize("name", ["dense_3x3", *CUTS])
def test_workspace_is_bounded(name):
    g = CUTS.get(name) or NAMED[name]
    for dtype, size in (("float32", 4), ("float64", 8), ("bfloat16", 4)):
        _, workspace_bytes = oracles.plan(g, dtype, map_=FILTER_GRAD)
        assert workspace_bytes <= max(32 << 20, 4 * size * math.prod(g.rhs_shape))


@pytest.mark.parametrize("name", ["by rows", "swapped axes", "rows first"])
def test_stored_programs_that_bring_less_workspace_run(rng, name):
    """As versions planned them whose tasks were fewer, or did not swap axes."""
    g, workspace_bytes = {
        "by rows": (make_geometry((10, 10), (3, 3), (64, 256), batch=1), 115_328),
        "swapped axes": (make_geometry((400, 3), (3, 3), (60, 40), batch=1, padding=1), 700_000),
        "rows first": (make_geometry((66, 300), (3, 1), (8, 16), batch=8), 718_592),
    }[name]
    _, wanted = oracles.plan(g, "float32", map_=FILTER_GRAD)
    assert wanted > workspace_bytes
    x, dy = operands(rng, g, "float32")
    call = functools.partial(oracles._call, platform="cpu", precision=None, map_=FILTER_GRAD)
    dw, _ = jax.jit(lambda x, dy: call(x, dy, g, ("auto", workspace_bytes)))(x, dy)
    error = normwise_error(dw, references.filter_grad(x, dy, g))
    assert error <= tolerance("float32", reduction_taps(g, FILTER_GRAD))


@pytest.mark.parametrize("name", ["dots", "exchanged"])
def test_the_handler_plans_what_was_planned(rng, name):
    """With its workspace for a limit other ways had fewer tasks, seemed cheaper and did not fit."""
    g = {
        "dots": make_geometry((14, 14), (1, 1), (256, 256), batch=1, dimension_numbers="first"),
        "exchanged": make_geometry((18, 18), (3, 3), (104, 32), batch=2, padding=1),
    }[name]
    x, dy = operands(rng, g, "float32")
    dw = jax.jit(functools.partial(bind_filter_grad, geometry=g, implementation="native"))(x, dy)
    error = normwise_error(dw, references.filter_grad(x, dy, g))
    assert error <= tolerance("float32", reduction_taps(g, FILTER_GRAD))


def test_what_wants_more_workspace_is_left_to_lax(monkeypatch):
    monkeypatch.setattr(dispatch, "switch", lambda: None)
    g = make_geometry((60354,), (60352,), (23, 3), batch=5)
    choice = dispatch.choose(g, "float32", "cpu", map_=FILTER_GRAD)
    assert choice.implementation == "xla"
    assert "workspace" in choice.reason


DENSE = make_geometry((6, 5), (3, 2), (4, 6), batch=2, stride=(2, 1), padding=1)
GROUPED = make_geometry((6, 5), (3, 2), (4, 6), batch=2, stride=(2, 1), feature_groups=2, padding=1)
BATCHED = make_geometry((6, 5), (3, 2), (4, 6), batch=6, batch_groups=3, padding=1)
EVERY = pytest.mark.parametrize(
    "g", [DENSE, GROUPED, BATCHED], ids=["dense", "groups", "groups of images"]
)


def by_lax(g):
    """The transpose of lax's convolution for the filter."""
    w = jax.ShapeDtypeStruct(g.rhs_shape, "float64")
    return lambda x, dy: jax.linear_transpose(lambda w: oracles.lax_conv(g)(x, w), w)(dy)[0]


@EVERY
def test_transposes_and_batching(rng, x64, g):
    x, dy = operands(rng, g, "float64")
    ours = functools.partial(bind_filter_grad, geometry=g, implementation="native")
    oracles.check_rules_of_bilinear_map(ours, by_lax(g), x, dy, oracles.FILTER_TARGET)


@EVERY
def test_public_function(rng, g):
    x, dy = operands(rng, g, "float32")
    function = functools.partial(
        jax_convgrad.conv_filter_grad, rhs_shape=g.rhs_shape, **g.conv_params()
    )
    for implementation in ("native", "xla", None):
        dw = function(x, dy, implementation=implementation)
        error = normwise_error(dw, references.filter_grad(x, dy, g))
        assert error <= tolerance("float32", reduction_taps(g, FILTER_GRAD))
    wide = function(x.astype("bfloat16"), dy.astype("bfloat16"), preferred_element_type="float32")
    assert wide.dtype == jnp.float32


def test_public_function_of_one_image(rng):
    g = make_geometry((6, 5), (3, 2), (4, 6), batch=1, dimension_numbers="first")
    x, dy = operands(rng, g, "float32")
    dw = jax_convgrad.conv_filter_grad(x[0], dy[0], g.rhs_shape)
    np.testing.assert_allclose(dw, references.filter_grad(x, dy, g), rtol=1e-4, atol=1e-5)


def test_bad_arguments_of_the_public_function_are_named():
    x, dy = jnp.ones((1, 2, 4, 4)), jnp.ones((1, 3, 2, 2))
    call = jax_convgrad.conv_filter_grad
    assert call(x, dy, (3, 2, 3, 3)).shape == (3, 2, 3, 3)
    with pytest.raises(ValueError, match=r"dy must have the shape .* \(1, 3, 3, 3\) for x"):
        call(x, dy, (3, 2, 2, 2))
    with pytest.raises(ValueError, match=r"\(3, 3, 3\) for x \(2, 4, 4\) .* got \(3, 2, 2\)"):
        call(x[0], dy[0], (3, 2, 2, 2))
    with pytest.raises(TypeError, match=r"float32 for x and bfloat16 for dy"):
        call(x, dy.astype("bfloat16"), (3, 2, 3, 3))
    with pytest.raises(TypeError, match=r"conv_filter_grad x must be an array"):
        call("x", dy, (3, 2, 3, 3))
    with pytest.raises(TypeError, match=r"rhs_shape"):
        call(x, dy, 3)
    with pytest.raises(ValueError, match=r"implementation must be None"):
        call(x, dy, (3, 2, 3, 3), implementation="fast")


def test_per_example_gradients_are_one_call(rng):
    """vmap of grad, as differential privacy asks for."""
    x = jnp.asarray(rng.standard_normal((5, 1, 6, 6, 3)), "float32")
    w = jnp.asarray(rng.standard_normal((3, 3, 3, 8)), "float32")

    def loss(w, x):
        y = jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(y))

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    expected = gradients(w, x)
    with jax_convgrad.installed():
        text = gradients.lower(w, x).as_text()
        assert text.count(oracles.FILTER_TARGET) == 1
        assert "stablehlo.convolution" not in text
        np.testing.assert_allclose(gradients(w, x), expected, rtol=1e-4, atol=1e-4)


def test_cuda_has_no_kernel():
    choice = dispatch.choose(DENSE, "float32", "cuda", map_=FILTER_GRAD)
    assert choice.implementation == "xla"
    if native.cuda is not None:
        assert "no filter gradient kernel" in choice.reason


@pytest.mark.parametrize("index", range(12))
def test_parts_put_together_are_the_whole(rng, index):
    """Cut by NumPy: the arithmetic of halos and paddings, each part a term of the sum."""
    g = oracles.cut_in_step(index)
    x, dy = operands(rng, g, "float64")
    whole = references.filter_grad(x, dy, g)
    for parts, local, of_x in oracles.parts_of_x(x, g, FILTER_GRAD):
        pieces = map(references.filter_grad, of_x, np.split(dy, parts, 2), [local] * parts)
        np.testing.assert_allclose(sum(pieces), whole, rtol=1e-12, atol=1e-12)
