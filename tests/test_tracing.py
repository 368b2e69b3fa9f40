"""What users see of the convolution while it is traced: jaxprs, residuals, NaNs, refusals."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import print_saved_residuals
from jax.experimental import checkify
from transformations import POLICIES, names_the_convolution

import jax_convgrad

PARAMS = {"window_strides": (2, 1), "padding": [(1, 1), (0, 0)], "feature_group_count": 2}
ENTRY_POINTS = ("function", "install")


@pytest.fixture
def operands(rng):
    shapes = (2, 4, 7, 5), (6, 2, 3, 1)
    return [jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes]


def convolution(entry_point):
    function = (
        jax_convgrad.conv_general_dilated if entry_point == "function" else lax.conv_general_dilated
    )
    return functools.partial(function, **PARAMS)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_checkify_finds_nans_in_gradients(operands, entry_point):
    """As in those of lax; it knows lax's primitives by name."""
    x, w = operands
    conv = convolution(entry_point)

    def gradients(x, w, dy):
        return jax.vjp(conv, x, w)[1](dy)

    with jax_convgrad.installed(entry_point == "install"):
        dy = jnp.full_like(conv(x, w), jnp.inf)
        checked = checkify.checkify(jax.jit(gradients), errors=checkify.float_checks)
        for x_or_zero, w_or_zero in ((x, 0 * w), (0 * x, w)):
            error, _ = checked(x_or_zero, w_or_zero, dy)
            assert "nan generated" in error.get()
        assert checked(x, w, jnp.ones_like(dy))[0].get() is None


def primitives(jaxpr):
    """Names of the primitives of a jaxpr and of those inside it."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += primitives(inner)
    return found


def test_code_of_the_documentation(capsys):
    text = (pathlib.Path(__file__).parents[1] / "docs/transformations.md").read_text()
    keep, show = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(compile(keep, "transformations.md", "exec"), namespace)
    x = jnp.ones(3)
    assert jax.grad(jax.checkpoint(lambda x: x.sum(), policy=namespace["policy"]))(x).shape == (3,)
    exec(compile(show, "transformations.md", "exec"), {})
    (shown,) = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert "".join(shown.split()) in "".join(capsys.readouterr().out.split())


def test_jaxpr_of_the_convolution_names_it(operands):
    text = str(jax.make_jaxpr(convolution("function"))(*operands))
    assert "custom_vjp_call[\n      name=conv_general_dilated\n" in text


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_jaxpr_of_a_gradient_shows_the_geometry_on_one_line(operands, entry_point):
    loss = lambda x, w: jnp.sum(convolution(entry_point)(x, w) ** 2)  # noqa: E731
    with jax_convgrad.installed(entry_point == "install"):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(*operands)
    assert primitives(jaxpr.jaxpr).count("conv_input_grad") == 1
    assert (
        "= conv_input_grad[\n"
        "      geometry=x[2,4,7,5] w[6,2,3,1] y[2,6,4,5] NCHW/OIHW/NCHW window_strides=(2,1)"
        " padding=((1,1),(0,0)) feature_group_count=2\n"
    ) in str(jaxpr)


def residuals(capsys, function, *args):
    """What a differentiated function keeps, as text without the places in the source."""
    print_saved_residuals(function, *args)
    return sorted(line.split(" from /")[0] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint_policies_keep_what_they_keep_of_lax(operands, capsys, policy):
    def block(entry_point):
        conv = convolution(entry_point)
        function = lambda x, w: jnp.sin(conv(jnp.sin(x), w))  # noqa: E731
        return jax.checkpoint(function, policy=POLICIES[policy])

    expected = residuals(capsys, block("install"), *operands)
    assert residuals(capsys, block("function"), *operands) == expected
    kept = any("output of conv_general_dilated" in line for line in expected)
    assert kept == (policy in ("dots", "convolution", "dots_or_convolution"))


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_policy_that_names_the_primitive_keeps_an_input_gradient(operands, capsys, entry_point):
    """dots_saveable knows lax's two primitives only, so that a gradient is computed again."""
    x, w = operands

    def kept(policy):
        def block(x):
            conv = lambda x: jnp.sum(convolution(entry_point)(x, w) ** 3)  # noqa: E731
            return jnp.sin(jax.grad(conv)(x))

        with jax_convgrad.installed(entry_point == "install"):
            return residuals(capsys, jax.checkpoint(block, policy=policy), x)

    gradient = "f32[2,4,7,5] output of conv_input_grad"
    assert gradient in kept(names_the_convolution)
    assert gradient not in kept(jax.checkpoint_policies.dots_saveable)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_debug_nans_stops_at_a_nan_of_the_gradient(operands, entry_point):
    x, w = operands
    gradient = jax.jit(lambda dy, w: jax.vjp(lambda x: convolution(entry_point)(x, w), x)[1](dy))
    dy = jnp.ones((2, 6, 4, 5))
    with jax_convgrad.installed(entry_point == "install"), jax.debug_nans(True):
        gradient(dy, w)
        with pytest.raises(FloatingPointError, match="nan"):
            gradient(dy, w.at[0, 0, 0, 0].set(jnp.nan))


FORWARD_MODE = {
    "jvp": lambda conv, x, w: jax.jvp(conv, (x, w), (x, w)),
    "jacfwd": lambda conv, x, w: jax.jacfwd(conv, 1)(x, w),
    "linearize": lambda conv, x, w: jax.linearize(conv, x, w)[1](x, w),
    "linear_transpose": lambda conv, x, w: jax.linear_transpose(lambda x: conv(x, w), x)(
        conv(x, w)
    ),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused_by_the_function_and_served_by_install(operands, name):
    message = "forward-mode autodiff .* custom_vjp" if name != "linear_transpose" else "custom_vjp"
    with pytest.raises((TypeError, NotImplementedError), match=message):
        FORWARD_MODE[name](convolution("function"), *operands)
    with jax_convgrad.installed():
        FORWARD_MODE[name](convolution("install"), *operands)
