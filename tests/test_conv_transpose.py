"""conv_transpose against lax's, which multiplies the zeros that ours never inserts."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax

import jax_convgrad


def check(rng, lhs_shape, rhs_shape, strides, padding, dtype="float32", **params):
    """Compares with lax on small integers, for which every dtype here is exact."""
    x = jnp.asarray(rng.integers(-3, 4, lhs_shape), dtype)
    w = jnp.asarray(rng.integers(-3, 4, rhs_shape), dtype)
    ours = jax_convgrad.conv_transpose(x, w, strides, padding, **params)
    expected = lax.conv_transpose(x, w, strides, padding, **params)
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)
    return ours


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(0, 0), (0, 0)], [(1, 2), (3, 0)]])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 2), (1, 5)])
@pytest.mark.parametrize("rhs_dilation", [None, (1, 2), (3, 2)])
def test_strides_padding_and_dilation(rng, strides, padding, rhs_dilation):
    check(rng, (2, 5, 4, 3), (3, 4, 3, 2), strides, padding, rhs_dilation=rhs_dilation)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_window_below_and_above_the_stride(rng, window, stride, padding):
    ours = check(rng, (1, 5, 2), (window, 2, 3), (stride,), padding)
    if padding == "SAME":
        assert ours.shape == (1, 5 * stride, 3)


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 1)], [(0, 2)], [(-1, 1)]])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("rhs_dilation", [(1,), (2,)])
def test_consistent_padding(rng, padding, stride, rhs_dilation):
    options = {"rhs_dilation": rhs_dilation, "use_consistent_padding": True}
    check(rng, (2, 6, 3), (3, 3, 2), (stride,), padding, **options)


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(2, 1), (0, 1)]])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_transposed_filter_gives_the_gradient_of_a_convolution(rng, strides, padding):
    check(rng, (2, 4, 5, 2), (3, 2, 3, 2), strides, padding, transpose_kernel=True)
    if isinstance(padding, str):
        x, w = rng.standard_normal((2, 8, 9, 3)), rng.standard_normal((3, 2, 3, 4))
        x, w = x.astype("f4"), w.astype("f4")
        dnums = ("NHWC", "HWIO", "NHWC")
        conv = functools.partial(
            lax.conv_general_dilated,
            window_strides=(1, 1),
            padding=padding,
            dimension_numbers=dnums,
        )
        y, vjp = jax.vjp(lambda x: conv(x, w), x)
        dx = jax_convgrad.conv_transpose(y, w, (1, 1), padding, transpose_kernel=True)
        np.testing.assert_allclose(dx, vjp(y)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lhs_shape", "rhs_shape", "dimension_numbers"),
    [
        ((2, 3, 5, 4), (2, 3, 3, 2), ("NCHW", "OIHW", "NCHW")),
        ((2, 3, 5, 4), (3, 2, 2, 3), ("NCHW", "HWOI", "NHWC")),
        ((5, 3, 2, 4), (3, 3, 2, 2), ("HCNW", "HIWO", "WNHC")),
        (
            (2, 5, 4, 3),
            (3, 2, 3, 2),
            lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
        ),
    ],
)
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_layouts(rng, lhs_shape, rhs_shape, dimension_numbers, transpose_kernel):
    dnums = lax.conv_dimension_numbers(lhs_shape, rhs_shape, dimension_numbers)
    if transpose_kernel:  # the filter's two channel axes exchange their meaning
        sizes = list(rhs_shape)
        out, in_ = dnums.rhs_spec[:2]
        sizes[out], sizes[in_] = sizes[in_], sizes[out]
        rhs_shape = tuple(sizes)
    options = {"dimension_numbers": dimension_numbers, "transpose_kernel": transpose_kernel}
    check(rng, lhs_shape, rhs_shape, (2, 3), "SAME", **options)
    check(rng, lhs_shape, rhs_shape, (2, 1), [(1, 0), (2, 2)], **options)


@pytest.mark.parametrize("dtype", [*oracles.DTYPES, "complex64", "int32"])
def test_dtypes(rng, x64, dtype):
    check(rng, (1, 4, 3), (3, 3, 2), (2,), "SAME", dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_preferred_element_type(rng, dtype):
    ours = check(rng, (1, 4, 3), (3, 3, 2), (2,), "SAME", dtype, preferred_element_type="float32")
    assert ours.dtype == jnp.float32


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_default_layout_for_each_number_of_axes(rng, axes):
    check(rng, (2, *(4, 3, 5)[:axes], 3), (*(2, 3, 2)[:axes], 3, 4), (2,) * axes, "SAME")


@pytest.mark.parametrize(("lhs", "rhs"), [((0, 4, 3), (3, 3, 2)), ((1, 4, 3), (3, 3, 0))])
def test_empty_results(rng, lhs, rhs):
    assert check(rng, lhs, rhs, (2,), "SAME").size == 0


@pytest.mark.native
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_it_is_one_custom_call(transpose_kernel):
    x, w = np.ones((2, 4, 4, 3), "f4"), np.ones((3, 3, 3, 3), "f4")

    def conv(x, w):
        return jax_convgrad.conv_transpose(x, w, (2, 2), "SAME", transpose_kernel=transpose_kernel)

    text = jax.jit(conv).lower(x, w).as_text()
    target = oracles.TARGET if transpose_kernel else oracles.FORWARD_TARGET
    assert text.count(target) == 1
    assert "reverse" not in text
    assert "stablehlo.convolution" not in text


@hypothesis.given(
    size=st.integers(1, 7),
    window=st.integers(1, 5),
    stride=st.integers(1, 5),
    rhs_dilation=st.integers(1, 3),
    padding=st.one_of(
        st.sampled_from(["SAME", "VALID"]),
        st.tuples(st.integers(-2, 6), st.integers(-2, 6)).map(lambda pair: [pair]),
    ),
    consistent=st.booleans(),
)
@hypothesis.settings(max_examples=25)
def test_shape_is_that_of_lax(size, window, stride, rhs_dilation, padding, consistent):
    x, w = (jax.ShapeDtypeStruct(s, "float32") for s in ((1, size, 2), (window, 2, 3)))

    def shape(function):
        return jax.eval_shape(
            lambda x, w: function(
                x, w, (stride,), padding, (rhs_dilation,), use_consistent_padding=consistent
            ),
            x,
            w,
        ).shape

    try:
        expected = shape(lax.conv_transpose)
    except ValueError:
        with pytest.raises(ValueError, match="padding"):
            shape(jax_convgrad.conv_transpose)
        return
    assert shape(jax_convgrad.conv_transpose) == expected
