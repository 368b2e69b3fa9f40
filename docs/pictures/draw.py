"""Draws the pictures of the documentation, as SVG files beside this one.

    python docs/pictures/draw.py

Sizes are pixels. A test compares the files with what this draws.
"""

from __future__ import annotations

import pathlib
from html import escape
from math import gcd, hypot

HERE = pathlib.Path(__file__).parent
INK, MUTED, PALE = "#263238", "#546e7a", "#90a4ae"
COLOURS = ("#c5cae9", "#ffe0b2", "#c8e6c9")  # of phases, devices, maps


class Picture:
    """Shapes that are drawn in the order in which they come."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.shapes: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        *lines: str,
        size: int = 13,
        at: str = "middle",
        ink: str = INK,
        code: bool = False,
    ) -> None:
        """Lines of text around a point."""
        family = "monospace" if code else "sans-serif"
        for i, line in enumerate(lines):
            baseline = y + (i - (len(lines) - 1) / 2) * size * 1.35 + size * 0.35
            self.shapes.append(
                f'<text x="{x:g}" y="{baseline:.1f}" font-family="{family}" font-size="{size}" '
                f'text-anchor="{at}" fill="{ink}">{escape(line)}</text>'
            )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *lines: str,
        fill: str = "#fff",
        size: int = 13,
        code: bool = False,
        dashed: bool = False,
    ) -> None:
        """A box whose upper left corner is a point, with text in its middle."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
            f'fill="{fill}" stroke="{INK}"{dash}/>'
        )
        self.text(x + width / 2, y + height / 2, *lines, size=size, code=code)

    def line(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        *,
        ink: str = INK,
        width: float = 1.2,
        arrow: bool = True,
    ) -> None:
        """A straight line, with an arrow at its end."""
        self.shapes.append(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{ink}" '
            f'stroke-width="{width:g}"/>'
        )
        if not arrow:
            return
        length = hypot(x1 - x0, y1 - y0)
        dx, dy = 8 * (x1 - x0) / length, 8 * (y1 - y0) / length
        points = f"{x1:.1f},{y1:.1f} " + " ".join(
            f"{x1 - dx + side * dy * 0.45:.1f},{y1 - dy - side * dx * 0.45:.1f}" for side in (-1, 1)
        )
        self.shapes.append(f'<polygon points="{points}" fill="{ink}"/>')

    def svg(self, title: str) -> str:
        """The file."""
        width, height = self.size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img">',
                f"<title>{escape(title)}</title>",
                f'<rect width="{width}" height="{height}" fill="#fff"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def maps() -> str:
    """Three arrays, of which any two give the third one's map."""
    p = Picture(720, 330)
    corner = {"x": (130, 70), "w": (590, 70), "y": (360, 260)}
    sides = [
        ("x", "w", "share c, input channels", (360, 52)),
        ("x", "y", "share n, images", (150, 175)),
        ("w", "y", "share k, output channels", (575, 175)),
    ]
    for a, b, label, at in sides:
        p.line(*corner[a], *corner[b], ink=PALE, width=2, arrow=False)
        p.text(*at, label, ink=MUTED)
    p.text(360, 130, "g: groups, which all three share", ink=MUTED)
    p.text(360, 152, "a·h = s·p - l + b·r on every axis", ink=MUTED)
    arrays = {
        "x": ("x [n, g, c, h]", "dX from dY and w", "conv_input_grad"),
        "w": ("w [g, k, c, r]", "dW from x and dY", "conv_filter_grad"),
        "y": ("y, dY [n, g, k, p]", "y from x and w", "conv_general_dilated"),
    }
    for (name, (x, y)), fill in zip(corner.items(), COLOURS, strict=True):
        array, made, function = arrays[name]
        p.box(x - 105, y - 40, 210, 80, fill=fill)
        p.text(x, y - 20, array, size=15)
        p.text(x, y + 2, made)
        p.text(x, y + 24, function, code=True)
    return p.svg("The three maps of a convolution")


def path() -> str:
    """From the two entry points to a kernel, or to lax."""
    p = Picture(860, 470)
    p.text(430, 20, "when traced", size=12, ink=MUTED)
    p.box(30, 35, 330, 62, "jax_convgrad.conv_general_dilated", "a custom_vjp", fill=COLOURS[0])
    p.box(
        500,
        35,
        330,
        62,
        "lax.conv_general_dilated",
        "under install(): our transpose rules",
        fill=COLOURS[0],
    )
    p.box(30, 150, 330, 62, "lax's convolution, with a mark", "the forward pass")
    p.box(500, 150, 330, 62, "conv_input_grad, conv_filter_grad", "our primitives: the gradients")
    p.line(195, 97, 195, 150)
    p.line(665, 97, 665, 150)
    p.line(360, 84, 500, 158)
    p.line(500, 84, 360, 158)
    p.text(430, 232, "when lowered", size=12, ink=MUTED)
    p.box(
        230,
        250,
        400,
        52,
        "dispatch: which implementation, and why",
        "asks the planner and preference.py",
        fill=COLOURS[1],
    )
    p.line(195, 212, 320, 250)
    p.line(665, 212, 540, 250)
    p.box(30, 350, 200, 52, "lax's own computation")
    p.line(290, 302, 150, 350)
    p.box(
        300,
        350,
        240,
        52,
        "FFI custom call: handler",
        "checks, plans, takes workspace",
        fill=COLOURS[2],
    )
    p.line(430, 302, 420, 350)
    p.box(
        600,
        350,
        230,
        52,
        "kernel: stages of tasks",
        "on XLA's threads, or a stream",
        fill=COLOURS[2],
    )
    p.line(540, 376, 600, 376)
    p.text(565, 425, "when run", size=12, ink=MUTED)
    return p.svg("The path of a call")


def phases() -> str:
    """Stride 2 and a filter of 3 along one axis: which tap joins which positions."""
    stride, low, taps, out = 2, 1, 3, 4
    size = (out - 1) * stride + taps - low
    p = Picture(760, 330)
    step, left = 72, 110

    def at_x(h: int) -> float:
        return left + h * step

    def at_y(i: int) -> float:
        return left + step * (i * stride + (taps - 1) / 2 - low)

    p.text(58, 70, "dY", size=15)
    p.text(58, 250, "dX", size=15)
    phase_count = stride // gcd(stride, 1)
    inks = ("#3949ab", "#ef6c00")
    for i in range(out):
        for r in range(taps):
            h = stride * i - low + r
            if 0 <= h < size:
                p.line(at_y(i), 88, at_x(h), 232, ink=inks[h % phase_count], width=1.6)
                p.text(
                    at_y(i) + (at_x(h) - at_y(i)) * 0.5 + 12,
                    160,
                    f"r={r}",
                    size=11,
                    ink=inks[h % phase_count],
                )
    for i in range(out):
        p.box(at_y(i) - 24, 52, 48, 36, f"p={i}")
    for h in range(size):
        p.box(at_x(h) - 24, 232, 48, 36, f"h={h}", fill=COLOURS[h % phase_count])
    p.text(380, 20, "Stride 2, three taps, padding 1: h = 2p - 1 + r", size=14)
    p.text(
        380, 296, "Even positions form one phase, a dense problem with the tap r = 1.", ink=inks[0]
    )
    p.text(
        380, 316, "Odd positions form the other, a dense problem with r = 0 and r = 2.", ink=inks[1]
    )
    return p.svg("The phases of a strided gradient")


def halo() -> str:
    """Rows of an axis that is cut over two devices, and the rows that each borrows."""
    rows, side, gap, left, top, bottom = 5, 50, 150, 130, 90, 220
    p = Picture(left + 2 * rows * side + gap + 30, 320)
    edge = (left + rows * side, left + rows * side + gap)  # where the rows beside the cut end
    for device, start in enumerate((left, edge[1])):
        p.text(start + rows * side / 2, 24, f"device {device}", size=14)
        for i in range(rows):
            p.box(start + i * side, top, side, 36, fill=COLOURS[device])
            p.box(start + i * side, bottom, side, 36, fill=COLOURS[device])
    halos = (edge[0], edge[1] - side)
    owners = (edge[1], edge[0] - side)
    for device, height in ((0, 66), (1, 50)):
        p.box(halos[device], top, side, 36, fill=COLOURS[1 - device], dashed=True)
        here, there = owners[device] + side / 2, halos[device] + side / 2
        p.line(here, top, here, height, arrow=False)
        p.line(here, height, there, height, arrow=False)
        p.line(there, height, there, top)
        last = (edge[0] - side if device == 0 else edge[1]) + side / 2
        for tap in (-1, 0, 1):
            p.line(last + tap * side, top + 36, last + tap * 8, bottom, ink=PALE)
    p.text((edge[0] + edge[1]) / 2, 152, "halo", ink=MUTED)
    p.text(72, top + 18, "rows of dY", size=14)
    p.text(72, bottom + 18, "rows of dX", size=14)
    p.text(p.size[0] / 2, 282, "A window of three taps reaches one row beyond the cut.")
    p.text(
        p.size[0] / 2, 302, "Each device is sent that row by its neighbour. Nothing is gathered."
    )
    return p.svg("The halo of a cut spatial axis")


PICTURES = {"maps": maps, "path": path, "phases": phases, "halo": halo}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / f"{name}.svg").write_text(draw())
