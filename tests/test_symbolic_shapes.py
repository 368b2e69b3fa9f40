"""Symbolic batch and spatial sizes (`jax.export`), each program against concrete ones."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import SEED
from jax import export, lax

import jax_convgrad
from jax_convgrad import dispatch, native, planner, symbolic
from jax_convgrad.tools import geometries

pytestmark = pytest.mark.native


def spec(shape, *constraints):
    """The type of a float32 array of symbolic shape, such as "n, 3, h, w"."""
    return jax.ShapeDtypeStruct(
        export.symbolic_shape(shape, constraints=constraints) if isinstance(shape, str) else shape,
        "float32",
    )


def exported(function, *args, platforms=("cpu",)):
    checks = jax_convgrad.export_checks()
    return export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*args)


def calls(program):
    return program.mlir_module().count(oracles.TARGET)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype("f4")


def assert_close(actual, expected, taps=1000):
    error = geometries.normwise_error(actual, expected)
    assert error <= geometries.tolerance("float32", taps), error


LAST = ("NHWC", "HWIO", "NHWC")
# name: (symbolic shape of x, shape of w, parameters, concrete shapes of x)
CASES = {
    "SAME, stride 2": ("n, 3, h, w", (4, 3, 3, 3), {"window_strides": (2, 2), "padding": "SAME"},
                       [(2, 3, 9, 8), (1, 3, 1, 2), (3, 3, 4, 7)]),
    "SAME, window 4 of stride 3": (
        "n, h, w, 3", (4, 3, 3, 5),
        {"window_strides": (3, 1), "padding": "SAME", "dimension_numbers": LAST},
        [(2, 9, 8, 3), (1, 8, 5, 3), (2, 10, 3, 3)]),
    "SAME_LOWER, dilated filter": (
        "n, 3, h, w", (4, 3, 2, 3),
        {"window_strides": (2, 1), "padding": "SAME_LOWER", "rhs_dilation": (3, 2)},
        [(1, 3, 9, 8), (1, 3, 8, 5)]),
    "VALID, stride 2, any size": (
        "n, 3, h, w", (4, 3, 3, 3), {"window_strides": (2, 2), "padding": "VALID"},
        [(2, 3, 9, 8), (1, 3, 3, 4)]),
    "VALID where the window may not fit": (
        "n, 3, h, w", (4, 3, 3, 3), {"window_strides": (5, 4), "padding": "VALID"},
        [(2, 3, 9, 8), (1, 3, 2, 9)]),
    "padding of both signs": (
        "n, h, w, 3", (4, 3, 3, 5),
        {"window_strides": (2, 1), "padding": [(1, 2), (-1, 2)], "dimension_numbers": LAST},
        [(2, 9, 8, 3), (1, 6, 7, 3)]),
    "input dilation": (
        "n, 3, h", (4, 3, 4),
        {"window_strides": (2,), "padding": [(1, 1)], "lhs_dilation": (3,)},
        [(2, 3, 9), (1, 3, 2)]),
    "depthwise, one size known": (
        "n, 8, h, 9", (8, 1, 3, 3),
        {"window_strides": (2, 2), "padding": "SAME", "feature_group_count": 8},
        [(2, 8, 9, 9), (1, 8, 8, 9)]),
    "groups": (
        "n, h, 6", (3, 2, 9),
        {"window_strides": (2,), "padding": "SAME", "feature_group_count": 3,
         "dimension_numbers": ("NWC", "WIO", "NWC")},
        [(2, 9, 6), (3, 8, 6)]),
    "batch groups": (
        "2*n, 3, h", (4, 3, 3),
        {"window_strides": (2,), "padding": "SAME", "batch_group_count": 2},
        [(4, 3, 9), (2, 3, 8)]),
    "three axes, a product of sizes": (
        "n, 2, h, 2*h, w", (4, 2, 3, 3, 3), {"window_strides": (2, 2, 1), "padding": "SAME"},
        [(1, 2, 5, 10, 3), (2, 2, 4, 8, 1)]),
    "patches": (
        "n, 4*h, 4*w, 3", (4, 4, 3, 16),
        {"window_strides": (4, 4), "padding": "VALID", "dimension_numbers": LAST},
        [(2, 8, 12, 3), (1, 4, 4, 3)]),
    "few channels, many out channels": (
        "n, 3, h, w", (32, 3, 3, 3), {"window_strides": (1, 1), "padding": "SAME"},
        [(1, 3, 9, 8), (1, 3, 1, 1)]),
}  # fmt: skip


def vjp(conv, params):
    return lambda x, w, dy: jax.vjp(lambda x: conv(x, w, **params), x)[1](dy)[0]


def types(shape, w_shape, params):
    """The types of x, w and dy."""
    x, w = spec(shape), jax.ShapeDtypeStruct(w_shape, "float32")
    dy = jax.eval_shape(functools.partial(jax_convgrad.conv_general_dilated, **params), x, w)
    return x, w, jax.ShapeDtypeStruct(dy.shape, "float32")


@pytest.mark.parametrize("name", CASES)
def test_input_gradient(rng, name):
    shape, w_shape, params, concrete = CASES[name]
    ours = functools.partial(
        jax_convgrad.conv_general_dilated, implementation="native", precision="highest"
    )
    program = exported(vjp(ours, params), *types(shape, w_shape, params))
    assert calls(program) == 1
    for x_shape in concrete:
        g = oracles.geometry(x_shape, w_shape, **params)
        dy, w = oracles.operands(rng, g, "float32")
        dx = program.call(np.zeros(x_shape, "f4"), w, dy)
        if dy.size == 0:
            np.testing.assert_array_equal(dx, 0)
        else:
            assert_close(dx, oracles.sliced_input_grad(dy, w, g), geometries.reduction_taps(g))


@pytest.mark.skipif(native.cuda is None, reason="the CUDA module was not built")
@pytest.mark.parametrize("name", ["SAME, stride 2", "groups"])
def test_lowering_for_a_gpu_that_need_not_be_here(name):
    shape, w_shape, params, _ = CASES[name]
    ours = functools.partial(jax_convgrad.conv_general_dilated, implementation="native")
    function = vjp(ours, params)
    program = exported(function, *types(shape, w_shape, params), platforms=("cpu", "cuda"))
    assert calls(program) == 2


@pytest.mark.parametrize("name", ["SAME, stride 2", "padding of both signs", "groups"])
def test_input_gradient_by_lax(rng, name):
    """What another platform would run, whose own convolution takes no symbolic padding."""
    shape, w_shape, params, concrete = CASES[name]
    ours = functools.partial(
        jax_convgrad.conv_general_dilated, implementation="xla", precision="highest"
    )
    program = exported(vjp(ours, params), *types(shape, w_shape, params), platforms=("cpu", "tpu"))
    assert calls(program) == 0
    for x_shape in concrete:
        g = oracles.geometry(x_shape, w_shape, **params)
        dy, w = oracles.operands(rng, g, "float32")
        dx = program.call(np.zeros(x_shape, "f4"), w, dy)
        assert_close(dx, oracles.sliced_input_grad(dy, w, g), geometries.reduction_taps(g))


W = (4, 3, 3, 3)
SIZES = [(2, 3, 9, 8), (1, 3, 4, 7)]


def loss(conv, padding="SAME", **params):
    return lambda x, w: jnp.sum(jnp.sin(conv(x, w, (2, 2), padding, **params)))


def check(rng, ours, theirs, args, concrete, native_calls):
    """A program of `ours` for symbolic `args` agrees with `theirs` for concrete shapes."""
    program = exported(ours, *args)
    assert calls(program) == native_calls
    for shapes in concrete:
        operands = [normal(rng, *shape) for shape in shapes]
        actual, expected = program.call(*operands), jax.jit(theirs)(*operands)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def gradients(conv, padding="SAME"):
    return jax.grad(loss(conv, padding), argnums=(0, 1))


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_both_gradients(rng, padding):
    ours = gradients(jax_convgrad.conv_general_dilated, padding)
    theirs = gradients(lax.conv_general_dilated, padding)
    check(rng, ours, theirs, (spec("n, 3, h, w"), spec(W)), [(s, W) for s in SIZES], 1)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_installed(rng, padding):
    theirs = gradients(lax.conv_general_dilated, padding)

    def ours(x, w):
        with jax_convgrad.installed():
            return theirs(x, w)

    check(rng, ours, theirs, (spec("n, 3, h, w"), spec(W)), [(s, W) for s in SIZES], 1)


def second_order(conv, padding="SAME"):
    inner = jax.grad(loss(conv, padding))
    return jax.grad(lambda x, w: jnp.sum(inner(x, w) ** 2), argnums=(0, 1))


def test_second_order(rng):
    ours, theirs = map(second_order, (jax_convgrad.conv_general_dilated, lax.conv_general_dilated))
    check(rng, ours, theirs, (spec("n, 3, h, w"), spec(W)), [(SIZES[0], W)], 1)


@pytest.mark.parametrize("shape", ["n, 3, 8, 2*w", "n, 3, 2*h, 3*w"])
def test_input_that_is_certainly_left_over(rng, shape):
    ours = second_order(jax_convgrad.conv_general_dilated, "VALID")
    theirs = second_order(lax.conv_general_dilated, "VALID")
    args = spec(shape, "w >= 2", *(["h >= 2"] if "h" in shape else [])), spec(W)
    check(rng, ours, theirs, args, [((2, 3, 8, 6), W)], 1)


def test_forward_over_reverse(rng):
    def along(conv):
        gradient = jax.grad(loss(conv))
        return lambda x, v, w: jax.jvp(lambda x: gradient(x, w), (x,), (v,))[1]

    x = spec("n, 3, h, w")
    ours, theirs = map(along, (jax_convgrad.conv_general_dilated, lax.conv_general_dilated))
    check(rng, ours, theirs, (x, x, spec(W)), [(SIZES[0], SIZES[0], W)], 1)


@pytest.mark.parametrize("images", ["n, ", ""])
def test_vmap_over_a_symbolic_axis(rng, images):
    """One call with the product of the sizes for its batch."""

    def mapped(conv):
        gradient = jax.grad(loss(conv))
        if images:
            return jax.vmap(gradient, (0, None))
        return jax.vmap(lambda x, w: gradient(x[None], w)[0], (0, None))

    ours, theirs = map(mapped, (jax_convgrad.conv_general_dilated, lax.conv_general_dilated))
    shapes = [(3, 2, 3, 9, 8), (2, 1, 3, 4, 7)] if images else SIZES
    args = spec(f"b, {images}3, h, w"), spec(W)
    check(rng, ours, theirs, args, [(s, W) for s in shapes], 1)


@pytest.mark.parametrize(
    ("axes", "native_calls"),
    [
        ((None, 0), 0),  # an unknown number of input channels: lax
        ((0, 0), 1),  # of groups, which are no convolution: a loop
    ],
)
def test_vmap_of_filters_over_a_symbolic_axis(rng, axes, native_calls):
    def mapped(implementation):
        return jax.vmap(
            lambda dy, w: jax_convgrad.conv_input_grad(
                dy, w, (2, 3, 9, 8), implementation=implementation
            ),
            axes,
        )

    scope = export.SymbolicScope()
    shapes = "2, 4, 7, 6" if axes[0] is None else "b, 2, 4, 7, 6", "b, 4, 3, 3, 3"
    args = [jax.ShapeDtypeStruct(export.symbolic_shape(s, scope=scope), "float32") for s in shapes]
    concrete = [(3,) * (axes[0] is not None) + (2, 4, 7, 6), (3, *W)]
    check(rng, mapped(None), mapped("xla"), args, [concrete], native_calls)


def test_conv_input_grad(rng):
    def ours(x, dy, w):
        return jax_convgrad.conv_input_grad(dy, w, x.shape, (2, 2), "SAME", implementation="native")

    params = {"window_strides": (2, 2), "padding": "SAME"}
    x, w, dy = types("n, 3, h, w", W, params)
    program = exported(ours, x, dy, w)
    assert calls(program) == 1
    for shape in SIZES:
        g = oracles.geometry(shape, W, **params)
        dy, w = oracles.operands(rng, g, "float32")
        dx = program.call(np.zeros(shape, "f4"), dy, w)
        assert_close(dx, oracles.sliced_input_grad(dy, w, g), geometries.reduction_taps(g))


@pytest.mark.parametrize(
    ("padding", "options"),
    [
        ("SAME", {}),
        ("VALID", {"rhs_dilation": (2, 1)}),
        ([(1, 2), (0, 3)], {"use_consistent_padding": True, "transpose_kernel": True}),
    ],
)
def test_conv_transpose(rng, padding, options):
    w_shape = (3, 4, 2, 5) if "transpose_kernel" in options else (3, 4, 5, 2)

    def value_and_gradient(conv, **more):
        def function(x, w):
            y, pull = jax.vjp(lambda x: conv(x, w, (2, 3), padding, **options, **more), x)
            return y, pull(jnp.sin(y))

        return function

    ours = value_and_gradient(jax_convgrad.conv_transpose, implementation="native")
    theirs = value_and_gradient(lax.conv_transpose)
    args = spec("n, h, w, 5", "h >= 2", "w >= 2"), spec(w_shape)
    check(rng, ours, theirs, args, [((2, 4, 5, 5), w_shape), ((1, 2, 3, 5), w_shape)], 1)


def test_half_precision(rng):
    """A workspace that grows with the sizes: dY is packed."""
    params = {"window_strides": (2, 1), "padding": "SAME"}
    args = [jax.ShapeDtypeStruct(t.shape, "bfloat16") for t in types("n, 3, h, w", W, params)]
    ours = functools.partial(jax_convgrad.conv_general_dilated, implementation="native")
    program = exported(vjp(ours, params), *args)
    for shape in SIZES:
        g = oracles.geometry(shape, W, **params)
        dy, w = oracles.operands(rng, g, "bfloat16")
        dx = program.call(np.zeros(shape, dy.dtype), w, dy)
        error = geometries.normwise_error(dx, oracles.sliced_input_grad(dy, w, g))
        assert error <= geometries.tolerance("bfloat16", geometries.reduction_taps(g)), error


REFUSALS = {
    "channels": (("2, c, 9, 8", "SAME"), "symbolic sizes.*batch and of spatial axes"),
    "negative padding": (("n, 3, h, w", "negative"), "symbolic and may be negative"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_native_says_what_it_cannot_express(name):
    (shape, padding), message = REFUSALS[name]

    def gradient(implementation):
        def function(x):
            w = jnp.ones((4, x.shape[1], 3, 3))
            pads = [(x.shape[2] - 9, 12 - x.shape[2]), (1, 1)] if padding == "negative" else padding
            dy_shape = jax.eval_shape(
                lambda x: jax_convgrad.conv_general_dilated(x, w, (2, 2), pads), x
            ).shape
            return jax_convgrad.conv_input_grad(
                jnp.ones(dy_shape), w, x.shape, (2, 2), pads, implementation=implementation
            )

        return function

    with pytest.raises(ValueError, match=rf"implementation='native'.*{message}"):
        exported(gradient("native"), spec(shape))
    assert calls(exported(gradient(None), spec(shape))) == 0


def test_explain_needs_sizes():
    w = jax.ShapeDtypeStruct(W, "float32")
    with pytest.raises(ValueError, match=r"explain needs shapes without symbolic sizes.*n, 3"):
        jax_convgrad.explain(spec("n, 3, h, w"), w, (1, 1), "SAME")


def of_sizes(g, batch, sizes):
    """The shape of g's input with another batch and other spatial sizes."""
    lhs_spec = g.dimension_numbers.lhs_spec
    shape = list(g.lhs_shape)
    shape[lhs_spec[0]] = batch * g.batch_group_count
    for dim, size in zip(lhs_spec[2:], sizes, strict=True):
        shape[dim] = size
    return tuple(shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_workspace_is_enough_for_every_size(dtype):
    cases = itertools.chain(geometries.named_cases(), geometries.random_cases(150, SEED))
    checked = set()
    for g in (case.geometry for case in cases):
        if dispatch.unsupported(g, dtype) is not None:
            continue
        n, *sizes = export.symbolic_shape(", ".join("nabc"[: 1 + g.axes]))
        unknown = g.replace(lhs_shape=of_sizes(g, n, sizes))
        fixed, per_position = symbolic.workspace_bound(unknown, dtype, "cpu", None)
        for batch, size in ((1, 1), (1, 7), (3, 16)):
            try:
                known = oracles.geometry(
                    of_sizes(g, batch, [size] * g.axes), g.rhs_shape, **g.conv_params()
                )
            except ValueError:  # padding takes more than there is
                continue
            planned = planner.plan(known, dtype, "cpu")
            enough = fixed + per_position * batch * math.prod(known.out_sizes)
            assert planned.workspace_bytes <= enough, (known, planned)
            checked.add(planned.kernel)
    assert checked == set(native.cpu.kernel_names())
