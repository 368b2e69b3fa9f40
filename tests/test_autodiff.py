"""conv_general_dilated under JAX's transformations: reverse to any order, forward over reverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from jax.test_util import check_grads

import jax_convgrad

# name: x, w and the parameters; small enough for numerical differentiation
CASES = {
    "strided": ((2, 3, 7), (4, 3, 3), {"window_strides": (2,), "padding": [(1, 2)]}),
    "groups": ((2, 4, 5, 4), (6, 2, 2, 3), {"padding": "SAME", "feature_group_count": 2}),
    "batch groups": ((4, 2, 6), (4, 2, 3), {"padding": "VALID", "batch_group_count": 2}),
    "dilations": (
        (1, 5, 6, 2),
        (2, 3, 2, 3),
        {
            "window_strides": (2, 1),
            "padding": [(2, -1), (0, 3)],
            "lhs_dilation": (3, 2),
            "rhs_dilation": (1, 2),
            "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        },
    ),
}


@pytest.fixture(params=CASES)
def case(request, rng):
    """(our convolution, lax's, x, w, geometry) as float32."""
    x_shape, w_shape, params = CASES[request.param]
    params = {"window_strides": (1,) * (len(x_shape) - 2), **params}
    ours = functools.partial(jax_convgrad.conv_general_dilated, **params)
    reference = functools.partial(lax.conv_general_dilated, **params)
    x, w = (jnp.asarray(rng.standard_normal(s), "float32") for s in (x_shape, w_shape))
    return ours, reference, x, w, oracles.geometry(x_shape, w_shape, **params)


def assert_close(actual, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, float(jnp.abs(b).max(initial=0)))
        np.testing.assert_allclose(
            np.asarray(a, "f8") / scale, np.asarray(b, "f8") / scale, rtol=0, atol=tolerance
        )


def loss_of(conv):
    """A loss whose gradients of every order depend on x and on w."""
    return lambda x, w: jnp.sum(jnp.sin(conv(x, w)))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
def test_gradients_are_those_of_lax(case, transform):
    ours, reference, x, w, _ = case
    gradient = jax.grad(transform(loss_of(ours)), argnums=(0, 1))
    assert_close(gradient(x, w), jax.grad(loss_of(reference), argnums=(0, 1))(x, w))


def test_value_is_that_of_lax(case):
    ours, reference, x, w, _ = case
    assert_close(ours(x, w), reference(x, w))


def test_vjp_is_the_literal_sum(case):
    ours, _, x, w, g = case
    y, vjp = jax.vjp(ours, x, w)
    dy = jnp.cos(y)
    dx, dw = vjp(dy)
    assert_close(dx, jnp.asarray(oracles.literal_input_grad(dy, w, g), "float32"))
    assert_close(dw, jnp.asarray(oracles.literal_filter_grad(x, dy, g), "float32"))


def test_second_and_third_order(case):
    ours, reference, x, w, _ = case

    def third(conv):
        def first(x, w):
            gx, gw = jax.grad(loss_of(conv), argnums=(0, 1))(x, w)
            return jnp.sum(gx**3) + jnp.sum(gw**3)

        def second(x, w):
            gx, gw = jax.grad(first, argnums=(0, 1))(x, w)
            return jnp.sum(jnp.sin(gx)) + jnp.sum(jnp.sin(gw))

        return jax.jit(lambda x, w: (first(x, w), second(x, w), jax.grad(second, (0, 1))(x, w)))

    with jax.enable_x64(True):
        x, w = x.astype("float64"), w.astype("float64")
        assert_close(third(ours)(x, w), third(reference)(x, w), 1e-10)


def test_forward_over_reverse(case):
    ours, reference, x, w, _ = case

    def directional(conv):
        gradient = jax.grad(loss_of(conv), argnums=(0, 1))
        return jax.jit(lambda x, w: jax.jvp(gradient, (x, w), (jnp.cos(x), jnp.sin(w))))

    assert_close(directional(ours)(x, w), directional(reference)(x, w))


def test_hessian_vector_product_by_linearize_of_grad(case):
    ours, reference, x, w, _ = case

    def product(conv):
        _, linear = jax.linearize(jax.grad(lambda x: loss_of(conv)(x, w)), x)
        return linear(jnp.ones_like(x))

    assert_close(product(ours), product(reference))


def test_inside_scan_and_cond(case):
    ours, reference, x, w, _ = case

    def looped(conv):
        def step(w, flag):
            use = lambda w: jnp.mean(conv(x, w) ** 2)  # noqa: E731
            return w - 0.1 * jax.grad(lambda w: lax.cond(flag, use, jnp.sum, w))(w), None

        def run(x, w):
            last, _ = lax.scan(step, w, jnp.array([True, False, True]))
            return jnp.sum(conv(x, last) ** 2)

        return jax.jit(jax.grad(run, argnums=(0, 1)))

    assert_close(looped(ours)(x, w), looped(reference)(x, w))


@pytest.mark.native
def test_each_gradient_runs_its_own_kernel_alone(case):
    ours, _, x, w, _ = case

    def found(function):
        text = jax.jit(function).lower(x, w).as_text()
        return text.count(oracles.TARGET), text.count(oracles.FILTER_TARGET)

    loss = loss_of(ours)
    assert found(loss) == (0, 0)
    assert found(jax.grad(loss, argnums=0)) == (1, 0)
    assert found(jax.grad(loss, argnums=1)) == (0, 1)
    assert found(jax.grad(loss, argnums=(0, 1))) == (1, 1)


@pytest.mark.native
def test_input_gradient_is_the_kernel_and_no_convolution(case):
    ours, _, x, w, _ = case
    text = jax.jit(lambda dy, x, w: jax.vjp(lambda x: ours(x, w), x)[1](dy)).lower(
        jax.eval_shape(ours, x, w), x, w
    )
    assert text.as_text().count(oracles.TARGET) == 1
    compiled = text.compile().as_text()
    assert f'custom_call_target="{jax_convgrad.native.TARGET}"' in compiled
    assert "convolution(" not in compiled, "the forward is not needed for the input gradient"


def test_no_residual_for_an_operand_without_gradient(case):
    ours, _, x, w, _ = case

    def residual_shapes(function, primal):
        _, vjp = jax.vjp(function, primal)
        return [r.shape for r in jax.tree.leaves(vjp) if hasattr(r, "shape") and r.size > 1]

    assert w.shape not in residual_shapes(lambda w: ours(x, w), w)
    assert x.shape not in residual_shapes(lambda x: ours(x, w), x)


def test_integer_cotangent_of_an_unused_result(case):
    ours, _, x, w, _ = case
    zero = jax.grad(lambda x: 0.0 * jnp.sum(jnp.round(x)) + ours(lax.stop_gradient(x), w).sum())
    np.testing.assert_array_equal(zero(x), jnp.zeros_like(x))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_preferred_element_type_computes_gradients_in_it(case, dtype):
    ours, reference, x, w, _ = case
    x, w = x.astype(dtype), w.astype(dtype)

    def gradients(conv):
        wide = functools.partial(conv, preferred_element_type="float32")
        return jax.grad(loss_of(wide), argnums=(0, 1))(x, w)

    ours_dx, ours_dw = gradients(ours)
    expected_dx, expected_dw = gradients(reference)
    assert ours_dx.dtype == ours_dw.dtype == jnp.dtype(dtype)
    # Both round the same float32 sum once; the last bit of it may fall either way.
    assert_close(ours_dx, expected_dx, 1e-2)
    assert_close(ours_dw, expected_dw, 1e-2)


def test_bfloat16_parameters(case):
    ours, reference, x, w, _ = case
    x, w = x.astype("bfloat16"), w.astype("bfloat16")
    gradient = jax.grad(loss_of(ours), argnums=(0, 1))(x, w)
    assert {g.dtype for g in gradient} == {jnp.dtype("bfloat16")}
    assert_close(gradient, jax.grad(loss_of(reference), argnums=(0, 1))(x, w), 5e-2)


def test_operands_of_numpy_and_weak_types(case):
    ours, _, x, w, _ = case
    np.testing.assert_array_equal(ours(np.asarray(x), np.asarray(w)), ours(x, w))
    weak = jnp.broadcast_to(jnp.asarray(2.0), x.shape)
    assert jax.grad(loss_of(ours))(weak, w).dtype == jnp.float32


def test_forward_mode_of_the_function_itself_is_refused(case):
    ours, _, x, w, _ = case
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: ours(x, w), (x,), (x,))


@pytest.mark.parametrize("modes", ["fwd", "rev"])
def test_conv_input_grad_against_differences(case, x64, modes):
    _, _, _, w, g = case
    dy = np.asarray(w).ravel()[np.arange(np.prod(g.out_shape)) % w.size].reshape(g.out_shape)
    operands = dy.astype("f8"), np.asarray(w, "f8")

    def gradient(dy, w):
        return jax_convgrad.conv_input_grad(dy, w, g.lhs_shape, **g.conv_params())

    check_grads(gradient, operands, order=2, modes=modes)


@pytest.mark.parametrize("modes", ["fwd", "rev"])
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_conv_transpose_against_differences(rng, x64, modes, transpose_kernel):
    shapes = (2, 4, 3, 3), (3, 2, 2, 3) if transpose_kernel else (3, 2, 3, 2)
    operands = [rng.standard_normal(shape) for shape in shapes]

    def conv(x, w):
        return jax_convgrad.conv_transpose(x, w, (2, 1), "SAME", transpose_kernel=transpose_kernel)

    check_grads(conv, operands, order=2, modes=modes)


def test_convolution_against_differences_in_reverse(case, x64):
    ours, _, x, w, _ = case
    check_grads(ours, (np.asarray(x, "f8"), np.asarray(w, "f8")), order=2, modes="rev")


@pytest.mark.parametrize("entry_point", ["function", "install"])
def test_disable_jit_does_not_recurse(entry_point):
    x, w = jnp.ones((1, 2, 5, 5)), jnp.ones((3, 2, 3, 3))
    conv = (
        jax_convgrad.conv_general_dilated if entry_point == "function" else lax.conv_general_dilated
    )

    def gradient():
        return jax.grad(lambda x: conv(x, w, (2, 2), "SAME").sum())(x)

    expected = gradient()
    with jax_convgrad.installed(entry_point == "install"), jax.disable_jit():
        np.testing.assert_allclose(gradient(), expected, rtol=1e-6)
