"""Gradients over several devices, in each of JAX's ways to say so: the same numbers.

In float64, against lax on one device. What devices say to each other is in
test_partition.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_convgrad
from jax_convgrad import conv_input_grad
from jax_convgrad.tools.collectives import collectives
from jax_convgrad.tools.geometries import normwise_error, tolerance

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("x64")]

PARAMS = {"window_strides": (2,), "padding": "SAME"}
ours = functools.partial(jax_convgrad.conv_general_dilated, **PARAMS)
theirs = functools.partial(lax.conv_general_dilated, **PARAMS)


def loss(conv):
    return lambda x, w: jnp.sum(jnp.sin(conv(x, w)))


def both(conv):
    return jax.grad(loss(conv), argnums=(0, 1))


def second(conv):
    """A loss that holds a gradient."""
    return lambda x, w: jnp.sum(jax.grad(loss(conv))(x, w) ** 3)


@pytest.fixture
def x(rng):
    return rng.standard_normal((16, 8, 32))


@pytest.fixture
def w(rng):
    return rng.standard_normal((16, 8, 3)) / 5


def check(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        # Sums of sums: longer ones than those of the convolution alone.
        assert normwise_error(a, b) <= tolerance("float64", 10_000)


def mesh_of(kind=AxisType.Auto, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def put(mesh, value, *spec):
    return jax.device_put(value, NamedSharding(mesh, P(*spec)))


def kernels(function, *args):
    """How many custom calls of this package a device runs."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return text.count(f'custom_call_target="{oracles.TARGET.strip("@(")}"')


# --- automatic: XLA's partitioner decides

AUTOMATIC = {
    "images": (P("d"), P()),
    "input channels": (P(None, "d"), P(None, "d")),
    "output channels": (P(), P("d")),
    # Over every axis: lax's own gradient for w is wrong by a factor where positions are cut
    # and an axis of the mesh is left over (JAX 0.10.2 on CPUs).
    "positions": (P(None, None, ("d", "m")), P()),
    "everything": (P(("d", "m")), P("m")),
    "images and channels": (P("d", "m"), P(None, "m")),
    "images and positions": (P("d", None, "m"), P("m")),
}


@pytest.mark.parametrize("name", AUTOMATIC)
@pytest.mark.parametrize("order", [both, second], ids=["first", "second order"])
def test_automatic(name, order, x, w):
    x_spec, w_spec = AUTOMATIC[name]
    mesh = mesh_of(d=4, m=2)
    gradient = order if order is both else lambda conv: jax.grad(second(conv), argnums=(0, 1))
    xs, ws = put(mesh, x, *x_spec), put(mesh, w, *w_spec)
    check(jax.jit(gradient(ours))(xs, ws), gradient(theirs)(x, w))


def test_installed(x, w):
    mesh = mesh_of(d=8)
    with jax_convgrad.installed():
        dx = jax.jit(jax.grad(loss(theirs)))
        xs, ws = put(mesh, x, "d"), put(mesh, w)
        check(dx(xs, ws), jax.grad(loss(theirs))(x, w))
        assert dx(xs, ws).sharding.spec[0] == "d"
        compiled = dx.lower(xs, ws).compile()
    assert collectives(compiled) == []
    assert oracles.TARGET.strip("@(") in compiled.as_text()


def test_shardings_of_jit(x, w):
    mesh = mesh_of(d=8)
    rows, whole = NamedSharding(mesh, P(None, None, "d")), NamedSharding(mesh, P())
    dx = jax.jit(
        jax.grad(loss(ours)), in_shardings=(whole, whole), out_shardings=rows
    )(x, w)  # fmt: skip
    assert dx.sharding == rows
    check(dx, jax.grad(loss(theirs))(x, w))


def test_sharding_constraints(x, w):
    mesh = mesh_of(d=4, m=2)

    def constrained(conv, *spec):
        def apply(x, w):
            return lax.with_sharding_constraint(conv(x, w), NamedSharding(mesh, P(*spec)))

        return apply

    for spec in (("d", "m"), ("m", None, "d"), (("m", "d"),)):
        check(jax.jit(both(constrained(ours, *spec)))(x, w), both(theirs)(x, w))


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("spmd_axis_name", [None, "d"])
def test_vmap_over_a_sharded_axis(x, w, in_axes, spmd_axis_name):
    mesh = mesh_of(d=8)
    operands, specs = [], []
    for value, axis in zip((x[:2], w), in_axes, strict=True):
        mapped = np.stack([value * (i + 1) for i in range(8)]) if axis == 0 else value
        operands.append(mapped)
        specs.append(P("d") if axis == 0 else P())
    placed = [put(mesh, v, *s) for v, s in zip(operands, specs, strict=True)]
    each = jax.vmap(both(ours), in_axes, spmd_axis_name=spmd_axis_name)
    check(jax.jit(each)(*placed), jax.vmap(both(theirs), in_axes)(*operands))


PARTS = {
    "finer than groups": ({"d": 8}, P(None, "d"), {"feature_group_count": 2}),
    "finer than three groups": ({"d": 6}, P(None, "d"), {"feature_group_count": 3}),
    "finer than groups, of two axes": ({"d": 4, "e": 2}, P("e", "d"), {"feature_group_count": 2}),
    "finer than batch groups": ({"d": 8}, P("d"), {"batch_group_count": 2}),
    "finer than batch groups, of two axes": ({"d": 4, "e": 2}, P("d"), {"batch_group_count": 2}),
}


@pytest.mark.thorough
@pytest.mark.parametrize("conv", [ours, theirs], ids=["function", "installed"])
@pytest.mark.parametrize("name", PARTS)
def test_dimensions_cut_over_parts_of_a_mesh_axis(rng, conv, name):
    """Compilation failed: XLA cuts the groups that a convolution makes of channels or images."""
    axes, spec, groups = PARTS[name]
    x = rng.standard_normal((48, 24, 12))
    w = rng.standard_normal((24, 24 // groups.get("feature_group_count", 1), 3)) / 5
    conv = functools.partial(conv, **groups)
    mesh = jax.sharding.Mesh(
        np.asarray(jax.devices()[: np.prod(list(axes.values()))]).reshape(*axes.values()),
        tuple(axes),
    )
    with jax_convgrad.installed(conv.func is theirs.func):
        actual = jax.jit(both(conv))(put(mesh, x, *spec), put(mesh, w))
    reference = functools.partial(lax.conv_general_dilated, **PARAMS, **groups)
    check(actual, both(reference)(x, w))


def test_microbatches_of_a_sharded_batch(x, w):
    """The batch's mesh axis is cut in two by the reshape, for the scan and for its body."""
    mesh = mesh_of(d=8)

    def accumulated(conv):
        def gradients(x, w):
            parts = x.reshape(2, x.shape[0] // 2, *x.shape[1:])
            total = jax.lax.scan(lambda acc, part: (acc + both(conv)(part, w)[1], ()), 0 * w, parts)
            return total[0], jax.lax.map(lambda part: both(conv)(part, w)[0], parts)

        return gradients

    actual = jax.jit(accumulated(ours))(put(mesh, x, "d"), put(mesh, w))
    check(actual, accumulated(theirs)(x, w))


def test_scan_of_a_sharded_layer(x, w):
    mesh = mesh_of(d=8)

    def repeated(conv):
        conv = functools.partial(conv.func, window_strides=(1,), padding="SAME")

        def apply(x, w):
            return lax.scan(lambda x, _: (jnp.tanh(conv(x, w)), None), x, None, length=3)[0].sum()

        return jax.grad(apply, argnums=(0, 1))

    square = w[:8]
    actual = jax.jit(repeated(ours))(put(mesh, x, "d"), put(mesh, square))
    check(actual, repeated(theirs)(x, square))


def test_one_device_of_eight(x, w):
    one = jax.device_put((x, w), jax.devices()[3])
    dx = jax.jit(jax.grad(loss(ours)))(*one)
    assert dx.devices() == {jax.devices()[3]}
    assert kernels(jax.grad(loss(ours)), *one) == 1
    check(dx, jax.grad(loss(theirs))(x, w))


def test_meshes_with_one_device(x, w):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[5:6])
    xs, ws = put(mesh, x, "d"), put(mesh, w)
    assert kernels(jax.grad(loss(ours)), xs, ws) == 1
    check(jax.jit(both(ours))(xs, ws), both(theirs)(x, w))


def test_the_older_partitioner_takes_lax(run_python):
    """A Shardy rule without Shardy would abort the process."""
    code = """
import jax, jax.numpy as jnp, numpy as np, sys
jax.config.update("jax_use_shardy_partitioner", False)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_convgrad import conv_input_grad
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(1)
dy, w = rng.standard_normal((8, 4, 16)).astype("f4"), rng.standard_normal((4, 6, 3)).astype("f4")
for spec in (P("d"), P(None, None, "d")):
    place = NamedSharding(mesh, spec)
    function = lambda dy, w, **kw: conv_input_grad(dy, w, (8, 6, 16), (1,), "SAME", **kw)
    split = jax.jit(function, in_shardings=(place, NamedSharding(mesh, P())))
    text = split.lower(dy, w).compile().as_text()
    assert "convgrad_input_grad" not in text
    assert spec != P("d") or "all-gather" not in text
    np.testing.assert_allclose(split(dy, w), function(dy, w), rtol=1e-4, atol=1e-4)
    native = jax.jit(lambda dy, w: function(dy, w, implementation="native"),
                     in_shardings=(place, NamedSharding(mesh, P())))
    try:
        native(dy, w)
    except ValueError as e:
        assert "GSPMD" in str(e) and 'implementation="xla"' in str(e), e
    else:
        raise AssertionError("native was not refused")
print("fine")
"""
    flag = "--xla_force_host_platform_device_count=8"
    result = run_python("-c", code, check=False, XLA_FLAGS=flag)
    if "jax_use_shardy_partitioner" in result.stderr:
        pytest.skip("this JAX has no other partitioner")
    assert result.stdout.endswith("fine\n"), result.stderr


def test_the_persistent_cache_tells_geometries_apart(run_python, tmp_path):
    """Of the same shapes and the same sharding rule, once also by JAX's own wish."""
    code = """
import jax, numpy as np, sys
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_convgrad import conv_input_grad
for name, value in {
    "jax_compilation_cache_dir": sys.argv[1],
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_remove_custom_partitioning_ptr_from_cache_key": True,
}.items():
    jax.config.update(name, value)
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(1)
dy, w = rng.standard_normal((8, 4, 16)).astype("f4"), rng.standard_normal((4, 4, 3)).astype("f4")
places = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
for pads in ((1, 1), (0, 2), (2, 0)):
    def dx(dy, w):
        return conv_input_grad(dy, w, (8, 4, 16), (1,), [pads])
    np.testing.assert_allclose(
        jax.jit(dx, in_shardings=places)(dy, w), jax.jit(dx)(dy, w), rtol=1e-4, atol=1e-4
    )
"""
    flag = "--xla_force_host_platform_device_count=8"
    for _ in range(2):  # into the cache, and out of it
        run_python("-c", code, str(tmp_path), XLA_FLAGS=flag)
    assert any(tmp_path.iterdir())


# --- manual: shard_map and pmap

MANUAL = {
    # specs of x and w, and the axes over which the convolution's result is a partial sum
    "images": (P("d"), P(), P("d"), None),
    "input channels": (P(None, "d"), P(None, "d"), P(), "d"),
    "output channels": (P(), P("d"), P(None, "d"), None),
}


def manual(conv, name, check_vma, mesh):
    x_spec, w_spec, y_spec, partial = MANUAL[name]

    def local(x, w):
        y = conv(x, w)
        return y if partial is None else lax.psum(y, partial)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=y_spec, check_vma=check_vma
    )


@pytest.mark.parametrize("name", MANUAL)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(name, check_vma, x, w):
    mesh = mesh_of(d=8)
    split = manual(ours, name, check_vma, mesh)
    check(jax.jit(both(split))(x, w), both(theirs)(x, w))
    assert kernels(jax.grad(loss(split)), x, w) == 1
    with jax_convgrad.installed():
        check(jax.jit(both(manual(theirs, name, check_vma, mesh)))(x, w), both(theirs)(x, w))


@pytest.mark.parametrize("conv", [ours, theirs], ids=["function", "installed"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_inside_shard_map(conv, check_vma, x, w):
    """The gradient of a replicated filter is the sum over devices, taken once."""

    def local(x, w):
        dx, dw = both(conv)(x, w)
        # With checking on, the transpose of the filter's cast to varying has summed it.
        return dx, dw if check_vma else lax.psum(dw, "d")

    split = jax.shard_map(
        local,
        mesh=mesh_of(d=8),
        in_specs=(P("d"), P()),
        out_specs=(P("d"), P()),
        check_vma=check_vma,
    )
    with jax_convgrad.installed(conv is theirs):
        actual = jax.jit(split)(x, w)
    check(actual, both(theirs)(x, w))


@pytest.mark.parametrize("check_vma", [True, False])
def test_second_order_inside_shard_map(check_vma, x, w):
    split = jax.shard_map(
        lambda x, w: lax.psum(second(ours)(x, w), "d"),
        mesh=mesh_of(d=8),
        in_specs=(P("d"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    check(jax.jit(jax.grad(split, argnums=(0, 1)))(x, w), jax.grad(second(theirs), (0, 1))(x, w))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_map_over_some_axes_only(check_vma, x, w):
    """The rest is XLA's to split, which the primitive does not do there: it says so."""
    mesh = mesh_of(d=4, m=2)

    def local(x, w, implementation=None):
        return ours(x, w, implementation=implementation)

    def split(implementation):
        return jax.shard_map(
            functools.partial(local, implementation=implementation),
            mesh=mesh,
            in_specs=(P("d"), P()),
            out_specs=P("d"),
            axis_names={"d"},
            check_vma=check_vma,
        )

    xs, ws = put(mesh, x, "d", "m"), put(mesh, w, None, "m")
    check(jax.jit(both(split(None)))(xs, ws), both(theirs)(x, w))
    with pytest.raises(ValueError, match="some axes of the mesh are manual"):
        jax.jit(both(split("native")))(xs, ws)


@pytest.mark.skipif(not hasattr(jax, "pmap"), reason="this JAX has no pmap")
def test_pmap(x, w):
    parts = x.reshape(8, 2, *x.shape[1:])
    dx = jax.pmap(jax.grad(loss(ours)), in_axes=(0, None))(parts, w)
    check(dx.reshape(x.shape), jax.grad(loss(theirs))(x, w))


# --- explicit: shardings are part of types

EXPLICIT = {
    # specs of x, w and the convolution's result, None for the one that lax infers
    "images": (P("d"), P(), None),
    "images and positions": (P("d", None, "m"), P(), None),
    "input channels": (P("d", "m"), P(None, "m"), P("d")),
    "output channels": (P("d"), P("m"), P("d", "m")),
    "both filter axes": (P(None, "d"), P("m", "d"), P(None, "m")),
}


@pytest.fixture
def explicit():
    with jax.set_mesh(mesh_of(AxisType.Explicit, d=4, m=2)):
        yield


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize("conv", [ours, theirs], ids=["function", "installed"])
@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit(conv, name, x, w):
    x_spec, w_spec, y_spec = EXPLICIT[name]
    split = functools.partial(conv, out_sharding=y_spec)
    xs, ws = jax.device_put(x, x_spec), jax.device_put(w, w_spec)
    with jax_convgrad.installed(conv is theirs):
        dx, dw = jax.jit(both(split))(xs, ws)
        assert kernels(jax.grad(loss(split)), xs, ws) == 1
    assert spec_of(dx) == spec_of(xs)
    assert spec_of(dw) == spec_of(ws)
    check((dx, dw), both(theirs)(x, w))


def spec_of(x):
    entries = jax.typeof(x).sharding.spec
    return [None if e in (None, ()) else e if isinstance(e, tuple) else (e,) for e in entries]


@pytest.mark.usefixtures("explicit")
def test_explicit_second_order(x, w):
    gradient = jax.grad(second(ours), argnums=(0, 1))
    actual = jax.jit(gradient)(jax.device_put(x, P("d", None, "m")), jax.device_put(w, P()))
    check(actual, jax.grad(second(theirs), argnums=(0, 1))(x, w))


def dx_of(x, dy, w, **kwargs):
    return conv_input_grad(dy, w, x.shape, **PARAMS, **kwargs)


# specs of dy and w, the inferred spec of dX or None where there is no such one
INFERRED = [
    (P("d"), P(), P("d")),
    (P("d"), P(None, "m"), P("d", "m")),
    (P(None, None, "d"), P(), P(None, None, "d")),
    (P(), P(), P()),
    (P("d", "m"), P("m"), None),
    (P(None, "m"), P(), None),
    (P(), P("m"), None),
    (P("d"), P(None, "d"), None),
]


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize(("dy_spec", "w_spec", "dx_spec"), INFERRED)
def test_explicit_types_of_the_gradient_alone(rng, x, w, dy_spec, w_spec, dx_spec):
    dy = rng.standard_normal((16, 16, 16))
    expected = dx_of(x, dy, w)
    dys, ws = jax.device_put(dy, dy_spec), jax.device_put(w, w_spec)
    if dx_spec is None:
        # As lax says it of the convolution.
        with pytest.raises(Exception, match="Please specify the output sharding via `out_shard"):
            dx_of(x, dys, ws)
        dx_spec = P("d") if dy_spec == P("d") else P()
        dx = dx_of(x, dys, ws, out_sharding=dx_spec)
    else:
        dx = dx_of(x, dys, ws)
    assert spec_of(dx) == spec_of(jax.device_put(x, dx_spec))
    check(dx, expected)


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize(("in_axes", "specs"), [
    ((0, None), (P("d"), P())),
    ((0, None), (P(None, "d"), P())),
    ((None, 0), (P("d"), P("m"))),
    ((None, 0), (P("d"), P(None, None, "m"))),
    ((0, 0), (P("m"), P("m"))),
    ((0, 0), (P("m", "d"), P("m"))),
    ((0, 0), (P(None, "d"), P())),
])  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2])
def test_explicit_under_vmap(rng, in_axes, specs, groups):
    if groups > 1 and specs[1] == P(None, None, "m"):
        pytest.skip("input channels of groups cannot be cut")
    shapes = (8, 8, 16), (8, 8 // groups, 3)
    dy, w = (
        rng.standard_normal(shape if axis is None else (4, *shape))
        for shape, axis in zip(shapes, in_axes, strict=True)
    )

    def dx(dy, w):
        return conv_input_grad(
            dy, w, (8, 8, 16), (1,), "SAME", feature_group_count=groups
        )  # fmt: skip

    each = jax.jit(jax.vmap(dx, in_axes))
    expected = each(dy, w)
    placed = [jax.device_put(v, s) for v, s in zip((dy, w), specs, strict=True)]
    check(each(*placed), expected)


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize("kind", ["feature_group_count", "batch_group_count"])
def test_explicit_groups(rng, kind):
    feature_groups = kind == "feature_group_count"
    dy_shape, w_shape, x_shape = (
        ((8, 8, 16), (8, 2, 3), (8, 8, 16)) if feature_groups else
        ((2, 8, 16), (8, 3, 3), (8, 3, 16))
    )  # fmt: skip
    dy, w = rng.standard_normal(dy_shape), rng.standard_normal(w_shape)
    dx = functools.partial(
        conv_input_grad, lhs_shape=x_shape, padding="SAME", **{kind: 4}
    )  # fmt: skip
    expected = dx(dy, w)
    split = dx(jax.device_put(dy, P(None, "d")), jax.device_put(w, P("d")))
    spec = P(None, "d") if feature_groups else P("d")
    assert spec_of(split) == spec_of(jax.device_put(expected, spec))
    check(split, expected)


@pytest.mark.usefixtures("explicit")
@pytest.mark.parametrize("named", [False, True])
def test_out_sharding_of_one_image(rng, named):
    """Its dimensions were taken for those of a batch of one."""
    dy, w = rng.standard_normal((16, 16)), rng.standard_normal((16, 8, 3))
    spec = P("m", "d")
    out = NamedSharding(jax.sharding.get_abstract_mesh(), spec) if named else spec
    dx = conv_input_grad(
        jax.device_put(dy, P("m")), jax.device_put(w, P()), (8, 16), padding="SAME",
        out_sharding=out,
    )  # fmt: skip
    assert spec_of(dx) == [("m",), ("d",)]
    with jax.set_mesh(None):
        check(dx, conv_input_grad(dy, w, (8, 16), padding="SAME"))


def test_lax_is_asked_for_on_two_meshes(x, w):
    """Programs with the primitives have one mesh and known devices; lax's have not."""
    xs = jax.device_put(x, NamedSharding(mesh_of(d=8), P("d")))
    ws = jax.device_put(w, NamedSharding(mesh_of(a=4, b=2), P()))
    asks = functools.partial(ours, implementation="xla")
    check(jax.jit(both(asks))(xs, ws), both(theirs)(x, w))
    abstract = NamedSharding(jax.sharding.AbstractMesh((8,), ("d",)), P("d"))
    traced = jax.jit(jax.grad(loss(asks))).trace(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=abstract),
        jax.ShapeDtypeStruct(w.shape, w.dtype),
    )
    assert "stablehlo.convolution" in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_out_sharding_needs_explicit_axes(x, w, rng):
    dy = rng.standard_normal((16, 16, 16))
    with jax.set_mesh(mesh_of(d=8)), pytest.raises(ValueError, match="with explicit axes"):
        dx_of(x, dy, w, out_sharding=P("d"))


# --- export


def exported(function, *args):
    return jax.export.export(
        jax.jit(function), platforms=["cpu"], disabled_checks=jax_convgrad.export_checks()
    )(*args).mlir_module()  # fmt: skip


def test_export_of_a_program_that_xla_splits(x, w):
    xs, ws = put(mesh_of(d=8), x, "d"), put(mesh_of(d=8), w)
    assert oracles.TARGET not in exported(both(ours), xs, ws)
    native = functools.partial(ours, implementation="native")
    with pytest.raises(ValueError, match='implementation="xla" always is'):
        exported(both(native), xs, ws)


def test_export_of_shard_map_and_of_one_device(x, w):
    split = manual(ours, "images", True, mesh_of(d=8))
    assert exported(both(split), x, w).count(oracles.TARGET) == 1
    assert exported(both(ours), x, w).count(oracles.TARGET) == 1
