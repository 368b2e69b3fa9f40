"""What a device can do at best, for the roofline times that explain() and bench print."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Roofs:
    """Peak arithmetic and memory rates of a device, and where they come from."""

    flops_per_s: float
    bytes_per_s: float
    source: str

    def time_us(self, flops: int, bytes_moved: int) -> float:
        """The least time in microseconds that this work can take."""
        return 1e6 * max(flops / self.flops_per_s, bytes_moved / self.bytes_per_s)


def _best_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def measure(dtype: str) -> Roofs:
    """Measures the default JAX device: a large matrix product and a large copy.

    Takes about a second, once per dtype and process.

    Args:
        dtype: name of a floating dtype.

    Returns:
        The rates reached, best of five. XLA:CPU multiplies 16-bit floats in float32, so
        on a CPU their arithmetic roof is that of float32.
    """
    platform = jax.default_backend()
    compute = "float32" if platform == "cpu" and dtype in ("bfloat16", "float16") else dtype
    size, elements = (1536, 2**24) if platform == "cpu" else (8192, 2**28)
    matrix = jax.numpy.ones((size, size), compute)
    vector = jax.numpy.ones((elements,), "float32")
    product = jax.jit(lambda a: a @ a)
    increment = jax.jit(lambda a: a + 1)
    product_s = _best_seconds(lambda: product(matrix).block_until_ready())
    copy_s = _best_seconds(lambda: increment(vector).block_until_ready())
    return Roofs(
        flops_per_s=2 * size**3 / product_s,
        bytes_per_s=2 * np.dtype(np.float32).itemsize * elements / copy_s,
        source=f"measured on {jax.devices()[0].device_kind}: {size} matrix product in {compute}, "
        f"{elements * 4 >> 20} MiB increment",
    )
