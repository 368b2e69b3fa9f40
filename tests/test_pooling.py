"""The gradient of max pooling under install(): bit for bit lax's."""

import functools
import hashlib
import itertools
import json
import math
import sys

import cpu_programs
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import test_isa
from conftest import SEED
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_convgrad
from jax_convgrad import dispatch, native, pooling

pytestmark = pytest.mark.native

TARGET = f"@{native.MAX_POOL_GRAD_TARGET}("
SCATTER = "stablehlo.select_and_scatter"
RANDOM_COUNT = 50
PER_PROGRAM = 25
MOST_LOOKS = 3e5  # of windows at elements: lax takes a nanosecond and more for each

# name: (shape, window, strides, padding)
GEOMETRIES = {
    "3x3 by 2": ((2, 9, 8, 5), (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))),
    "3x3 by 2, planes": ((2, 3, 33, 40), (1, 1, 3, 3), (1, 1, 2, 2), ((0, 0),) * 2 + ((1, 1),) * 2),
    "2x2 by 2": ((2, 8, 10, 33), (1, 2, 2, 1), (1, 2, 2, 1), ((0, 0),) * 4),
    "2x2 by 2, planes": ((2, 3, 9, 41), (1, 1, 2, 2), (1, 1, 2, 2), ((0, 0),) * 4),
    "many channels": ((1, 5, 6, 150), (1, 3, 3, 1), (1, 1, 1, 1), ((0, 0), (1, 1), (1, 1), (0, 0))),
    "global": ((3, 7, 7, 20), (1, 7, 7, 1), (1, 1, 1, 1), ((0, 0),) * 4),
    "global, planes": ((3, 20, 7, 7), (1, 1, 7, 7), (1, 1, 1, 1), ((0, 0),) * 4),
    "wide overlap": ((1, 14, 14, 3), (1, 9, 9, 1), (1, 1, 1, 1), ((0, 0), (4, 4), (4, 4), (0, 0))),
    "gaps": ((2, 11, 13, 4), (1, 2, 1, 1), (1, 4, 3, 1), ((0, 0), (1, 0), (0, 2), (0, 0))),
    "windows in the padding": ((2, 3, 4), (1, 2, 1), (1, 1, 1), ((0, 0), (4, 5), (0, 0))),
    "a long signal": ((2, 5000), (1, 300), (1, 150), ((0, 0), (20, 7))),
    "a long signal of channels": ((700, 40), (150, 1), (50, 1), ((9, 0), (0, 0))),
    "three axes": (
        (2, 5, 6, 7, 3),
        (1, 3, 2, 3, 1),
        (1, 2, 2, 1, 1),
        ((0, 0), (1, 1), (0, 0), (1, 0), (0, 0)),
    ),
    "axes apart": ((6, 3, 7, 2), (3, 1, 2, 1), (2, 1, 2, 1), ((1, 0), (0, 0), (0, 1), (0, 0))),
    "all axes": ((6, 7), (3, 3), (2, 1), ((1, 1), (0, 2))),
    "strides alone": ((5, 6, 3), (1, 1, 1), (2, 3, 1), ((0, 0),) * 3),
    "no windows": ((4, 5), (1, 1), (1, 1), ((0, 0),) * 2),
}
DATA = ("normal", "ties", "infinite", "nan", "tiny", "bits")


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    jax_convgrad.uninstall()


def out_shape(g):
    return tuple((n + low + high - w) // s + 1 for n, w, s, (low, high) in zip(*g, strict=True))


def params(g):
    return dict(zip(("window_dimensions", "window_strides", "padding"), g[1:], strict=True))


def pool_grad(dy, x, g, select=lax.ge_p):
    return lax.select_and_scatter_add_p.bind(dy, x, select_prim=select, **params(g))


def call(dy, x, result=None, **attributes):
    """The custom call, past every check of Python's."""
    result = x if result is None else result
    of = jax.ShapeDtypeStruct(result.shape, result.dtype)
    return jax.ffi.ffi_call(native.MAX_POOL_GRAD_TARGET, of)(dy, x, **attributes)


def kernel(dy, x, g):
    return call(dy, x, **pooling.attributes(**params(g)))


def data(rng, shape, dtype, kind):
    """Values of a kind: equal ones, zeros and infinities of either sign, NaNs, subnormals."""
    dtype = jnp.dtype(dtype)
    if kind == "normal":
        return rng.standard_normal(shape).astype(dtype)
    if kind == "bits":
        return rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    tiny = float(jnp.finfo(dtype).tiny)
    of = {
        "ties": [-1, 0, 1],
        "infinite": [-np.inf, -np.inf, np.inf, 0.0, -0.0, 1],
        "nan": [np.nan, -np.inf, np.inf, 0.0, -0.0, 1, 2],
        "tiny": [0.0, -0.0, tiny, -1.5 * tiny, tiny / 2, -tiny / 4],
    }[kind]
    return rng.choice(np.array(of), shape).astype(dtype)


def operands(rng, g, dtype, kinds):
    return data(rng, out_shape(g), dtype, kinds[0]), data(rng, g[0], dtype, kinds[1])


def bits(a):
    a = np.asarray(a)
    # Which of two NaNs stays depends on XLA's optimisations in float16, and elsewhere on the
    # operands' order, which compilers choose where an addition has no third operand.
    if a.dtype == np.float16 or native.cpu.isa() == "portable":
        a = np.where(np.isnan(a), a.dtype.type(np.nan), a)
    return a.tobytes()


def random_geometry(rng):
    rank = int(rng.integers(1, 6))
    axes = rng.permutation(rank)[: rng.integers(0, min(rank, 3) + 1)]
    shape, window, strides, padding = [], [], [], []
    for i in range(rank):
        w, s, low, high = 1, 1, 0, 0
        size = int(rng.choice([1, 2, 3, 5, 9, 17, 70] if rank < 5 else [1, 2, 3, 9]))
        if i in axes:
            w, s = int(rng.choice([1, 2, 3, 3, 4, 5, 9])), int(rng.choice([1, 1, 2, 2, 3, 5]))
            low, high = (int(n) for n in rng.integers(0, 4, 2) * rng.integers(0, 2))
            size = max(1, w - low - high) + int(rng.integers(0, 14))
        shape.append(size)
        window.append(w)
        strides.append(s)
        padding.append((low, high))
    return tuple(shape), tuple(window), tuple(strides), tuple(padding)


def taken(rng):
    """Geometries that the kernel takes, of sizes that lax is quick with, without end."""
    while True:
        g = random_geometry(rng)
        if math.prod(g[0]) * math.prod(g[1]) > MOST_LOOKS or math.prod(out_shape(g)) == 1:
            continue
        if native.cpu.max_pool_grad_obstacle(g[0], out_shape(g), g[1], g[2], sum(g[3], ()), 4):
            continue
        yield g


def random_problems(rng, count):
    """(g, dy, x), as many as asked."""
    for g in itertools.islice(taken(rng), count):
        dtype, kinds = str(rng.choice(oracles.DTYPES)), rng.choice(DATA, 2)
        yield g, *operands(rng, g, dtype, kinds)


def check(problems):
    """Compares with lax, the kernel's results in memory that held NaNs."""
    given = [(dy, x) for _, dy, x in problems]

    def by(function):
        return lambda given: [function(*of, g) for of, (g, *_) in zip(given, problems, strict=True)]

    expected = jax.jit(by(pool_grad))(given)

    def into(poisoned, given):
        del poisoned
        return by(kernel)(given)

    poisoned = [oracles._poisoned(x.shape, x.dtype) for _, x in given]
    actual = jax.jit(into, donate_argnums=0, keep_unused=True)(poisoned, given)
    wrong = [
        f"{g} {x.dtype}"
        for (g, _, x), a, e in zip(problems, actual, expected, strict=True)
        if bits(a) != bits(e)
    ]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_bits_are_those_of_lax(rng, x64, dtype):
    # Data of every kind for either operand, in turn.
    check([
        (g, *operands(rng, g, dtype, (DATA[i % 6], DATA[(i + i // 6) % 6])))
        for i, g in enumerate(GEOMETRIES.values())
    ])  # fmt: skip


@pytest.mark.parametrize("part", range(RANDOM_COUNT // PER_PROGRAM))
def test_random_geometries(rng, x64, part):
    check(list(random_problems(rng, PER_PROGRAM)))


def test_a_sum_that_was_flushed_to_negative_zero_stays_so():
    """The zero added for a window that the position has not won made it positive."""
    x = np.array([[0, 0, 5, 1, 9]], np.float32)
    tiny = jnp.finfo(np.float32).tiny
    dy = np.array([[tiny, -1.5 * tiny, 1]], np.float32)
    g = (x.shape, (1, 3), (1, 1), ((0, 0), (0, 0)))
    check([(g, dy, x)])
    assert np.signbit(kernel(dy, x, g)[0, 2])


LARGE_TILES = [
    ((2, 16, 497, 8), (1, 4, 4, 1), (1, 2, 2, 1), ((0, 0),) * 4),
    ((2, 9, 482, 11), (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))),
    ((1, 20, 7, 239, 4), (1, 4, 4, 4, 1), (1, 2, 2, 2, 1),
     ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0))),
    ((1, 1, 1, 256, 64), (1, 10, 10, 128, 1), (1, 1, 1, 128, 1),
     ((0, 0), (9, 9), (9, 9), (0, 0), (0, 0))),
]  # fmt: skip


def test_float64_tiles_fit_the_stack_of_a_task(rng, x64):
    """Equal tiles packed more of x than the tiles that had been measured: the process died."""
    check([(g, *operands(rng, g, "float64", (DATA[0], DATA[0]))) for g in LARGE_TILES])


def counts(text):
    return text.count(TARGET), text.count(SCATTER)


def max_pool(x, init=-jnp.inf):
    return lax.reduce_window(x, init, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


def loss(x):
    return jnp.sum(jnp.sin(max_pool(x)) ** 2)


@pytest.fixture
def image(rng):
    return jnp.asarray(rng.standard_normal((4, 9, 8, 3)), "float32")


def test_lowered_to_the_kernel_while_installed(image):
    function = jax.jit(jax.grad(loss))
    found, results = [], []
    for switch in (jax_convgrad.uninstall, jax_convgrad.install, jax_convgrad.uninstall):
        switch()
        found.append(counts(function.lower(image).as_text()))
        results.append(bits(function(image)))
    assert found == [(0, 1), (1, 0), (0, 1)]
    assert len(set(results)) == 1


def test_jaxpr_is_that_of_lax(image):
    expected = str(jax.make_jaxpr(jax.grad(loss))(image))
    with jax_convgrad.installed():
        assert str(jax.make_jaxpr(jax.grad(loss))(image)) == expected


TRANSFORMED = {
    "vmap": lambda x: jax.vmap(jax.grad(lambda x: loss(x[None])))(x),
    "vmap of other dimensions": lambda x: jax.vmap(jax.grad(loss), 3, 1)(x[..., None, :]),
    "grad of grad": lambda x: jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 3))(x),
    "forward over reverse": lambda x: jax.jvp(jax.grad(loss), (x,), (jnp.cos(x),)),
    "checkpoint": lambda x: jax.grad(jax.checkpoint(loss))(x),
    "scan": lambda x: jax.grad(
        lambda x: lax.scan(lambda c, x: (c + loss(x[None]), None), 0.0, x)[0]
    )(x),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(image, name):
    function = TRANSFORMED[name]
    expected = jax.jit(function)(image)
    with jax_convgrad.installed():
        assert counts(jax.jit(function).lower(image).as_text())[0] > 0
        actual = jax.jit(function)(image)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def installed_text(function, *args):
    with jax_convgrad.installed():
        return jax.jit(function).lower(*args).as_text()


def test_what_stays_laxs(monkeypatch, image):
    monkeypatch.setattr(dispatch, "switch", lambda: None)
    g = (image.shape, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    dy = jnp.ones(out_shape(g))
    assert counts(installed_text(lambda dy, x: pool_grad(dy, x, g), dy, image)) == (1, 0)
    least = functools.partial(pool_grad, g=g, select=lax.le_p)
    assert counts(installed_text(least, dy, image)) == (0, 1)
    whole = functools.partial(pool_grad, g=g)
    whole_dy, whole_x = dy.astype("int32"), image.astype("int32")
    assert counts(installed_text(whole, whole_dy, whole_x)) == (0, 1)
    single = ((5,), (5,), (1,), ((0, 0),))
    one = functools.partial(pool_grad, g=single)
    assert counts(installed_text(one, jnp.ones(1), jnp.ones(5))) == (0, 1)
    # More windows over an element than the kernel keeps; axes apart; few windows a row.
    deep = ((40, 40), (20, 20), (1, 1), ((0, 0), (0, 0)))
    apart = ((4, 2, 4, 2, 4), (2, 1, 2, 1, 2), (2, 1, 2, 1, 2), ((0, 0),) * 5)
    few = ((2, 512, 8, 8), *GEOMETRIES["2x2 by 2, planes"][1:])
    for g in (deep, apart, few):
        function = functools.partial(pool_grad, g=g)
        args = jnp.ones(out_shape(g)), jnp.ones(g[0])
        assert counts(installed_text(function, *args)) == (0, 1)


def test_switched_on_small_planes_take_the_kernel(monkeypatch):
    """That lax is faster at them was no reason that `on` lifted."""
    monkeypatch.setattr(dispatch, "switch", lambda: "on")
    g = ((2, 32, 8, 8), *GEOMETRIES["2x2 by 2, planes"][1:])
    function = functools.partial(pool_grad, g=g)
    assert counts(installed_text(function, jnp.ones(out_shape(g)), jnp.ones(g[0]))) == (1, 0)


def test_switch(image, monkeypatch):
    monkeypatch.setattr(dispatch, "switch", lambda: "off")
    assert counts(installed_text(jax.grad(loss), image)) == (0, 1)


def test_exported_program_is_laxs(image):
    with jax_convgrad.installed():
        exported = jax.export.export(jax.jit(jax.grad(loss)))(image)
    assert counts(exported.mlir_module()) == (0, 1)
    np.testing.assert_array_equal(exported.call(image), jax.grad(loss)(image))


def test_several_devices(image):
    """XLA cannot split a custom call; inside shard_map no one has to."""
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("data",))
    expected = jax.grad(loss)(image)
    sharded = jax.device_put(image, NamedSharding(mesh, P("data")))
    by_hand = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    for function, found in ((jax.grad(loss), (0, 1)), (by_hand, (1, 0))):
        assert counts(installed_text(function, sharded)) == found
        with jax_convgrad.installed():
            np.testing.assert_array_equal(jax.jit(function)(sharded), expected)


def test_explicit_sharding_is_laxs(image):
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=kinds, devices=jax.devices("cpu")[:1])
    placed = jax.device_put(image, NamedSharding(mesh, P("data")))
    assert counts(installed_text(jax.grad(loss), placed)) == (0, 1)


# name: (what is another, what the message must contain)
ERRORS = {
    "dy of another size": ({"dy": (1, 3, 3, 2)}, ["dy must have shape (1, 4, 3, 2)"]),
    "dy of another rank": ({"dy": (1, 4, 6)}, ["dy must have shape (1, 4, 3, 2)"]),
    "dx of another size": ({"dx": (1, 8, 7, 2)}, ["dx must have the shape of x", "(1, 8, 7, 2)"]),
    "other dtypes": ({"dtypes": ("float32", "float64", "float32")}, ["F32, F64 and F32"]),
    "an integer": ({"dtypes": ("int32",) * 3}, ["dtype", "S32"]),
    "no window": ({"window_dimensions": [1, 0, 2, 1]}, ["window_dimensions must be 4 integers"]),
    "few windows": ({"window_dimensions": [1, 2, 2]}, ["window_dimensions must be 4 integers"]),
    "no stride": ({"window_strides": [1, 2, 0, 1]}, ["window_strides must be 4 integers"]),
    "a stride too many": ({"window_strides": [1, 2, 2, 1, 1]}, ["window_strides must be 4"]),
    "padding that crops": ({"padding": [0, 0, -1, 0, 0, 0, 0, 0]}, ["padding must be 8 integers"]),
    "padding too large": ({"padding": [0, 0, 2**62, 0, 0, 0, 0, 0]}, ["padding must be 8"]),
    "a window beyond x": (
        {"window_dimensions": [1, 20, 2, 1]},
        ["dy must have shape (1, 0, 3, 2), got (1, 4, 3, 2)"],
    ),
    "many taps": (
        {
            "x": (2, 2), "dx": (2, 2), "dy": (1, 1), "window_dimensions": [2**17, 2**17],
            "window_strides": [2**17, 2**17], "padding": [0, 2**17 - 2] * 2,
        },
        ["window_dimensions must have less than 2^31 taps"],
    ),
    "many windows over an element": (
        {
            "x": (30, 30), "dx": (30, 30), "dy": (15, 15), "window_dimensions": [16, 16],
            "window_strides": [1, 1], "padding": [0] * 4,
        },
        ["window_strides", "at most 100 windows"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_the_call(x64, name):
    changes, parts = ERRORS[name]
    given = {
        "dy": (1, 4, 3, 2), "x": (1, 8, 6, 2), "dx": (1, 8, 6, 2), "dtypes": ("float32",) * 3,
        "window_dimensions": [1, 2, 2, 1], "window_strides": [1, 2, 2, 1], "padding": [0] * 8,
        **changes,
    }  # fmt: skip
    shapes = [given.pop(role) for role in ("dy", "x", "dx")]
    dy, x, dx = map(np.ones, shapes, given.pop("dtypes"))
    attributes = {name: np.array(values, np.int64) for name, values in given.items()}
    function = jax.jit(lambda dy, x: call(dy, x, dx, **attributes))
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as raised:
        jax.block_until_ready(function(dy, x))
    for part in ("convgrad_max_pool_grad", *parts):
        assert part in str(raised.value)


def all_problems(rng):
    """Every geometry, and two of several tasks each, that threads share."""
    problems = [
        (g, *operands(rng, g, oracles.DTYPES[i % len(oracles.DTYPES)], ("bits", "ties")))
        for i, g in enumerate(GEOMETRIES.values())
    ]
    large = [((4, 40, 40, 64), *GEOMETRIES["3x3 by 2"][1:])]
    large.append(((8, 20, 40, 40), *GEOMETRIES["3x3 by 2, planes"][1:]))
    return problems + [(g, *operands(rng, g, "float32", ("normal", "ties"))) for g in large]


def compare():
    """Compares with lax in a process whose instruction set was asked for, and prints it."""
    jax.config.update("jax_disable_most_optimizations", True)
    check(all_problems(np.random.default_rng(SEED)))
    print(json.dumps({"isa": native.cpu.isa()}))


def digest():
    """Prints a digest of what the kernel makes of fixed data, and the number of threads."""
    found = hashlib.sha256()
    for g, dy, x in all_problems(np.random.default_rng(0)):
        found.update(bits(kernel(dy, x, g)))
    threads = test_isa.threads_of_pool()
    print(json.dumps({"digest": found.hexdigest(), "threads": threads}))


def report(run_python, function, **environment):
    code = f"import test_pooling; test_pooling.{function}()"
    return test_isa.report(run_python, code, **environment)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.thorough
def test_instruction_sets(run_python, isa):
    if isa not in cpu_programs.flags_by_set():
        pytest.skip(f"this processor's kernels are not for {isa}")
    test_isa.skip_without(isa)
    assert report(run_python, "compare", JAX_CONVGRAD_CPU_ISA=isa)["isa"] == isa


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.thorough
def test_the_same_bits_for_every_thread_count(run_python):
    found = [
        report(run_python, "digest", PJRT_NPROC=str(threads), NPROC=str(threads))
        for threads in (1, 2, 4)
    ]
    assert [each["threads"] for each in found] == [1, 2, 4]
    assert len({each["digest"] for each in found}) == 1
