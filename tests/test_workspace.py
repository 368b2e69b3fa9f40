"""Workspaces: which calls bring one as a result, and which have that of their thread.

Calls that bring one share its memory, so that XLA runs them one after another.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax

import jax_convgrad
from jax_convgrad import native
from jax_convgrad.maps import FILTER_GRAD, FORWARD, INPUT_GRAD
from jax_convgrad.tools.geometries import make_geometry

pytestmark = pytest.mark.native

MAPS = (FORWARD, INPUT_GRAD, FILTER_GRAD)
SMALL = make_geometry((5, 6), (3, 3), (20, 24), batch=3, padding=1)
LARGE = make_geometry((5, 6), (3, 3), (200, 240), batch=3, padding=1)
CALLS = 24


def operands_of(rng, g, map_):
    """Random operands of a map, in its order."""
    return [
        jnp.asarray(rng.standard_normal(oracles.shape_of_role(g, role)), jnp.float32)
        for role in map_.operands
    ]


def call(map_, g, kernel, brought, *operands):
    """A map's result by the handler, where the call brings so many bytes, or no workspace."""
    return oracles._call(*operands, g, (kernel, brought), "cpu", None, map_=map_)[0]


@pytest.mark.parametrize("map_", MAPS, ids=lambda map_: map_.name)
def test_every_kernel_has_the_same_bits_in_the_workspace_of_its_thread(rng, map_):
    operands = operands_of(rng, SMALL, map_)
    wanted = []
    for kernel in oracles.kernels_for(SMALL, "float32", map_=map_):
        _, workspace_bytes = oracles.plan(SMALL, "float32", kernel, map_=map_)
        wanted.append(workspace_bytes)
        expected = call(map_, SMALL, kernel, workspace_bytes, *operands)
        for brought in (None, 0):
            dx = call(map_, SMALL, kernel, brought, *operands)
            np.testing.assert_array_equal(dx, expected, err_msg=f"{kernel} {brought}")
    assert max(wanted) > 0


def test_the_workspace_of_a_thread_has_a_limit(rng):
    operands = operands_of(rng, LARGE, INPUT_GRAD)
    _, workspace_bytes = oracles.plan(LARGE, "float32", "gemm")
    assert workspace_bytes > native.cpu.scratch_bytes
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"must have {workspace_bytes} bytes, got 0"
    ):
        jax.block_until_ready(call(INPUT_GRAD, LARGE, "gemm", None, *operands))


@pytest.mark.parametrize("map_", MAPS, ids=lambda map_: map_.name)
@pytest.mark.parametrize("g", [SMALL, LARGE], ids=["small", "large"])
def test_only_large_workspaces_are_brought(map_, g):
    function = {
        FORWARD: lambda x, w, _: jax_convgrad.conv_general_dilated(
            x, w, **g.conv_params(), implementation="native"
        ),
        INPUT_GRAD: lambda x, w, dy: jax_convgrad.conv_input_grad(
            dy, w, x.shape, **g.conv_params(), implementation="native"
        ),
        FILTER_GRAD: lambda x, w, dy: jax_convgrad.conv_filter_grad(
            x, dy, w.shape, **g.conv_params(), implementation="native"
        ),
    }[map_]
    shapes = (g.lhs_shape, g.rhs_shape, g.out_shape)
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    _, workspace_bytes = oracles.plan(g, "float32", map_=map_)
    is_large = workspace_bytes > native.cpu.scratch_bytes
    assert workspace_bytes > 0
    assert is_large == (g is LARGE)
    text = jax.jit(function).lower(*arguments).as_text()
    assert f"@{map_.target}(" in text
    assert (f"tensor<{workspace_bytes}xui8>" in text) == is_large
    assert ("xui8>" in text) == is_large


def test_independent_calls_share_no_memory(rng):
    """XLA keeps no temporary for them, so that nothing orders them; and all are right."""
    g = SMALL
    xs = [rng.standard_normal(g.lhs_shape).astype(np.float32) for _ in range(CALLS)]
    ws = [rng.standard_normal(g.rhs_shape).astype(np.float32) for _ in range(CALLS)]

    def one(x, w):
        return jax_convgrad.conv_general_dilated(x, w, **g.conv_params(), implementation="native")

    program = jax.jit(lambda xs, ws: [one(x, w) for x, w in zip(xs, ws, strict=True)])
    compiled = program.lower(xs, ws).compile()
    tables_bytes = 64 * CALLS  # of pointers to a call's results
    assert compiled.memory_analysis().temp_size_in_bytes <= tables_bytes
    alone = [np.asarray(jax.jit(one)(x, w)) for x, w in zip(xs, ws, strict=True)]
    expected = [
        np.asarray(lax.conv_general_dilated(x, w, **g.conv_params(), precision="highest"))
        for x, w in zip(xs, ws, strict=True)
    ]
    for _ in range(20):
        for y, same, close in zip(compiled(xs, ws), alone, expected, strict=True):
            np.testing.assert_array_equal(y, same)
            np.testing.assert_allclose(y, close, atol=1e-5 * math.sqrt(9 * 20))
