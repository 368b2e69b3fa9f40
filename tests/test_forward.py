"""The forward map by every CPU kernel, against float64; its primitive's own rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import SEED
from jax import lax

import jax_convgrad
from jax_convgrad import custom_call, dispatch, native, planner
from jax_convgrad.geometry import ConvGeometry
from jax_convgrad.maps import FORWARD
from jax_convgrad.primitive import bind_forward
from jax_convgrad.tools import references
from jax_convgrad.tools.geometries import (
    make_geometry,
    named_cases,
    normwise_error,
    random_case,
    tolerance,
)

pytestmark = pytest.mark.native

NAMED = {case.name: case.geometry for case in named_cases()}
RANDOM_COUNT = 25


def operands(rng, g, dtype):
    return oracles.operands(rng, g, dtype, FORWARD)


def call_kernels(x, w, g):
    return oracles.call_kernels_of_map((x, w), g, FORWARD)


def check_kernels(rng, g, dtype):
    x, w = operands(rng, g, dtype)
    expected = oracles.lax_conv(g)(x.astype("float64"), w.astype("float64"))
    oracles.check_kernels((x, w), g, FORWARD, expected)


@pytest.mark.parametrize(("name", "dtype"), oracles.with_dtypes(NAMED))
def test_named_geometry(rng, x64, name, dtype):
    check_kernels(rng, NAMED[name], dtype)


@pytest.mark.parametrize(("index", "dtype"), oracles.with_dtypes(range(RANDOM_COUNT)))
def test_random_geometry(rng, x64, index, dtype):
    check_kernels(rng, random_case(SEED, index).geometry, dtype)


def test_stored_programs_of_whole_windows_run(rng, x64):
    """They bring less workspace: that of when such a window's taps were not made channels."""
    g = NAMED["whole_window_nchw"]
    x, w = operands(rng, g, "float32")
    wanted = planner.plan(g, "float32", "cpu", map_=FORWARD).workspace_bytes
    call = functools.partial(oracles._call, platform="cpu", precision=None, map_=FORWARD)
    y, _ = jax.jit(lambda x, w: call(x, w, g, ("auto", wanted - 64)))(x, w)
    expected = oracles.lax_conv(g)(x.astype("float64"), w.astype("float64"))
    assert normwise_error(y, expected) <= tolerance("float32", 60)


def test_a_whole_window_may_be_taken_by_the_kernel_for_few_channels(rng, x64):
    """Its workspace is less than gemm's, which decided whether taps were made channels."""
    g = make_geometry((5, 5), (5, 5), (20, 10), batch=64, dimension_numbers="first")
    x, w = operands(rng, g, "float32")
    assert planner.plan(g, "float32", "cpu", map_=FORWARD).kernel == "few_channels_dot"
    y = jax.jit(functools.partial(bind_forward, geometry=g, implementation="native"))(x, w)
    expected = oracles.lax_conv(g)(x.astype("float64"), w.astype("float64"))
    assert normwise_error(y, expected) <= tolerance("float32", 500)


# Convolutions without padding whose taps along a row are one run of x (csrc/cpu/planner).
RUNS = {
    "patches": make_geometry((16, 16), (4, 4), (3, 40), batch=2, stride=4),
    "patches that leave a rest": make_geometry((18, 19), (4, 4), (3, 5), batch=2, stride=4),
    "windows that overlap": make_geometry((9, 23), (3, 5), (2, 33), batch=2, stride=(1, 2)),
    "one channel, first": make_geometry(
        (9, 23), (3, 5), (1, 20), batch=2, stride=2, dimension_numbers="first"
    ),
    "along a signal": make_geometry((301,), (25,), (1, 33), batch=3, stride=4),
    "beyond the filter": make_geometry((40, 40), (2, 3), (3, 18), stride=7),
}


# Few channels, whose padded rows are copied (csrc/cpu/planner/padded_rows.h), and the gradient
# for an input of many channels of such a convolution's transpose.
PADDED = {
    "a stem": make_geometry((21, 19), (7, 7), (3, 17), stride=2, padding=3),
    "a stem, first": make_geometry(
        (12, 15), (3, 3), (3, 16), stride=2, padding=((0, 1), (1, 2)), dimension_numbers="first"
    ),
    "cropped in front": make_geometry((9, 17), (3, 5), (2, 20), padding=((1, 1), (-3, 2))),
    "cropped behind": make_geometry((9, 17), (3, 5), (8, 20), stride=(1, 3), padding=-2),
    "wider than x": make_geometry((5, 3), (3, 9), (1, 33), padding=((1, 1), (5, 6))),
    "one result": make_geometry((4, 4), (4, 4), (3, 16), padding=((0, 0), (1, 0)), stride=4),
    "three axes": make_geometry((5, 6, 7), (3, 3, 3), (3, 18), stride=(1, 2, 2), padding=1),
    "patches, first": make_geometry((12, 12), (4, 4), (3, 40), stride=4, dimension_numbers="first"),
    "along a signal": make_geometry((301,), (25,), (2, 33), batch=3, stride=4, padding=12),
}


@pytest.mark.parametrize(("name", "dtype"), oracles.with_dtypes(PADDED))
def test_padded_rows_of_few_channels(rng, x64, name, dtype):
    check_kernels(rng, PADDED[name], dtype)


def test_a_program_with_less_workspace_copies_no_rows(rng):
    """As one does that was stored before rows were copied."""
    g = PADDED["a stem"]
    x, w = operands(rng, g, "float32")
    wanted = planner.plan(g, "float32", "cpu", None, "gemm", map_=FORWARD).workspace_bytes
    layouts = custom_call.layouts(g, "cpu")
    call = jax.ffi.ffi_call(
        native.FORWARD_TARGET,
        (
            jax.ShapeDtypeStruct(g.out_shape, "float32"),
            jax.ShapeDtypeStruct((wanted - 64,), "uint8"),
        ),
        input_layouts=layouts[:2],
        output_layouts=(layouts[2], (0,)),
    )
    y, _ = jax.jit(functools.partial(call, **custom_call.attributes(g, "cpu", None, "gemm")))(x, w)
    expected = references.by_definition(FORWARD, x, w, g)
    assert normwise_error(y, expected) <= tolerance("float32", 147)


# Rows of x that pixels in lanes read every other, third or fourth element of.
in_rows = functools.partial(make_geometry, dimension_numbers="first")
STRANDS = {
    "of two": in_rows((13, 37), (3, 3), (6, 6), stride=2, feature_groups=6, padding=1),
    "of three": in_rows((9, 50), (3, 5), (4, 8), stride=3, feature_groups=4, padding=2),
    "of four": in_rows((8, 71), (5, 2), (3, 3), stride=4, feature_groups=3),
    "dilated alike": in_rows(
        (20, 41), (3, 3), (4, 4), stride=2, rhs_dilation=2, feature_groups=4, padding=2
    ),
    "dilated otherwise": in_rows(
        (24, 60), (3, 4), (4, 4), stride=4, rhs_dilation=6, feature_groups=4, padding=3
    ),
    "longer than a tile": in_rows((5, 2100), (2, 3), (2, 2), stride=2, feature_groups=2),
    "cropped": in_rows((11, 40), (3, 3), (3, 3), stride=2, feature_groups=3, padding=-2),
    "of rows with gaps": in_rows(
        (7, 33), (3, 4), (4, 4), stride=4, lhs_dilation=6, feature_groups=2, padding=2
    ),
    "along a signal": in_rows((301,), (25,), (5, 5), stride=2, feature_groups=5),
}


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("name", STRANDS)
def test_strands_of_rows(rng, x64, name, dtype):
    g = STRANDS[name]
    check_kernels(rng, g, dtype)
    taken = planner.plan(g, dtype, "cpu", None, "few_channels", map_=FORWARD)
    assert taken.kernel == "few_channels"


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("name", RUNS)
def test_taps_that_are_one_run(rng, x64, name, dtype):
    check_kernels(rng, RUNS[name], dtype)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("where", ["x", "w"])
@pytest.mark.parametrize("name", ["dense_3x3", *RUNS, "a stem", "cropped in front"])
def test_what_is_not_finite_reaches_what_the_definition_connects(rng, name, where, value):
    g = RUNS.get(name) or PADDED.get(name) or NAMED[name]
    x, w = operands(rng, g, "float32")
    array = np.array(x if where == "x" else w)
    array.reshape(-1)[rng.integers(array.size)] = value
    x, w = (array, w) if where == "x" else (x, array)
    with np.errstate(invalid="ignore"):
        reached = ~np.isfinite(oracles.literal_forward(x, w, g))
    for kernel, y in call_kernels(x, w, g).items():
        np.testing.assert_array_equal(~np.isfinite(y), reached, err_msg=kernel)


@pytest.mark.parametrize("index", range(6))
def test_bits_of_an_image_do_not_depend_on_its_batch(rng, index):
    g = random_case(SEED, 1000 + index).geometry
    if g.batch_group_count > 1 or 0 in (*g.lhs_shape, *g.out_shape):
        g = NAMED["dense_3x3"]
    dim = g.dimension_numbers.lhs_spec[0]
    shape = list(g.lhs_shape)
    shape[dim] = 5
    many = g.replace(lhs_shape=tuple(shape))
    x, w = operands(rng, many, "float32")
    shape[dim] = 1
    one = g.replace(lhs_shape=tuple(shape))
    y = call_kernels(x, w, many)["gemm"]
    first = call_kernels(x.take([0], dim), w, one)["gemm"]
    out_dim = g.dimension_numbers.out_spec[0]
    np.testing.assert_array_equal(y.take([0], out_dim), first)


G = make_geometry((6, 5), (3, 2), (4, 6), batch=2, stride=(2, 1), feature_groups=2, padding=1)
DENSE = make_geometry((6, 5), (3, 2), (4, 6), batch=2, stride=(2, 1), padding=1)
BATCHED = make_geometry((6, 5), (3, 2), (4, 6), batch=6, batch_groups=3, padding=1)


@pytest.mark.parametrize("g", [G, DENSE, BATCHED], ids=["groups", "dense", "groups of images"])
def test_transposes_and_batching(rng, x64, g):
    x, w = operands(rng, g, "float64")
    ours = functools.partial(bind_forward, geometry=g, implementation="native")
    oracles.check_rules_of_bilinear_map(ours, oracles.lax_conv(g), x, w, oracles.FORWARD_TARGET)


def test_public_convolution_is_one_custom_call_that_checkpoint_saves(rng):
    """Policies know lax's primitive: ours is that one, with a mark."""
    x, w = operands(rng, DENSE, "float32")

    def conv(x, w):
        return jnp.sin(jax_convgrad.conv_general_dilated(x, w, **DENSE.conv_params()))

    def forwards(policy):
        f = jax.checkpoint(lambda x, w: jnp.sum(conv(x, w)), policy=policy)
        text = jax.jit(jax.grad(f)).lower(x, w).compile().as_text()
        return text.count(f'custom_call_target="{native.FORWARD_TARGET}"')

    text = jax.jit(conv).lower(x, w).as_text()
    assert text.count(oracles.FORWARD_TARGET) == 1
    assert "stablehlo.convolution" not in text
    policies = jax.checkpoint_policies
    assert forwards(policies.nothing_saveable) == forwards(policies.dots_saveable) == 1
    jaxpr = str(jax.make_jaxpr(jax.linearize(
        jax.checkpoint(lambda x: jnp.sum(conv(x, w)), policy=policies.dots_saveable), x
    )[1])(x))  # fmt: skip
    assert "name=conv_general_dilated" not in jaxpr


@pytest.mark.parametrize("dnums", ["HNWC OHWI HNWC", "CHWN IHWO CHWN", "NHWC HWIO HWNC"])
def test_native_means_native_where_images_do_not_come_first(rng, dnums):
    """lax ran there under the kernel's name, and XLA's own is wrong in the first of these."""
    specs = tuple(dnums.split())
    x, w = (
        rng.standard_normal([sizes[name] for name in spec]).astype(np.float32)
        for spec, sizes in zip(
            specs, ({"N": 1, "C": 3, "H": 9, "W": 8}, {"O": 1, "I": 3, "H": 3, "W": 3}),
            strict=False,
        )
    )  # fmt: skip
    g = ConvGeometry.parse(x.shape, w.shape, (3, 3), ((-1, 3), (0, 0)), dimension_numbers=specs)

    def conv(implementation):
        of = functools.partial(
            jax_convgrad.conv_general_dilated, **g.conv_params(), implementation=implementation
        )
        return jax.jit(of).lower(x, w).compile()

    insisted = conv("native")
    assert native.FORWARD_TARGET in insisted.as_text()
    expected = references.by_definition(FORWARD, x, w, g)
    assert normwise_error(insisted(x, w), expected) <= tolerance("float32", 27)
    explained = jax_convgrad.explain(x, w, **g.conv_params()).forward
    runs_kernel = native.FORWARD_TARGET in conv(None).as_text()
    assert runs_kernel == (explained.implementation == "native")


def test_implementation_xla_is_lax_own_also_while_installed(rng):
    x, w = operands(rng, DENSE, "float32")
    conv = functools.partial(
        jax_convgrad.conv_general_dilated, **DENSE.conv_params(), implementation="xla"
    )
    expected = lax.conv_general_dilated(x, w, **DENSE.conv_params())
    with jax_convgrad.installed():
        assert oracles.FORWARD_TARGET not in jax.jit(conv).lower(x, w).as_text()
        np.testing.assert_array_equal(conv(x, w), expected)


def test_cuda_has_no_forward_kernel():
    choice = dispatch.choose(DENSE, "float32", "cuda", map_=FORWARD)
    assert choice.implementation == "xla"
    if native.cuda is not None:
        assert "no forward kernel" in choice.reason


@pytest.mark.parametrize("index", range(12))
def test_parts_put_together_are_the_whole(rng, x64, index):
    """Cut by NumPy: the arithmetic of halos and paddings of a forward map."""
    g = oracles.cut_in_step(index)
    x, w = operands(rng, g, "float64")
    whole = oracles.lax_conv(g)(x, w)
    for _, local, of_x in oracles.parts_of_x(x, g, FORWARD):
        pieces = [oracles.lax_conv(local)(part, w) for part in of_x]
        np.testing.assert_allclose(np.concatenate(pieces, 2), whole, rtol=1e-12, atol=1e-12)
