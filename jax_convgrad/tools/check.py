"""`check`: maps of convolutions against the definition in float64, over many geometries.

Every geometry runs in every dtype through the public functions, on the kernel wherever
one takes it, on fresh random data. The reference is the map's definition in NumPy, of the
same operands after rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .. import custom_call, dispatch, native, planner
from ..compat import canonicalize_precision
from ..geometry import ConvGeometry
from ..maps import INPUT_GRAD, Map, shape_of_role
from . import DTYPES, MAPS, ToolError, machine, maps_by_name
from .console import Console, table
from .geometries import (
    Case,
    classify,
    named_cases,
    normwise_error,
    random_cases,
    reduction_taps,
    tolerance,
)
from .references import by_definition
from .workloads import public_function

# Compiled programs are not used again after their case; without this they would pile up.
_CASES_PER_CACHE = 100


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One case in one dtype: what ran, how far off it was, how far off it may be."""

    case: Case
    map_: Map
    dtype: str
    kernel: str | None  # None where lax ran
    error: float
    bound: float
    failure: str | None = None  # an exception, where nothing was computed

    @property
    def passed(self) -> bool:
        """Whether a result came out and is within its bound."""
        return self.failure is None and self.error <= self.bound


def forced_kernel(
    geometry: ConvGeometry,
    dtype: str,
    platform: str,
    kernel: str,
    precision: Any,
    map_: Map = INPUT_GRAD,
) -> Any:
    """The custom call with one kernel by name, or None if that kernel does not take it."""
    module = native.module_for(platform)
    if module is None:
        raise ToolError(f"--kernel needs compiled kernels: the {platform} module was not built")
    maps = [map_.name for map_ in MAPS.values() if map_.target in module.targets()]
    known = dict.fromkeys(name for of_map in maps for name in module.kernel_names(of_map))
    if kernel not in known:
        names = ", ".join(known)
        raise ToolError(f"--kernel must be one of {names} on {platform}, got {kernel!r}")
    try:
        workspace_bytes = planner.plan(
            geometry, dtype, platform, precision, kernel, map_
        ).workspace_bytes
    except ValueError:
        return None
    attributes = custom_call.attributes(geometry, platform, precision, kernel)
    layouts = custom_call.layouts(geometry, platform)
    struct: Any = jax.ShapeDtypeStruct
    call: Any = jax.ffi.ffi_call(
        native.TARGETS[map_],
        (
            struct(shape_of_role(geometry, map_.result), dtype),
            struct((workspace_bytes,), np.uint8),
        ),
        input_layouts=tuple(layouts[role] for role in map_.operands),
        output_layouts=(layouts[map_.result], (0,)),
    )
    return lambda first, second: call(first, second, **attributes)[0]


@dataclasses.dataclass(frozen=True)
class _Result:
    """What one case computes in one dtype, before it runs."""

    map_: Map
    dtype: str
    kernel: str | None
    function: Callable[..., Any]
    operands: tuple[np.ndarray, np.ndarray]


def _results_of(
    case: Case,
    maps: Sequence[Map],
    dtypes: Sequence[str],
    platform: str,
    rng: np.random.Generator,
    kernel: str | None,
    precision: str,
) -> list[_Result]:
    geometry = case.geometry
    results = []
    for map_, dtype in itertools.product(maps, dtypes):
        if kernel is None:
            name, function = _public(map_, geometry, dtype, platform, precision)
        else:
            name = kernel
            function = forced_kernel(
                geometry, dtype, platform, kernel, canonicalize_precision(precision), map_
            )
            if function is None:
                continue
        first, second = (
            rng.standard_normal(shape_of_role(geometry, role)).astype(dtype)
            for role in map_.operands
        )
        results.append(_Result(map_, dtype, name, function, (first, second)))
    return results


def _compute(results: Sequence[_Result]) -> Sequence[Any]:
    """All of them in one program, since most of the time goes into compiling programs."""
    functions = [result.function for result in results]

    def program(operands: list[tuple[Any, Any]]) -> list[Any]:
        return [function(*pair) for function, pair in zip(functions, operands, strict=True)]

    return jax.device_get(jax.jit(program)([result.operands for result in results]))


def _run_case(
    case: Case, results: Sequence[_Result], platform: str, precision: str
) -> list[Outcome]:
    failures: list[str | None] = [None] * len(results)
    outs: list[Any] = [None] * len(results)
    try:
        outs[:] = _compute(results)
    except Exception:  # then each alone, so that one failure hides no other
        for index, result in enumerate(results):
            try:
                (outs[index],) = _compute([result])
            except Exception as e:
                failures[index] = f"{type(e).__name__}: {e}".splitlines()[0]
    outcomes = []
    for result, out, failure in zip(results, outs, failures, strict=True):
        error = float("nan")
        if failure is None:
            expected = by_definition(result.map_, *result.operands, case.geometry)
            error = normwise_error(out, expected)
        tf32 = platform == "cuda" and result.dtype == "float32" and precision != "highest"
        taps = reduction_taps(case.geometry, result.map_)
        bound = tolerance("tf32" if tf32 else result.dtype, taps)
        outcomes.append(
            Outcome(case, result.map_, result.dtype, result.kernel, error, bound, failure)
        )
    return outcomes


def _public(
    map_: Map, geometry: ConvGeometry, dtype: str, platform: str, precision: str
) -> tuple[str | None, Callable[..., Any]]:
    """The kernel's name and the public function, insisting on the kernel if there is one."""
    try:
        choice = dispatch.choose(
            geometry, dtype, platform, "native", canonicalize_precision(precision), map_=map_
        )
    except ValueError:
        choice = dispatch.choose(geometry, dtype, platform, "xla", map_=map_)
    options = {"precision": precision, "implementation": choice.implementation}
    return choice.kernel, public_function(map_, geometry, **options)


def summarize(outcomes: Sequence[Outcome]) -> str:
    """The table: one line per dtype and class, the worst case of each."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        key = (outcome.map_.name, outcome.dtype, classify(outcome.case.geometry))
        groups.setdefault(key, []).append(outcome)
    rows = []
    for (map_name, dtype, class_name), members in sorted(groups.items()):
        computed = [o for o in members if o.failure is None]
        worst = max(computed, key=lambda o: o.error / o.bound, default=None)
        native_count = sum(o.kernel is not None for o in members)
        failed = sum(not o.passed for o in members)
        rows.append(
            (
                f"{map_name} {dtype} {class_name}",
                str(len(members)),
                str(native_count),
                "-" if worst is None else f"{worst.error:.2e}",
                "-" if worst is None else f"{worst.bound:.2e}",
                "pass" if not failed else f"FAIL {failed}",
            )
        )
    headers = ("map, dtype, class", "cases", "native", "worst error", "its bound", "result")
    return table(headers, rows)


def main(
    *,
    count: int,
    maps: str | None,
    dtype: str,
    seed: int,
    kernel: str | None,
    precision: str,
    require_native: bool,
) -> int:
    """Runs the check and prints its table.

    Args:
        count: random geometries, besides the named ones.
        maps: names in `MAPS`, comma-separated; None for the maps that have kernels here.
        dtype: "all" or a key of `DTYPES`.
        seed: of the geometries and of the data.
        kernel: one kernel by name, on the geometries that it takes; None for the planner's.
        precision: "default" or "highest"; on a GPU the former lets float32 be TF32.
        require_native: fail if anything ran through lax.

    Returns:
        The exit status: 1 if a result was wrong or missing.
    """
    console = Console()
    platform = machine.lowering_platform()
    maps = maps or ("dx" if platform == "cuda" else ",".join(MAPS))
    wanted = [MAPS[name] for name in maps_by_name(maps)]
    dtypes = list(DTYPES.values()) if dtype == "all" else [DTYPES[dtype]]
    cases = [*named_cases(), *random_cases(count, seed)]
    outcomes: list[Outcome] = []
    clear_caches: Callable[[], None] = jax.clear_caches
    start = time.perf_counter()
    console.line(
        f"check: {maps} of {len(cases)} geometries in {', '.join(dtypes)} on {platform} "
        f"({jax.devices()[0].device_kind}), seed {seed}"
    )
    with jax.enable_x64(True), console.progress(len(cases), "check"):
        for index, case in enumerate(cases):
            rng = np.random.default_rng([seed, index])
            results = _results_of(case, wanted, dtypes, platform, rng, kernel, precision)
            outcomes += _run_case(case, results, platform, precision)
            if index % _CASES_PER_CACHE == _CASES_PER_CACHE - 1:
                clear_caches()
            console.advance()
    console.line(summarize(outcomes))
    failures = [o for o in outcomes if not o.passed]
    for o in failures:
        what = o.failure or f"error {o.error:.3e} above {o.bound:.3e}"
        ran = "lax" if o.kernel is None else f"kernel {o.kernel}"
        name = f"{o.map_.name} {o.dtype} {o.case.name}"
        console.line(f"FAIL {name} ({ran}): {what}\n  {o.case.geometry}", "red")
    native_count = sum(o.kernel is not None for o in outcomes)
    used: dict[str, int] = {}
    for o in outcomes:
        used[o.kernel or "lax"] = used.get(o.kernel or "lax", 0) + 1
    console.line(
        f"{len(outcomes)} results, {native_count} native, {len(failures)} failed, "
        f"{time.perf_counter() - start:.0f} s; "
        + ", ".join(f"{name}: {number}" for name, number in sorted(used.items()))
    )
    if not outcomes:
        console.line(f"FAIL kernel {kernel} took none of the geometries", "red")
        return 1
    if native_count == 0:
        console.line("note: no kernel ran, so this compared lax with itself", "yellow")
    if require_native and native_count < len(outcomes):
        console.line("FAIL --require-native: not every case ran on a kernel", "red")
        return 1
    return 1 if failures else 0
