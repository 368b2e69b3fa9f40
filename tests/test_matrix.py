"""Every transformation of JAX, on every kind of convolution, dtype and implementation.

One cell of the matrix is a row of `transformations.py` on one geometry in one dtype by one
implementation, compared with the same transformation of lax's convolution in float64. The
cells are a part of all combinations: a transformation meets every dtype, every implementation
and two kinds of geometry, and over all of them every pair of these three occurs.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from transformations import TRANSFORMATIONS

import jax_convgrad
from jax_convgrad import primitive
from jax_convgrad.tools.geometries import make_geometry, normwise_error, tolerance

# Distinct sizes, so that no axis passes for another, and few elements: there are Hessians.
GEOMETRIES = {
    "dense strided": make_geometry((5, 4), (3, 2), (2, 3), stride=2, padding=1),
    "depthwise": make_geometry((4, 3), (3, 3), (3, 3), padding="SAME", feature_groups=3),
    "grouped": make_geometry(
        (7,), (3,), (4, 6), stride=2, feature_groups=2, dimension_numbers="first"
    ),
    "dilated": make_geometry((8,), (3,), (2, 3), rhs_dilation=2, padding=((2, 1),)),
    "lhs dilated": make_geometry(
        (3, 4), (3, 2), (3, 2), lhs_dilation=(2, 3), stride=(1, 2), padding=((2, 1), (-1, 2)),
        dimension_numbers="first",
    ),
    "batch groups": make_geometry((5,), (2,), (3, 4), batch=4, padding=1, batch_groups=2),
    "odd layouts 3d": make_geometry(
        (2, 3, 2), (2, 2, 1), (3, 2), padding="SAME", stride=(1, 2, 1), dimension_numbers="odd"
    ),
    "pointwise": make_geometry((3, 2), (1, 1), (4, 5), dimension_numbers="first"),
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float64", "float16")
IMPLEMENTATIONS = ("native", None, "installed", "xla")


def cells():
    """(transformation, geometry, dtype, implementation), spread evenly over all combinations.

    Two geometries for a transformation, so that their references are compiled once, and
    with every dtype another implementation.
    """
    names = list(GEOMETRIES)
    for t, transformation in enumerate(TRANSFORMATIONS):
        for i, dtype in enumerate(DTYPES):
            geometry = names[(t + (i // 2) * (t // 8 + 1)) % len(names)]
            implementation = IMPLEMENTATIONS[(i + t + t // 4) % len(IMPLEMENTATIONS)]
            if transformation.forward_mode:
                implementation = "installed"
            parts = (transformation.name, geometry, dtype, str(implementation))
            name = "-".join(parts).replace(" ", "_")
            # Each transformation once, and dtypes in turn, in a run that has to be short.
            marks = [] if i == t % len(DTYPES) else [pytest.mark.thorough]
            yield pytest.param(
                transformation, geometry, dtype, implementation, id=name, marks=marks
            )


MATRIX = list(cells())


def convolution(geometry, implementation):
    """The convolution of a cell; None for lax's own without the package."""
    if implementation in ("lax", "installed"):
        return functools.partial(lax.conv_general_dilated, **geometry.conv_params())
    return functools.partial(
        jax_convgrad.conv_general_dilated,
        **geometry.conv_params(),
        implementation=implementation,
    )


def operands(rng, geometry, dtype):
    """x, w and dy, rounded to the dtype; results and their gradients are about as large."""
    scale = np.sqrt(np.prod(geometry.rhs_shape) / geometry.rhs_shape[rhs_out(geometry)])
    shapes = geometry.lhs_shape, geometry.rhs_shape, geometry.out_shape
    x, w, dy = (rng.standard_normal(shape) for shape in shapes)
    return [a.astype(jnp.dtype(dtype)) for a in (x, w / scale, dy)]


def rhs_out(geometry):
    return geometry.dimension_numbers.rhs_spec[0]


def terms(geometry):
    """The longest of the three sums: of the result, of dX and of dW."""
    outputs = np.prod(geometry.out_shape) // geometry.rhs_shape[rhs_out(geometry)]
    taps = np.prod(geometry.rhs_shape) // geometry.groups
    return int(max(outputs, taps))


def transformed(transformation, geometry, implementation):
    """The function of a cell, compiled as a whole where it can be."""
    conv = convolution(geometry, implementation)
    function = functools.partial(transformation.function, conv)
    return function if transformation.eager else jax.jit(function)


@functools.lru_cache(maxsize=2)
def reference(transformation, geometry):
    """The same transformation of lax's convolution, one program for several cells."""
    return transformed(transformation, geometry, "lax")


def run(function, arrays, installed=False):
    """The leaves of what a function returns, as NumPy arrays."""
    with jax_convgrad.installed(installed), jax.enable_x64(arrays[0].dtype == np.float64):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(function(*map(jnp.asarray, arrays)))]


@contextlib.contextmanager
def counted_bindings(monkeypatch):
    """Counts how often the package's primitive is bound inside."""
    count = [0]
    bind = primitive.conv_input_grad_p.bind

    def counting(*args, **params):
        count[0] += 1
        return bind(*args, **params)

    with monkeypatch.context() as patch:
        patch.setattr(primitive.conv_input_grad_p, "bind", counting)
        yield count


@pytest.mark.parametrize(("transformation", "geometry", "dtype", "implementation"), MATRIX)
def test_matrix(rng, monkeypatch, transformation, geometry, dtype, implementation):
    if implementation == "native" and jax_convgrad.native.cpu is None:
        pytest.skip("the CPU module was not built")
    geometry = GEOMETRIES[geometry]
    arrays = operands(rng, geometry, dtype)
    with counted_bindings(monkeypatch) as bound:
        function = transformed(transformation, geometry, implementation)
        actual = run(function, arrays, implementation == "installed")
    if implementation == "xla":
        assert not bound[0], "lax was asked for"
    else:
        assert bound[0] or not transformation.input_grad, "dX was not computed by the package"
    wide = [a.astype(np.float64) for a in arrays]
    expected = run(reference(transformation, geometry), wide)
    largest_error = transformation.depth * tolerance(dtype, terms(geometry))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if jnp.issubdtype(e.dtype, np.floating):
            assert a.dtype == jnp.dtype(dtype)
        assert normwise_error(a, e) <= largest_error


def test_the_matrix_is_as_large_and_as_even_as_it_claims():
    assert len(MATRIX) >= 300
    seen = [set(), set(), set()]
    for cell in MATRIX:
        _, geometry, dtype, implementation = cell.values
        seen[0].add((geometry, dtype))
        seen[1].add((geometry, implementation))
        seen[2].add((dtype, implementation))
    sizes = len(GEOMETRIES), len(DTYPES), len(IMPLEMENTATIONS)
    assert [len(pairs) for pairs in seen] == [
        sizes[0] * sizes[1],
        sizes[0] * sizes[2],
        sizes[1] * sizes[2],
    ]
