"""The figures of bench (ratios by class, rates under the roofs) and of step (where time goes)."""

from __future__ import annotations

import pathlib
from typing import Any

from . import require
from .results import PEERS, geometric_mean

_FASTER, _SLOWER = "#2b6f9e", "#d1495b"
_INK, _GRID = "#333333", "#d9d9d9"
_STYLE = {"font.size": 10, "axes.edgecolor": _INK, "axes.labelcolor": _INK,
          "xtick.color": _INK, "ytick.color": _INK, "text.color": _INK}  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws a report.

    One panel per peer holds the ratio of every row, in columns by class; the last panel
    holds every row's rate against its arithmetic intensity.

    Args:
        report: the object that `results` documents, as `bench` writes it.
        path: of the PNG.

    Raises:
        ToolError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "--png")
    matplotlib.use("Agg")
    plt = require("matplotlib.pyplot", "--png")
    peers = [peer for peer in PEERS if any(peer in row["ratios"] for row in report["rows"])]
    class_names = list(dict.fromkeys(row["class"] for row in report["rows"]))
    width = max(9.0, 2.5 + 0.75 * len(class_names))
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            len(peers) + 1,
            1,
            figsize=(width, 3.9 * len(peers) + 5.2),
            height_ratios=[3.9] * len(peers) + [4.8],
            layout="constrained",
            squeeze=False,
        )
        for peer, axis in zip(peers, axes[:, 0], strict=False):
            _ratios(axis, report, peer, class_names)
        _roofline(axes[-1, 0], report, class_names)
        figure.suptitle(_title(report), fontsize=11, x=0.01, ha="left")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _title(report: dict[str, Any]) -> str:
    options = report["options"]
    budget = options["batch_budget"]
    return _heading(
        "Convolution input gradient",
        report,
        [
            f"{options['dtype']} {options['layout']}",
            *([f"inside a scan of {options['scan']} steps"] if options.get("scan") else []),
            *([f"batch budget {budget:g} MFLOP"] if budget else []),
        ],
    )


def _heading(what: str, report: dict[str, Any], details: list[str]) -> str:
    """Three lines: what on which device, the details, the versions and the date."""
    machine, versions = report["machine"], report["versions"]
    on_cpu = machine["platform"] == "cpu"
    device = machine["cpu_model"] if on_cpu else machine["device_kind"]
    if on_cpu:
        device += f", {machine['cpu_cores']} cores"
    elif machine["driver"]:
        device += f", driver {machine['driver']}"
    commit = (report["git_commit"] or "")[:10]
    second = [
        *details,
        f"jax-convgrad {versions['jax-convgrad']}" + (f" ({commit})" if commit else ""),
        f"jax {versions['jax']}",
        *([f"torch {versions['torch']}"] if report.get("torch") else []),
        report["date_utc"][:10],
    ]
    half = (len(second) + 1) // 2
    lines = [" · ".join(second[:half]), " · ".join(second[half:])]
    return "\n".join([f"{what} on {device}", *lines])


def _ratios(axis: Any, report: dict[str, Any], peer: str, class_names: list[str]) -> None:
    """Ratios of one peer: a column per class, rows in file order across the column."""
    losses = total = 0
    for column, class_name in enumerate(class_names):
        ratios = [
            row["ratios"][peer]
            for row in report["rows"]
            if row["class"] == class_name and peer in row["ratios"]
        ]
        if not ratios:
            axis.text(column, 1.0, "no rows", ha="center", va="bottom", fontsize=8, color="#888888")
            continue
        spacing = 0.72 / max(1, len(ratios) - 1)
        xs = [column + (i * spacing - 0.36 if len(ratios) > 1 else 0) for i in range(len(ratios))]
        medians = [r["median"] for r in ratios]
        colours = [_SLOWER if r["loss"] else _FASTER for r in ratios]
        spreads = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
        axis.errorbar(xs, medians, yerr=spreads, fmt="none", ecolor="#b5b5b5", elinewidth=1,
                      zorder=2)  # fmt: skip
        axis.scatter(xs, medians, s=20, c=colours, zorder=3, linewidths=0)
        mean = geometric_mean(medians)
        axis.hlines(mean, column - 0.42, column + 0.42, color=_INK, linewidth=1.6, zorder=4)
        axis.annotate(f"{mean:.3g}x", (column, max([mean, *(r["q3"] for r in ratios)])),
                      xytext=(0, 5), textcoords="offset points", ha="center",
                      fontsize=9, fontweight="bold", zorder=5,
                      bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.8,
                            "linewidth": 0})  # fmt: skip
        losses += sum(r["loss"] for r in ratios)
        total += len(ratios)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    # Both sides of 1 in view, and room for the labels above the highest row.
    axis.set_ylim(min(low, 0.7), max(high, 1.5) * 1.6)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.axhline(1, color=_INK, linewidth=1, zorder=1)
    axis.axhspan(axis.get_ylim()[0], 1, color=_SLOWER, alpha=0.06, zorder=0, linewidth=0)
    for column in range(1, len(class_names)):
        axis.axvline(column - 0.5, color=_GRID, linewidth=0.7, zorder=0)
    axis.grid(axis="y", color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_xlim(-0.6, len(class_names) - 0.4)
    axis.set_xticks(range(len(class_names)), class_names, rotation=35, ha="right",
                    rotation_mode="anchor")  # fmt: skip
    axis.set_ylabel(f"time of {peer} / ours")
    axis.set_title(
        f"{peer} / ours: above 1 ours is faster. {losses} of {total} rows lose (red). "
        "Bar: geometric mean; whiskers: quartiles.",
        loc="left",
        fontsize=10,
    )
    _clean(axis)


def _roofline(axis: Any, report: dict[str, Any], class_names: list[str]) -> None:
    """GFLOP/s of ours against FLOP per byte, under the two measured rates."""
    colours = require("matplotlib", "--png").colormaps["tab20"].colors
    intensities = []
    for index, class_name in enumerate(class_names):
        rows = [
            row
            for row in report["rows"]
            if row["class"] == class_name and row["gflop_per_s"] and row["flops"]
        ]
        xs = [row["flops"] / row["bytes"] for row in rows]
        axis.scatter(xs, [row["gflop_per_s"] for row in rows], s=26, alpha=0.85,
                     color=colours[index % len(colours)], marker=_MARKERS[index % len(_MARKERS)],
                     label=class_name, zorder=3, linewidths=0)  # fmt: skip
        intensities += xs
    axis.set_xscale("log")
    axis.set_yscale("log")
    roofs = report["roofs"]
    if intensities:
        ridge = roofs["flops_per_s"] / roofs["bytes_per_s"]
        left, right = min(intensities) / 1.5, max([*intensities, 2 * ridge]) * 1.5
        xs = [left, ridge, right]
        ys = [min(x * roofs["bytes_per_s"], roofs["flops_per_s"]) / 1e9 for x in xs]
        axis.plot(xs, ys, color=_INK, linewidth=1.4, zorder=2)
        axis.annotate(
            f"{roofs['flops_per_s'] / 1e9:.4g} GFLOP/s, {roofs['bytes_per_s'] / 1e9:.4g} GB/s",
            (right, ys[-1]),
            xytext=(-2, 5),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        axis.set_xlim(left, right)
    axis.grid(which="major", color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_xlabel("FLOP per byte of least traffic")
    axis.set_ylabel("GFLOP/s of ours")
    axis.set_title(f"Roofline: {roofs['source']}", loc="left", fontsize=10)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    _clean(axis)


def draw_steps(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the report of `step`: for each net the two steps as bars, cut into their parts.

    Args:
        report: the object that `step` documents.
        path: of the PNG.

    Raises:
        ToolError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "--png")
    matplotlib.use("Agg")
    plt = require("matplotlib.pyplot", "--png")
    nets = [net for net in report["nets"] if "times_us" in net]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(max(1, len(nets)), 1, figsize=(10, 1.4 + 2.3 * len(nets)),
                                    layout="constrained", squeeze=False)  # fmt: skip
        for net, axis in zip(nets, axes[:, 0], strict=False):
            _step_bars(axis, net)
        if nets:
            figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                          ncols=4, frameon=False, fontsize=9)  # fmt: skip
            axes[-1, 0].set_xlabel("ms for one step; line: median and quartiles")
        options = report["options"]
        details = [f"batch {options['batch']}, {options['image']}x{options['image']} images, f32"]
        figure.suptitle(_heading("A training step", report, details), fontsize=11, x=0.01,
                        ha="left")  # fmt: skip
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _step_bars(axis: Any, net: dict[str, Any]) -> None:
    """Both steps of one net: forward, input gradients as measured alone, and the rest."""
    for program, height in (("lax", 1), ("ours", 0)):
        step, left = net["times_us"][program], 0.0
        forward, gradients = (
            net["times_us"][name]["median"] / 1e3
            for name in (f"forward_{program}", f"dx_{program}")
        )
        rest = max(0.0, step["median"] / 1e3 - forward - gradients)
        for label, ms, colour in (
            ("forward", forward, "#a9b8c4"),
            ("dX, measured alone", gradients, _SLOWER),
            ("the rest: filter gradients, other layers, update", rest, "#dfe4e8"),
        ):
            axis.barh(height, ms, left=left, height=0.62, color=colour,
                      label=label if program == "lax" else None)  # fmt: skip
            left += ms
        middle, q1, q3 = (step[key] / 1e3 for key in ("median", "q1", "q3"))
        axis.errorbar([middle], [height], xerr=[[middle - q1], [q3 - middle]], color=_INK,
                      capsize=3, elinewidth=1)  # fmt: skip
    if net["ceiling"]:
        axis.axvline(net["times_us"]["lax"]["median"] / 1e3 / net["ceiling"], color=_INK,
                     linewidth=1.2, linestyle="--",
                     label="if forward and dX took no time")  # fmt: skip
    axis.set_yticks([1, 0], ["lax", "install()"])
    ceiling = f"{net['ceiling']:.3g}x" if net["ceiling"] else "none"
    axis.set_title(
        f"{net['title']}: {net['speedup']['median']:.3g}x. dX is "
        f"{100 * net['dx_of_backward']:.0f} % of lax's backward pass; ceiling {ceiling}. "
        f"{net['native']} of {net['input_gradients']} dX by a kernel",
        loc="left",
        fontsize=10,
    )
    axis.grid(axis="x", color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    _clean(axis)


def _clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
