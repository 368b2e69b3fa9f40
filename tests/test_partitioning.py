"""Programs over several devices, each in a process with eight host devices."""

import pytest

PRELUDE = """
import functools, re
import jax, jax.numpy as jnp, numpy as np, oracles, jax_convgrad
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
assert len(jax.devices()) == 8
rng = np.random.default_rng(7)
x = rng.standard_normal((16, 6, 10)).astype("f4")
w = rng.standard_normal((4, 6, 3)).astype("f4")
params = dict(window_strides=(2,), padding="SAME")
ours = functools.partial(jax_convgrad.conv_general_dilated, **params)
theirs = functools.partial(lax.conv_general_dilated, **params)
def loss(conv):
    return lambda x, w: jnp.sum(jnp.sin(conv(x, w)))
expected = jax.grad(loss(theirs), argnums=(0, 1))(x, w)
def check(actual, wanted=expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
def collectives(compiled):
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return sorted(set(re.findall(names, compiled.as_text())))
"""

AUTOMATIC = """
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
def put(a, *spec):
    return jax.device_put(a, NamedSharding(mesh, P(*spec)))
xs, ws = put(x, "d"), put(w)
"""

PROGRAMS = {
    "batch sharded: dX needs no collective": """
dx = jax.jit(jax.grad(loss(ours)))
check(dx(xs, ws), expected[0])
assert dx(xs, ws).sharding.spec == P("d"), dx(xs, ws).sharding
assert collectives(dx.lower(xs, ws).compile()) == []
""",
    "batch sharded: dW is one all-reduce": """
both = jax.jit(jax.grad(loss(ours), argnums=(0, 1)))
check(both(xs, ws))
assert collectives(both.lower(xs, ws).compile()) == ["all-reduce"]
""",
    "input channels sharded": """
wide = np.tile(x, (1, 4, 1)), 0.1 * np.tile(w, (1, 4, 1))  # a sine of large sums would blur
check(
    jax.jit(jax.grad(loss(ours), argnums=(0, 1)))(put(wide[0], None, "d"), put(wide[1], None, "d")),
    jax.grad(loss(theirs), argnums=(0, 1))(*wide),
)
""",
    "output channels sharded": """
tall = np.tile(w, (2, 1, 1))
check(
    jax.jit(jax.grad(loss(ours), argnums=(0, 1)))(put(x), put(tall, "d")),
    jax.grad(loss(theirs), argnums=(0, 1))(x, tall),
)
""",
    "installed": """
with jax_convgrad.installed():
    dx = jax.jit(jax.grad(loss(theirs)))
    check(dx(xs, ws), expected[0])
    assert collectives(dx.lower(xs, ws).compile()) == []
""",
    "vmap over a sharded axis": """
per_example = jax.vmap(jax.grad(loss(ours)), (0, None))
check(jax.jit(per_example)(put(x[:, None], "d"), ws), expected[0][:, None])
""",
    "one device of eight": """
one = jax.device_put(x, jax.devices()[3]), jax.device_put(w, jax.devices()[3])
dx = jax.jit(jax.grad(loss(ours)))
check(dx(*one), expected[0])
assert dx(*one).devices() == {jax.devices()[3]}
if jax_convgrad.native.cpu is not None:
    assert dx.lower(*one).as_text().count(oracles.TARGET) == 1
""",
}

MANUAL = {
    "shard_map over the batch": """
sharded = jax.shard_map(ours, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
gradient = jax.jit(jax.grad(loss(sharded), argnums=(0, 1)))
check(gradient(x, w))
if jax_convgrad.native.cpu is not None:
    assert gradient.lower(x, w).as_text().count(oracles.TARGET) == 1
""",
    "gradient inside shard_map": """
def local(x, w):
    dx, dw = jax.grad(loss(ours), argnums=(0, 1))(x, w)
    return dx, dw
sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P()))
check(jax.jit(sharded)(x, w))
""",
    "shard_map over input channels": """
def partial_sum(x, w):
    return lax.psum(ours(x, w), "d")
wide = np.tile(x, (1, 4, 1)), 0.1 * np.tile(w, (1, 4, 1))  # a sine of large sums would blur
spec = P(None, "d")
sharded = jax.shard_map(partial_sum, mesh=mesh, in_specs=(spec, spec), out_specs=P())
check(
    jax.jit(jax.grad(loss(sharded), argnums=(0, 1)))(*wide),
    jax.grad(loss(theirs), argnums=(0, 1))(*wide),
)
""",
    "second order inside shard_map": """
def second(conv):
    return lambda x, w: jnp.sum(jax.grad(loss(conv))(x, w) ** 3)
local = jax.shard_map(
    lambda x, w: lax.psum(second(ours)(x, w), "d"),
    mesh=mesh, in_specs=(P("d"), P()), out_specs=P(),
)
check(
    jax.jit(jax.grad(local, argnums=(0, 1)))(x, w), jax.grad(second(theirs), argnums=(0, 1))(x, w)
)
""",
    "installed, inside shard_map": """
with jax_convgrad.installed():
    sharded = jax.shard_map(theirs, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    check(jax.jit(jax.grad(loss(sharded), argnums=(0, 1)))(x, w))
""",
    "pmap": """
parts = x.reshape(8, 2, *x.shape[1:])
gradient = jax.pmap(jax.grad(loss(ours)), in_axes=(0, None))
check(gradient(parts, w).reshape(x.shape), expected[0])
""",
}

EXPLICIT = {
    "batch sharded": """
with jax.set_mesh(mesh):
    xs, ws = jax.device_put(x, P("d")), jax.device_put(w, P())
    both = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(ours(x, w))), argnums=(0, 1)))
    dx, dw = both(xs, ws)
    assert jax.typeof(dx).sharding.spec[0] == "d", jax.typeof(dx)
    check((dx, dw))
""",
    "installed": """
with jax.set_mesh(mesh), jax_convgrad.installed():
    xs, ws = jax.device_put(x, P("d")), jax.device_put(w, P())
    check(jax.jit(jax.grad(loss(theirs), argnums=(0, 1)))(xs, ws))
""",
}


def run(run_python, *parts):
    run_python(
        "-W",
        "error",
        "-c",
        "".join(parts),
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        JAX_CONVGRAD="on",
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_partitioned_by_xla(run_python, name):
    run(run_python, PRELUDE, AUTOMATIC, PROGRAMS[name])


@pytest.mark.parametrize("name", MANUAL)
def test_manual_axes(run_python, name):
    run(run_python, PRELUDE, AUTOMATIC, MANUAL[name])


@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_axes(run_python, name):
    mesh = 'mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))\n'
    run(run_python, PRELUDE, mesh, EXPLICIT[name])


def test_the_older_partitioner(run_python):
    """With Shardy off, XLA's GSPMD must neither abort nor gather the batch."""
    switch = 'import jax; jax.config.update("jax_use_shardy_partitioner", False)\n'
    name = "batch sharded: dX needs no collective"
    parts = "".join([switch, PRELUDE, AUTOMATIC, PROGRAMS[name]])
    result = run_python(
        "-c", parts, check=False, XLA_FLAGS="--xla_force_host_platform_device_count=8"
    )
    if "jax_use_shardy_partitioner" in result.stderr:
        pytest.skip("this JAX has no other partitioner")
    assert result.returncode == 0, result.stderr
