"""What bench found: the lines it prints, the class summaries, and the JSON's schema.

The JSON is one object:

    machine, versions, modules, git_commit, date_utc    as `machine.describe` gives them
    options     the command's options
    torch       PyTorch's settings {threads, omp_wait_policy, cudnn, cudnn_benchmark}, None
                where it is no peer
    complete    false in a file that an interrupted run left
    roofs       {flops_per_s, bytes_per_s, source}, measured on the device
    rows        one object for each row measured, in order:
      index, name, class, direction ("dx", "fwd" or "dw"), source, geometry (text)
      batch, batch_in_file
      flops, bytes              work of one problem, products with padding not counted;
                                least traffic
      dtype, workspace_bytes    of the problem; scratch memory of our kernel
      implementation, kernel, reason    what ran as "ours": "native" or "xla"; None for xla
      reference, bound, errors  dtype of the reference, normwise error allowed and, by
                                peer, found
      working_set_bytes         memory that calls rotate through, operands and results
      cache                     "cold" if that is over twice the last-level cache,
                                "warm" if not, "unknown" if its size is
      times_us                  by peer: {median, q1, q3, rounds, instances, calls}, per
                                problem
      ratios                    by peer, its time over ours, the median of rounds:
                                {median, q1, q3, loss, within_noise}; a loss is a median
                                under 1, within noise if q3 is not
      gflop_per_s, gbyte_per_s  of ours
      failures                  [{peer, kind, message}], kind one of "unsupported",
                                "mismatch", "error"; a peer with one has no time.
                Of peer "reference" or "timing": the row has no times
    classes     by class, then by peer: {rows, geomean, worst, worst_row, losses,
                losses_within_noise}
    failures    the number of rows' failures by "peer kind"
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from . import ToolError
from .timing import Spread, Timing

PEERS = ("lax", "torch")
Row = dict[str, Any]

_CLASS_WIDTH, _NAME_WIDTH = 18, 62
LISTED_LOSS = 1.15  # our time over a peer's from which `losses` lists a row


def time_entry(timing: Timing) -> dict[str, Any]:
    """A peer's time, as the JSON has it."""
    us = timing.us
    return {
        "median": us.median,
        "q1": us.q1,
        "q3": us.q3,
        "rounds": len(timing.samples_us),
        "instances": timing.instances,
        "calls": timing.calls,
    }


def ratio_entry(ratio: Spread) -> dict[str, Any]:
    """A peer's time over ours, as the JSON has it."""
    return {
        "median": ratio.median,
        "q1": ratio.q1,
        "q3": ratio.q3,
        "loss": ratio.median < 1,
        "within_noise": ratio.median < 1 <= ratio.q3,
    }


def time_fields(row: Row, timings: dict[str, Timing]) -> None:
    """Adds times, ratios and rates to a row."""
    for name, timing in timings.items():
        row["times_us"][name] = time_entry(timing)
        if name == "ours":
            row["gflop_per_s"] = row["flops"] / timing.us.median / 1e3
            row["gbyte_per_s"] = row["bytes"] / timing.us.median / 1e3
        else:
            row["ratios"][name] = ratio_entry(timings["ours"].ratio_of(timing))


def portable_options(options: dict[str, Any]) -> dict[str, Any]:
    """A command's options as its JSON has them: paths without folders above this one."""
    return {
        name: _portable(value) if isinstance(value, pathlib.Path) else value
        for name, value in options.items()
    }


def _portable(path: pathlib.Path) -> str:
    absolute, here = path.resolve(), pathlib.Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else path.name


def check_writable(*paths: pathlib.Path | None) -> None:
    """Makes the folders of files to come, so that a ToolError precedes the measurement."""
    for path in paths:
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ToolError(f"cannot write {path}: {e.strerror}") from None


def _microseconds(row: Row, peer: str) -> str:
    times = row["times_us"].get(peer)
    if times is None:
        return "-"
    spread = 50 * (times["q3"] - times["q1"]) / times["median"]
    median = times["median"]
    return (f"{median:.0f}" if median >= 1000 else f"{median:.3g}") + f" ±{spread:.0f}%"


def header(peers: Sequence[str]) -> str:
    """The line above the rows."""
    return "  ".join(
        [
            *(f"{peer}/ours".rjust(10) for peer in peers),
            "class".ljust(_CLASS_WIDTH),
            "layer".ljust(_NAME_WIDTH),
            *(f"{peer} us".rjust(13) for peer in ("ours", *peers)),
            "GFLOP/s".rjust(8),
            "GB/s".rjust(7),
            "kernel",
        ]
    )


def line(row: Row, peers: Sequence[str]) -> str:
    """A row's line: ratios first, losses named at its end."""
    marks = []
    for peer in peers:
        if (ratio := row["ratios"].get(peer)) is not None and ratio["loss"]:
            marks.append(f"LOSS to {peer}" + (" (within noise)" if ratio["within_noise"] else ""))
    for failure in row["failures"]:
        marks.append(f"{failure['kind'].upper()} {failure['peer']}")
    ratios = [row["ratios"].get(peer) for peer in peers]
    rates = [row["gflop_per_s"], row["gbyte_per_s"]]
    return "  ".join(
        [
            *("-".rjust(10) if r is None else f"{r['median']:.3g}x".rjust(10) for r in ratios),
            row["class"].ljust(_CLASS_WIDTH),
            f"{row['name']} {row['geometry']}".ljust(_NAME_WIDTH),
            *(_microseconds(row, peer).rjust(13) for peer in ("ours", *peers)),
            ("-" if rates[0] is None else f"{rates[0]:.4g}").rjust(8),
            ("-" if rates[1] is None else f"{rates[1]:.4g}").rjust(7),
            row["kernel"] or ("lax" if row["implementation"] == "xla" else "-"),
            *(f"[{mark}]" for mark in marks),
        ]
    ).rstrip()


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive values."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The `classes` of the JSON: "all" for the input gradients, "all fwd" and "all dw" too."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["class"], []).append(row)
    for name, direction in (("all", "dx"), ("all fwd", "fwd"), ("all dw", "dw")):
        groups[name] = [row for row in rows if row["direction"] == direction]
    summary: dict[str, dict[str, Any]] = {}
    for class_name, members in groups.items():
        summary[class_name] = {}
        for peer in PEERS:
            timed = [row for row in members if peer in row["ratios"]]
            if not timed:
                continue
            ratios = [row["ratios"][peer] for row in timed]
            worst = min(timed, key=lambda row: float(row["ratios"][peer]["median"]))
            summary[class_name][peer] = {
                "rows": len(timed),
                "geomean": geometric_mean([r["median"] for r in ratios]),
                "worst": worst["ratios"][peer]["median"],
                "worst_row": f"{worst['name']} {worst['geometry']}",
                "losses": sum(r["loss"] for r in ratios),
                "losses_within_noise": sum(r["within_noise"] for r in ratios),
            }
    return summary


def count_failures(rows: Sequence[Row]) -> dict[str, int]:
    """How many failures of each kind, by "peer kind"."""
    counts: dict[str, int] = {}
    for row in rows:
        for failure in row["failures"]:
            key = f"{failure['peer']} {failure['kind']}"
            counts[key] = counts.get(key, 0) + 1
    return counts


def losses(rows: Sequence[Row], peer: str, beyond: float) -> list[str]:
    """Lines that name the rows where we take more than `beyond` times a peer's time.

    Args:
        rows: what was measured.
        peer: of whom.
        beyond: at least 1.

    Returns:
        A line that counts them, and one for each, the worst first.
    """
    timed = [row for row in rows if peer in row["ratios"]]
    slower = sorted((1 / row["ratios"][peer]["median"], row["index"], row) for row in timed)[::-1]
    beyond_it = [(times, row) for times, _, row in slower if times > beyond]
    share = 100 * len(beyond_it) / max(1, len(timed))
    lines = [
        f"{len(beyond_it)} of {len(timed)} rows ({share:.2g} %) take over {beyond} times {peer}'s"
    ]
    for times, row in beyond_it:
        lines.append(
            f"{times:>6.2f}  {row['name']} {row['direction']} {row['dtype']} {row['geometry']}: "
            f"{_microseconds(row, 'ours')} us, {peer} {_microseconds(row, peer)} us, "
            f"{row['kernel'] or row['reason']}"
        )
    return lines


def summary_rows(classes: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table of classes, under `SUMMARY_HEADERS`."""
    return [
        (
            class_name,
            f"{peer}/ours",
            f"{s['geomean']:.3g}x",
            f"{s['worst']:.3g}x",
            str(s["rows"]),
            str(s["losses"]),
            str(s["losses_within_noise"]),
            s["worst_row"],
        )
        for class_name, peers in classes.items()
        for peer, s in peers.items()
    ]


SUMMARY_HEADERS = ("class", "ratio", "geomean", "worst", "rows", "losses", "in noise", "worst row")
