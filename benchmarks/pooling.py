"""The gradient of max pooling on a CPU: lax, this package under install(), PyTorch.

    python benchmarks/pooling.py --json benchmarks/results/cpu_pooling.json

Layers of real nets, in float32 and bfloat16, channels last and first. lax and this package
get x and dY. PyTorch gets dY and where its forward pass found each maximum, which it keeps.
Before anything is timed, the kernel's bits are compared with lax's, and PyTorch's values with
them. Peers take turns (jax_convgrad/tools/timing.py); operands rotate, so that each call reads
others.

The JSON is what `machine.describe` gives, `options`, `complete`, and rows of {name, shape (of
x, NHWC), window, stride, padding, dtype, layout, bytes (least traffic), times_us, ratios (the
peer's time over ours)}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_convgrad
from jax_convgrad.tools import machine, results, timing, torch_peer

torch = torch_peer.load("default")

# name, x as NHWC, window, stride, padding on both sides
LAYERS = [
    ("ResNet, stem", (8, 112, 112, 64), 3, 2, 1),
    ("ResNet, stem, small images", (32, 32, 32, 64), 3, 2, 1),
    ("VGG, second pool", (4, 112, 112, 128), 2, 2, 0),
    ("U-Net, third pool", (8, 32, 32, 256), 2, 2, 0),
    ("CIFAR net", (64, 32, 32, 32), 2, 2, 0),
    ("Inception, pool branch", (8, 28, 28, 192), 3, 1, 1),
]
POOL_BYTES = 2**27  # of operands and results that calls rotate through


@dataclasses.dataclass
class Peer:
    """A function of the number of an operand set."""

    name: str
    call: Callable[[int], Any]
    wait: Callable[[Any], Any]
    pool: int

    def run(self, first: int, instances: int, calls: int) -> float:
        """Microseconds per call."""
        start = time.perf_counter()
        for i in range(instances * calls):
            result = self.call((first + i) % self.pool)
        self.wait(result)
        return (time.perf_counter() - start) / (instances * calls) * 1e6


def gradient(dims: tuple[int, ...], strides: tuple[int, ...], padding: Any) -> Callable[..., Any]:
    """The gradient, of x and dY, as JAX differentiates a maximum over windows."""

    def function(x: jax.Array, dy: jax.Array) -> jax.Array:
        def pool(x: jax.Array) -> jax.Array:
            return lax.reduce_window(x, -jnp.inf, lax.max, dims, strides, padding)

        return jax.vjp(pool, x)[1](dy)[0]

    return function


def compiled(function: Callable[..., Any], active: bool, *operands: Any) -> Callable[..., Any]:
    """A program with or without the kernel."""
    with jax_convgrad.installed(active):
        return jax.jit(function).lower(*operands).compile()


def to_torch(a: np.ndarray, dtype: str, layout: str) -> Any:
    """The array in a layout as PyTorch's tensor, NCHW by shape."""
    tensor = torch.from_numpy(a.astype(np.float32)).to(getattr(torch, dtype))
    return tensor if layout == "NCHW" else tensor.permute(0, 3, 1, 2)


def measure(layer: tuple[Any, ...], dtype: str, layout: str, seconds: float) -> dict[str, Any]:
    """One row."""
    name, shape, window, stride, pad = layer
    n, h, w, c = shape
    last = layout == "NHWC"

    def spread(one: Any, other: Any) -> tuple[Any, ...]:
        return (one, other, other, one) if last else (one, one, other, other)

    dims, strides = spread(1, window), spread(1, stride)
    function = gradient(dims, strides, spread((0, 0), (pad, pad)))
    x_shape = shape if last else (n, c, h, w)
    out = [(size + 2 * pad - window) // stride + 1 for size in (h, w)]
    y_shape = (n, *out, c) if last else (n, c, *out)
    itemsize = jnp.dtype(dtype).itemsize
    least = (2 * int(np.prod(x_shape)) + int(np.prod(y_shape))) * itemsize
    pool = max(2, min(32, POOL_BYTES // least))
    rng = np.random.default_rng(0)
    operands = [
        [jnp.asarray(rng.standard_normal(s), dtype) for s in (x_shape, y_shape)]
        for _ in range(pool)
    ]
    programs = {
        "ours": compiled(function, True, *operands[0]),
        "lax": compiled(lambda *a: function(*a), False, *operands[0]),
    }
    found, expected = (np.asarray(programs[peer](*operands[0])) for peer in ("ours", "lax"))
    assert found.tobytes() == expected.tobytes(), f"{name} {dtype} {layout}: not lax's bits"

    def on_torch(x: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
        tensors = [to_torch(np.asarray(a), dtype, layout) for a in (x, dy)]
        square = ([window] * 2, [stride] * 2, [pad] * 2, [1, 1], False)
        index = torch.ops.aten.max_pool2d_with_indices(tensors[0], *square)[1]
        return (tensors[1], tensors[0], *square, index)

    given = [on_torch(*each) for each in operands]
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    theirs = backward(*given[0]).float().numpy()
    theirs = theirs.transpose(0, 2, 3, 1) if last else theirs
    np.testing.assert_allclose(theirs, expected.astype(np.float32), rtol=0.02, atol=0.02)
    peers = [
        Peer("torch", lambda i: backward(*given[i]), lambda _: None, pool),
        *(
            Peer(peer, lambda i, p=program: p(*operands[i]), jax.block_until_ready, pool)
            for peer, program in programs.items()
        ),
    ]
    timings = timing.measure(peers, pool=pool, batched=False, row_seconds=seconds)
    ratios = {peer: timings["ours"].ratio_of(timings[peer]) for peer in ("lax", "torch")}
    us = timings["ours"].us.median
    print(
        f"{name:28} {dtype:9} {layout} {window}x{window} s{stride}  {us:8.0f} us  "
        f"{least / us / 1e3:5.1f} GB/s  "
        + "  ".join(f"{peer} {ratio.median:.3g}" for peer, ratio in ratios.items()),
        flush=True,
    )
    return {
        "name": name, "shape": shape, "window": window, "stride": stride, "padding": pad,
        "dtype": dtype, "layout": layout, "bytes": least,
        "times_us": {peer: results.time_entry(each) for peer, each in timings.items()},
        "ratios": {peer: results.ratio_entry(ratio) for peer, ratio in ratios.items()},
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="where to write the result")
    parser.add_argument("--row-seconds", type=float, default=1.0, help="to spend on a row")
    options = parser.parse_args()
    report = machine.describe() | {
        "options": {"row_seconds": options.row_seconds},
        "torch": {"version": torch.__version__} | torch_peer.settings(torch),
        "complete": False,
        "rows": [],
    }
    for dtype in ("float32", "bfloat16"):
        for layout in ("NHWC", "NCHW"):
            for layer in LAYERS:
                report["rows"].append(measure(layer, dtype, layout, options.row_seconds))
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    report["complete"] = True
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
