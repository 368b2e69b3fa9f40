"""What only a GPU can show. The parts of it that a CPU can show run on the CPU module too."""

import concurrent.futures
import functools
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from conftest import SEED, lacks
from emulator import build, cases
from jax import lax

import jax_convgrad
from jax_convgrad import custom_call
from jax_convgrad.tools.geometries import make_geometry, normwise_error

HIGHEST = (lax.Precision.HIGHEST,) * 2
PLATFORMS = [
    pytest.param("cpu", marks=[pytest.mark.native, pytest.mark.thorough]),
    pytest.param("cuda", marks=pytest.mark.cuda),
]
CASES = list(cases.small_cases(12, SEED))


@pytest.fixture
def gpu_program():
    """A program for the GPU that is here, by its sources: built now, or by on_gpu.py before."""
    if (folder := os.environ.get("CONVGRAD_GPU_PROGRAMS")) is not None:
        return lambda sources: pathlib.Path(folder, sources[0].stem)
    if build.gpu_compiler() is None:
        lacks("cuda", "no nvcc")
    capability = jax.devices("cuda")[0].compute_capability
    return lambda sources: build.gpu_program(sources, build.gpu_architecture(capability))


# ---- without JAX --------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("source", ["primitives.cu", "hopper_primitives.cu"])
def test_primitives_are_what_the_emulator_takes_them_for(gpu_program, source):
    """Both have to agree with the same models, which these sources hold."""
    program = gpu_program([build.EMULATOR / source])
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("poison", [cases.NAN_POISON, cases.FINITE_POISON])
def test_every_kernel_against_the_literal_sum(gpu_program, tmp_path, poison, monkeypatch):
    """In every dtype, and the same bits 20 times on two streams at once."""
    monkeypatch.setenv("CUDA_EMULATOR_POISON", poison)
    program = gpu_program(build.core_sources())
    small = list(cases.small_cases(10, SEED, 1 << 18))
    lines = [
        *cases.lines(small),
        *(line for k in cases.TILES for line in cases.tile_lines(k, small)),
        *cases.hopper_lines(cases.hopper_sweep(10, SEED)),
    ]
    path = cases.write(tmp_path / "problems", lines)
    done = subprocess.run([program, path, "10"], capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip
    failed = [line for line in done.stdout.splitlines() if ": pass " not in line]
    assert done.returncode == 0, "\n".join(failed[:40]) + done.stderr


# ---- through JAX --------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_every_kernel_against_float64(rng, x64, index, turn):
    """Two dtypes for each geometry: the literal sum has all."""
    case = CASES[index]
    dtype = cases.DTYPES[(index + 2 * turn) % 4]
    precision = HIGHEST if index % 2 else None
    dy, w = oracles.operands(rng, case.geometry, dtype)
    wide = case.name in {wide.name for wide in cases.wide_cases()}
    reference = oracles.literal_input_grad if wide else oracles.lax_input_grad
    expected = reference(dy, w, case.geometry)
    allow_tf32 = custom_call.allows_tf32(precision)
    bound = cases.bound(case.geometry, dtype, allow_tf32=allow_tf32)
    with jax.default_device(jax.devices("cuda")[0]):
        results = oracles.call_kernels(dy, w, case.geometry, "cuda", precision)
    assert "direct" in results
    for name, dx in results.items():
        assert normwise_error(dx, expected) <= bound, (name, case)


REPEATED = {
    "dense": make_geometry((14, 14), (3, 3), (72, 24), batch=3, padding=1),
    "strided": make_geometry((15, 15), (3, 3), (70, 20), batch=4, stride=2, padding=1),
    # On a GPU the sum is split.
    "long_sum": make_geometry((7, 7), (3, 3), (64, 512), batch=2, padding=1),
    "depthwise": make_geometry((13, 13), (3, 3), (40, 40), padding=1, feature_groups=40),
    "grouped": make_geometry((13, 13), (3, 3), (32, 64), padding=1, feature_groups=4),
    "few_channels": make_geometry((31, 31), (5, 5), (3, 32), stride=2, padding=2),
}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", REPEATED)
def test_the_same_bits_in_20_runs_from_two_threads(rng, name, platform):
    """On two devices in turn, where there are two."""
    g = REPEATED[name]
    devices = jax.devices(platform)[:2]
    for dtype in ("float32", "bfloat16"):
        function = oracles.every_kernel(g, dtype, platform)
        pair = oracles.operands(rng, g, dtype)
        operands = [jax.device_put(pair, device) for device in devices]

        def run(turn, function=function, operands=operands):
            results = function(*operands[turn % len(operands)])
            return {kernel: np.asarray(dx).tobytes() for kernel, dx in results.items()}

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first, *others = pool.map(run, range(20))
        assert first
        assert all(other == first for other in others), (name, dtype)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REPEATED)
def test_epilogues_have_the_bits_of_their_steps(rng, name, dtype, platform):
    """Through the fused call, of every kernel, on JAX's own buffers."""
    g = REPEATED[name]
    dy, w = oracles.operands(rng, g, dtype)
    residual = rng.standard_normal(g.lhs_shape).astype(dtype)
    mask = np.maximum(rng.standard_normal(g.lhs_shape), 0).astype(dtype)
    none = np.zeros(0, dtype)
    kernels = oracles.kernels_for(g, dtype, platform)
    with jax.default_device(jax.devices(platform)[0]):
        for kernel in kernels:
            call = functools.partial(oracles.call_kernel, dy, w, g, kernel, platform)
            plain = jax.jit(call)()
            for arrays in ((residual, none), (none, mask), (residual, mask)):
                fused = jax.jit(lambda *arrays, call=call: call(arrays=arrays))(*arrays)
                steps = [array if array.size else None for array in arrays]
                np.testing.assert_array_equal(fused, oracles.finish(plain, *steps), kernel)


LARGE_IMAGE = (1024, 1024)
LARGE = {  # input channels, output channels: which array has more than 2^31 elements
    "dx": make_geometry(LARGE_IMAGE, (3, 3), (32, 8), batch=65, padding=1),
    "dy": make_geometry(LARGE_IMAGE, (3, 3), (8, 32), batch=65, padding=1),
}


def free_bytes(device):
    """Memory that JAX can still take, 0 if it does not say."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", ["direct", "mma"])
@pytest.mark.parametrize("which", LARGE)
def test_more_than_2_31_elements(rng, which, kernel):
    g, dtype = LARGE[which], jnp.bfloat16
    batch = g.lhs_shape[0]
    device = jax.devices("cuda")[0]
    assert max(math.prod(g.lhs_shape), math.prod(g.out_shape)) > 1 << 31
    needed = 2 * g.bytes_moved(2)
    if (free := free_bytes(device)) < needed:
        lacks("cuda", f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
    with jax.default_device(device):
        # Images differ by a factor: random numbers for all would need the memory twice.
        image, w = (
            jnp.asarray(rng.standard_normal(shape, "float32"), dtype)
            for shape in (g.out_shape[1:], g.rhs_shape)
        )
        factors = 1 + jnp.arange(batch, dtype="float32") / batch
        scaled = jax.jit(lambda image, factor: (image * factor).astype(dtype))
        dy = jax.jit(jax.vmap(scaled, (None, 0)))(image, factors)
        dx = jax.jit(functools.partial(oracles.call_kernel, g=g, kernel=kernel, platform="cuda"))(
            dy, w
        )
        one = g.replace(lhs_shape=(1, *g.lhs_shape[1:]))

        @jax.jit
        def expected(image, factor):
            x = jax.ShapeDtypeStruct(one.lhs_shape, "float32")
            forward = oracles.lax_conv(one, precision="highest")
            pull = jax.linear_transpose(lambda x: forward(x, w.astype("float32")), x)
            return pull(scaled(image, factor)[None].astype("float32"))[0][0]

        # Both ends, the image that holds element 2^31, and those where mma parts the batch.
        for n in (0, 1, 61, 62, 63, 64):
            error = normwise_error(dx[n], expected(image, factors[n]))
            assert error <= cases.bound(g, "bfloat16"), n


# ---- CUDA graphs --------------------------------------------------------------------

# What XLA records into command buffers, which are CUDA graphs: nothing; custom calls and
# nothing else, even a single one; whatever it can, whole loops included.
GRAPHS = {
    "none": "--xla_gpu_enable_command_buffer=",
    "calls": "--xla_gpu_enable_command_buffer=CUSTOM_CALL --xla_gpu_graph_min_graph_size=1",
    "loops": "--xla_gpu_enable_command_buffer=+CUSTOM_CALL,+WHILE,+CONDITIONAL "
    "--xla_gpu_graph_min_graph_size=1",
}
RECORDED = "Creating command buffer thunk"  # XLA's log, when it has made one
STEPS = 5


def train_step(params, x, target):
    """One step of gradient descent of a small net; also the loss."""

    def loss(params):
        conv = functools.partial(
            jax_convgrad.conv_general_dilated,
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
            implementation="native",
        )
        hidden = jax.nn.relu(conv(x, params[0], (2, 2)))
        hidden = jax.nn.relu(conv(hidden, params[1], (1, 1)))
        return ((hidden.mean((1, 2)) - target) ** 2).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    return [p - 0.1 * g for p, g in zip(params, gradient, strict=True)], value


def run_programs(platform):
    """Runs programs with our custom call in them, a few times each; prints their results.

    As JSON, {name: numbers}. Every program's name goes to stderr before it is compiled,
    where XLA's log follows it.
    """
    results = {}
    rng = np.random.default_rng(SEED)

    def run(name, function, *arguments):
        print(f"== {name}", file=sys.stderr, flush=True)
        function = jax.jit(function)
        for _ in range(3):  # recorded, replayed, replayed with other buffers
            out = function(*map(jnp.array, arguments))
        results[name] = np.asarray(out, "float64").ravel().tolist()

    for name, dtype in itertools.product(("strided", "long_sum"), ("float32", "bfloat16")):
        g = REPEATED[name]
        dy, w = oracles.operands(rng, g, dtype)
        for kernel in oracles.kernels_for(g, dtype, platform):
            call = functools.partial(oracles.call_kernel, g=g, kernel=kernel, platform=platform)
            run(f"alone {name} {dtype} {kernel}", call, dy, w)

            def scanned(steps, w, call=call, g=g):
                def step(total, each):
                    return total + call(each, w), None

                return lax.scan(step, jnp.zeros(g.lhs_shape, w.dtype), steps)[0]

            steps = np.stack([dy * np.asarray(k, dy.dtype) for k in range(1, STEPS + 1)])
            run(f"scan {name} {dtype} {kernel}", scanned, steps, w)

    x, target = rng.standard_normal((4, 16, 16, 3)), rng.standard_normal((4, 24))
    shapes = ((3, 3, 3, 16), (3, 3, 16, 24))
    data = [a.astype("float32") for a in (x, target, *(rng.standard_normal(s) / 8 for s in shapes))]

    def train(x, target, *params):
        losses = []
        for _ in range(STEPS):
            params, loss = train_step(params, x, target)
            losses.append(loss)
        return jnp.stack(losses)

    def train_in_scan(x, target, *params):
        return lax.scan(lambda p, _: train_step(p, x, target), list(params), length=STEPS)[1]

    run("train unrolled", train, *data)
    run("train scan", train_in_scan, *data)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def programs_without_graphs():
    """Results of `run_programs` by platform, filled in by the first test that needs them."""
    return {}


@pytest.mark.parametrize(
    ("platform", "graphs"),
    [
        pytest.param("cpu", "loops", marks=[pytest.mark.native, pytest.mark.thorough]),
        pytest.param("cuda", "calls", marks=pytest.mark.cuda),
        pytest.param("cuda", "loops", marks=pytest.mark.cuda),
    ],
)
def test_inside_cuda_graphs(run_python, programs_without_graphs, platform, graphs):
    """XLA's flags are the same on a CPU, where they must do nothing."""

    def run(flags):
        return run_python(
            "-c",
            f"import test_gpu; test_gpu.run_programs({platform!r})",
            JAX_PLATFORMS=f"{platform},cpu" if platform == "cuda" else platform,
            XLA_FLAGS=flags,
            TF_CPP_MIN_LOG_LEVEL="0",
            TF_CPP_VMODULE="command_buffer_conversion_pass=2",
        )

    if platform not in programs_without_graphs:
        done = run(GRAPHS["none"])
        assert RECORDED not in done.stderr
        programs_without_graphs[platform] = json.loads(done.stdout)
    expected = programs_without_graphs[platform]
    done = run(GRAPHS[graphs])
    results = json.loads(done.stdout)
    assert results.keys() == expected.keys()
    for name, numbers in results.items():
        if name.startswith("train"):  # other libraries' kernels take part
            assert normwise_error(numbers, expected[name]) <= 1e-5, name
        else:
            assert numbers == expected[name], name
    if platform == "cuda":
        logs = dict(part.split("\n", 1) for part in done.stderr.split("== ")[1:])
        # With "calls", nothing but our custom call could be recorded.
        assert [name for name, log in logs.items() if RECORDED not in log] == []
