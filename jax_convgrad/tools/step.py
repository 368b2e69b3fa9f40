"""`step`: a training step of a whole net, by lax and under `install()`.

A step is the forward pass, the gradients for all parameters and the update of SGD with
momentum: one jitted program that is given its parameters' memory. The losses of three steps
and the gradients of the first are compared; then both programs are timed in turns within one
run (`timing`). Where the time goes is read from a trace of XLA's operations (`step_trace`) and
scaled to the time of the untraced step.

The JSON is what `machine.describe` gives, `options`, `complete`, and

    nets        one object for each net:
      net, title, dtype, parameters, batch, image    the last one a list of sizes
      convolutions              {y, dx, dw}: how many there are in a step, forward passes and
                                gradients; the first layer has no input gradient
      kernels                   {y, dx, dw}, each how many by kernel, "lax" among them
      multiply_adds             of the forward convolutions, products with padding included
      losses, loss_error        by program, of three steps; their largest relative distance
      gradient_error            the largest normwise distance of a parameter's two gradients;
                                in 16 bits that of ours from lax's of the step in float32
      bound                     what is allowed for both: four times the sum, over the forward
                                passes and the input gradients, of the error allowed for one; in
                                16 bits at least twice lax's own gradient_error. All of these
                                are of the net with smooth functions for ReLU and the maximum of
                                a window
      times_us                  by "lax" and "ours": {median, q1, q3, rounds, instances, calls}
      ratios                    {lax}: its time over ours, {median, q1, q3, loss, within_noise}
      parts_us                  by program, then by key in `step_trace.PARTS`; none on a GPU
      rest_us                   by program, of the rest the costliest operations of XLA
      failures                  [{what, message}]; a net with one has no times
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from . import DTYPES, ToolError, machine, models, require, results
from .console import Console, table
from .step_trace import PARTS
from .training import Report, measure, of_net


def describe(net: Report) -> list[tuple[str, str]]:
    """The lines about one net, each with its style."""
    counts = [
        f"{part} {sum(of.values())} ({', '.join(f'{k} {n}' for k, n in sorted(of.items()))})"
        for part, of in net["kernels"].items()
    ]
    losses = ", ".join(f"{loss:.6g}" for loss in net["losses"]["ours"])
    size = "x".join(map(str, net["image"]))
    lines = [
        (f"{net['title']}, {net['parameters'] / 1e6:.3g} M parameters, batch {net['batch']} of "
         f"{size}, {net['dtype']}", "bold"),
        (f"  convolutions by kernel: {'; '.join(counts)}", ""),
        (f"  losses {losses}, {net['loss_error']:.1e} from lax's; gradients "
         f"{net['gradient_error']:.1e} apart, at most {net['bound']:.1e}", ""),
    ]  # fmt: skip
    lines += [(f"  FAILED {f['what']}: {f['message']}", "red") for f in net["failures"]]
    for name, us in net.get("times_us", {}).items():
        ratio = net["ratios"].get(name)
        lost = "" if ratio is None or not ratio["loss"] else "  LOSS"
        lost += " (within noise)" if lost and ratio["within_noise"] else ""
        lines.append((
            f"  {name:<20}{us['median'] / 1e3:>9.4g} ms, quartiles {us['q1'] / 1e3:.4g} to "
            f"{us['q3'] / 1e3:.4g}, {us['rounds']} rounds"
            + (f", {ratio['median']:.3g}x ours" if ratio else "") + lost,
            "red" if lost else "",
        ))  # fmt: skip
    lines += [(f"  {note}", "") for note in net.get("notes", ())]
    if parts := net.get("parts_us"):
        rows = [
            (
                PARTS[part],
                *(f"{of[part] / 1e3:.4g}" if part in of else "-" for of in parts.values()),
            )
            for part in PARTS
            if any(part in of for of in parts.values())
        ]
        lines.append((table(("ms", *parts), rows), ""))
        rest = [f"{name} {us / 1e3:.3g}" for name, us in net["rest_us"]["ours"].items()]
        lines.append((f"  the rest of ours, ms: {', '.join(rest)}", ""))
    return lines


def summary(nets: Sequence[Report]) -> str:
    """One row for each net that was timed, as Markdown."""
    timed = [net for net in nets if "times_us" in net]
    peers = list(dict.fromkeys(peer for net in timed for peer in net["ratios"]))
    parts = [part for part in PARTS if any(part in _ours(net) for net in timed)]
    rows: list[Sequence[str]] = [
        ("net", *peers, "ours", *(f"{peer}/ours" for peer in peers),
         *(f"{PARTS[part]}" for part in parts)),
    ]  # fmt: skip
    rows.append(["---"] * len(rows[0]))

    def ms(us: dict[str, Any] | None) -> str:
        if us is None:
            return "-"
        half = (us["q3"] - us["q1"]) / us["median"] / 2
        return f"{us['median'] / 1e3:.4g} ms ±{100 * half:.0f} %"

    for net in timed:
        ours = net["times_us"]["ours"]["median"]
        ratios = [net["ratios"].get(peer) for peer in peers]
        rows.append((
            net["title"],
            *(ms(net["times_us"].get(peer)) for peer in (*peers, "ours")),
            *("-" if ratio is None else f"{ratio['median']:.3g}x" for ratio in ratios),
            *(f"{100 * _ours(net).get(part, 0) / ours:.0f} %" for part in parts),
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _ours(net: Report) -> dict[str, float]:
    return net["parts_us"].get("ours", {})


def measure_net(name: str, *, dtype: str, batch: int, image: int, seconds: float,
                precision: str, seed: int) -> Report:  # fmt: skip
    """Checks and times one net.

    Args:
        name: a key of `models.NETS`.
        dtype: as `models.Net` has it.
        batch: images.
        image: their height and width.
        seconds: time to spend on timing.
        precision: "default" or "highest", of every product.
        seed: of parameters, images and labels.

    Returns:
        The net's object.
    """
    net = dataclasses.replace(models.NETS[name], dtype=dtype)
    training = of_net(net, batch, image, seed)
    smooth, exact = net.smooth(), None
    if dtype in ("bfloat16", "float16"):
        exact = of_net(dataclasses.replace(smooth, dtype="float32"), batch, image, seed)
    return {
        "net": name,
        "title": net.title,
        "dtype": dtype,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(training.state[0])),
        "batch": batch,
        "image": [image, image],
        **measure(training, of_net(smooth, batch, image, seed), seconds=seconds,
                  precision=precision, exact=exact),
    }  # fmt: skip


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
    names = nets or list(models.DEFAULT_NETS)

    def measured(name: str) -> Report:
        return measure_net(name, dtype=DTYPES[dtype], batch=batch, image=image, seconds=seconds,
                           precision=precision, seed=seed)  # fmt: skip

    return report_all(names, measured, options, json_path, png_path)


def report_all(
    names: Sequence[str],
    measured: Callable[[str], Report],
    options: dict[str, Any],
    json_path: pathlib.Path | None,
    png_path: pathlib.Path | None,
    **described: Any,
) -> int:
    """Measures nets one after the other, and prints, writes and draws them.

    Args:
        names: of the nets.
        measured: from a name to the net's object.
        options: the command's.
        json_path: rewritten after each net, so that a run that is cut leaves what it measured.
        png_path: of the picture.
        **described: what the JSON holds besides.

    Returns:
        The exit status: 1 if a result was wrong.
    """
    if png_path is not None:
        require("matplotlib", "--png")
    results.check_writable(json_path, png_path)
    console = Console()
    report: Report = machine.describe() | {"options": options} | described
    report |= {"complete": False, "nets": []}
    for name in names:
        net = measured(name)
        report["nets"].append(net)
        report["complete"] = len(report["nets"]) == len(names)
        for line, style in describe(net):
            console.line(line, style)
        console.line()
        if json_path is not None:
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    console.line(summary(report["nets"]))
    if png_path is not None:
        from . import plots

        plots.draw_steps(report, png_path)
    return 1 if any(net["failures"] for net in report["nets"]) else 0
