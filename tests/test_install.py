"""install(): lax's own convolution takes the kernel, wherever the flag says so."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from jax.experimental import jet

import jax_convgrad
from jax_convgrad import native

PARAMS = {"window_strides": (2,), "padding": [(1, 1)]}


@pytest.fixture
def operands(rng):
    shapes = (2, 3, 9), (4, 3, 3)
    return [jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes]


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    jax_convgrad.uninstall()


def conv(x, w):
    return lax.conv_general_dilated(x, w, **PARAMS)


def loss(x, w):
    return jnp.sum(jnp.sin(conv(x, w)))


@functools.cache
def fresh_gradient():
    """One jitted gradient for all tests of this file: it must follow every change."""
    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def calls(function, *args):
    return oracles.custom_calls(function, *args)


@pytest.mark.native
def test_jitted_function_picks_it_up_and_reverts(operands):
    gradient = jax.jit(jax.grad(loss))
    counts = [gradient.lower(*operands).as_text().count(oracles.TARGET)]
    before = gradient(*operands)
    for switch in (jax_convgrad.install, jax_convgrad.install, jax_convgrad.uninstall):
        switch()
        counts.append(gradient.lower(*operands).as_text().count(oracles.TARGET))
        np.testing.assert_allclose(gradient(*operands), before, rtol=1e-4, atol=1e-4)
    assert counts == [0, 1, 1, 0]


@pytest.mark.native
def test_the_executed_program_changes_too(operands):
    """Counting in `lower` could miss a stale entry of the cache that calls use."""
    traced = []

    @jax.jit
    def gradient(x, w):
        traced.append(None)
        return jax.grad(loss)(x, w)

    for switch in (None, jax_convgrad.install, jax_convgrad.uninstall, jax_convgrad.install):
        if switch is not None:
            switch()
        gradient(*operands)
        gradient(*operands)
    assert len(traced) == 2, "once for each state of the flag, then from the cache"


@pytest.mark.native
def test_context_is_nested_and_can_turn_it_off(operands):
    gradient = jax.grad(loss)
    with jax_convgrad.installed():
        assert calls(gradient, *operands) == 1
        with jax_convgrad.installed(False):
            assert calls(gradient, *operands) == 0
        assert calls(gradient, *operands) == 1
    assert calls(gradient, *operands) == 0
    jax_convgrad.install()
    with jax_convgrad.installed(False):
        assert calls(gradient, *operands) == 0
    assert calls(gradient, *operands) == 1


@pytest.mark.native
def test_context_ends_with_an_exception(operands):
    def fail():
        with jax_convgrad.installed():
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert calls(jax.grad(loss), *operands) == 0


@pytest.mark.native
def test_inner_jit_is_retraced(operands):
    inner = jax.jit(conv)
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(inner(x, w)))))
    before = gradient(*operands)
    with jax_convgrad.installed():
        assert gradient.lower(*operands).as_text().count(oracles.TARGET) == 1
        np.testing.assert_allclose(gradient(*operands), before, rtol=1e-4, atol=1e-4)
    assert gradient.lower(*operands).as_text().count(oracles.TARGET) == 0


@pytest.mark.native
def test_other_threads_see_install_but_not_a_context(operands):
    gradient = jax.grad(loss)

    def counted_in_thread():
        counts = []
        thread = threading.Thread(target=lambda: counts.append(calls(gradient, *operands)))
        thread.start()
        thread.join()
        return counts

    with jax_convgrad.installed():
        assert calls(gradient, *operands) == 1
        assert counted_in_thread() == [0]
    jax_convgrad.install()
    assert counted_in_thread() == [1]


TRANSFORMED = {
    "grad": lambda x, w: jax.grad(loss, argnums=(0, 1))(x, w),
    "jit of grad": lambda x, w: fresh_gradient()(x, w),
    "jvp": lambda x, w: jax.jvp(conv, (x, w), (w.sum() * x, 2 * w)),
    "linearize": lambda x, w: jax.linearize(lambda x: conv(x, w), x)[1](jnp.cos(x)),
    "jvp of grad": lambda x, w: jax.jvp(lambda x: jax.grad(loss)(x, w), (x,), (jnp.sin(x),)),
    "hessian": lambda x, w: jax.hessian(loss)(x[:1, :2, :5], w[:2, :2]),
    "hessian in w": lambda x, w: jax.hessian(loss, argnums=1)(x[:1, :2, :5], w[:2, :2]),
    "linear_transpose": lambda x, w: jax.linear_transpose(lambda x: conv(x, w), x)(conv(x, w)),
    "linear_transpose in w": lambda x, w: jax.linear_transpose(lambda w: conv(x, w), w)(conv(x, w)),
    "grad of grad": lambda x, w: jax.grad(lambda x: jnp.sum(jax.grad(loss)(x, w) ** 3))(x),
    "vmap of grad": lambda x, w: jax.vmap(jax.grad(loss), (None, 0))(x, jnp.stack([w, 2 * w])),
    "checkpoint": lambda x, w: jax.grad(jax.checkpoint(loss))(x, w),
    "scan": lambda x, w: lax.scan(lambda c, _: (jax.grad(loss)(c, w), None), x, None, 3)[0],
    "conv_transpose": lambda x, w: jax.grad(
        lambda w: jnp.sum(
            jnp.sin(lax.conv_transpose(x, w, (2,), "SAME", None, ("NCW", "OIW", "NCW")))
        )
    )(w),
}


# In float64: some of these functions, the repeated gradient above all, enlarge a rounding
# error by orders of magnitude, so that no tolerance for float32 fits all random operands.
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformation_gives_the_same_numbers(operands, name):
    function = TRANSFORMED[name]
    with jax.enable_x64(True):
        operands = [jnp.asarray(operand, "float64") for operand in operands]
        expected = function(*operands)
        with jax_convgrad.installed():
            actual = function(*operands)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.native
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grad", 1),
        ("jvp of grad", 2),
        ("linear_transpose", 1),
        ("linear_transpose in w", 0),
        ("jvp", 0),
        ("vmap of grad", 1),
        ("scan", 1),
    ],
)
def test_kernel_is_reached_from_each_transformation(operands, name, expected):
    with jax_convgrad.installed():
        assert calls(TRANSFORMED[name], *operands) == expected


@pytest.mark.native
def test_no_convolution_is_left_of_a_gradient(operands):
    """A kernel for each map, and each only where it is asked for."""
    targets = oracles.FORWARD_TARGET, oracles.TARGET, oracles.FILTER_TARGET

    def found(argnums):
        text = jax.jit(jax.grad(loss, argnums)).lower(*operands).as_text()
        return [text.count(name) for name in (*targets, "stablehlo.convolution")]

    assert found((0, 1)) == [0, 0, 0, 3]
    with jax_convgrad.installed():
        assert found(0) == [1, 1, 0, 0]
        assert found(1) == [1, 0, 1, 0]
        assert found((0, 1)) == [1, 1, 1, 0]


@pytest.mark.parametrize("dtype", ["int32", "complex64", "float8_e4m3fn"])
def test_other_dtypes_keep_lax_rule(operands, dtype):
    x, w = (a.astype(dtype) for a in operands)
    transpose = lambda dy: jax.linear_transpose(lambda x: conv(x, w), x)(dy)  # noqa: E731
    expected = str(jax.make_jaxpr(transpose)(conv(x, w)))
    with jax_convgrad.installed():
        assert str(jax.make_jaxpr(transpose)(conv(x, w))) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_preferred_element_type(operands, dtype):
    x, w = (a.astype(dtype) for a in operands)

    def wide(x, w):
        y = lax.conv_general_dilated(x, w, **PARAMS, preferred_element_type="float32")
        return jnp.sum(jnp.sin(y))

    expected = jax.grad(wide, argnums=(0, 1))(x, w)
    with jax_convgrad.installed():
        actual = jax.grad(wide, argnums=(0, 1))(x, w)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), rtol=2e-2, atol=2e-2)


def test_jet_of_a_gradient_under_install(operands):
    """Taylor coefficients: `KeyError: conv_input_grad` where plain JAX worked."""
    x, w = operands

    def coefficients():
        gradient = jax.grad(loss)
        return jet.jet(lambda x: gradient(x, w), (x,), ([x, 0.5 * x],))

    plain, plain_terms = coefficients()
    with jax_convgrad.installed():
        ours, our_terms = coefficients()
    for expected, found in zip([plain, *plain_terms], [ours, *our_terms], strict=True):
        # Sums of large terms may cancel.
        atol = 2e-6 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=atol)


def fused_gradient(dy, w, residual, relu_mask):
    args = (w, relu_mask.shape, PARAMS["window_strides"], PARAMS["padding"])
    return jax_convgrad.conv_input_grad(dy, *args, residual=residual, relu_mask=relu_mask)


def test_jet_of_an_epilogue(operands):
    """The primitive with a residual and a mask, for which jet had no rule either."""
    x, w = operands
    dy = conv(x, w)

    def gradient(dy, residual):
        return fused_gradient(dy, w, residual, x)

    series = ([0.3 * dy, dy], [x, 0.1 * x])
    found, found_terms = jet.jet(gradient, (dy, 2 * x), series)

    def along(t):
        return gradient(dy + t * (0.3 * dy) + t * t / 2 * dy, 2 * x + t * x + t * t / 2 * (0.1 * x))

    first = jax.jacfwd(along)
    for expected, term in zip(
        [along, first, jax.jacfwd(first)], [found, *found_terms], strict=True
    ):
        np.testing.assert_allclose(term, expected(0.0), rtol=2e-5, atol=2e-5)


def test_jet_of_an_epilogue_of_two_series(operands):
    """Both operands of the product: the second coefficient and later ones were too large."""
    x, w = operands
    dy = conv(x, w)

    def gradient(dy, w):
        return fused_gradient(dy, w, x, x)

    def path(t, value):
        return value * (1 + 0.5 * t + t * t / 2 + t**3 / 12)

    _, terms = jet.jet(gradient, (dy, w), [[0.5 * v, v, 0.5 * v] for v in (dy, w)])
    expected = functools.reduce(
        lambda f, _: jax.jacfwd(f), range(3), lambda t: gradient(path(t, dy), path(t, w))
    )
    assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4)
    assert_close(terms[2], expected(0.0))


@pytest.mark.parametrize("size", [2**31, 2**31 + 1, 2**33])
def test_axis_beyond_2_31_lowers_under_install(size):
    """lax lowers it, so it must not raise; nothing of that size is allocated."""
    x, w = (jax.ShapeDtypeStruct((1, 1, n), "float32") for n in (size, 3))

    def layer(x, w, dilation):
        return lax.conv_general_dilated(x, w, (1,), [(1, 1)], lhs_dilation=(dilation,))

    def gradient(x, w):
        return jax.grad(lambda x: layer(x, w, 1).sum())(x)

    with jax_convgrad.installed():
        for function in (gradient, functools.partial(layer, dilation=2)):
            text = jax.jit(function).lower(x, w).as_text()
            fits = size <= 2**31 and function is gradient
            assert ("convgrad_input_grad" in text) == (fits and native.cpu is not None)
    spec = jax.ShapeDtypeStruct((1, 1, size), "float32")
    explanation = jax_convgrad.explain(spec, w, (1,), [(1, 1)], platform="cpu")
    if size > 2**31:
        assert "a spatial axis, step or group count of" in explanation.reason


BEYOND = {
    "window_strides": ((1, 1, 5), (1, 1, 3), {"window_strides": (2**32,)}),
    "lhs_dilation": ((1, 1, 1), (1, 1, 1), {"lhs_dilation": (2**31 + 1,)}),
    "rhs_dilation": ((1, 1, 5), (1, 1, 1), {"rhs_dilation": (2**31 + 1,)}),
    "feature_group_count": ((1, 2**31 + 1, 1), (2**31 + 1, 1, 1),
                            {"feature_group_count": 2**31 + 1}),
    "batch": ((2**41, 1, 1), (1, 1, 1), {}),
    "elements": ((2**20, 8, 2**20, 2**20), (1, 8, 1, 1), {}),
}  # fmt: skip


@pytest.mark.parametrize("what", BEYOND)
def test_what_the_kernels_do_not_count_to_lowers_under_install(what):
    """lax takes steps, groups and arrays of any size: a ValueError under install()."""
    lhs, rhs, params = BEYOND[what]
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in (lhs, rhs))
    axes = len(lhs) - 2
    params = {"window_strides": (1,) * axes, "padding": [(0, 0)] * axes} | params

    def gradients(x, w):
        y, vjp = jax.vjp(lambda x, w: lax.conv_general_dilated(x, w, **params), x, w)
        return vjp(y)

    with jax_convgrad.installed():
        assert "convgrad" not in jax.jit(gradients).lower(x, w).as_text()
