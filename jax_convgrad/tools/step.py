"""`step`: a training step of a whole net, by lax and under `install()`.

A step is the forward pass, the gradients for all parameters and the update of SGD with
momentum: one jitted program that is given its parameters' memory. Loss and gradients of both
programs are compared first, and every input gradient alone with lax in float64. Then six
things are timed in turns within one run (`timing`):

    lax, ours           the step, with lax's own gradients and under `install()`
    forward_lax, forward_ours    the loss alone
    dx_lax, dx_ours     the step's input gradients alone: each convolution's at its shape, on
                        random operands, one call after the other, by lax and by what
                        `install()` would run. The first convolution of a net has none

From their medians follow

    backward            lax - forward_lax: both gradients of every layer, and the update
    dx_of_backward      dx_lax / backward, dX's share of the backward pass
    dx_of_step          dx_lax / lax
    ceiling             lax / (backward - dx_lax): the speed-up if the forward pass and dX took
                        no time (Amdahl)
    expected            lax / (backward - dx_lax + forward_ours + dx_ours): the speed-up if they
                        took as long inside the step as alone

and the measured speed-up, lax / ours round by round, stands beside them. A layer alone finds
its operands in a cache more or less than the step does, so the shares are estimates.

The JSON is what `machine.describe` gives, `options`, `complete`, and

    nets        one object for each net:
      net, title, dtype, parameters, batch, image
      convolutions, input_gradients, native    in the forward pass; in the step; of these, those
                                               that a kernel computes
      kernels                   how many by kernel, "lax" among them
      losses, loss_error        by program; their relative distance
      gradient_error            the largest normwise distance of a parameter's two gradients;
                                in 16 bits that of ours from lax's of the step in float32
      bound                     what is allowed for both: four times the sum, over the input
                                gradients, of the error allowed for one; in 16 bits at least
                                twice lax's own gradient_error. All of these are of the net
                                with smooth functions for ReLU and the maximum of a window
      times_us                  by name above: {median, q1, q3, rounds, instances, calls}
      speedup, dx_speedup       lax over ours, {median, q1, q3, loss, within_noise}
      backward_us, dx_of_backward, dx_of_step, ceiling, expected    as above
      layers                    for each geometry: {geometry, count, implementation, kernel,
                                reason, bound, errors, times_us}; errors and medians of one
                                call by lax and ours, times None on a GPU
      failures                  [{what, message}]; a net with one has no times
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from . import DTYPES, ToolError, machine, models, require, results
from .console import Console, table
from .training import PROGRAMS, Report, measure_net


def describe(report: Report) -> list[str]:
    """The lines about one net."""
    kernels = ", ".join(f"{name} {number}" for name, number in sorted(report["kernels"].items()))
    lines = [
        f"{report['title']}, {report['parameters'] / 1e6:.3g} M parameters, batch "
        f"{report['batch']}, {report['image']}x{report['image']} images, {report['dtype']}",
        f"  {report['convolutions']} convolutions; {report['input_gradients']} input gradients in "
        f"a step, {report['native']} of them by a kernel ({kernels})",
        f"  losses {report['losses']['lax']:.7g} by lax and {report['losses']['ours']:.7g}; "
        f"gradients {report['gradient_error']:.2e} apart, at most {report['bound']:.2e}",
    ]
    lines += [f"  FAILED {f['what']}: {f['message']}" for f in report["failures"]]
    if "times_us" not in report:
        return lines
    cells = []
    for what, name in (
        ("step, lax", "lax"),
        ("step, install()", "ours"),
        ("forward, lax", "forward_lax"),
        ("forward, install()", "forward_ours"),
        ("all dX alone, lax", "dx_lax"),
        ("all dX alone, ours", "dx_ours"),
    ):
        us = report["times_us"][name]
        cells.append((what, *(f"{us[key] / 1e3:.4g}" for key in ("median", "q1", "q3")),
                      str(us["rounds"])))  # fmt: skip
    lines.append(table(("ms", "median", "q1", "q3", "rounds"), cells))
    if report["layers"][0]["times_us"]["lax"] is not None:
        lines.append(table(("one dX", "count", "lax us", "ours us", "ratio", "runs as"), [
            (row["geometry"], str(row["count"]),
             *(f"{row['times_us'][program]:.4g}" for program in PROGRAMS),
             f"{row['times_us']['lax'] / row['times_us']['ours']:.3g}x", row["kernel"] or "lax")
            for row in report["layers"]
        ]))  # fmt: skip
    return lines


SUMMARY_HEADERS = ("net", "dX by a kernel", "step, lax", "step, install()", "lax/ours",
                   "dX of backward", "dX of step", "ceiling", "all dX, lax/ours",
                   "expected")  # fmt: skip


def summary(nets: Sequence[Report]) -> str:
    """One row for each net that was timed, as Markdown."""

    def ms(us: dict[str, Any]) -> str:
        half = (us["q3"] - us["q1"]) / us["median"] / 2
        return f"{us['median'] / 1e3:.4g} ms ±{100 * half:.0f} %"

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}x"

    rows: list[Sequence[str]] = [SUMMARY_HEADERS, ["---"] * len(SUMMARY_HEADERS)]
    for net in nets:
        if "times_us" not in net:
            continue
        rows.append((
            net["title"],
            f"{net['native']} of {net['input_gradients']}",
            ms(net["times_us"]["lax"]),
            ms(net["times_us"]["ours"]),
            times(net["speedup"]["median"]),
            f"{100 * net['dx_of_backward']:.0f} %",
            f"{100 * net['dx_of_step']:.0f} %",
            times(net["ceiling"]),
            times(net["dx_speedup"]["median"]),
            times(net["expected"]),
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(
    *,
    nets: list[str] | None,
    dtype: str,
    batch: int,
    image: int,
    precision: str,
    seconds: float,
    seed: int,
    json_path: pathlib.Path | None,
    png_path: pathlib.Path | None,
) -> int:
    """Runs the benchmark; the arguments are the command's options.

    Returns:
        The exit status: 1 if a result was wrong.
    """
    options = results.portable_options(locals())
    if unknown := [name for name in nets or () if name not in models.NETS]:
        raise ToolError(f"--net must be one of {', '.join(models.NETS)}, got {unknown[0]}")
    if image % models.IMAGE_MULTIPLE:
        raise ToolError(f"--image must be a multiple of {models.IMAGE_MULTIPLE}, got {image}")
    if png_path is not None:
        require("matplotlib", "--png")
    results.check_writable(json_path, png_path)
    console = Console()
    report: Report = machine.describe() | {"options": options, "complete": False, "nets": []}
    names = nets or list(models.DEFAULT_NETS)
    for name in names:
        net = measure_net(name, dtype=DTYPES[dtype], batch=batch, image=image, seconds=seconds,
                          precision=precision, seed=seed)  # fmt: skip
        report["nets"].append(net)
        report["complete"] = len(report["nets"]) == len(names)
        for line in describe(net):
            console.line(line, "red" if "FAILED" in line else "")
        console.line()
        if json_path is not None:
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    console.line(summary(report["nets"]))
    if png_path is not None:
        from . import plots

        plots.draw_steps(report, png_path)
    return 1 if any(net["failures"] for net in report["nets"]) else 0
