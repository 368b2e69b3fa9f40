"""install(): the forward pass of convolutions, lax's and every library's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax

import jax_convgrad
from jax_convgrad import dispatch
from jax_convgrad.maps import FORWARD
from jax_convgrad.tools import geometries

NHWC = ("NHWC", "HWIO", "NHWC")
CONVOLUTION = "stablehlo.convolution"


@pytest.fixture
def operands(rng):
    shapes = (2, 4, 5, 3), (3, 3, 3, 2)
    return [jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes]


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    jax_convgrad.uninstall()


def upsample(x, w, **params):
    return lax.conv_transpose(x, w, (2, 2), "SAME", **params)


def loss(x, w):
    return jnp.sum(jnp.sin(upsample(x, w)))


def lowered(function, *args):
    return jax.jit(function).lower(*args).as_text()


def counts(text):
    return text.count(oracles.FORWARD_TARGET), text.count(CONVOLUTION)


@pytest.mark.native
def test_lowered_to_the_kernel_while_installed(operands):
    function = jax.jit(upsample)
    found, results = [], []
    for switch in (jax_convgrad.uninstall, jax_convgrad.install, jax_convgrad.uninstall):
        switch()
        found.append(counts(function.lower(*operands).as_text()))
        results.append(function(*operands))
    assert found == [(0, 1), (1, 0), (0, 1)]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.native
def test_the_executed_program_and_the_eager_one_change(operands, monkeypatch):
    """A call could take a stale entry of a cache that `lower` has no part in."""
    chosen = []
    choose = dispatch.choose
    monkeypatch.setattr(
        dispatch, "choose", lambda *args, **kw: chosen.append(choose(*args, **kw)) or chosen[-1]
    )
    # No program of another test: every size is a new one.
    x, w = operands
    operands = jnp.tile(x, (1, 1, 1, 2)), jnp.tile(w, (1, 1, 2, 1))
    for function in (jax.jit(lambda x, w: upsample(x, w)), upsample):
        function(*operands)
        assert not chosen
        with jax_convgrad.installed():
            function(*operands)
            function(*operands)
        assert {choice.implementation for choice in chosen} == {"native"}
        before = len(chosen)
        function(*operands)
        with jax_convgrad.installed():
            function(*operands)
        assert len(chosen) == before, "both programs are in the cache"
        chosen.clear()


# lhs, rhs (NCHW, OIHW; the axes that are there), and the rest of lax's arguments.
GEOMETRIES = {
    "upsample by 2": (
        (2, 3, 4, 5),
        (4, 3, 4, 4),
        {"padding": [(2, 2)] * 2, "lhs_dilation": (2, 2)},
    ),
    "one axis of two": ((2, 3, 4, 5), (4, 3, 2, 3), {"padding": "VALID", "lhs_dilation": (1, 3)}),
    "strided too": (
        (2, 2, 7),
        (3, 2, 4),
        {"window_strides": (3,), "padding": [(3, 1)], "lhs_dilation": (2,)},
    ),
    "stride that divides it": (
        (1, 2, 6),
        (2, 2, 3),
        {"window_strides": (2,), "padding": [(1, 0)], "lhs_dilation": (4,)},
    ),
    "filter dilated": (
        (2, 3, 5, 3),
        (2, 3, 3, 2),
        {"padding": [(4, 3), (0, 2)], "lhs_dilation": (3, 2), "rhs_dilation": (2, 3)},
    ),
    "cropped": ((1, 2, 6), (3, 2, 3), {"padding": [(-2, -3)], "lhs_dilation": (3,)}),
    "padded beyond the filter": ((1, 2, 3), (2, 2, 2), {"padding": [(5, 7)], "lhs_dilation": (2,)}),
    "filter below the stride": ((1, 2, 4), (2, 2, 1), {"padding": [(0, 2)], "lhs_dilation": (3,)}),
    "grouped": (
        (2, 6, 4, 3),
        (9, 2, 3, 3),
        {"padding": [(1, 2)] * 2, "lhs_dilation": (2, 2), "feature_group_count": 3},
    ),
    "depthwise": (
        (2, 5, 4, 3),
        (5, 1, 4, 4),
        {"padding": [(2, 2)] * 2, "lhs_dilation": (2, 2), "feature_group_count": 5},
    ),
    "plain": ((2, 3, 6, 5), (4, 3, 3, 3), {"padding": [(1, 1)] * 2}),
    "strided": ((2, 5, 9, 8), (4, 5, 3, 3), {"window_strides": (2, 2), "padding": [(0, 1)] * 2}),
    "strided past the end": ((1, 2, 8), (2, 2, 3), {"window_strides": (4,), "padding": "VALID"}),
    "a la trous": ((2, 3, 9), (2, 3, 3), {"padding": [(3, 2)], "rhs_dilation": (2,)}),
    "patches": ((2, 3, 8, 8), (5, 3, 4, 4), {"window_strides": (4, 4), "padding": "VALID"}),
    "one channel": ((2, 1, 9, 30), (3, 1, 3, 5), {"window_strides": (1, 2), "padding": "VALID"}),
    "stem": ((2, 3, 11, 12), (8, 3, 7, 7), {"window_strides": (2, 2), "padding": [(3, 3)] * 2}),
    "many groups": (
        (2, 12, 5, 5),
        (24, 3, 3, 3),
        {"window_strides": (2, 1), "padding": [(1, 1)] * 2, "feature_group_count": 4},
    ),
    "groups of images": ((6, 4, 5), (9, 4, 3), {"padding": [(1, 1)], "batch_group_count": 3}),
    "window as long as the signal": ((3, 2, 70), (4, 2, 70), {"padding": [(2, 0)]}),
    "three axes": (
        (1, 2, 2, 3, 2),
        (3, 2, 2, 3, 2),
        {"padding": "VALID", "lhs_dilation": (2, 1, 2)},
    ),
}


def geometry_of(name):
    lhs, rhs, params = GEOMETRIES[name]
    params = dict(params)
    if params["padding"] == "VALID":
        params["padding"] = [(0, 0)] * (len(lhs) - 2)
    strides = params.pop("window_strides", (1,) * (len(lhs) - 2))
    return oracles.geometry(lhs, rhs, strides, **params)


@pytest.mark.native
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_numbers(rng, x64, dtype):
    convs = {name: geometry_of(name) for name in GEOMETRIES}
    operands = {
        name: tuple(
            rng.standard_normal(shape).astype(jnp.dtype(dtype))
            for shape in (g.lhs_shape, g.rhs_shape)
        )
        for name, g in convs.items()
    }

    def forward(operands):
        return {name: oracles.lax_conv(g)(*operands[name]) for name, g in convs.items()}

    program = jax.jit(forward)
    expected = program(jax.tree.map(lambda x: x.astype("float64"), operands))
    with jax_convgrad.installed():
        lowering = program.lower(operands)
        actual = lowering.compile()(operands)
    assert counts(lowering.as_text()) == (len(convs), 0)
    for name, g in convs.items():
        assert actual[name].dtype == jnp.dtype(dtype)
        taps = geometries.reduction_taps(g, FORWARD)
        error = geometries.normwise_error(actual[name], expected[name])
        assert error <= geometries.tolerance(dtype, taps), name


LAYOUTS = [
    ("NCHW", "OIHW", "NCHW"),
    ("NHWC", "HWIO", "NHWC"),
    ("NHWC", "OHWI", "NCHW"),
    ("NWHC", "HIWO", "CNHW"),
]


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("groups", [1, 2])
def test_layouts(rng, layout, groups):
    sizes = [{"N": 2, "C": 4, "H": 3, "W": 4}, {"O": 6, "I": 4 // groups, "H": 2, "W": 3}]
    x, w = (
        jnp.asarray(rng.integers(-3, 4, [of[letter] for letter in spec]), "float32")
        for of, spec in zip(sizes, layout[:2], strict=True)
    )
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 2),
        padding=[(1, 1), (2, 0)],
        lhs_dilation=(2, 3),
        dimension_numbers=layout,
        feature_group_count=groups,
    )
    expected = conv(x, w)
    with jax_convgrad.installed():
        assert counts(lowered(conv, x, w)) == (1, 0)
        np.testing.assert_array_equal(conv(x, w), expected)


TRANSFORMED = {
    "grad": lambda x, w: jax.grad(loss, argnums=(0, 1))(x, w),
    "jvp": lambda x, w: jax.jvp(upsample, (x, w), (jnp.cos(x), jnp.sin(w))),
    "linear_transpose": lambda x, w: jax.linear_transpose(lambda x: upsample(x, w), x)(
        jnp.ones((2, 8, 10, 2), x.dtype)
    ),
    "vmap of x": lambda x, w: jax.vmap(lambda x: upsample(x[None], w))(x),
    "vmap of w": lambda x, w: jax.vmap(upsample, (None, 0))(x, jnp.stack([w, w + 1])),
    "vmap of both": lambda x, w: jax.vmap(upsample)(jnp.stack([x, x + 1]), jnp.stack([w, w + 1])),
    "vmap of grad": lambda x, w: jax.vmap(jax.grad(loss, argnums=(0, 1)), (0, None))(x[:, None], w),
    "forward over reverse": lambda x, w: jax.jvp(
        lambda x: jax.grad(loss, argnums=1)(x, w), (x,), (jnp.sin(x),)
    ),
    "grad of grad": lambda x, w: jax.grad(lambda w: jnp.sum(jax.grad(loss)(x, w) ** 2))(w),
    "checkpoint": lambda x, w: jax.grad(jax.checkpoint(loss), argnums=(0, 1))(x, w),
    "scan": lambda x, w: lax.scan(lambda c, x: (c + loss(x[None], w), None), 0.0, x)[0],
    "inner jit": lambda x, w: jax.jit(upsample)(x, w) + jax.jit(upsample)(2 * x, w),
}


@pytest.mark.native
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformation_gives_the_same_numbers_and_types(operands, name):
    function = TRANSFORMED[name]
    with jax.enable_x64(True):
        operands = [jnp.asarray(operand, "float64") for operand in operands]
        expected = jax.jit(function)(*operands)
        with jax_convgrad.installed():
            text = lowered(function, *operands)
            assert counts(text)[0] + text.count(oracles.TARGET) > 0
            actual = jax.jit(function)(*operands)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type)
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_jaxpr_is_that_of_lax(operands):
    expected = str(jax.make_jaxpr(upsample)(*operands))
    with jax_convgrad.installed():
        assert str(jax.make_jaxpr(upsample)(*operands)) == expected


@pytest.mark.parametrize(
    ("lhs", "rhs"), [(False, False), (False, True), (True, False), (True, True)]
)
@pytest.mark.parametrize("preferred", [None, "float32"])
def test_weak_types(lhs, rhs, preferred):
    x, w = (
        lax.broadcast(value, shape) if weak else jnp.full(shape, value, "float32")
        for value, shape, weak in ((2.0, (1, 3, 3, 1), lhs), (3.0, (2, 2, 1, 2), rhs))
    )
    function = functools.partial(upsample, preferred_element_type=preferred)
    expected = function(x, w)
    with jax_convgrad.installed():
        actual = function(x, w)
    assert (x.weak_type, w.weak_type) == (lhs, rhs)
    assert actual.weak_type == expected.weak_type
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.native
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_preferred_element_type_accumulates_and_returns_it(operands, dtype):
    x, w = (operand.astype(dtype) for operand in operands)
    function = functools.partial(upsample, preferred_element_type="float32")
    with jax_convgrad.installed():
        assert counts(lowered(function, x, w)) == (1, 0)
        actual = function(x, w)
    assert actual.dtype == jnp.float32
    expected = upsample(x.astype("float32"), w.astype("float32"))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_integers_stay_with_lax(operands):
    assert unchanged(upsample, *((3 * operand).astype("int32") for operand in operands))


@pytest.mark.native
def test_complex_numbers_take_the_kernel_for_their_parts(operands):
    """lax multiplies them by three real convolutions."""
    x, w = (operand + 1j * jnp.flip(operand) for operand in operands)
    expected = upsample(x, w)
    with jax_convgrad.installed():
        assert counts(lowered(upsample, x, w)) == (3, 0)
        np.testing.assert_allclose(upsample(x, w), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [((0, 4, 4, 3), (3, 3, 3, 2)), ((2, 4, 4, 0), (3, 3, 0, 2)), ((2, 4, 4, 3), (3, 3, 3, 0))],
)
def test_empty_operands_stay_with_lax(lhs, rhs):
    x, w = jnp.ones(lhs), jnp.ones(rhs)
    expected = upsample(x, w)
    with jax_convgrad.installed():
        np.testing.assert_array_equal(upsample(x, w), expected)


def unchanged(function, *args):
    """Whether the program is the same, to the letter, while installed."""
    before = lowered(function, *args)
    with jax_convgrad.installed():
        return lowered(function, *args) == before


@pytest.mark.native
def test_groups_of_images(operands):
    x, w = operands
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding=[(0, 0)] * 2,
        dimension_numbers=NHWC,
        batch_group_count=2,
    )
    expected = conv(x, w)
    with jax_convgrad.installed():
        assert counts(lowered(conv, x, w)) == (1, 0)
        np.testing.assert_allclose(conv(x, w), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.native
def test_gradient_for_the_filter_of_a_transposed_layer(operands):
    """It has lhs_dilation."""
    x, w = operands
    dy = jnp.cos(upsample(x, w))

    def gradient(x, w, dy):
        return jax.linear_transpose(lambda w: upsample(x, w), w)(dy)[0]

    expected = gradient(x, w, dy)
    with jax_convgrad.installed():
        text = lowered(gradient, x, w, dy)
        assert (text.count(oracles.FILTER_TARGET), text.count(CONVOLUTION)) == (1, 0)
        np.testing.assert_allclose(gradient(x, w, dy), expected, rtol=1e-5, atol=1e-5)


def test_what_asks_for_lax_gets_it_beside_a_layer_that_does_not(operands):
    """Equal equations of one program are lowered once: it must not be one for both."""
    x, w = operands

    def asked(x, w):
        return jax_convgrad.conv_transpose(x, w, (2, 2), "SAME", implementation="xla")

    def both(x, w, order):
        functions = [asked, upsample, asked, upsample]
        return [function(x, w) for function in functions[order:]]

    with jax_convgrad.installed():
        assert counts(lowered(asked, x, w)) == (0, 1)
        if jax_convgrad.native.cpu is not None:
            assert counts(lowered(functools.partial(both, order=0), x, w)) == (2, 2)
            assert counts(lowered(functools.partial(both, order=1), x, w)) == (2, 1)


def test_what_asks_for_lax_gets_it_in_complex_numbers_and_in_higher_derivatives(operands):
    """lax's three convolutions for complex ones, and the gradient's gradient, were kernels'."""
    x, w = operands
    conv = functools.partial(
        jax_convgrad.conv_general_dilated, window_strides=(2, 2), padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), implementation="xla",
    )  # fmt: skip

    def penalty(x, w):
        return jnp.sum(jnp.abs(jax.grad(lambda x: jnp.sum(jnp.sin(conv(x, w))))(x)) ** 2)

    def gradient(x, w):
        dy = jnp.ones_like(conv(x, w))
        return jax_convgrad.conv_input_grad(
            dy, w, x.shape, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            implementation="xla",
        )  # fmt: skip

    with jax_convgrad.installed():
        for function in (jax.grad(penalty), jax.grad(penalty, argnums=1), gradient):
            assert "custom_call" not in lowered(function, x, w)
        assert "custom_call" not in lowered(gradient, x + 1j, w + 0j)


@pytest.mark.native
def test_the_flag_counts_when_a_program_is_lowered(operands):
    function = jax.jit(upsample)
    with jax_convgrad.installed():
        traced = function.trace(*operands)
        assert counts(traced.lower().as_text()) == (1, 0)
    outside = traced.lower()
    assert counts(outside.as_text()) == (0, 1)
    np.testing.assert_allclose(
        outside.compile()(*operands), function(*operands), rtol=1e-5, atol=1e-5
    )
    traced = function.trace(*operands)
    with jax_convgrad.installed():
        assert counts(traced.lower().as_text()) == (1, 0)
    assert counts(function.lower(*operands).as_text()) == (0, 1)


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
def test_export_needs_no_check_disabled_that_lax_does_not_need(operands, platforms):
    with jax_convgrad.installed():
        exported = jax.export.export(jax.jit(upsample), platforms=platforms)(*operands)
    assert counts(exported.mlir_module())[0] == 0
    np.testing.assert_allclose(exported.call(*operands), upsample(*operands), rtol=1e-5, atol=1e-5)


def test_symbolic_shapes_stay_with_lax(operands):
    x, w = operands
    shape = jax.export.symbolic_shape("n, 4, 5, 3")
    with jax_convgrad.installed():
        exported = jax.export.export(jax.jit(upsample))(jax.ShapeDtypeStruct(shape, x.dtype), w)
    np.testing.assert_allclose(exported.call(x, w), upsample(x, w), rtol=1e-5, atol=1e-5)


DEVICES = """
import re
import jax, jax.numpy as jnp, numpy as np, oracles, jax_convgrad
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
rng = np.random.default_rng(7)
x, w = rng.standard_normal((16, 6, 6)).astype("f4"), rng.standard_normal((3, 6, 4)).astype("f4")
def upsample(x, w):
    return lax.conv_transpose(x, w, (2,), "SAME")
expected = upsample(x, w)
def put(kind, a, *spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    return jax.device_put(a, NamedSharding(mesh, P(*spec)))
with jax_convgrad.installed():
    function = jax.jit(upsample)
    sharded = put(AxisType.Auto, x, "d"), put(AxisType.Auto, w)
    compiled = function.lower(*sharded).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(*sharded), expected, rtol=1e-4, atol=1e-5)
    assert compiled(*sharded).sharding.spec == P("d")
    # Types with shardings in them are lax's business.
    out = function(put(AxisType.Explicit, x, "d"), put(AxisType.Explicit, w))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert jax.typeof(out).sharding.spec[0] == "d"
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    local = jax.shard_map(upsample, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    manual = jax.jit(local)
    np.testing.assert_allclose(manual(x, w), expected, rtol=1e-4, atol=1e-5)
    if jax_convgrad.native.cpu is not None:
        assert manual.lower(x, w).as_text().count(oracles.FORWARD_TARGET) == 1
    def loss(function):
        return lambda x, w: jnp.sum(jnp.sin(function(x, w)))
    gradient = jax.jit(jax.grad(loss(local), argnums=(0, 1)))(x, w)
    automatic = jax.jit(jax.grad(loss(upsample), argnums=(0, 1))).lower(*sharded).compile()
    names = "all-gather|all-to-all|collective-permute|reduce-scatter"
    assert not re.findall(names, automatic.as_text())
    expected = jax.grad(loss(upsample), argnums=(0, 1))(x, w)
    for a, b, c in zip(gradient, automatic(*sharded), expected, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(b, c, rtol=1e-3, atol=1e-4)
"""


def test_several_devices(run_python):
    run_python("-W", "error", "-c", DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=8")
