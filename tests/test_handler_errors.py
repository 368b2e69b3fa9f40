"""Malformed custom calls that reach the FFI handler: an error with both sides, never a crash.

Nothing that Python checks stands in front of these: a serialised program, or one that
another library built, hands the handler whatever its bytes say.
"""

import jax
import numpy as np
import oracles
import pytest

from jax_convgrad import custom_call, native

pytestmark = pytest.mark.native

GEOMETRY = oracles.geometry((1, 2, 5, 6), (4, 2, 3, 3), (2, 1), [(1, 0), (0, 1)])
GROUPED = oracles.geometry((4, 6, 5), (6, 2, 3), (1,), "SAME", feature_group_count=3)
BATCH_GROUPED = oracles.geometry((4, 2, 5), (6, 2, 3), (1,), "SAME", batch_group_count=2)


def call_handler(
    g=GEOMETRY,
    *,
    dy=None,
    w=None,
    dx=None,
    workspace=None,
    padding_operand=None,
    dtypes=("float32",) * 4,
    drop=(),
    **changes,
):
    """One custom call by this geometry's attributes, with anything replaced."""
    shapes = [dy or g.out_shape, w or g.rhs_shape, dx or g.lhs_shape]
    if workspace is None:
        workspace = (oracles.plan(g, "float32")[1],)
    types = [jax.numpy.dtype(name) for name in (*dtypes[:3], "uint8")]
    if len(dtypes) == 4 and dtypes[3] != "float32":
        types[3] = jax.numpy.dtype(dtypes[3])
    attributes = {**custom_call.attributes(g, "cpu", None), **changes}
    for name in drop:
        del attributes[name]
    results = (jax.ShapeDtypeStruct(shapes[2], types[2]), jax.ShapeDtypeStruct(workspace, types[3]))
    operands = (np.ones(shapes[0], types[0]), np.ones(shapes[1], types[1]))
    if padding_operand is not None:
        operands += (np.ones(padding_operand, np.uint8),)
    call = jax.ffi.ffi_call(native.TARGET, results)
    return jax.block_until_ready(jax.jit(lambda *a: call(*a, **attributes))(*operands))


def ints(*values):
    return np.array(values, np.int64)


# name: (changes, what the message must contain)
ROWS = {
    "dy of another size": ({"dy": (1, 4, 3, 4)}, ["must be 2", "(1, 4, 3, 4)", "(1, 2, 5, 6)"]),
    "dy too large": ({"dy": (1, 4, 9, 9)}, ["(1, 4, 9, 9)", "(4, 2, 3, 3)"]),
    "dy of another batch": ({"dy": (2, 4, 2, 5)}, ["batch", "(2, 4, 2, 5)", "(1, 2, 5, 6)"]),
    "dy of other channels": ({"dy": (1, 5, 2, 5)}, ["features", "(1, 5, 2, 5)", "(4, 2, 3, 3)"]),
    "dy of another rank": ({"dy": (1, 4, 10)}, ["rank", "(1, 4, 10)", "(1, 2, 5, 6)"]),
    "filter of another rank": ({"w": (4, 2, 9)}, ["rank", "(4, 2, 9)", "(1, 2, 5, 6)"]),
    "filter of other channels": ({"w": (4, 3, 3, 3)}, ["features", "2 and 3", "(4, 3, 3, 3)"]),
    "filter window too large": ({"w": (4, 2, 30, 3)}, ["must be 0", "(4, 2, 30, 3)"]),
    "result of another rank": ({"dx": (1, 2, 5, 6, 1)}, ["rank", "(1, 2, 5, 6, 1)"]),
    "result too large": ({"dx": (1, 2, 50, 60)}, ["(1, 2, 50, 60)", "(1, 4, 2, 5)"]),
    "result of another batch": ({"dx": (7, 2, 5, 6)}, ["batch", "(7, 2, 5, 6)", "(1, 4, 2, 5)"]),
    "operands without axes": ({"dy": (4,), "w": (4,), "dx": (4,)}, ["rank", "(4,)"]),
    "scalars": ({"dy": (1,), "w": (1, 1), "dx": (1, 1, 1)}, ["rank", "(1, 1, 1)", "(1, 1)"]),
    "six dimensions": (
        {"dy": (1,) * 6, "w": (1,) * 6, "dx": (1,) * 6},
        ["rank", "5", "(1, 1, 1, 1, 1, 1)"],
    ),
    "workspace of the wrong dtype": ({"dtypes": ("float32",) * 3 + ("int32",)}, []),
    "operand dtypes differ": (
        {"dtypes": ("float32", "bfloat16", "float32")},
        ["F32, BF16 and F32", "(1, 4, 2, 5)", "(4, 2, 3, 3)"],
    ),
    # Products of these counts and a size wrap around to the size that would fit.
    "feature group count that overflows": (
        {"feature_group_count": np.int64(2**62 + 1), "w": (0, 4, 1, 1), "dy": (1, 0, 1, 1)},
        ["feature_group_count", str(2**62 + 1), "(0, 4, 1, 1)"],
    ),
    "batch group count that overflows": (
        {"batch_group_count": np.int64(2**62 + 1), "w": (0, 4, 1, 1), "dy": (4, 0, 1, 1)},
        ["batch_group_count", str(2**62 + 1), "(0, 4, 1, 1)"],
    ),
    "result dtype differs": ({"dtypes": ("float32", "float32", "float16")}, ["dtype"]),
    "integers": ({"dtypes": ("int32",) * 3}, ["dtype"]),
    "complex numbers": ({"dtypes": ("complex64",) * 3}, ["dtype"]),
    "unknown kernel": ({"kernel": "fastest"}, ["kernel", "'fastest'", "auto"]),
    "empty kernel name": ({"kernel": ""}, ["kernel", "''"]),
    "kernel that is a number": ({"kernel": np.int64(3)}, []),
    "zero stride": ({"window_strides": ints(0, 1)}, ["window_strides", "(0, 1)"]),
    "negative stride": ({"window_strides": ints(2, -1)}, ["window_strides", "(2, -1)"]),
    "huge stride": ({"window_strides": ints(2**62, 1)}, ["window_strides", str(2**62)]),
    "too few strides": ({"window_strides": ints(2)}, ["window_strides", "(2,)"]),
    "no strides": ({"window_strides": ints()}, ["window_strides", "()"]),
    "zero input dilation": ({"lhs_dilation": ints(0, 0)}, ["lhs_dilation", "(0, 0)"]),
    "zero filter dilation": ({"rhs_dilation": ints(1, 0)}, ["rhs_dilation", "(1, 0)"]),
    "three filter dilations": ({"rhs_dilation": ints(1, 1, 1)}, ["rhs_dilation", "(1, 1, 1)"]),
    "half the padding": ({"padding": ints(1, 0)}, ["padding", "(1, 0)", "4"]),
    "huge padding": ({"padding": ints(2**62, 0, 0, 0)}, ["padding", str(2**62)]),
    "hugely negative padding": ({"padding": ints(-(2**62), 0, 0, 0)}, ["padding", str(-(2**62))]),
    "other padding": ({"padding": ints(1, 0, 0, 3)}, ["must be 7", "(1, 4, 2, 5)"]),
    "padding operand of another rank": (
        {"padding_operand": (0, 1, 1)},
        ["(0, low, low + high, ...)", "(0, 1, 1)", "(1, 0, 0, 1)", "(1, 2, 5, 6)"],
    ),
    "padding operand that is not empty": (
        {"padding_operand": (1, 0, 0, 0, 0)},
        ["(0, low, low + high, ...)", "(1, 0, 0, 0, 0)"],
    ),
    "padding operand of other padding": (
        {"padding_operand": (0, 0, 0, 0, 3)},
        ["must be 8", "(1, 4, 2, 5)"],
    ),
    "padding operand for half the padding": (
        {"padding_operand": (0, 0, 0, 0, 0), "padding": ints(1, 0)},
        ["two sizes for each spatial axis", "(1, 0)"],
    ),
    "padding operand beyond huge padding": (
        {"padding_operand": (0, 7, 7, 0, 0), "padding": ints(2**63 - 1, 0, 0, 0)},
        ["padding", str(2**63 - 1)],
    ),
    "spec that repeats": ({"lhs_spec": ints(0, 1, 1, 3)}, ["lhs_spec", "(0, 1, 1, 3)"]),
    "spec out of range": ({"rhs_spec": ints(0, 1, 2, 4)}, ["rhs_spec", "(0, 1, 2, 4)"]),
    "negative spec": ({"out_spec": ints(0, 1, 2, -1)}, ["out_spec", "(0, 1, 2, -1)"]),
    "short spec": ({"out_spec": ints(0, 1, 2)}, ["out_spec", "(0, 1, 2)"]),
    "layout that repeats": ({"lhs_layout": ints(0, 0, 0, 0)}, ["lhs_layout", "(0, 0, 0, 0)"]),
    "layout out of range": ({"rhs_layout": ints(9, 1, 2, 3)}, ["rhs_layout", "(9, 1, 2, 3)"]),
    "long layout": ({"out_layout": ints(0, 1, 2, 3, 4)}, ["out_layout", "(0, 1, 2, 3, 4)"]),
    "zero groups": ({"feature_group_count": np.int64(0)}, ["feature_group_count", "0 and 1"]),
    "negative groups": ({"batch_group_count": np.int64(-3)}, ["batch_group_count", "1 and -3"]),
    "both kinds of groups": (
        {"feature_group_count": np.int64(2), "batch_group_count": np.int64(2)},
        ["at most one", "2 and 2"],
    ),
    "huge group count": ({"feature_group_count": np.int64(2**62)}, []),
    "groups that do not divide": (
        {"g": GROUPED, "w": (7, 2, 3), "dy": (4, 7, 5)},
        ["multiple", "3", "(7, 2, 3)"],
    ),
    "batch groups that do not divide": (
        {"g": BATCH_GROUPED, "dx": (5, 2, 5)},
        ["batch_group_count 2", "(5, 2, 5)"],
    ),
    "attribute of another type": ({"window_strides": np.array([2, 1], np.int32)}, []),
    "scalar for a vector": ({"padding": np.int64(1)}, []),
    "vector for a scalar": ({"feature_group_count": ints(1)}, []),
    "flag that is a number": ({"allow_tf32": np.int64(1)}, []),
    "missing strides": ({"drop": ["window_strides"]}, []),
    "missing kernel": ({"drop": ["kernel"]}, []),
    "missing groups": ({"drop": ["feature_group_count", "batch_group_count"]}, []),
    "no attributes": ({"drop": list(custom_call.attributes(GEOMETRY, "cpu", None))}, []),
}


@pytest.mark.parametrize("name", ROWS)
def test_malformed_custom_call_is_refused(name):
    changes, fragments = ROWS[name]
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call_handler(**changes)
    message = str(caught.value)
    assert message.startswith("INVALID_ARGUMENT"), message
    if fragments:  # the others are refused by XLA's decoder, in its own words
        assert "convgrad_input_grad: " in message
    assert [part for part in fragments if part not in message] == [], message


@pytest.mark.parametrize("kernel", native.cpu.kernel_names() if native.cpu else [])
def test_too_small_workspace_is_refused(kernel):
    planned = oracles.plan(GEOMETRY, "float32", kernel)
    if planned is None or planned[1] == 0:
        pytest.skip(f"{kernel} wants no workspace here")
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"workspace must have {planned[1]} bytes"):
        call_handler(workspace=(planned[1] - 1,), kernel=kernel)


def test_another_kernel_runs_in_a_workspace_too_small_for_the_best():
    """A program of symbolic sizes, or of another version, may have brought less."""
    ones = np.ones(GEOMETRY.out_shape), np.ones(GEOMETRY.rhs_shape)
    expected = oracles.literal_input_grad(*ones, GEOMETRY)
    sizes = {
        oracles.plan(GEOMETRY, "float32", kernel)[1]
        for kernel in oracles.kernels_for(GEOMETRY, "float32")
    }
    assert len(sizes) > 1
    for size in sizes:
        dx, _ = call_handler(workspace=(max(size, 1),))  # of 0 bytes is none
        np.testing.assert_allclose(dx, expected, rtol=1e-6)
    assert min(sizes) == 0  # of direct, which is left where there is one byte


@pytest.mark.parametrize(
    ("static", "dims"), [((0, 0, 0, 0), (1, 1, 0, 1)), ((1, -1, -3, 0), (0, 1, 3, 4))]
)
def test_padding_as_the_shape_of_an_operand(static, dims):
    dx, _ = call_handler(padding=ints(*static), padding_operand=(0, *dims))
    np.testing.assert_array_equal(dx, call_handler()[0])


def test_four_operands_are_refused():
    attributes = custom_call.attributes(GEOMETRY, "cpu", None)
    results = [jax.ShapeDtypeStruct(s, t) for s, t in ((GEOMETRY.lhs_shape, "f4"), ((9999,), "u1"))]
    operands = [np.ones(GEOMETRY.out_shape, "f4"), np.ones(GEOMETRY.rhs_shape, "f4")]
    operands += [np.ones((0, 0, 0, 0, 0), np.uint8)] * 2
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"operands must be dy, w and at most one.*got 4"
    ):
        jax.block_until_ready(jax.ffi.ffi_call(native.TARGET, results)(*operands, **attributes))


def test_larger_workspace_is_taken():
    needed = oracles.plan(GEOMETRY, "float32")[1]
    small, _ = call_handler()
    large, _ = call_handler(workspace=(needed + 1000,))
    np.testing.assert_array_equal(small, large)


@pytest.mark.parametrize(("operands", "results"), [(1, 1), (1, 2), (2, 3)])
def test_wrong_number_of_buffers_is_refused(operands, results):
    attributes = custom_call.attributes(GEOMETRY, "cpu", None)
    workspace = jax.ShapeDtypeStruct((4096,), np.uint8)
    types = [jax.ShapeDtypeStruct(GEOMETRY.lhs_shape, np.float32), workspace, workspace]
    arrays = [np.ones(GEOMETRY.out_shape, "f4"), np.ones(GEOMETRY.rhs_shape, "f4")]
    call = jax.ffi.ffi_call(native.TARGET, types[:results])
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        jax.block_until_ready(call(*arrays[:operands], **attributes))


def test_the_call_that_the_rows_change_is_right(rng):
    for g in (GEOMETRY, GROUPED, BATCH_GROUPED):
        dx, _ = call_handler(g)
        ones = np.ones(g.out_shape), np.ones(g.rhs_shape)
        np.testing.assert_allclose(dx, oracles.literal_input_grad(*ones, g), rtol=1e-6)


def test_the_handler_serves_after_a_refusal():
    with pytest.raises(jax.errors.JaxRuntimeError):
        call_handler(dy=(1, 4, 9, 9))
    assert np.isfinite(call_handler()[0]).all()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"out_shape": (1, 4, 3, 3)}, "must be 2"),
        ({"dtype": "int32"}, "int32"),
        ({"kernel": "none"}, "'none'"),
        ({"window_strides": [2]}, "window_strides"),
    ],
)
def test_planner_refuses_what_the_handler_refuses(changes, fragment):
    changes = dict(changes)
    dtype = changes.pop("dtype", "float32")
    out_shape = changes.pop("out_shape", GEOMETRY.out_shape)
    attributes = {**custom_call.attributes(GEOMETRY, "cpu", None), **changes}
    with pytest.raises(ValueError, match=fragment):
        native.cpu.plan(dtype, GEOMETRY.lhs_shape, GEOMETRY.rhs_shape, out_shape, attributes)
