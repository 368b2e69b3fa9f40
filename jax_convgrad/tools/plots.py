"""The figures of bench (ratios by class, rates under the roofs) and of step (where time goes)."""

from __future__ import annotations

import pathlib
from typing import Any

from . import require
from .results import PEERS, geometric_mean
from .step_trace import PARTS

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


# Of a step: what the legend says, and the colour.
_PART_COLOURS = {"y": "#2b6f9e", "dx": "#d1495b", "dw": "#e8a33d", "conv": "#5f7383",
                 "pool": "#7a9e6e", "rest": "#c9d0d6"}  # fmt: skip
_WHOLE = "#8a7fb0"  # a step that nobody took apart


def draw_steps(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the report of `step`: a panel for each net, a bar for each program, cut into parts.

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
    columns = 1 if len(nets) < 3 else 3
    rows = max(1, -(-len(nets) // columns))
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(max(10, 5.4 * columns), 2 + 2 * rows),
                                    layout="constrained", squeeze=False)  # fmt: skip
        handles: dict[str, Any] = {}
        for net, axis in zip(nets, axes.flat, strict=False):
            _step_bars(axis, net, handles)
        for axis in axes.flat[len(nets) :]:
            axis.set_axis_off()
        labels = [label for label in (*PARTS.values(), "whole step") if label in handles]
        figure.legend([handles[label] for label in labels], labels, loc="outside lower center",
                      ncols=max(1, len(labels)), frameon=False, fontsize=10)  # fmt: skip
        details = ["ms for one step, its quartiles, and its ratio to ours"]
        figure.suptitle(_heading("Training steps", report, details), fontsize=11, x=0.01,
                        ha="left")  # fmt: skip
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _step_bars(axis: Any, net: dict[str, Any], handles: dict[str, Any]) -> None:
    """The steps of one net, each cut into its parts if they are known."""
    names = [*(name for name in net["times_us"] if name != "ours"), "ours"]
    for height, name in enumerate(names):
        step, left = net["times_us"][name], 0.0
        parts = net["parts_us"].get(name, {"": step["median"]})
        for part, us in parts.items():
            label = PARTS.get(part, "whole step")
            handles[label] = axis.barh(height, us / 1e3, left=left, height=0.66,
                                       color=_PART_COLOURS.get(part, _WHOLE))  # fmt: skip
            left += us / 1e3
        middle, q1, q3 = (step[key] / 1e3 for key in ("median", "q1", "q3"))
        axis.errorbar([middle], [height], xerr=[[middle - q1], [q3 - middle]], color=_INK,
                      capsize=3, elinewidth=1)  # fmt: skip
        ratio = net["ratios"].get(name)
        text = (f"{middle:.0f}" if middle >= 100 else f"{middle:.3g}") + (
            "" if ratio is None else f"  ({ratio['median']:.3g}x)"
        )
        axis.annotate(text, (max(q3, left), height), xytext=(5, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axis.set_xlim(0, 1.35 * max(us["q3"] for us in net["times_us"].values()) / 1e3)
    axis.set_ylim(len(names) - 0.5, -0.5)
    shown = {"ours": "jax_convgrad", "torch": "PyTorch"}
    axis.set_yticks(range(len(names)), [shown.get(name, name) for name in names])
    axis.set_title(
        f"{net['title']}, batch {net['batch']} of {'x'.join(map(str, net['image']))}",
        loc="left", fontsize=10,
    )  # fmt: skip
    axis.grid(axis="x", color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    _clean(axis)


def _clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
