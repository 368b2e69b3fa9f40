"""Many Python threads calling jitted steps at once: right results, no deadlock, no leak."""

import concurrent.futures
import json
import pathlib
import sys
import time

import jax
import numpy as np
import oracles
import pytest
from jax import lax

import jax_convgrad
from jax_convgrad import native
from jax_convgrad.tools.geometries import make_geometry

THREADS = 8
STEPS = 4  # of the scan
# Each call of the first brings a packed filter of 1.3 MB; the second has another kernel, whose
# workspace is its thread's.
LAYERS = (
    make_geometry((14, 14), (3, 3), (192, 192), batch=1, padding=1),
    make_geometry((14, 14), (3, 3), (192, 192), batch=1, padding=1, feature_groups=192),
)
GROWTH_BYTES = 48 << 20


def gradients(inside_scan):
    """A function of (x, filters), all three maps of both layers, as one vector; or in a scan.

    In a scan it is the sum over scaled x.
    """

    def loss(x, filters):
        for g, w in zip(LAYERS, filters, strict=True):
            x = jax.numpy.sin(jax_convgrad.conv_general_dilated(x, w, **g.conv_params()))
        return x.sum()

    def grad(x, filters):
        dx, dws = jax.grad(loss, (0, 1))(x, filters)
        return jax.numpy.concatenate([array.ravel() for array in (dx, *dws)])

    def scanned(x, filters):
        scales = jax.numpy.arange(1.0, STEPS + 1)
        _, outs = lax.scan(lambda _, scale: (None, grad(x * scale, filters)), None, scales)
        return outs.sum(0)

    return scanned if inside_scan else grad


def resident_bytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def stress(seconds, inside_scan, leak=False):
    """Raises if a result differs from what it is alone, or memory grows; prints JSON."""
    rng = np.random.default_rng(0)
    filters = tuple(oracles.operands(rng, g, "float32")[1] for g in LAYERS)
    operands = [oracles.operands(rng, LAYERS[-1], "float32")[0] for _ in range(THREADS)]
    function = jax.jit(gradients(inside_scan))
    text = function.lower(operands[0], filters).as_text()
    assert [text.count(f"@{target}(") for target in native.TARGETS.values()] == [len(LAYERS)] * 3
    alone = [np.asarray(function(x, filters)) for x in operands]
    brought, own = (oracles.plan(g, "float32")[1] for g in LAYERS)
    assert brought > native.cpu.scratch_bytes >= own > 0
    kept = []

    def call(index, until):
        calls = 0
        while time.perf_counter() < until:
            out = np.asarray(function(operands[index], filters))
            assert np.array_equal(out, alone[index]), f"thread {index}, call {calls}"
            kept.extend([out.copy()] if leak else [])
            calls += 1
        return calls

    def calls_per_second(threads, duration):
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            calls = list(pool.map(call, range(threads), [start + duration] * threads))
        assert min(calls) > 0, calls
        return sum(calls) / (time.perf_counter() - start), sum(calls)

    one, _ = calls_per_second(1, seconds / 5)
    calls_per_second(THREADS, seconds / 5)  # until the allocator has what it wants
    before = resident_bytes()
    many, calls = calls_per_second(THREADS, seconds)
    growth = resident_bytes() - before
    workspace = brought * calls * (STEPS if inside_scan else 1)
    print(json.dumps({
        "calls_per_s": {"1 thread": round(one, 1), f"{THREADS} threads": round(many, 1)},
        "calls": calls, "growth_mib": round(growth / 2**20, 2),
        "workspaces_mib": round(workspace / 2**20),
    }))  # fmt: skip
    assert workspace > 2 * GROWTH_BYTES, "too few calls to see a leak"
    assert growth < GROWTH_BYTES, f"memory grew by {growth} bytes in {calls} calls"


def run(run_python, seconds, *arguments, **options):
    code = f"import test_stress; test_stress.stress({seconds}, *{arguments!r})"
    result = run_python("-c", code, timeout_s=10 * seconds + 120, JAX_CONVGRAD="on", **options)
    print(result.stdout)
    return result


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")


@pytest.mark.native
@needs_proc
@pytest.mark.parametrize("inside_scan", [False, True], ids=["call", "scan"])
@pytest.mark.parametrize(
    "seconds",
    [pytest.param(3, marks=pytest.mark.thorough), pytest.param(60, marks=pytest.mark.slow)],
)
def test_threads_calling_a_step_at_once(run_python, seconds, inside_scan):
    run(run_python, seconds, inside_scan)


@pytest.mark.native
@needs_proc
@pytest.mark.thorough
def test_growing_memory_is_noticed(run_python):
    result = run(run_python, 3, False, True, check=False)
    assert result.returncode != 0
    assert "memory grew" in result.stderr
