"""`calibrate`: measures the CUDA kernels and corrects the planner's model of them.

On a GPU it runs kernels by name on problems that it picks by the model itself: for every row
of the table (`rates`), some that arithmetic bounds and some that memory does, from the layers
of real nets and from constructed problems, each beside the other kernels that might be planned
for it. Results are compared with the kernel "direct" before they are timed, in turns, as
`bench` does it. `rate_fit` turns that into a table.

The JSON is what `machine.describe` gives, `options`, `complete`, and

    rates              the table that the measured plans were made with, as `rates.Rates`
    multiprocessors    {gpu, model}: of the GPU, None if JAX does not say; and how many
                       the models count with
    copy_bytes_per_us  of a large copy, read and written
    problems           one object each: name, geometry (text), dtype, precision, bytes (least
                       traffic), launch (true: so small that only the launch counts), planned
                       (the planner's kernel), and kernels, one object for each measured kernel:
      kernel, operands its row of the table
      cost             of its plan, as `rates.Cost`
      error            normwise distance from the result of "direct", None for that one
      time_us          {median, q1, q3, rounds, instances, calls}, None after a failure
      failure          what went wrong, or None
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from .. import native, roofline
from ..compat import canonicalize_precision
from . import (
    ToolError,
    layers,
    machine,
    rate_fit,
    rate_problems,
    rates,
    read_json,
    results,
    timing,
)  # fmt: skip
from .check import forced_kernel
from .console import Console
from .rate_problems import Planned
from .rates import Rates
from .references import distance
from .workloads import JaxPeer, Workload, make_pool

# Operand sets: more than an L2 cache holds.
_POOL, _POOL_BYTES = 16, 2**28


def _problem(workload: Workload, table: Rates, found: dict[str, Planned]) -> dict[str, Any]:
    planned = min(
        found.values(),
        key=lambda p: table.model_us(p.cost, table.correction(p.kernel, p.operands)),
    )
    return {
        "name": workload.name,
        "geometry": layers.short(workload.geometry),
        "dtype": workload.dtype,
        "precision": workload.precision,
        "bytes": workload.bytes_moved,
        "planned": planned.kernel,
    }


def measure(
    workload: Workload, chosen: Sequence[Planned], *, seed: int, row_seconds: float
) -> list[dict[str, Any]]:
    """Checks and times some kernels on one problem, in turns.

    Args:
        workload: the problem.
        chosen: the kernels.
        seed: of the operands.
        row_seconds: time to spend on timing.

    Returns:
        The `kernels` of the JSON. Failures are recorded, not raised.
    """
    rows = [
        {
            "kernel": planned.kernel,
            "operands": planned.operands,
            "cost": dataclasses.asdict(planned.cost),
            "error": None,
            "time_us": None,
            "failure": None,
        }
        for planned in chosen
    ]
    try:
        _check_and_time(workload, rows, seed, row_seconds)
    except Exception as e:  # out of memory, mostly
        for row in rows:
            row["failure"] = row["failure"] or _one_line(e)
    return rows


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _check_and_time(
    workload: Workload, rows: Sequence[dict[str, Any]], seed: int, row_seconds: float
) -> None:
    """Fills in what was measured, and failures of single kernels."""
    precision = canonicalize_precision(workload.precision)
    count = max(2, min(_POOL, _POOL_BYTES // max(1, workload.bytes_moved)))
    pool = [tuple(map(jax.device_put, pair)) for pair in make_pool(workload, seed, count)]

    def peer(kernel: str) -> JaxPeer:
        function = forced_kernel(workload.geometry, workload.dtype, "cuda", kernel, precision)
        return JaxPeer(kernel, function, pool)

    expected = peer("direct").result()
    ready = []
    for row in rows:
        try:
            candidate = peer(row["kernel"])
            out = candidate.result()
            if row["kernel"] != "direct":
                row["error"] = error = float(distance(out, expected))
                if not error <= 2 * workload.bound:
                    row["failure"] = f"{error:.3e} away from direct, above {2 * workload.bound:.3e}"
                    continue
            ready.append(candidate)
        except Exception as e:  # a kernel that breaks must not hide the others
            row["failure"] = _one_line(e)
    if not ready:
        return
    timings = timing.measure(ready, pool=count, batched=True, row_seconds=row_seconds)
    for row in rows:
        if row["kernel"] in timings:
            row["time_us"] = results.time_entry(timings[row["kernel"]])


def _require_gpu() -> tuple[Any, Any]:
    """The GPU and the module for it, or a ToolError."""
    without = "--measurements FILE fits a table to what a GPU has measured before"
    if not machine.is_gpu():
        raise ToolError(f"calibrate needs a GPU, got {jax.devices()[0].device_kind}; {without}")
    if native.cuda is None:
        raise ToolError(f"calibrate needs the CUDA module, which was not built; {without}")
    return jax.devices()[0], native.cuda


def _measure_all(
    console: Console,
    *,
    seconds: float,
    per_bound: int,
    row_seconds: float,
    seed: int,
    json_path: pathlib.Path | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The JSON, complete or not; saved after every problem."""
    device, module = _require_gpu()
    deadline = time.perf_counter() + seconds
    capability = round(10 * float(device.compute_capability))
    table = Rates.from_json(module.rates())
    report = machine.describe() | {
        "options": options,
        "complete": False,
        "rates": dataclasses.asdict(table),
        "multiprocessors": {
            "gpu": getattr(device, "core_count", None),
            "model": module.reference_gpu("float32", False)["multiprocessors"],
        },
        "copy_bytes_per_us": roofline.measure("float32").bytes_per_s / 1e6,
        "problems": [],
    }
    problems: list[dict[str, Any]] = report["problems"]
    with jax.enable_x64(True):
        everything = rate_problems.candidates_on(capability)
        todo = rate_problems.select(everything, table, per_bound)
        tiny = []
        for layer in rate_problems.launches():
            workload = Workload(layer, "dx", *rate_problems.REQUESTS["f32"])
            tiny.append((workload, [rate_problems.plans(workload, capability)["direct"]]))
        console.line(
            f"calibrate: {len(todo)} of {len(everything)} problems on {device.device_kind}, at "
            f"most {seconds:.0f} s"
        )
        with console.progress(len(tiny) + len(todo), "calibrate"):
            for index, (workload, chosen) in enumerate((*tiny, *todo)):
                if time.perf_counter() > deadline:
                    break
                entry = _problem(workload, table, rate_problems.plans(workload, capability))
                entry["launch"] = index < len(tiny)
                entry["kernels"] = measure(workload, chosen, seed=seed, row_seconds=row_seconds)
                problems.append(entry)
                report["complete"] = len(problems) == len(tiny) + len(todo)
                if json_path is not None:
                    json_path.write_text(json.dumps(report, indent=1) + "\n")
                console.advance(workload.name)
    return report


def _read(path: pathlib.Path) -> dict[str, Any]:
    report = read_json(path, "measurements")
    if not isinstance(report, dict):
        raise ToolError(f"{path} must hold an object, got {type(report).__name__}")
    return report


def main(
    *,
    write_path: pathlib.Path | None,
    json_path: pathlib.Path | None,
    measurements_path: pathlib.Path | None,
    seconds: float,
    per_bound: int,
    row_seconds: float,
    seed: int,
) -> int:
    """Runs the calibration; the arguments are the command's options.

    Returns:
        The exit status: 1 if a kernel failed or was wrong.
    """
    options = results.portable_options(locals())
    if measurements_path is not None and json_path is not None:
        raise ToolError("--json keeps new measurements, and --measurements takes old ones")
    console = Console()
    if measurements_path is not None:
        report = _read(measurements_path)
    else:
        results.check_writable(json_path, write_path)
        report = _measure_all(
            console,
            seconds=seconds,
            per_bound=per_bound,
            row_seconds=row_seconds,
            seed=seed,
            json_path=json_path,
            options=options,
        )
    fitted = rate_fit.fit(report)
    text = rates.render(fitted.after)
    for line in rate_fit.describe(fitted):
        console.line(line)
    failures = [
        f"FAIL {row['kernel']} {row['operands']} {problem['name']} {problem['geometry']}: "
        f"{row['failure']}"
        for problem in report["problems"]
        for row in problem["kernels"]
        if row["failure"] is not None
    ]
    for failure in failures:
        console.line(failure, "red")
    if write_path is None:
        console.line(f"\n{text}")
    else:
        _write(write_path, text, report)
        console.line(f"wrote {write_path}")
    return 1 if failures else 0


def _write(path: pathlib.Path, text: str, report: dict[str, Any]) -> None:
    """Writes the table, unless the models count with another kind of GPU."""
    found = report["multiprocessors"]
    if found["gpu"] not in (None, found["model"]):
        raise ToolError(
            f"--write: the planner's models count with {found['model']} multiprocessors "
            f"(csrc/cuda/kernel_table.h), the measurements are from a GPU of {found['gpu']}"
        )
    results.check_writable(path)
    try:
        path.write_text(text)
    except OSError as e:
        raise ToolError(f"cannot write {path}: {e.strerror}") from None
