"""`overhead`: what the package costs beside the arithmetic. Reported, never judged.

Three things, each of them measured in turns within one run (`timing`):

    tracing     tracing and lowering the gradient of ResNet-50 for its parameters, with JAX's
                caches empty: by lax, and under `install()`
    eager       one call outside of `jit` of a convolution so small that nothing but the way
                there counts, forward and gradient for the input: by lax, by lax under
                `install()`, and by `jax_convgrad.conv_general_dilated`
    importing   `import jax`, and then `import jax_convgrad`, in fresh processes

The JSON is what `machine.describe` gives, `options`, `complete`, and

    tracing     {net, convolutions, native, times_us, ratios}: convolutions in the program
                by lax; those of the program under `install()` that are calls of a kernel
    eager       {forward, gradient}, each {geometry, times_us, ratios}
    importing   {processes, jax_us, jax_convgrad_us}, each {median, q1, q3}

where times_us is by name "lax", "installed" or "ours", {median, q1, q3, rounds, instances,
calls}, and ratios those times over lax's in the same round, {median, q1, q3}.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import ConvGeometry, conv_general_dilated, installed, native
from . import ToolError, machine, models, results, timing
from .console import Console, table

BATCH, IMAGE = 8, 224  # no shape costs more to trace than another
EAGER = ConvGeometry.parse((1, 4, 8, 8), (4, 4, 3, 3), (2, 2), "SAME")

_IMPORTS = """
import time
start = time.perf_counter()
import jax
middle = time.perf_counter()
import jax_convgrad
print(middle - start, time.perf_counter() - middle)
"""


@dataclasses.dataclass
class _Call:
    """A peer that is a Python call, made over and over."""

    name: str
    call: Callable[[], object]

    def run(self, first: int, instances: int, calls: int) -> float:
        """Microseconds per call, the last one waited for."""
        del first
        start = time.perf_counter()
        for _ in range(instances * calls):
            result = self.call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / (instances * calls) * 1e6


def _times(peers: Sequence[_Call], seconds: float) -> dict[str, Any]:
    timings = timing.measure(peers, pool=256, batched=False, row_seconds=seconds)
    return {
        "times_us": {name: results.time_entry(each) for name, each in timings.items()},
        "ratios": {
            name: dataclasses.asdict(timings["lax"].ratio_of(each))
            for name, each in timings.items()
            if name != "lax"
        },
    }


def measure_tracing(seconds: float) -> dict[str, Any]:
    """The `tracing` of the JSON."""
    net = models.RESNET50

    def specification(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    params = jax.tree.map(specification, net.params(0))
    images = jax.ShapeDtypeStruct((BATCH, IMAGE, IMAGE, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)

    def lowered(active: bool) -> jax.stages.Lowered:
        jax.clear_caches()
        with installed(active):
            return jax.jit(jax.grad(net.loss)).lower(params, images, labels)

    texts = [lowered(active).as_text() for active in (False, True)]
    return {
        "net": net.title,
        "convolutions": texts[0].count("stablehlo.convolution"),
        "native": texts[1].count(f"@{native.TARGET}("),
        **_times(
            [_Call("lax", lambda: lowered(False)), _Call("installed", lambda: lowered(True))],
            seconds,
        ),
    }


def measure_eager(seconds: float) -> dict[str, Any]:
    """The `eager` of the JSON."""
    keys = jax.random.split(jax.random.key(0))
    x, w = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, (EAGER.lhs_shape, EAGER.rhs_shape), strict=True)
    )

    def forward(convolution: Callable[..., jax.Array], active: bool) -> Callable[[], object]:
        def call() -> jax.Array:
            with installed(active):
                return convolution(x, w, **EAGER.conv_params())

        return call

    def gradient(convolution: Callable[..., jax.Array], active: bool) -> Callable[[], object]:
        function = jax.grad(lambda x: convolution(x, w, **EAGER.conv_params()).sum())

        def call() -> jax.Array:
            with installed(active):
                return function(x)

        return call

    report = {}
    for name, make in (("forward", forward), ("gradient", gradient)):
        peers = [
            _Call("lax", make(lax.conv_general_dilated, False)),
            _Call("installed", make(lax.conv_general_dilated, True)),
            _Call("ours", make(conv_general_dilated, False)),
        ]
        report[name] = {"geometry": str(EAGER), **_times(peers, seconds / 2)}
    return report


def measure_importing(processes: int) -> dict[str, Any]:
    """The `importing` of the JSON."""
    samples: list[tuple[float, float]] = []
    for _ in range(processes):
        try:
            done = subprocess.run(
                [sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True
            )
        except subprocess.CalledProcessError as e:
            raise ToolError(f"a fresh process could not import the package: {e.stderr}") from None
        theirs, ours = map(float, done.stdout.split())
        samples.append((theirs * 1e6, ours * 1e6))
    theirs_us, ours_us = zip(*samples, strict=True)
    return {
        "processes": processes,
        "jax_us": dataclasses.asdict(timing.Spread.of(theirs_us)),
        "jax_convgrad_us": dataclasses.asdict(timing.Spread.of(ours_us)),
    }


def _cells(what: str, time_us: dict[str, Any], ratio: dict[str, Any] | None) -> tuple[str, ...]:
    values = [f"{time_us[key] / 1e3:.4g}" for key in ("median", "q1", "q3")]
    return (what, *values, "" if ratio is None else f"{ratio['median']:.3g}x")


def describe(report: dict[str, Any]) -> list[str]:
    """The lines about everything that was measured."""
    parts = [("trace and lower", report["tracing"])]
    parts += [(f"eager {name}", part) for name, part in report["eager"].items()]
    rows = [
        _cells(f"{what}, {name}", time_us, part["ratios"].get(name))
        for what, part in parts
        for name, time_us in part["times_us"].items()
    ]
    importing = report["importing"]
    rows.append(_cells("import jax", importing["jax_us"], None))
    rows.append(_cells("then import jax_convgrad", importing["jax_convgrad_us"], None))
    tracing = report["tracing"]
    return [
        f"{tracing['net']}'s gradient: {tracing['convolutions']} convolutions, of which "
        f"{tracing['native']} are calls of a kernel under install(). Eager: {EAGER}",
        table(("ms", "median", "q1", "q3", "over lax"), rows),
    ]


def main(*, seconds: float, processes: int, json_path: pathlib.Path | None) -> int:
    """Runs the measurement; the arguments are the command's options.

    Returns:
        The exit status, 0.
    """
    options = results.portable_options(locals())
    results.check_writable(json_path)
    report = machine.describe() | {"options": options, "complete": False}
    report["importing"] = measure_importing(processes)
    report["eager"] = measure_eager(seconds)
    report["tracing"] = measure_tracing(seconds)
    report["complete"] = True
    console = Console()
    for line in describe(report):
        console.line(line)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    return 0
