"""`bench`: the gradient beside its peers, on the layers of real nets.

Every result is checked before it is timed. Peers are timed in turns within one run
(`timing`), on operands that rotate through a pool, several instances to a call. On a GPU
times are device times: JAX's as the wall time of many instances issued back to back,
PyTorch's by events around a CUDA graph. Every row is printed, losses and failures
included. With a number of steps, JAX's functions run as the body of a `lax.scan`, where XLA
compiles some of them otherwise; PyTorch, which has none, runs a loop. `results` documents
the JSON.

With `--random` the rows are not layers of nets but convolutions drawn over all that lax
accepts (`random_layers`), and every loss to lax beyond 15 % is listed again at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .. import roofline
from ..dispatch import Implementation
from . import (
    DTYPES,
    MAPS,
    ToolError,
    layers,
    machine,
    maps_by_name,
    random_layers,
    require,
    results,
    timing,
)
from .console import Console, table
from .references import distance, reference
from .results import PEERS, Row
from .workloads import JaxPeer, ScanPeer, Workload, make_pool, workloads

_IMPLEMENTATIONS: dict[str, Implementation] = {"auto": None, "native": "native", "xla": "xla"}


class _RowFailureError(Exception):
    """A peer that cannot be timed; `kind` as in the JSON."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _error(peer: str, error: Exception) -> dict[str, str]:
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"peer": peer, "kind": "error", "message": message}


def _empty_row(workload: Workload) -> Row:
    layer = workload.layer
    return {
        "index": layer.index,
        "name": workload.name,
        "class": workload.class_name,
        "direction": workload.direction,
        "source": layer.source,
        "geometry": layers.short(layer.geometry),
        "batch": layer.batch,
        "batch_in_file": layer.batch_in_file,
        "flops": layer.geometry.flops,
        "bytes": workload.bytes_moved,
        "dtype": workload.dtype,
        "workspace_bytes": 0,
        "implementation": None,
        "kernel": None,
        "reason": None,
        "reference": None,
        "bound": None,
        "errors": {},
        "working_set_bytes": None,
        "cache": "unknown",
        "times_us": {},
        "ratios": {},
        "gflop_per_s": None,
        "gbyte_per_s": None,
        "failures": [],
    }


def measure_row(
    workload: Workload,
    implementation: Implementation,
    peers: Sequence[str],
    *,
    seed: int,
    row_seconds: float,
    cache_bytes: int | None,
    scan: int | None = None,
) -> Row:
    """Checks and times one row.

    Args:
        workload: what to compute.
        implementation: of ours.
        peers: names from `results.PEERS`.
        seed: of the operands.
        row_seconds: time to spend on timing.
        cache_bytes: size of the last-level cache, if known.
        scan: steps of the scan that JAX's peers run in; None for no scan.

    Returns:
        The row, as `results` documents it. Failures are recorded, not raised.
    """
    row = _empty_row(workload)
    pool = make_pool(workload, seed, scan)
    row["working_set_bytes"] = len(pool) * workload.bytes_moved
    if cache_bytes:
        row["cache"] = "cold" if row["working_set_bytes"] > 2 * cache_bytes else "warm"
    try:
        choice = workload.choice(implementation)
    except ValueError as e:
        row["failures"].append({"peer": "ours", "kind": "unsupported", "message": str(e)})
        return row
    row.update(
        implementation=choice.implementation,
        kernel=choice.kernel,
        reason=choice.reason,
        workspace_bytes=choice.workspace_bytes,
    )
    trusted = reference(workload, pool[0])
    row.update(reference=trusted.dtype, bound=trusted.bound)
    on_device = [(jax.device_put(a), jax.device_put(b)) for a, b in pool]

    jax_peer = JaxPeer if scan is None else ScanPeer

    def prepare(name: str) -> Any:
        if name == "ours":
            return jax_peer(name, workload.our_function(implementation), on_device)
        if name == "lax":
            return jax_peer(name, workload.lax_function(), on_device)
        from . import torch_peer

        try:
            return torch_peer.TorchPeer(torch_peer.load(workload.precision), workload, pool)
        except torch_peer.UnsupportedError as e:
            raise _RowFailureError("unsupported", str(e)) from None

    ready: list[timing.Peer] = []
    whole: dict[str, Any] = {}
    for name in ("ours", *peers):
        try:
            peer = prepare(name)
            out = peer.result()
            row["errors"][name] = error = trusted.error(out)
            if not error <= trusted.bound:
                raise _RowFailureError(
                    "mismatch", f"normwise error {error:.3e} above {trusted.bound:.3e}"
                )
            whole[name] = jax.device_put(out)
            # The reference has some images; peers that agree on all of them have the rest.
            if name != "ours" and "ours" in whole:
                apart = float(distance(whole["ours"], whole.pop(name)))
                if not apart <= 2 * trusted.bound:
                    raise _RowFailureError(
                        "mismatch",
                        f"whole result {apart:.3e} away from ours, above {2 * trusted.bound:.3e}",
                    )
            ready.append(peer)
        except _RowFailureError as e:
            row["failures"].append({"peer": name, "kind": e.kind, "message": str(e)})
        except ToolError:
            raise
        except Exception as e:  # a peer that breaks on a layer must not hide the others
            row["failures"].append(_error(name, e))
    whole.clear()
    if any(peer.name == "ours" for peer in ready):
        try:
            timings = timing.measure(
                ready,
                pool=len(pool),
                batched=machine.is_gpu() or scan is not None,
                row_seconds=row_seconds,
            )
        except Exception as e:  # out of memory, mostly
            row["failures"].append(_error("timing", e))
        else:
            results.time_fields(row, timings)
    return row


def _wide(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """JAX's 64-bit mode where a dtype needs it, and only there."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def _parse_peers(text: str) -> list[str]:
    peers = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in peers if name not in PEERS]:
        raise ToolError(f"--peers must be among {', '.join(PEERS)}, got {', '.join(unknown)}")
    if len(set(peers)) != len(peers):
        raise ToolError(f"--peers names a peer twice: {text}")
    return peers


def _select(
    chosen: Sequence[layers.Layer], classes: Sequence[str] | None, per_class: int | None
) -> list[layers.Layer]:
    """The layers of some classes, and of each at most so many, spread over the list."""
    by_class: dict[str, list[layers.Layer]] = {}
    for layer in chosen:
        by_class.setdefault(layer.class_name, []).append(layer)
    if unknown := [name for name in classes or () if name not in by_class]:
        raise ToolError(f"--class must be one of {', '.join(sorted(by_class))}, got {unknown[0]}")
    if per_class == 0:
        raise ToolError("--per-class must be positive, got 0")
    picked: list[layers.Layer] = []
    for name in classes or by_class:
        members = by_class[name]
        count = len(members) if per_class is None else min(per_class, len(members))
        picked += [members[i * len(members) // count] for i in range(count)]
    return sorted(picked, key=lambda layer: layer.index)


def main(
    *,
    layers_path: pathlib.Path | None,
    random: int | None,
    dtype: str | None,
    layout: str,
    maps: str | None,
    peers: str,
    classes: list[str] | None,
    per_class: int | None,
    batch_budget: float | None,
    implementation: str,
    precision: str,
    row_seconds: float,
    scan: int | None,
    limit: int | None,
    seed: int,
    json_path: pathlib.Path | None,
    png_path: pathlib.Path | None,
) -> int:
    """Runs the benchmark; the arguments are the command's options.

    Returns:
        The exit status: 1 if a result of ours was wrong or did not come.
    """
    dtype = dtype or (None if random is not None else "f32")
    options = results.portable_options(locals())
    if png_path is not None:
        require("matplotlib", "--png")
    results.check_writable(json_path, png_path)
    names = _parse_peers(peers)
    names_of_maps = maps_by_name(maps or ("dx" if random is None else ",".join(MAPS)))
    torch_settings = None
    if "torch" in names:
        from . import torch_peer

        try:
            torch_settings = torch_peer.settings(torch_peer.load(precision))
        except torch_peer.UnsupportedError as e:
            raise ToolError(f"--peers torch: {e}") from None
    dtype_name = DTYPES[dtype or "f32"]  # of the roofs, where rows differ
    if random is None:
        listed = layers.load(layers_path or layers.default_path(), layout, batch_budget)
        selected = _select(listed, classes, per_class)
        todo = [w for x in selected for w in workloads(x, dtype_name, precision, names_of_maps)][
            :limit
        ]
    else:
        drawn_dtype = None if dtype is None else dtype_name
        draw = functools.partial(
            random_layers.random_workload,
            seed,
            dtype=drawn_dtype,
            precision=precision,
            maps=names_of_maps,
        )
        todo = [draw(index) for index in range(random)][:limit]
    console = Console()
    with _wide(dtype_name):
        report = machine.describe() | {
            "options": options,
            "torch": torch_settings,
            "complete": False,
            "roofs": dataclasses.asdict(roofline.measure(dtype_name)),
        }

        def save(rows: Sequence[Row], complete: bool) -> None:
            report.update(
                complete=complete,
                rows=rows,
                classes=results.summarize(rows),
                failures=results.count_failures(rows),
            )
            if json_path is not None:
                json_path.write_text(json.dumps(report, indent=1) + "\n")

        _run(console, todo, _IMPLEMENTATIONS[implementation], names, seed, row_seconds, scan, save)
    if png_path is not None:
        from . import plots

        plots.draw(report, png_path)
    return _conclude(console, report)


def _run(
    console: Console,
    todo: Sequence[Workload],
    implementation: Implementation,
    peers: Sequence[str],
    seed: int,
    row_seconds: float,
    scan: int | None,
    save: Callable[[Sequence[Row], bool], None],
) -> None:
    """Measures, prints and saves every row; a run that is stopped leaves what it has."""
    cache_bytes = machine.last_level_cache_bytes()
    console.line(results.header(peers), "bold")
    rows: list[Row] = []
    with console.progress(len(todo), "bench", plain=False):
        for workload in todo:
            try:
                with _wide(workload.dtype):
                    row = measure_row(
                        workload,
                        implementation,
                        peers,
                        seed=seed,
                        row_seconds=row_seconds,
                        cache_bytes=cache_bytes,
                        scan=scan,
                    )
            except ToolError:
                raise
            except Exception as e:  # no operands or no reference: memory, mostly
                row = _empty_row(workload)
                row["failures"].append(_error("reference", e))
            rows.append(row)
            bad = row["failures"] or any(ratio["loss"] for ratio in row["ratios"].values())
            console.line(results.line(row, peers), "red" if bad else "")
            for failure in row["failures"]:
                console.line(f"    {failure['peer']} {failure['kind']}: {failure['message']}")
            save(rows, len(rows) == len(todo))
            console.advance()


def _conclude(console: Console, report: dict[str, Any]) -> int:
    """Prints the summary and returns the exit status."""
    console.line()
    if cells := results.summary_rows(report["classes"]):
        console.line(table(results.SUMMARY_HEADERS, cells))
    if report["options"]["random"] is not None:
        for text in results.losses(report["rows"], "lax", results.LISTED_LOSS):
            console.line(text)
    failures = report["failures"]
    counted = ", ".join(f"{number} {name}" for name, number in sorted(failures.items()))
    console.line(f"{len(report['rows'])} rows; failures: {counted or 'none'}")
    # A peer's failure says nothing about this package; ours, or no time at all, does.
    broken = ("ours mismatch", "ours error", "reference error", "timing error")
    return 1 if any(failures.get(kind) for kind in broken) else 0
