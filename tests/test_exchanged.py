"""Maps that are asked of the convolution with the filter and y in each other's place."""

import math

import jax
import oracles
import pytest
from conftest import SEED

from jax_convgrad import ConvGeometry, dispatch, lax_maps, native, preference
from jax_convgrad.maps import FILTER_GRAD, FORWARD, exchanged
from jax_convgrad.tools import references, workloads
from jax_convgrad.tools.geometries import (
    make_geometry,
    named_cases,
    normwise_error,
    random_cases,
    reduction_taps,
    tolerance,
)

CASES = {
    case.name: case.geometry
    for case in [*named_cases(), *random_cases(40, SEED)]
    if 0 not in (*case.geometry.lhs_shape, *case.geometry.rhs_shape, *case.geometry.out_shape)
}
MAPS = pytest.mark.parametrize("map_", [FORWARD, FILTER_GRAD])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.thorough] if i % 8 else [])  # lax compiles slowly
        for i, name in enumerate(CASES)
    ],
)
def test_filter_gradient_is_the_other_forward_map(rng, x64, name):
    g = CASES[name]
    other = exchanged(g)
    assert other.out_shape == g.rhs_shape
    assert exchanged(other).replace(padding=()) == g.replace(padding=())
    x, dy = oracles.operands(rng, g, map_=FILTER_GRAD)
    expected = references.filter_grad(x, dy, g)
    assert normwise_error(lax_maps.forward(x, dy, other), expected) < 1e-13
    x, w = oracles.operands(rng, g, map_=FORWARD)
    assert normwise_error(lax_maps.filter_grad(x, w, other), oracles.lax_conv(g)(x, w)) < 1e-13


def check(rng, g, map_, dtype):
    """The public function, and that it asks for the other map."""
    choice = dispatch.choose(g, dtype, "cpu", "native", map_=map_)
    assert choice.computes is not None
    assert choice.computes[0] == exchanged(g)
    first, second = oracles.operands(rng, g, dtype, map_)
    function = jax.jit(workloads.public_function(map_, g, implementation="native"))
    assert native.TARGETS[choice.computes[1]] in function.lower(first, second).as_text()
    wide = first.astype("float64"), second.astype("float64")
    expected = oracles.lax_conv(g)(*wide) if map_ is FORWARD else references.filter_grad(*wide, g)
    error = normwise_error(function(first, second), expected)
    assert error <= tolerance(dtype, reduction_taps(g, map_))


@pytest.mark.native
@MAPS
@pytest.mark.parametrize(
    ("name", "dtype"),
    oracles.with_dtypes([name for name, g in CASES.items() if g.groups == 1][::4]),
)
def test_exchanged_operands_give_the_map(monkeypatch, rng, x64, name, dtype, map_):
    monkeypatch.setattr(preference, "is_faster_exchanged", lambda *_: True)
    monkeypatch.setattr(dispatch, "_most_workspace_bytes", lambda *_: math.inf)
    check(rng, CASES[name], map_, dtype)


LARGE = {
    "fully connected": make_geometry((5, 5), (5, 5), (24, 200), batch=3),
    "fully connected nchw": make_geometry((5, 5), (5, 5), (24, 200), batch=3,
                                          dimension_numbers="first"),
    "long rows of few features": make_geometry((301,), (300,), (5, 3), dimension_numbers="first"),
    "gradient of a filter gradient": exchanged(make_geometry((28, 28), (3, 3), (9, 130), batch=1,
                                                             padding=1)),
}  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("name", LARGE)
def test_large_filter_gradients_of_few_positions_are_exchanged(monkeypatch, rng, x64, name):
    monkeypatch.setattr(dispatch, "switch", lambda: None)
    g = LARGE[name]
    check(rng, g, FILTER_GRAD, "float32")
    choice = dispatch.choose(g, "float32", "cpu", map_=FILTER_GRAD)
    assert "as the forward map with filter and y exchanged" in choice.reason


@pytest.mark.native
def test_forward_of_a_filter_gradient_is_exchanged(monkeypatch, rng, x64):
    monkeypatch.setattr(dispatch, "switch", lambda: None)
    g = exchanged(make_geometry((20, 20), (3, 3), (40, 30), batch=2, padding=1))
    check(rng, g, FORWARD, "float32")


@pytest.mark.native
def test_filter_gradients_that_are_as_fast_stay(monkeypatch):
    monkeypatch.setattr(dispatch, "switch", lambda: None)

    def computes(*args, batch=3, **options):
        g = make_geometry(*args, batch=batch, **options)
        return dispatch.choose(g, "float32", "cpu", map_=FILTER_GRAD).computes

    assert computes((5, 5), (5, 5), (24, 200))
    assert not computes((5, 5), (5, 5), (24, 200), batch=2)
    assert not computes((9, 9), (5, 5), (24, 200), padding=2)  # more positions than taps
    assert not computes((5, 5), (5, 5), (200, 20))  # lanes of features would be empty
    assert computes((5, 5), (5, 5), (200, 20), dimension_numbers="first")
    # Sums that a forward map does not add in pairs.
    assert not computes((5, 5), (5, 5), (24, 200), batch=20_000)
    # Most taps meet padding alone.
    assert not computes((2,), (400,), (24, 20), padding=200, dimension_numbers="first")
    assert not computes((5, 5), (5, 5), (48, 400), feature_groups=2)


@pytest.mark.native
def test_exchanging_needs_no_more_workspace_than_is_allowed(monkeypatch):
    g = LARGE["fully connected"]
    monkeypatch.setattr(dispatch, "_most_workspace_bytes", lambda *_: -1)
    assert dispatch.choose(g, "float32", "cpu", "native", map_=FILTER_GRAD).computes is None


@pytest.mark.native
def test_what_lax_is_preferred_for_is_not_exchanged(monkeypatch):
    """Of an outer product the filter gradient is lax's, so the other forward map is as well."""
    monkeypatch.setattr(dispatch, "switch", lambda: None)
    g = make_geometry((2,), (1,), (1024, 1024), batch=1)
    for asked, map_ in ((g, FILTER_GRAD), (exchanged(g), FORWARD)):
        assert dispatch.choose(asked, "float32", "cpu", map_=map_).implementation == "xla"


@pytest.mark.native
def test_parameters_that_no_kernel_takes_when_exchanged():
    """The other padding is the window's that is left of a stride: beyond 32 bits."""
    g = ConvGeometry.parse(
        (3, 16, 16), (2, 16, 20), (2**31 - 1,), [(0, -(2**31 - 1))], (2**31 - 1,), None,
        ("WCN", "WIO", "WNC"),
    )  # fmt: skip
    assert dispatch.choose(g, "float32", "cpu", map_=FORWARD).computes is None


@pytest.mark.native
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_plan_is_of_what_runs(monkeypatch, dtype):
    """Widened operands are planned again: in float32 the workspace is another."""
    monkeypatch.setattr(dispatch, "switch", lambda: None)
    g = make_geometry((14, 14), (12, 12), (16, 64), batch=3)
    choice = dispatch.choose(g, dtype, "cpu", map_=FILTER_GRAD)
    ran = dispatch.choose(g, choice.kernel_dtype or dtype, "cpu", map_=FILTER_GRAD)
    assert choice.kernel_dtype == (None if dtype == "float32" else "float32")
    assert (choice.plan, choice.computes) == (ran.plan, ran.computes)
    assert choice.computes is not None
