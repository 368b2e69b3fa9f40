"""Libraries built on lax's convolution train the same under install(), on the kernel.

One small net in each of them: a strided convolution, a depthwise one and a transposed one
that undoes the stride. In float32, and in the mixed precision that each library offers:
parameters in float32, activations in bfloat16.
"""

import importlib
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jax_convgrad
from jax_convgrad import integration
from jax_convgrad.tools import geometries

REQUIRE = "JAX_CONVGRAD_REQUIRE_LIBRARIES"
WIDTH = 6
# Of the loss, and of the momentum after two steps. Both sides of a step in bfloat16 round,
# each in its own order.
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}


def library(name):
    """Imports it, or skips the test, or fails where that is forbidden."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{e}, and {REQUIRE}=1", pytrace=False)
        pytest.skip(str(e))


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    jax_convgrad.uninstall()


# --- the net in each library: from a dtype for the activations to (parameters, apply),
# where apply maps (parameters, [N, H, W, 3]) to an array of the same shape.


def flax_nnx(dtype):
    nnx = library("flax.nnx")
    kwargs = {"dtype": dtype, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    net = nnx.Sequential(
        nnx.Conv(3, WIDTH, (3, 3), strides=2, **kwargs),
        jax.nn.gelu,
        nnx.Conv(WIDTH, WIDTH, (3, 3), feature_group_count=WIDTH, **kwargs),
        jax.nn.gelu,
        nnx.ConvTranspose(WIDTH, 3, (4, 4), strides=(2, 2), **kwargs),
    )
    graph, params = nnx.split(net)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def flax_linen(dtype):
    linen = library("flax.linen")
    kwargs = {"dtype": dtype, "param_dtype": jnp.float32}
    net = linen.Sequential(
        [
            linen.Conv(WIDTH, (3, 3), strides=2, **kwargs),
            jax.nn.gelu,
            linen.Conv(WIDTH, (3, 3), feature_group_count=WIDTH, **kwargs),
            jax.nn.gelu,
            linen.ConvTranspose(3, (4, 4), strides=(2, 2), **kwargs),
        ]
    )
    return net.init(jax.random.key(0), jnp.ones((1, 8, 8, 3))), net.apply


def equinox(dtype):
    eqx = library("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, key=keys[1]),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.ConvTranspose2d(WIDTH, 3, 4, stride=2, padding=1, key=keys[2]),
        ]
    )
    params, static = eqx.partition(net, eqx.is_array)

    def apply(params, x):
        # Equinox has no switch: casting the parameters and one image at a time is its way.
        net = eqx.combine(jax.tree.map(lambda p: p.astype(dtype), params), static)
        return jax.vmap(net)(x.astype(dtype).transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)

    return params, apply


def haiku(dtype):
    hk, jmp = library("haiku"), library("jmp")

    class Net(hk.Module):
        def __call__(self, x):
            x = jax.nn.gelu(hk.Conv2D(WIDTH, 3, stride=2)(x))
            x = jax.nn.gelu(hk.Conv2D(WIDTH, 3, feature_group_count=WIDTH)(x))
            return hk.Conv2DTranspose(3, 4, stride=2)(x)

    policy = jmp.Policy(param_dtype=jnp.float32, compute_dtype=dtype, output_dtype=dtype)
    hk.mixed_precision.set_policy(Net, policy)
    net = hk.without_apply_rng(hk.transform(lambda x: Net()(x)))
    return net.init(jax.random.key(0), jnp.ones((1, 8, 8, 3))), net.apply


def keras_net(dtype):
    keras = library("keras")
    keras.utils.set_random_seed(0)
    policy = keras.DTypePolicy("float32" if dtype == jnp.float32 else "mixed_bfloat16")
    layers, kwargs = keras.layers, {"padding": "same", "dtype": policy}
    return keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(WIDTH, 3, strides=2, activation="gelu", **kwargs),
            layers.DepthwiseConv2D(3, activation="gelu", **kwargs),
            layers.Conv2DTranspose(3, 4, strides=2, **kwargs),
        ]
    )


def keras(dtype):
    net = keras_net(dtype)
    params = [variable.value for variable in net.trainable_variables]
    return params, lambda params, x: net.stateless_call(params, [], x)[0]


NETS = [flax_nnx, flax_linen, equinox, haiku, keras]


@pytest.fixture
def batch(rng):
    return [jnp.asarray(rng.standard_normal((4, 8, 8, 3)), "float32") for _ in range(2)]


def training_step(apply, optimizer):
    optax = library("optax")

    def step(params, state, x, target):
        def loss(params):
            return jnp.mean((apply(params, x).astype("float32") - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step)


def train(net, dtype, batch):
    """The losses of two steps, the momentum of each parameter, and the program.

    The momentum sums the gradients. What the steps change in a parameter does not do: where it
    is a thousandth of the parameter, the rounding of the parameter alone is 1e-5 of it.
    """
    optimizer = library("optax").sgd(0.1, momentum=0.9)
    params, apply = net(dtype)
    step, state, losses = training_step(apply, optimizer), optimizer.init(params), []
    text = step.lower(params, state, *batch).as_text()
    for _ in range(2):
        params, state, loss = step(params, state, *batch)
        losses.append(loss)
    momentum = [np.asarray(leaf, "f8") for leaf in jax.tree.leaves(state)]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    return losses, momentum, text


def error(actual, expected):
    """The largest normwise error of the losses and of the momentum of each parameter."""
    pairs = [(actual[0], expected[0]), *zip(actual[1], expected[1], strict=True)]
    return max(geometries.normwise_error(np.asarray(a), np.asarray(b)) for a, b in pairs)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("net", NETS)
def test_two_steps_of_training(batch, net, dtype):
    expected = train(net, jnp.dtype(dtype), batch)
    jax_convgrad.install()
    actual = train(net, jnp.dtype(dtype), batch)
    jax_convgrad.uninstall()
    assert error(actual, expected) <= BOUNDS[dtype]
    assert len(actual[1]) == len(expected[1]) > 0
    assert all(np.any(leaf) for leaf in actual[1])
    targets = oracles.TARGET, oracles.FORWARD_TARGET, oracles.FILTER_TARGET
    assert not any(target in expected[2] for target in targets)
    if jax_convgrad.native.cpu is not None:
        # All forward passes and filter gradients, the input gradients of all layers but the
        # first, and no convolution besides.
        assert [actual[2].count(target) for target in targets] == [2, 3, 3]
        assert "stablehlo.convolution" not in actual[2]
        calls = [line for line in actual[2].splitlines() if any(t in line for t in targets)]
        of_dtype = {"float32": "xf32>", "bfloat16": "xbf16>"}[dtype]
        # What sums over three channels may be widened: the first layer's forward pass, and the
        # input gradient of the last one, which is transposed.
        images = "(tensor<4x8x8x3xf32>", "(tensor<4x3x8x8xf32>"
        others = [line for line in calls if of_dtype not in line]
        assert len(others) <= 2
        assert all(any(image in line for image in images) for line in others)


def test_a_wrong_gradient_would_be_seen(monkeypatch, batch):
    right = integration.input_cotangent
    expected = train(flax_linen, jnp.float32, batch)
    monkeypatch.setattr(integration, "input_cotangent", lambda *a, **k: 1.001 * right(*a, **k))
    with jax_convgrad.installed():
        assert error(train(flax_linen, jnp.float32, batch), expected) > 10 * BOUNDS["float32"]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_keras_trains_by_its_own_loop(batch, dtype):
    """`train_on_batch`, whose jitted step is Keras's."""
    keras = library("keras")

    results = []
    for active in (False, True):
        net = keras_net(jnp.dtype(dtype))
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        net.compile(optimizer, "mse")
        with jax_convgrad.installed(active):
            losses = [net.train_on_batch(*map(np.asarray, batch)) for _ in range(2)]
        momentum = [np.asarray(variable.value) for variable in optimizer.momentums]
        assert len(momentum) == len(net.trainable_variables)
        assert all(map(np.any, momentum))
        results.append((losses, momentum))
    assert error(*reversed(results)) <= BOUNDS[dtype]


def test_nnx_accumulates_in_the_dtype_asked_for(batch):
    """`preferred_element_type`: products of bfloat16 that leave the layer in float32."""
    nnx = library("flax.nnx")
    kwargs = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    layer = nnx.ConvTranspose(3, 4, (4, 4), strides=(2, 2), rngs=nnx.Rngs(0), **kwargs)
    graph, params = nnx.split(layer)

    def loss(params, x):
        y = nnx.merge(graph, params)(x)
        assert y.dtype == jnp.float32
        return jnp.sum(jnp.sin(y))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    expected = gradient(params, batch[0])
    with jax_convgrad.installed():
        actual = gradient(params, batch[0])
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert geometries.normwise_error(a, b) <= BOUNDS["bfloat16"]


def transposed_layers():
    """By library: its transposed layer alone, as a function of [2, 5, 4, 3] or [2, 3, 5, 4]."""

    def nnx(x):
        nnx = library("flax.nnx")
        return nnx.ConvTranspose(3, 4, (4, 3), strides=(2, 3), rngs=nnx.Rngs(0))(x)

    def linen(x):
        layer = library("flax.linen").ConvTranspose(4, (4, 3), strides=(2, 3))
        return layer.init_with_output(jax.random.key(0), x)[0]

    def equinox(x):
        layer = library("equinox").nn.ConvTranspose2d(
            3, 4, (4, 3), stride=(2, 3), key=jax.random.key(0)
        )
        return jax.vmap(layer)(x.transpose(0, 3, 1, 2))

    def haiku(x):
        hk = library("haiku")
        net = hk.transform(lambda x: hk.Conv2DTranspose(4, (4, 3), stride=(2, 3))(x))
        return net.apply(net.init(jax.random.key(0), x), None, x)

    def keras(x):
        keras = library("keras")
        keras.utils.set_random_seed(0)
        layer = keras.layers.Conv2DTranspose(4, (4, 3), strides=(2, 3))
        layer.build(x.shape)
        variables = [variable.value for variable in layer.trainable_variables]
        return lambda x: layer.stateless_call(variables, [], x)[0]

    return {"nnx": nnx, "linen": linen, "equinox": equinox, "haiku": haiku, "keras": keras}


@pytest.mark.native
@pytest.mark.parametrize("name", transposed_layers())
def test_transposed_layer_runs_the_kernel_while_installed(rng, name):
    x = jnp.asarray(rng.standard_normal((2, 5, 4, 3)), "float32")
    layer = transposed_layers()[name]
    if name == "keras":  # which makes its variables outside of a trace
        layer = layer(x)
    found, results = [], []
    for switch in (jax_convgrad.uninstall, jax_convgrad.install, jax_convgrad.uninstall):
        switch()
        program = jax.jit(layer).lower(x)
        text = program.as_text()
        found.append((text.count(oracles.FORWARD_TARGET), text.count("stablehlo.convolution")))
        results.append(program.compile()(x))
    assert found == [(0, 1), (1, 0), (0, 1)]
    for result in results[1:]:
        assert geometries.normwise_error(result, results[0]) <= BOUNDS["float32"]
