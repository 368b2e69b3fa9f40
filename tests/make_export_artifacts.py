"""Writes tests/data/*.jax_export, which pin what stored programs look like (docs/export.md).

Run it with the oldest supported JAX, for a new version of the custom call only, and give the
new files new names: those that are there stay, and tests/test_export_artifacts.py goes on
running them.

    python tests/make_export_artifacts.py tests/data/NAME
"""

from __future__ import annotations

import pathlib
import sys

import jax
from jax import export

import jax_convgrad

# Several files may hold the same program: from "own-scratch" on they bring no small workspace.
# What each file computes of (x, dy, w): dX, x for its shape alone, or with the epilogue in
# which x is the residual and the ReLU's result; or, by name, dW.
SAME = {"window_strides": (2, 2), "padding": "SAME"}
PROGRAMS = {
    "static": ((2, 6, 9, 8), (4, 3, 3, 2), "float32", {**SAME, "feature_group_count": 2}),
    "symbolic": ("n, 3, h, w", (4, 3, 3, 3), "float32", SAME),
    "symbolic_bfloat16": ("n, h, w, 3", (3, 3, 3, 16), "bfloat16", {
        **SAME, "dimension_numbers": ("NHWC", "HWIO", "NHWC")
    }),
    "fused": ("n, 3, h, w", (4, 3, 3, 3), "float32", SAME),
    "filter_grad": ((2, 6, 9, 8), (4, 3, 3, 2), "float32", {**SAME, "feature_group_count": 2}),
}  # fmt: skip


def make(name: str) -> export.Exported:
    """Exports one program of `PROGRAMS`."""
    shape, w_shape, dtype, params = PROGRAMS[name]
    shape = export.symbolic_shape(shape) if isinstance(shape, str) else shape
    x, w = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(w_shape, dtype)
    dy = jax.eval_shape(lambda x, w: jax.lax.conv_general_dilated(x, w, **params), x, w)

    def program(x, dy, w):
        if name == "filter_grad":
            return jax_convgrad.conv_filter_grad(x, dy, w.shape, **params, implementation="native")
        epilogue = {"residual": x, "relu_mask": x} if name == "fused" else {}
        return jax_convgrad.conv_input_grad(
            dy, w, x.shape, **params, **epilogue, implementation="native"
        )

    return export.export(
        jax.jit(program), platforms=("cpu",), disabled_checks=jax_convgrad.export_checks()
    )(x, dy, w)


def main(prefix: str) -> None:
    """Writes every program to PREFIX_NAME.jax_export."""
    # Programs name the files that made them: without this machine's folders.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
    for name in PROGRAMS:
        path = pathlib.Path(f"{prefix}_{name}.jax_export")
        if path.exists():
            raise SystemExit(f"{path} is there already")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make(name).serialize())
        print(f"{path}: {path.stat().st_size} bytes, JAX {jax.__version__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
