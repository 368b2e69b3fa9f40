"""What eight devices say to each other for the gradients of a convolution, axis by axis.

    python benchmarks/communication.py benchmarks/results/communication.json

Compiles, for eight CPU devices, dX and a whole step (forward, dX and dW) of two layers
with the operands cut along one axis after the other, once with this package and once with
lax, and counts the collectives in XLA's code. Nothing is run. Prints a table in Markdown.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import sys
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_convgrad
from jax_convgrad.tools import machine
from jax_convgrad.tools.collectives import collectives

# name: sizes of x in NHWC and of w in HWIO, stride, groups
LAYERS = {
    "dense": ((16, 56, 56, 64), (3, 3, 64, 128), 1, 1),
    "dense, stride 2": ((16, 64, 64, 64), (3, 3, 64, 128), 2, 1),
    "32 groups": ((16, 56, 56, 128), (3, 3, 4, 128), 1, 32),
}
# name: specifications of x, w and y
CUTS = {
    "N": (P("d"), P(), P("d")),
    "C": (P(None, None, None, "d"), P(None, None, "d"), P()),
    "K": (P(), P(None, None, None, "d"), P(None, None, None, "d")),
    "H": (P(None, "d"), P(), P(None, "d")),
    "groups": (P(None, None, None, "d"), P(None, None, None, "d"), P(None, None, None, "d")),
}


def summary(compiled: Any) -> str:
    """Collectives by kind, with their number and their bytes in all."""
    count: dict[str, int] = collections.Counter()
    size: dict[str, int] = collections.Counter()
    for collective in collectives(compiled):
        count[collective.kind] += 1
        size[collective.kind] += collective.bytes
    return ", ".join(f"{count[k]} {k} {size[k]:,} B" for k in sorted(count)) or "none"


def measure(layer: str, cut: str) -> dict[str, str]:
    """The communication of dX and of a step, ours and lax's."""
    x_shape, w_shape, stride, groups = LAYERS[layer]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    places = [NamedSharding(mesh, spec) for spec in CUTS[cut]]

    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jax.lax.with_sharding_constraint(y, places[2])

    def dx(x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: conv(x, w), x)[1](dy)[0]

    def step(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(conv, x, w)
        return y, vjp(dy)

    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in (x_shape, w_shape))
    dy = jax.eval_shape(conv, x, w)
    row = {}
    for name, installed in (("ours", True), ("lax", False)):
        with jax_convgrad.installed(installed):
            of_dx = jax.jit(dx, in_shardings=places, out_shardings=places[0])
            row[f"dX, {name}"] = summary(of_dx.lower(x, w, dy).compile())
            results = (places[2], (places[0], places[1]))
            of_step = jax.jit(step, in_shardings=places, out_shardings=results)
            row[f"step, {name}"] = summary(of_step.lower(x, w, dy).compile())
    return row


def main(result: pathlib.Path | None) -> None:
    """Prints the table, and keeps it where a file is named."""
    rows = []
    for layer, (_, _, _, groups) in LAYERS.items():
        for cut in CUTS if groups > 1 else [c for c in CUTS if c != "groups"]:
            if groups > 1 and cut in ("C", "K"):
                continue  # channels are cut by groups
            rows.append({"layer": layer, "cut": cut, **measure(layer, cut)})
            print("| " + " | ".join(rows[-1].values()) + " |", flush=True)
    if result is not None:
        content = {**machine.describe(), "layers": LAYERS, "rows": rows}
        result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else None)
