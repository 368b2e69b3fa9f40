"""`residual` and `relu_mask` of `conv_input_grad`: the steps after the sum, done on the way."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import SEED
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import finish

import jax_convgrad
from jax_convgrad import conv_input_grad, native
from jax_convgrad.tools.geometries import make_geometry, named_cases, normwise_error, tolerance

G = make_geometry((9, 8), (3, 3), (6, 10), batch=8, stride=2, padding=1)
EPILOGUES = (("residual",), ("relu_mask",), ("residual", "relu_mask"))
ids = "+".join


def arrays_for(rng, names, g=G, dtype="float32"):
    """A residual and what a ReLU may have left: a third of it zeros."""
    values = rng.standard_normal((len(names), *g.lhs_shape)).astype(jnp.dtype(dtype))
    made = dict(zip(names, values, strict=True))
    if "relu_mask" in made:
        made["relu_mask"][rng.random(g.lhs_shape) < 1 / 3] = 0
    return made


def gradient(dy, w, *, g=G, implementation="native", **arrays):
    return conv_input_grad(
        dy, w, g.lhs_shape, **g.conv_params(), implementation=implementation, **arrays
    )


def written_out(dy, w, *, residual=None, relu_mask=None, **params):
    return finish(gradient(dy, w, **params), residual, relu_mask)


def same_bits(a, b):
    kind = {8: np.uint64, 4: np.uint32, 2: np.uint16}[a.dtype.itemsize]
    return np.array_equal(np.asarray(a).view(kind), np.asarray(b).view(kind))


# A third of the named cases in each run: the driver of the sanitizers takes them all.
CASES = [case for case in named_cases() if 0 not in case.geometry.lhs_shape][SEED % 3 :: 3]


@pytest.mark.native
@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kernel_has_the_bits_of_the_steps(rng, x64, case):
    g = case.geometry
    dtype = rng.choice(oracles.DTYPES)
    dy, w = oracles.operands(rng, g, dtype)
    named = arrays_for(rng, ("residual", "relu_mask"), g, dtype)
    absent = np.zeros(0, jnp.dtype(dtype))
    for kernel in oracles.kernels_for(g, dtype):
        chosen = EPILOGUES[rng.integers(len(EPILOGUES))]
        arrays = [named[name] if name in chosen else absent for name in named]
        fused = jax.jit(functools.partial(oracles.call_kernel, g=g, kernel=kernel, arrays=arrays))
        plain = jax.jit(functools.partial(oracles.call_kernel, g=g, kernel=kernel))
        expected = jax.jit(finish)(plain(dy, w), **{name: named[name] for name in chosen})
        assert same_bits(fused(dy, w), expected), (kernel, dtype, chosen)


@pytest.mark.native
@pytest.mark.parametrize("names", EPILOGUES, ids=ids)
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_it_is_one_call_and_its_bits_are_those_of_the_steps(rng, x64, names, dtype):
    dy, w = oracles.operands(rng, G, dtype)
    arrays = arrays_for(rng, names, dtype=dtype)
    expected = jax.jit(written_out)(dy, w, **arrays)
    assert same_bits(jax.jit(gradient)(dy, w, **arrays), expected)
    assert same_bits(gradient(dy, w, **arrays), expected)
    with jax.disable_jit():
        assert same_bits(gradient(dy, w, **arrays), expected)
    text = jax.jit(gradient).lower(dy, w, **arrays).as_text()
    assert text.count(oracles.FUSED_TARGET) == 1
    assert oracles.TARGET not in text
    assert "stablehlo.select" not in text
    assert "stablehlo.add" not in text


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("names", EPILOGUES, ids=ids)
def test_other_implementations(rng, names, implementation):
    dy, w = oracles.operands(rng, G, "float32")
    arrays = arrays_for(rng, names)
    reference = finish(oracles.lax_input_grad(dy, w, G), **arrays)
    dx = gradient(dy, w, implementation=implementation, **arrays)
    assert dx.dtype == jnp.float32
    assert normwise_error(dx, reference) <= tolerance("float32", 9 * 10)
    text = jax.jit(functools.partial(gradient, implementation="xla")).lower(dy, w, **arrays)
    assert "@convgrad" not in text.as_text()


def test_a_preferred_dtype_that_x64_would_have_to_allow(rng):
    """The residual had to be of a dtype that no array has."""
    dy, w, residual = jnp.ones((1, 3, 4, 4)), jnp.ones((3, 2, 2, 2)), jnp.ones((1, 2, 5, 5))
    wide = {"preferred_element_type": "float64"}
    dx = jax_convgrad.conv_input_grad(dy, w, residual.shape, residual=residual, **wide)
    assert dx.dtype == jnp.float32
    explanation = jax_convgrad.explain(residual, w, (1, 1), "VALID", **wide)
    assert explanation.dtype == "float32"


@pytest.mark.parametrize("installed", [False, True])
def test_x64_that_holds_inside_a_jitted_function_alone(rng, installed):
    """Its programs are lowered when it no longer holds."""
    function = lax.conv_general_dilated if installed else jax_convgrad.conv_general_dilated

    @jax.jit
    def f(x, w):
        with jax.enable_x64(True):
            y = function(x.astype("float64"), w.astype("float64"), (1, 1), "SAME")
            return y.astype("float32")

    x, w = (jnp.asarray(rng.standard_normal(s), "float32") for s in ((2, 3, 5, 5), (4, 3, 3, 3)))
    with jax_convgrad.installed(installed):
        np.testing.assert_allclose(f(x, w), lax.conv(x, w, (1, 1), "SAME"), rtol=1e-4, atol=1e-5)


def test_an_image_without_a_batch_axis(rng):
    dy, w = rng.standard_normal((5, 4, 4)), rng.standard_normal((5, 3, 3, 3))
    x = np.maximum(rng.standard_normal((3, 6, 6)), 0).astype(np.float32)
    plain = conv_input_grad(dy, w, x.shape)
    dx = conv_input_grad(dy, w, x.shape, residual=2 - x, relu_mask=x)
    np.testing.assert_array_equal(dx, finish(plain, 2 - x, x))


def test_what_a_mask_may_be(rng):
    dy, w = oracles.operands(rng, G, "float16")
    dx = gradient(dy, w)
    tiny = np.float32(1e-30)  # positive, and zero as a float16
    mask = rng.choice([-1, 0, tiny, 1, np.inf, -np.inf, np.nan], G.lhs_shape).astype(np.float32)
    passes = mask > 0
    for given in (mask, passes, passes.astype(np.int8), np.where(passes, 2.0, np.nan)):
        assert same_bits(gradient(dy, w, relu_mask=given), jnp.where(passes, dx, 0)), given.dtype


def test_a_wider_result(rng):
    dy, w = oracles.operands(rng, G, "bfloat16")
    arrays = arrays_for(rng, ("residual", "relu_mask"))
    dx = conv_input_grad(
        dy, w, G.lhs_shape, **G.conv_params(), preferred_element_type="float32", **arrays
    )
    assert dx.dtype == jnp.float32
    expected = finish(oracles.lax_input_grad(dy, w, G), **arrays)
    assert normwise_error(dx, expected) <= tolerance("float32", 9 * 10)


def test_integers_go_through_lax(rng):
    dy, w = (rng.integers(-4, 5, shape) for shape in (G.out_shape, G.rhs_shape))
    arrays = {name: rng.integers(-4, 5, G.lhs_shape) for name in ("residual", "relu_mask")}
    dx = gradient(dy, w, implementation=None, **arrays)
    expected = finish(oracles.lax_input_grad(dy, w, G), **arrays)
    np.testing.assert_array_equal(dx, expected)
    with pytest.raises(ValueError, match="dtype int"):
        gradient(dy, w, **arrays)


@pytest.mark.parametrize(
    ("error", "arrays", "message"),
    [
        (ValueError, {"residual": np.ones((1, 2), "f4")}, r"residual must have .*\(1, 2\)"),
        (ValueError, {"relu_mask": np.ones((1, 2))}, r"relu_mask must have .*\(1, 2\)"),
        (TypeError, {"residual": np.ones(G.lhs_shape, "f2")}, "residual must have .* float16"),
        (TypeError, {"relu_mask": np.ones(G.lhs_shape, "c8")}, "relu_mask must be real .* complex"),
        (TypeError, {"relu_mask": "positive"}, "relu_mask"),
        (TypeError, {"residual": object()}, "residual"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(rng, error, arrays, message):
    dy, w = oracles.operands(rng, G, "float32")
    with pytest.raises(error, match=message):
        gradient(dy, w, **arrays)


# --- transformations, each against the steps written out, in float64


def agree(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert normwise_error(a, b) <= tolerance("float64", 1000)


def loss_of(function, names):
    def loss(dy, w, *arrays):
        return jnp.sum(jnp.sin(function(dy, w, **dict(zip(names, arrays, strict=True)))))

    return loss


def inner_second(function, names):
    loss = loss_of(function, names)
    return lambda *operands: sum(jnp.sum(x**2) for x in jax.grad(loss, argnums=(0, 1))(*operands))


def transposed(function, names):
    """In dy alone, whatever else is known: the residual is then no part of the linear map."""

    def pull(dy, w, *arrays):
        named = dict(zip(names, arrays, strict=True))
        if function is written_out:
            named.pop("residual", None)
        f = functools.partial(function, w=w, **named)
        return jax.linear_transpose(f, dy)(jnp.cos(jnp.ones(G.lhs_shape)))

    return pull


def tangents(operands):
    return tuple(jnp.sin(3 * x) for x in operands)


TRANSFORMATIONS = {
    "jvp": lambda f, names: lambda *operands: jax.jvp(
        lambda dy, w, *arrays: f(dy, w, **dict(zip(names, arrays, strict=True))),
        operands,
        tangents(operands),
    ),
    "jvp_of_w": lambda f, names: lambda dy, w, *arrays: jax.jvp(
        lambda w: f(dy, w, **dict(zip(names, arrays, strict=True))), (w,), (jnp.sin(w),)
    ),
    "grad": lambda f, names: lambda *operands: jax.grad(
        loss_of(f, names), argnums=tuple(range(len(operands)))
    )(*operands),
    "grad_of_arrays": lambda f, names: lambda *operands: jax.grad(
        loss_of(f, names), argnums=tuple(range(2, len(operands)))
    )(*operands),
    "second": lambda f, names: lambda *operands: jax.grad(
        inner_second(f, names), argnums=(0, 1)
    )(*operands),
    "forward_over_reverse": lambda f, names: lambda *operands: jax.jvp(
        jax.grad(loss_of(f, names)), operands, tangents(operands)
    ),
    "checkpoint": lambda f, names: lambda *operands: jax.grad(
        jax.checkpoint(loss_of(f, names)), argnums=(0, 1)
    )(*operands),
    "linear_transpose": transposed,
    "scan": lambda f, names: lambda dy, w, *arrays: lax.scan(
        lambda w, _: (jnp.cos(w), f(dy, w, **dict(zip(names, arrays, strict=True)))),
        w,
        length=3,
    )[1],
}  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize(
    ("transformation", "names"),
    [
        *((transformation, EPILOGUES[-1]) for transformation in TRANSFORMATIONS),
        *itertools.product(("jvp", "grad", "linear_transpose"), EPILOGUES[:-1]),
    ],
    ids=lambda value: value if isinstance(value, str) else ids(value),
)
def test_transformation(rng, x64, transformation, names):
    transform = TRANSFORMATIONS[transformation]
    operands = oracles.operands(rng, G)
    operands += tuple(arrays_for(rng, names, dtype="float64").values())
    operands = tuple(map(jnp.asarray, operands))
    actual = jax.jit(transform(gradient, names))(*operands)
    agree(actual, jax.jit(transform(written_out, names))(*operands))


@pytest.mark.native
@pytest.mark.parametrize(
    "mapped",
    [(0, 0, 0, 0), (0, None, 0, 0), (None, 0, None, 0), (None, None, 1, None), (2, 1, None, None)],
    ids=str,
)
def test_vmap_of_any_operands(rng, x64, mapped):
    shapes = (G.out_shape, G.rhs_shape, G.lhs_shape, G.lhs_shape)
    operands = [
        rng.standard_normal(shape if axis is None else (*shape[:axis], 3, *shape[axis:]))
        for shape, axis in zip(shapes, mapped, strict=True)
    ]

    def call(function):
        def one(dy, w, residual, relu_mask):
            return function(dy, w, residual=residual, relu_mask=relu_mask)

        return jax.jit(jax.vmap(one, in_axes=mapped))(*operands)

    agree(call(gradient), call(written_out))


# --- several devices


def sharded_operands(rng, mesh, spec):
    dy, w = oracles.operands(rng, G)
    named = arrays_for(rng, ("residual", "relu_mask"), dtype="float64")
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
    whole = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
    return put(dy), whole, {name: put(x) for name, x in named.items()}


@pytest.mark.native
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_batch_stays_sharded(rng, x64, kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    spec = PartitionSpec("d")
    with jax.set_mesh(mesh):
        dy, w, arrays = sharded_operands(rng, mesh, spec)
        program = jax.jit(gradient).lower(dy, w, **arrays).compile()
        dx = program(dy, w, **arrays)
    assert dx.sharding.is_equivalent_to(NamedSharding(mesh, spec), dx.ndim)
    assert native.TARGET in program.as_text()
    assert "all-gather" not in program.as_text()
    plain = {name: np.asarray(x) for name, x in arrays.items()}
    expected = finish(oracles.lax_input_grad(dy, w, G), **plain)
    assert normwise_error(dx, expected) <= tolerance("float64", 1000)


@pytest.mark.native
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_has_the_fused_call(rng, x64, check_vma):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")
    one = make_geometry((9, 8), (3, 3), (6, 10), batch=1, stride=2, padding=1)
    dy, w, arrays = sharded_operands(rng, mesh, spec)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec, PartitionSpec(), spec, spec), out_specs=spec,
        check_vma=check_vma,
    )  # fmt: skip
    def mapped(dy, w, residual, relu_mask):
        return gradient(dy, w, g=one, residual=residual, relu_mask=relu_mask)

    assert oracles.FUSED_TARGET in mapped.lower(dy, w, *arrays.values()).as_text()
    plain = {name: np.asarray(x) for name, x in arrays.items()}
    expected = finish(oracles.lax_input_grad(dy, w, G), **plain)
    agree(mapped(dy, w, *arrays.values()), jnp.asarray(expected, jnp.float64))


# --- export


@pytest.mark.native
def test_exported_for_both_platforms_with_symbolic_sizes(rng):
    b, h = export.symbolic_shape("b, h")
    shapes = {"dy": (b, h, 8, 10), "w": G.rhs_shape, "x": (b, 2 * h, 16, 6)}
    specs = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}

    def call(dy, w, residual, x):
        return conv_input_grad(
            dy,
            w,
            x.shape,
            **{**G.conv_params(), "padding": "SAME"},
            residual=residual,
            relu_mask=x,
            implementation="native",
        )

    checks = jax_convgrad.export_checks()
    exported = export.export(jax.jit(call), platforms=["cpu"], disabled_checks=checks)(
        specs["dy"], specs["w"], specs["x"], specs["x"]
    )
    again = export.deserialize(exported.serialize())
    for batch, height in ((2, 3), (1, 5)):
        sizes = [tuple(batch if d is b else height if d is h else d for d in shapes["dy"])]
        dy, w, residual, x = (
            rng.standard_normal(shape).astype(np.float32)
            for shape in (*sizes, G.rhs_shape, *[(batch, 2 * height, 16, 6)] * 2)
        )
        np.testing.assert_array_equal(
            again.call(dy, w, residual, x), jax.jit(call)(dy, w, residual, x)
        )
