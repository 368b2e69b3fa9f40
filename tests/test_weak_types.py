"""Operands made of Python scalars have weak types: whatever lax makes of them, we make too."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jax_convgrad

CONV = {"window_strides": (2,), "padding": [(1, 1)]}
TRANSPOSED = {"strides": (2,), "padding": "SAME"}
# ours, what it is to equal, and whether under installed()
CASES = {
    "conv_general_dilated": (
        functools.partial(jax_convgrad.conv_general_dilated, **CONV),
        functools.partial(lax.conv_general_dilated, **CONV),
        False,
    ),
    "conv_transpose": (
        functools.partial(jax_convgrad.conv_transpose, **TRANSPOSED),
        functools.partial(lax.conv_transpose, **TRANSPOSED),
        False,
    ),
    "lax.conv_general_dilated": (functools.partial(lax.conv_general_dilated, **CONV),) * 2
    + (True,),
    "lax.conv_transpose": (functools.partial(lax.conv_transpose, **TRANSPOSED),) * 2 + (True,),
}


def types(convolution, x, w):
    """Of the result and of the two gradients: (dtype, weak_type)."""

    def all_three(x, w):
        y, vjp = jax.vjp(convolution, x, w)
        return y, *vjp(y)

    return [(a.dtype.name, a.weak_type) for a in jax.eval_shape(all_three, x, w)]


@pytest.mark.parametrize("preferred", [None, "float32"])
@pytest.mark.parametrize("weak", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_are_as_weak_as_those_of_lax(name, weak, preferred):
    x, w = (
        lax.broadcast(value, (1, 3, 3)) if is_weak else jnp.full((1, 3, 3), value, "float32")
        for value, is_weak in zip((2.0, 3.0), weak, strict=True)
    )
    assert (x.weak_type, w.weak_type) == weak
    ours, theirs, installed = (
        functools.partial(part, preferred_element_type=preferred) if callable(part) else part
        for part in CASES[name]
    )
    expected = types(theirs, x, w)
    with jax_convgrad.installed(installed):
        assert types(ours, x, w) == expected
