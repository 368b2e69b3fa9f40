"""Sizes, layouts and work of a convolution: pure Python against lax and brute force."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import oracles
import pytest
from conftest import SEED
from jax import lax

from jax_convgrad import ConvGeometry
from jax_convgrad.tools.geometries import named_cases, random_cases

CASES = [*named_cases(), *random_cases(60, SEED)]


def lax_out_shape(lhs_shape, rhs_shape, *args, **kwargs):
    lhs, rhs = (jax.ShapeDtypeStruct(shape, "float32") for shape in (lhs_shape, rhs_shape))
    convolve = lambda a, b: lax.conv_general_dilated(a, b, *args, **kwargs)  # noqa: E731
    return jax.eval_shape(convolve, lhs, rhs).shape


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(str(SEED), "seed"))
def test_result_shape_is_that_of_lax(case):
    g = case.geometry
    assert g.out_shape == lax_out_shape(g.lhs_shape, g.rhs_shape, **g.conv_params())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(str(SEED), "seed"))
def test_work_counts_the_products_that_are_needed(case):
    g = case.geometry
    pairs = 1
    for axis in range(g.axes):
        pairs *= sum(
            1
            for p, r in itertools.product(range(g.out_sizes[axis]), range(g.window_sizes[axis]))
            if reaches(g, axis, p, r)
        )
    assert g.connections == pairs
    n, k = (g.out_shape[d] for d in g.dimension_numbers.out_spec[:2])
    assert g.flops == 2 * n * k * g.rhs_shape[g.dimension_numbers.rhs_spec[1]] * pairs


def reaches(g, axis, p, r):
    """Whether output p and tap r of one axis meet an input, not padding or an inserted zero."""
    position = p * g.window_strides[axis] - g.padding[axis][0] + r * g.rhs_dilation[axis]
    h, rest = divmod(position, g.lhs_dilation[axis])
    return rest == 0 and 0 <= h < g.in_sizes[axis]


def test_connections_of_a_plain_case_by_hand():
    # 3 outputs and 3 taps, no padding: all 9 pairs land on the input.
    assert oracles.geometry((1, 1, 5), (1, 1, 3), (1,), "VALID").connections == 9
    # SAME: the two outer taps of the two outer outputs fall on padding.
    assert oracles.geometry((1, 1, 5), (1, 1, 3), (1,), "SAME").connections == 13


def test_bytes_are_two_reads_and_one_write():
    g = oracles.geometry((2, 3, 5), (4, 3, 3), (1,), "VALID")
    assert g.bytes_moved(4) == 4 * (2 * 3 * 5 + 4 * 3 * 3 + 2 * 4 * 3)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "SAME_LOWER", "same", "valid"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("rhs_dilation", [(1, 1), (2, 3)])
def test_string_padding_is_read_as_lax_reads_it(padding, strides, rhs_dilation):
    shapes = (1, 2, 9, 8), (3, 2, 4, 3)
    g = ConvGeometry.parse(*shapes, strides, padding, None, rhs_dilation)
    params = {"window_strides": strides, "padding": padding, "rhs_dilation": rhs_dilation}
    assert g.out_shape == lax_out_shape(*shapes, **params)
    x, w = np.arange(144.0, dtype="f4").reshape(shapes[0]), np.ones(shapes[1], "f4")
    np.testing.assert_array_equal(
        oracles.lax_conv(g)(x, w), lax.conv_general_dilated(x, w, **params)
    )


@pytest.mark.parametrize(
    "form",
    [
        ("NHWC", "HWIO", "NHWC"),
        ["NHWC", "HWIO", "NHWC"],
        lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
    ],
)
def test_every_form_of_dimension_numbers_is_the_same_geometry(form):
    g = ConvGeometry.parse((1, 8, 9, 2), (3, 3, 2, 4), (1, 2), "SAME", dimension_numbers=form)
    expected = ConvGeometry.parse(
        (1, 8, 9, 2), (3, 3, 2, 4), (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert g == expected
    assert hash(g) == hash(expected)
    assert g.out_shape == (1, 8, 5, 4)


def test_default_dimension_numbers_are_channels_first():
    g = ConvGeometry.parse((1, 2, 8, 9), (4, 2, 3, 3), None, "SAME")
    named = ConvGeometry.parse(
        (1, 2, 8, 9), (4, 2, 3, 3), (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    assert g == named


@pytest.mark.parametrize("integer", [int, np.int32, np.int64, np.uint8])
def test_numpy_integers_become_plain_ones(integer):
    two = integer(2)
    g = ConvGeometry.parse(
        (1, two, 8), (4, 1, 3), (two,), [(two, two)], (two,), (two,), None, two, integer(1)
    )
    assert g == ConvGeometry.parse((1, 2, 8), (4, 1, 3), (2,), [(2, 2)], (2,), (2,), None, 2)
    values = [*g.lhs_shape, *g.window_strides, *g.padding[0], *g.lhs_dilation, g.groups]
    assert {type(value) for value in values} == {int}


def test_text_shows_what_is_not_a_default():
    plain = oracles.geometry((2, 3, 9), (4, 3, 3), (1,), "VALID")
    assert str(plain) == "x[2,3,9] w[4,3,3] y[2,4,7] NCW/OIW/NCW"
    full = oracles.geometry(
        (2, 9, 6),
        (3, 3, 4),
        (2,),
        [(1, -1)],
        (3,),
        (2,),
        ("NWC", "WIO", "NWC"),
        feature_group_count=2,
    )
    for part in ("NWC/WIO/NWC", "window_strides=(2,)", "lhs_dilation=(3,)", "rhs_dilation=(2,)"):
        assert part in str(full)
    assert "padding=((1,-1),)" in str(full)
    assert "feature_group_count=2" in str(full)


axis = st.tuples(
    st.integers(0, 12),  # input size
    st.integers(1, 5),  # window
    st.integers(1, 5),  # stride
    st.integers(1, 4),  # input dilation
    st.integers(1, 4),  # filter dilation
    st.integers(-4, 9),  # low padding
    st.integers(-4, 9),  # high padding
)


@hypothesis.given(axes=st.lists(axis, min_size=1, max_size=3))
def test_sizes_and_work_of_any_parameters(axes):
    sizes, windows, strides, lhs_dilation, rhs_dilation, low, high = zip(*axes, strict=True)
    arguments = (
        (1, 1, *sizes),
        (1, 1, *windows),
        strides,
        list(zip(low, high, strict=True)),
        lhs_dilation,
        rhs_dilation,
    )
    try:
        g = ConvGeometry.parse(*arguments)
    except ValueError as e:
        assert "Negative padding" in str(e)  # noqa: PT017
        padded = [(n - 1) * d + 1 if n else 0 for n, d in zip(sizes, lhs_dilation, strict=True)]
        assert any(n + a + b < 0 for n, a, b in zip(padded, low, high, strict=True))
        return
    assert g.out_shape == lax_out_shape(*arguments)
    assert g.connections == sum(1 for _ in oracles.connected(g)) if math.prod(sizes) < 300 else True
    assert 0 <= g.connections <= math.prod(g.out_sizes) * math.prod(g.window_sizes)


@hypothesis.given(data=st.data(), axes=st.integers(1, 3))
def test_geometry_does_not_depend_on_the_layout(data, axes):
    letters = "DHW"[-axes:]
    lhs = "".join(data.draw(st.permutations("NC" + letters)))
    rhs = "".join(data.draw(st.permutations("OI" + letters)))
    out = "".join(data.draw(st.permutations("NC" + letters)))
    sizes = {"N": 2, "C": 3, "D": 5, "H": 6, "W": 7}
    windows = {"O": 4, "I": 3, "D": 2, "H": 3, "W": 1}
    strides = {"D": 1, "H": 2, "W": 3}
    # Parameters by axis follow the order of the filter's spatial letters.
    in_order = [strides[c] for c in rhs if c in strides]
    g = ConvGeometry.parse(
        [sizes[c] for c in lhs],
        [windows[c] for c in rhs],
        in_order,
        "SAME",
        dimension_numbers=(lhs, rhs, out),
    )
    plain = ConvGeometry.parse(
        [sizes[c] for c in "NC" + letters],
        [windows[c] for c in "OI" + letters],
        [strides[c] for c in letters],
        "SAME",
    )
    assert dict(zip(out, g.out_shape, strict=True)) == dict(
        zip("NC" + letters, plain.out_shape, strict=True)
    )
    assert g.in_sizes == tuple(sizes[c] for c in rhs if c in strides)
    assert (g.flops, g.bytes_moved(2)) == (plain.flops, plain.bytes_moved(2))
