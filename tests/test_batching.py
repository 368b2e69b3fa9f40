"""vmap: one custom call for any number of mapped axes, whatever is mapped."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax

import jax_convgrad

# Geometries of one example; distinct sizes, so that no axis passes for another.
CASES = {
    "plain": ((2, 3, 7), (4, 3, 3), {"window_strides": (2,), "padding": [(1, 0)]}),
    "feature groups": ((2, 6, 5), (9, 2, 3), {"padding": "SAME", "feature_group_count": 3}),
    "batch groups": ((4, 3, 5), (6, 3, 3), {"padding": "SAME", "batch_group_count": 2}),
    "channels-last groups": (
        (2, 5, 4, 4),
        (2, 3, 2, 6),
        {
            "padding": "SAME",
            "feature_group_count": 2,
            "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        },
    ),
    "other layouts": (
        (5, 3, 2),
        (3, 3, 4),
        {"padding": [(2, 1)], "dimension_numbers": ("WCN", "IWO", "CNW")},
    ),
    "channels-last batch groups": (
        (4, 6, 3),
        (3, 3, 4),
        {
            "padding": "VALID",
            "batch_group_count": 2,
            "dimension_numbers": ("NWC", "WIO", "NWC"),
        },
    ),
}


@pytest.fixture(params=CASES)
def g(request):
    lhs_shape, rhs_shape, params = CASES[request.param]
    return oracles.geometry(lhs_shape, rhs_shape, **{"window_strides": None, **params})


def gradient(g, implementation=None):
    """conv_input_grad of one example."""
    return functools.partial(
        jax_convgrad.conv_input_grad,
        lhs_shape=g.lhs_shape,
        **g.conv_params(),
        implementation=implementation,
    )


def mapped(rng, shape, axis, size):
    """Integers, for which float32 sums are exact, with a mapped axis of some size."""
    full = shape if axis is None else (*shape[:axis], size, *shape[axis:])
    return jnp.asarray(rng.integers(-4, 5, full), "float32")


def looped(g, dy, w, axes, size):
    """One example after the other through the definition by lax."""

    def take(x, axis, i):
        return x if axis is None else jnp.take(x, i, axis)

    return np.stack(
        [oracles.lax_input_grad(take(dy, axes[0], i), take(w, axes[1], i), g) for i in range(size)]
    )


def check_vmap(g, dy, w, axes, size, out_axis=0):
    function = jax.vmap(gradient(g), in_axes=axes, out_axes=out_axis)
    expected = np.moveaxis(looped(g, dy, w, axes, size), 0, out_axis)
    np.testing.assert_array_equal(jax.jit(function)(dy, w), expected)
    return function


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("what", ["dy", "w", "both"])
def test_mapped_operands(rng, g, what, size):
    axes = (None if what == "w" else 0, None if what == "dy" else 0)
    dy, w = mapped(rng, g.out_shape, axes[0], size), mapped(rng, g.rhs_shape, axes[1], size)
    check_vmap(g, dy, w, axes, size)


def test_mapped_axes_anywhere(rng, g):
    rank = len(g.lhs_shape)
    pairs = list(itertools.product([None, *range(rank + 1)], repeat=2))[1:]
    for index in rng.choice(len(pairs), 4, replace=False):
        axes = pairs[index]
        dy, w = mapped(rng, g.out_shape, axes[0], 3), mapped(rng, g.rhs_shape, axes[1], 3)
        check_vmap(g, dy, w, axes, 3, out_axis=int(rng.integers(rank + 1)))


@pytest.mark.native
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_one_call_and_no_loop(rng, g, axes):
    dy, w = mapped(rng, g.out_shape, axes[0], 3), mapped(rng, g.rhs_shape, axes[1], 3)
    text = jax.jit(jax.vmap(gradient(g), in_axes=axes)).lower(dy, w).as_text()
    assert text.count(oracles.TARGET) == 1
    assert "stablehlo.while" not in text
    assert "stablehlo.convolution" not in text


def nested(g, axes_of):
    """A vmap for each pair of axes, the last one innermost."""
    function = gradient(g)
    for axes in reversed(axes_of):
        function = jax.vmap(function, in_axes=axes)
    return function


@pytest.mark.parametrize(
    "axes_of",
    [
        [(0, None), (0, None)],
        [(0, None), (None, 0)],
        [(None, 0), (None, 0)],
        [(0, 0), (0, None)],
        [(0, None), (0, 0)],
        [(0, 0), (None, 0)],
        [(0, 0), (0, 0)],
        [(0, None), (None, 0), (0, 0)],
    ],
)
def test_nested_maps(rng, g, axes_of):
    sizes = [2, 3, 2][: len(axes_of)]
    dy_sizes = [n for n, axes in zip(sizes, axes_of, strict=True) if axes[0] is not None]
    w_sizes = [n for n, axes in zip(sizes, axes_of, strict=True) if axes[1] is not None]
    dy = jnp.asarray(rng.integers(-4, 5, (*dy_sizes, *g.out_shape)), "float32")
    w = jnp.asarray(rng.integers(-4, 5, (*w_sizes, *g.rhs_shape)), "float32")
    function = jax.jit(nested(g, axes_of))
    out = function(dy, w)
    assert out.shape == (*sizes, *g.lhs_shape)
    for index in itertools.product(*map(range, sizes)):
        i = tuple(k for k, axes in zip(index, axes_of, strict=True) if axes[0] is not None)
        j = tuple(k for k, axes in zip(index, axes_of, strict=True) if axes[1] is not None)
        np.testing.assert_array_equal(out[index], oracles.lax_input_grad(dy[i], w[j], g))
    if jax_convgrad.native.cpu is not None:
        assert function.lower(dy, w).as_text().count(oracles.TARGET) == 1


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_no_examples(rng, g, axes):
    dy, w = mapped(rng, g.out_shape, axes[0], 0), mapped(rng, g.rhs_shape, axes[1], 0)
    out = jax.jit(jax.vmap(gradient(g), in_axes=axes))(dy, w)
    assert out.shape == (0, *g.lhs_shape)
    assert out.dtype == jnp.float32


def convolution(g):
    return functools.partial(jax_convgrad.conv_general_dilated, **g.conv_params())


def squared(conv):
    return lambda x, w: jnp.sum(conv(x, w) ** 2)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 2)])
def test_vmap_of_grad(rng, g, axes):
    x, w = mapped(rng, g.lhs_shape, axes[0], 3), mapped(rng, g.rhs_shape, axes[1], 3)

    def gradients(conv):
        return jax.jit(jax.vmap(jax.grad(squared(conv), argnums=(0, 1)), in_axes=axes))(x, w)

    for a, b in zip(gradients(convolution(g)), gradients(oracles.lax_conv(g)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_grad_of_vmap(rng, g, axes):
    x, w = mapped(rng, g.lhs_shape, axes[0], 3), mapped(rng, g.rhs_shape, axes[1], 3)

    def gradient_of(conv):
        total = squared(jax.vmap(conv, in_axes=axes))
        return jax.jit(jax.grad(total, argnums=(0, 1)))

    ours = gradient_of(convolution(g))
    for a, b in zip(ours(x, w), gradient_of(oracles.lax_conv(g))(x, w), strict=True):
        np.testing.assert_array_equal(a, b)
    if jax_convgrad.native.cpu is not None:
        text = ours.lower(x, w).as_text()
        assert text.count(oracles.TARGET) == 1
        assert "stablehlo.while" not in text


@pytest.mark.thorough
def test_per_example_jacobians(rng):
    """jacrev and jacfwd of the gradient map basis vectors over either operand."""
    g = oracles.geometry((1, 2, 4), (3, 2, 2), None, "VALID")
    dy, w = mapped(rng, g.out_shape, None, 0), mapped(rng, g.rhs_shape, None, 0)
    for argnum in (0, 1):
        forward = jax.jacfwd(gradient(g), argnum)(dy, w)
        np.testing.assert_array_equal(jax.jacrev(gradient(g), argnum)(dy, w), forward)
        assert forward.shape == (*g.lhs_shape, *(g.out_shape, g.rhs_shape)[argnum])


def test_conv_transpose_is_mapped(rng):
    x, w = mapped(rng, (2, 4, 3), 0, 5), mapped(rng, (3, 3, 2), 0, 5)
    for axes in ((0, None), (None, 0), (0, 0)):
        a, b = (x if axes[0] == 0 else x[0]), (w if axes[1] == 0 else w[0])
        ours, reference = (
            jax.vmap(lambda x, w, f=f: f(x, w, (2,), "SAME"), in_axes=axes)(a, b)
            for f in (jax_convgrad.conv_transpose, lax.conv_transpose)
        )
        np.testing.assert_array_equal(ours, reference)
