"""Malformed calls of the public functions: what each message must name.

A row changes some arguments of a valid call. The message names the argument, what came
and what was expected, in every public function that takes the argument.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_convgrad

X, W, DY = np.ones((1, 2, 5, 5), "f4"), np.ones((4, 2, 3, 3), "f4"), np.ones((1, 4, 3, 3), "f4")
PARAMS = {"window_strides": (1, 1), "padding": "VALID"}


def conv_general_dilated(**changes):
    return jax_convgrad.conv_general_dilated(**{"lhs": X, "rhs": W, **PARAMS, **changes})


def explain(**changes):
    return jax_convgrad.explain(**{"lhs": X, "rhs": W, **PARAMS, **changes})


def conv_input_grad(**changes):
    arguments = {"dy": DY, "w": W, "lhs_shape": X.shape, **PARAMS, **changes}
    return jax_convgrad.conv_input_grad(**arguments)


def parse(**changes):
    arguments = {"lhs_shape": X.shape, "rhs_shape": W.shape, **PARAMS, **changes}
    return jax_convgrad.ConvGeometry.parse(**arguments)


def conv_transpose(**changes):
    arguments = {"lhs": np.ones((1, 5, 5, 2), "f4"), "rhs": np.ones((3, 3, 2, 4), "f4")}
    return jax_convgrad.conv_transpose(
        **{**arguments, "strides": (2, 2), "padding": "SAME", **changes}
    )


CONVOLUTIONS = (conv_general_dilated, explain, conv_input_grad)
GEOMETRIC = (*CONVOLUTIONS, parse)
OF_ARRAYS = (conv_general_dilated, explain)
ALL = (*CONVOLUTIONS, conv_transpose)


def dnums(lhs=(0, 1, 2, 3), rhs=(0, 1, 2, 3), out=(0, 1, 2, 3)):
    return lax.ConvDimensionNumbers(lhs, rhs, out)


# (functions, changed arguments, exception, what the message must contain)
ROWS = [
    (GEOMETRIC, {"window_strides": (1,)}, ValueError, ["window_strides", "(1,)", "2"]),
    (GEOMETRIC, {"window_strides": (1, 1, 1)}, ValueError, ["window_strides", "(1, 1, 1)", "2"]),
    (GEOMETRIC, {"window_strides": (0, 1)}, ValueError, ["window_strides", "(0, 1)", "from 1"]),
    (GEOMETRIC, {"window_strides": (-1, 1)}, ValueError, ["window_strides", "(-1, 1)", "from 1"]),
    (GEOMETRIC, {"window_strides": (1.5, 1)}, TypeError, ["window_strides", "1.5", "integer"]),
    (GEOMETRIC, {"window_strides": (True, 1)}, TypeError, ["window_strides", "True", "integer"]),
    (GEOMETRIC, {"window_strides": (None, 1)}, TypeError, ["window_strides", "None", "integer"]),
    (GEOMETRIC, {"window_strides": 2}, TypeError, ["window_strides", "got 2", "2 integers"]),
    (GEOMETRIC, {"window_strides": "11"}, TypeError, ["window_strides", "'11'", "2 integers"]),
    (
        GEOMETRIC,
        {"window_strides": (2**31, 1)},
        ValueError,
        ["window_strides", str(2**31), "2**31"],
    ),
    (GEOMETRIC, {"window_strides": np.ones((2, 2), int)}, TypeError, ["window_strides", "integer"]),
    (GEOMETRIC, {"lhs_dilation": (0, 1)}, ValueError, ["lhs_dilation", "(0, 1)", "from 1"]),
    (GEOMETRIC, {"lhs_dilation": (1,)}, ValueError, ["lhs_dilation", "(1,)", "2"]),
    (GEOMETRIC, {"lhs_dilation": 2}, TypeError, ["lhs_dilation", "got 2", "2 integers"]),
    (GEOMETRIC, {"lhs_dilation": (1, "a")}, TypeError, ["lhs_dilation", "'a'", "integer"]),
    (GEOMETRIC, {"rhs_dilation": (0, 1)}, ValueError, ["rhs_dilation", "(0, 1)", "from 1"]),
    (GEOMETRIC, {"rhs_dilation": (1, 1, 1)}, ValueError, ["rhs_dilation", "(1, 1, 1)", "2"]),
    (GEOMETRIC, {"rhs_dilation": 2.0}, TypeError, ["rhs_dilation", "2.0", "2 integers"]),
    (GEOMETRIC, {"rhs_dilation": (1, 2.5)}, TypeError, ["rhs_dilation", "2.5", "integer"]),
    (GEOMETRIC, {"padding": "FULL"}, ValueError, ["padding", "'FULL'", "SAME"]),
    (GEOMETRIC, {"padding": [(1, 1)]}, TypeError, ["padding", "got 1", "expected 2"]),
    (GEOMETRIC, {"padding": [(1, 1, 1), (0, 0)]}, ValueError, ["padding", "(1, 1, 1)", "pairs"]),
    (GEOMETRIC, {"padding": 1}, ValueError, ["padding", "got 1", "pairs"]),
    (GEOMETRIC, {"padding": None}, ValueError, ["padding", "None", "pairs"]),
    (GEOMETRIC, {"padding": [1, 1]}, ValueError, ["padding", "[1, 1]", "pairs"]),
    (GEOMETRIC, {"padding": [(0.5, 0), (0, 0)]}, ValueError, ["padding", "0.5", "pairs"]),
    (GEOMETRIC, {"padding": b"SAME"}, ValueError, ["padding", "b'SAME'", "string"]),
    (GEOMETRIC, {"padding": ["SAME", "SAME"]}, ValueError, ["padding", "['SAME'", "pairs"]),
    (GEOMETRIC, {"padding": [(2**31, 0), (0, 0)]}, ValueError, ["padding", str(2**31), "within"]),
    (GEOMETRIC, {"padding": [(-9, 0), (0, 0)]}, ValueError, ["padding", "-9", "(1, 2, 5, 5)"]),
    (
        GEOMETRIC,
        {"padding": "SAME", "lhs_dilation": (2, 1)},
        ValueError,
        ["padding", "'SAME'", "lhs_dilation=(2, 1)", "specify"],
    ),
    (
        GEOMETRIC,
        {"dimension_numbers": ("NCHW", "OIHW")},
        TypeError,
        ["dimension_numbers", "2", "3"],
    ),
    (GEOMETRIC, {"dimension_numbers": "NCHW"}, TypeError, ["dimension_numbers", "str", "tuple"]),
    (GEOMETRIC, {"dimension_numbers": 5}, TypeError, ["dimension_numbers", "int", "tuple"]),
    (
        GEOMETRIC,
        {"dimension_numbers": ("NCH", "OIHW", "NCHW")},
        TypeError,
        ["dimension_numbers[0]", "got 3", "ndim"],
    ),
    (
        GEOMETRIC,
        {"dimension_numbers": ("NCHH", "OIHW", "NCHW")},
        TypeError,
        ["dimension_numbers[0]", "NCHH", "duplicate"],
    ),
    (
        GEOMETRIC,
        {"dimension_numbers": ("NCHW", "OIXY", "NCHW")},
        TypeError,
        ["dimension_numbers", "OIXY", "same"],
    ),
    (
        GEOMETRIC,
        {"dimension_numbers": ("NCHW", None, "NCHW")},
        TypeError,
        ["dimension_numbers", "NoneType", "strings"],
    ),
    (
        GEOMETRIC,
        {"dimension_numbers": dnums(lhs=(0, 1, 2, 2))},
        ValueError,
        ["dimension_numbers.lhs_spec", "(0, 1, 2, 2)", "permutation"],
    ),
    (
        GEOMETRIC,
        {"dimension_numbers": dnums(rhs=(0, 1, 2))},
        ValueError,
        ["dimension_numbers.rhs_spec", "(0, 1, 2)", "permutation"],
    ),
    (
        GEOMETRIC,
        {"dimension_numbers": dnums(out=(0, 1, 2, 4))},
        ValueError,
        ["dimension_numbers.out_spec", "(0, 1, 2, 4)", "permutation"],
    ),
    (
        GEOMETRIC,
        {"dimension_numbers": dnums(out=(0, 1, 2, "W"))},
        TypeError,
        ["dimension_numbers.out_spec", "'W'", "integer"],
    ),
    (GEOMETRIC, {"feature_group_count": 0}, ValueError, ["feature_group_count", "0", "positive"]),
    (GEOMETRIC, {"feature_group_count": -2}, ValueError, ["feature_group_count", "-2", "positive"]),
    (GEOMETRIC, {"feature_group_count": 1.5}, TypeError, ["feature_group_count", "1.5", "integer"]),
    (GEOMETRIC, {"feature_group_count": "2"}, TypeError, ["feature_group_count", "'2'", "integer"]),
    (
        GEOMETRIC,
        {"feature_group_count": True},
        TypeError,
        ["feature_group_count", "True", "integer"],
    ),
    (GEOMETRIC, {"feature_group_count": 3}, ValueError, ["feature_group_count", "3", "divide 2"]),
    (GEOMETRIC, {"feature_group_count": 2}, ValueError, ["feature_group_count", "2 // 2 != 2"]),
    (GEOMETRIC, {"batch_group_count": 0}, ValueError, ["batch_group_count", "0", "positive"]),
    (GEOMETRIC, {"batch_group_count": None}, TypeError, ["batch_group_count", "None", "integer"]),
    (GEOMETRIC, {"batch_group_count": 2.0}, TypeError, ["batch_group_count", "2.0", "integer"]),
    (GEOMETRIC, {"batch_group_count": 3}, ValueError, ["batch_group_count", "3", "divide 1"]),
    (
        GEOMETRIC,
        {"batch_group_count": 2, "feature_group_count": 2},
        ValueError,
        ["batch_group_count=2", "feature_group_count=2", "At most one"],
    ),
    (ALL, {"implementation": "cuda"}, ValueError, ["implementation", "'cuda'", "'native'"]),
    (ALL, {"implementation": True}, ValueError, ["implementation", "True", "'xla'"]),
    (ALL, {"implementation": ["xla"]}, ValueError, ["implementation", "['xla']", "None"]),
    (ALL, {"precision": "best"}, ValueError, ["Precision", "best", "highest"]),
    (ALL, {"precision": 3}, ValueError, ["Precision", "3", "highest"]),
    (ALL, {"preferred_element_type": "float99"}, TypeError, ["preferred_element_type", "float99"]),
    (ALL, {"preferred_element_type": 3}, TypeError, ["preferred_element_type", "got 3", "dtype"]),
    (ALL, {"preferred_element_type": "complex64"}, TypeError, ["preferred_element_type", "kind"]),
    (ALL, {"implementation": np.array("xla")}, ValueError, ["implementation", "array", "'native'"]),
    (ALL, {"implementation": np.array([1, 2])}, ValueError, ["implementation", "[1, 2]"]),
    (CONVOLUTIONS, {"out_sharding": "x"}, TypeError, ["out_sharding", "'x'", "PartitionSpec"]),
    (
        (conv_input_grad,),
        {"out_sharding": jax.sharding.PartitionSpec("x")},
        ValueError,
        ["out_sharding", "'x'", "explicit"],
    ),
    (GEOMETRIC, {"window_strides": np.array(2)}, TypeError, ["window_strides", "2 integers"]),
    (GEOMETRIC, {"rhs_dilation": jnp.array(2)}, TypeError, ["rhs_dilation", "2 integers"]),
    ((conv_input_grad,), {"lhs_shape": np.array(3)}, TypeError, ["lhs_shape", "array(3)"]),
    (
        GEOMETRIC,
        {"dimension_numbers": lax.ConvDimensionNumbers(5, (0, 1, 2, 3), (0, 1, 2, 3))},
        TypeError,
        ["dimension_numbers.lhs_spec", "got 5", "4 dimensions"],
    ),
    (
        (conv_input_grad,),
        {"dy": DY[0], "lhs_shape": X.shape[1:], "dimension_numbers": ("NCHW", "OIHW", "NCHW")},
        TypeError,
        ["dimension_numbers", "'NCHW'", "'CHW'", "without a batch axis"],
    ),
    (
        (conv_input_grad,),
        {"dy": DY[0], "lhs_shape": X.shape[1:], "dimension_numbers": 5},
        TypeError,
        ["dimension_numbers", "got 5", "'CHW'"],
    ),
    (
        (conv_general_dilated, conv_transpose),
        {"lhs": jax.ShapeDtypeStruct(X.shape, "float32")},
        TypeError,
        ["lhs", "array", "ShapeDtypeStruct"],
    ),
    (OF_ARRAYS, {"lhs": np.full(X.shape, None)}, TypeError, ["lhs", "numbers", "object"]),
    (OF_ARRAYS, {"rhs": np.full(W.shape, "w")}, TypeError, ["rhs", "numbers", "U1"]),
    (OF_ARRAYS, {"lhs": jax.random.key(0)}, TypeError, ["lhs", "numbers", "key"]),
    (
        ALL,
        {"preferred_element_type": jnp.bfloat16},
        TypeError,
        ["preferred_element_type", "narrower"],
    ),
    (ALL, {"preferred_element_type": jnp.int32}, TypeError, ["preferred_element_type"]),
    (OF_ARRAYS, {"lhs": [1.0, 2.0]}, TypeError, ["lhs", "list", "array"]),
    (OF_ARRAYS, {"rhs": None}, TypeError, ["rhs", "NoneType", "array"]),
    (OF_ARRAYS, {"lhs": 1.0}, TypeError, ["lhs", "float", "array"]),
    (OF_ARRAYS, {"lhs": X[0]}, ValueError, ["lhs and rhs", "(2, 5, 5)", "(4, 2, 3, 3)"]),
    (OF_ARRAYS, {"lhs": X[0, 0, 0], "rhs": X[0, 0, 0]}, ValueError, ["lhs", "(5,)", "2 dim"]),
    (OF_ARRAYS, {"lhs": np.ones((1, 3, 5, 5), "f4")}, ValueError, ["lhs feature", "3 // 1 != 2"]),
    (OF_ARRAYS, {"rhs": W.astype("f2")}, TypeError, ["dtypes", "float32", "float16"]),
    ((parse,), {"lhs_shape": (1, 2, -5, 5)}, ValueError, ["lhs shape", "-5", "negative"]),
    ((parse,), {"rhs_shape": (4, 2, 3, 3.0)}, TypeError, ["rhs shape", "3.0", "integer"]),
    ((parse,), {"lhs_shape": (1, 2, 5)}, ValueError, ["lhs and rhs", "(1, 2, 5)"]),
    ((parse,), {"lhs_shape": (3,), "rhs_shape": (3,)}, ValueError, ["lhs", "(3,)", "at least 2"]),
    ((conv_input_grad,), {"dy": None}, TypeError, ["dy", "NoneType", "array"]),
    ((conv_input_grad,), {"w": [[1.0]]}, TypeError, ["w must", "list", "array"]),
    ((conv_input_grad,), {"w": W.astype("f2")}, TypeError, ["dtypes", "float32", "float16 for w"]),
    ((conv_input_grad,), {"dy": DY[..., :2]}, ValueError, ["dy", "(1, 4, 3, 2)", "(1, 4, 3, 3)"]),
    ((conv_input_grad,), {"dy": DY[0]}, ValueError, ["dy", "(4, 3, 3)", "(1, 4, 3, 3)"]),
    (
        (conv_input_grad,),
        {"dy": DY[0], "lhs_shape": (2, 6, 6)},
        ValueError,
        ["dy", "(4, 3, 3)", "(4, 4, 4)", "(2, 6, 6)"],
    ),
    (
        (conv_input_grad,),
        {"dy": DY[0], "lhs_shape": (2, 5, 5), "dimension_numbers": dnums()},
        TypeError,
        ["dimension_numbers", "ConvDimensionNumbers", "('CHW', 'OIHW', 'CHW')"],
    ),
    ((conv_input_grad,), {"lhs_shape": 5}, TypeError, ["lhs_shape", "5", "sequence"]),
    ((conv_input_grad,), {"lhs_shape": "NCHW"}, TypeError, ["lhs_shape", "'NCHW'", "sequence"]),
    ((conv_input_grad,), {"lhs_shape": (1, 2, 5)}, ValueError, ["(1, 2, 5)", "(4, 2, 3, 3)"]),
    ((conv_input_grad,), {"lhs_shape": (1, 2, 5, -5)}, ValueError, ["lhs shape", "-5"]),
    ((conv_input_grad,), {"lhs_shape": (1, 2, 5, 5.5)}, TypeError, ["lhs shape", "5.5"]),
    ((conv_transpose,), {"lhs": None}, TypeError, ["lhs", "NoneType", "array"]),
    ((conv_transpose,), {"rhs": 3.0}, TypeError, ["rhs", "float", "array"]),
    ((conv_transpose,), {"lhs": X[0]}, ValueError, ["lhs", "(2, 5, 5)", "(3, 3, 2, 4)"]),
    ((conv_transpose,), {"rhs": np.ones((3, 3, 2, 4), "f2")}, TypeError, ["dtypes", "float16"]),
    ((conv_transpose,), {"strides": (0, 1)}, ValueError, ["strides", "(0, 1)", "from 1"]),
    ((conv_transpose,), {"strides": (2,)}, ValueError, ["strides", "(2,)", "2"]),
    ((conv_transpose,), {"strides": 2}, TypeError, ["strides", "got 2", "sequence"]),
    ((conv_transpose,), {"strides": (1.5, 2)}, TypeError, ["strides", "1.5", "integer"]),
    ((conv_transpose,), {"rhs_dilation": (1, 0)}, ValueError, ["rhs_dilation", "(1, 0)", "from 1"]),
    ((conv_transpose,), {"rhs_dilation": (1,)}, ValueError, ["rhs_dilation", "(1,)", "2"]),
    ((conv_transpose,), {"padding": "FULL"}, ValueError, ["padding", "'FULL'", "'SAME'"]),
    (
        (conv_transpose,),
        {"padding": "SAME_LOWER"},
        ValueError,
        ["padding", "SAME_LOWER", "'VALID'"],
    ),
    ((conv_transpose,), {"padding": 2}, ValueError, ["padding", "got 2", "pairs"]),
    ((conv_transpose,), {"padding": [(1, 1)]}, TypeError, ["padding", "expected 2", "got 1"]),
    ((conv_transpose,), {"padding": [(1.5, 1), (0, 0)]}, ValueError, ["padding", "1.5", "pairs"]),
    ((conv_transpose,), {"padding": [(-20, 0), (0, 0)]}, ValueError, ["padding", "-20"]),
    (
        (conv_transpose,),
        {"dimension_numbers": ("NHWC", "HWIO")},
        TypeError,
        ["dimension_numbers", "2", "3"],
    ),
    ((conv_transpose,), {"transpose_kernel": True}, ValueError, ["lhs feature", "2", "4"]),
    (
        (conv_transpose,),
        {"rhs": np.ones((3, 3, 5, 4), "f4")},
        ValueError,
        ["feature", "2 // 1 != 5"],
    ),
    ((explain,), {"platform": 3}, TypeError, ["platform", "3"]),
]

CALLS = [(function, *row[1:]) for row in ROWS for function in row[0]]


def call_id(value):
    if callable(value) and not isinstance(value, type):
        return value.__name__
    if isinstance(value, dict):
        return re.sub(r"\W+", "_", ",".join(f"{k}={shown(v)}" for k, v in value.items()))
    return ""


def shown(value):
    return f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)


@pytest.mark.parametrize(("function", "changes", "error", "fragments"), CALLS, ids=call_id)
def test_malformed_call_is_explained(function, changes, error, fragments):
    with pytest.raises(error) as caught:
        function(**changes)
    assert type(caught.value) is error, "a subclass says something else"
    message = str(caught.value)
    assert [part for part in fragments if part not in message] == [], message


@pytest.mark.parametrize("function", [*ALL, parse])
def test_the_call_that_the_rows_change_is_valid(function):
    assert function() is not None


@pytest.mark.parametrize("function", [*ALL, parse])
def test_message_names_the_function(function):
    strides = "strides" if function is conv_transpose else "window_strides"
    name = "conv_general_dilated" if function is parse else function.__name__
    with pytest.raises(ValueError, match=f"^{name} "):
        function(**{strides: (0, 0)})
