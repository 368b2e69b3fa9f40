"""Flax NNX layers that take jax_convgrad's convolution as an argument.

`nnx.Conv(..., conv_general_dilated=jax_convgrad.conv_general_dilated)` is the whole
change. Trains a small network on scikit-learn's digits for a few dozen steps and checks
that the gradients for the weights and for the images equal those of lax's convolution.
Exits with status 1 if they do not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from rich.console import Console
from sklearn.datasets import load_digits

import jax_convgrad

BATCH = 64
# |a - b| / |b| over an array: the same sums, added up in different orders.
TOLERANCE = 1e-5


class Network(nnx.Module):
    """A dense, a depthwise and a strided convolution, then a linear read-out."""

    def __init__(self, convolution: Callable[..., jax.Array], rngs: nnx.Rngs) -> None:
        shared: dict[str, Any] = {
            "kernel_size": (3, 3),
            "precision": lax.Precision.HIGHEST,
            "conv_general_dilated": convolution,
            "rngs": rngs,
        }
        self.dense = nnx.Conv(1, 32, **shared)
        self.depthwise = nnx.Conv(32, 32, feature_group_count=32, **shared)
        self.strided = nnx.Conv(32, 64, strides=2, **shared)
        self.linear = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [n, 8, 8, 1] to logits [n, 10]."""
        for layer in (self.dense, self.depthwise, self.strided):
            x = nnx.gelu(layer(x))
        return self.linear(x.reshape(len(x), -1))


def loss_of(network: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy over a batch."""
    logits = network(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def gradients_of(network: Network, images: jax.Array, labels: jax.Array) -> Any:
    """Returns the loss's gradients for the weights and for the images."""
    return nnx.grad(loss_of, argnums=(0, 1))(network, images, labels)


@nnx.jit
def train_step(
    network: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Updates the network in place and returns the loss before the update."""
    loss, gradients = nnx.value_and_grad(loss_of)(network, images, labels)
    optimizer.update(network, gradients)
    return loss


def normwise_error(tree: Any, reference: Any) -> float:
    """Returns the largest |a - b| / |b| over the arrays of two trees."""

    def error(a: jax.Array, b: jax.Array) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))

    return max(jax.tree.leaves(jax.tree.map(error, tree, reference)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="batches (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console()

    bundle = load_digits()
    images = jnp.asarray(bundle.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(bundle.target, jnp.int32)

    network = Network(jax_convgrad.conv_general_dilated, nnx.Rngs(options.seed))
    reference = Network(lax.conv_general_dilated, nnx.Rngs(options.seed))
    optimizer = nnx.Optimizer(network, optax.adam(2e-3), wrt=nnx.Param)

    batches = np.random.default_rng(options.seed).integers(0, len(images), (options.steps, BATCH))
    losses = [
        float(train_step(network, optimizer, images[batch], labels[batch])) for batch in batches
    ]
    # The weights of a trained network, seen through both convolutions.
    nnx.update(reference, nnx.state(network))
    batch = images[:BATCH], labels[:BATCH]
    error = normwise_error(gradients_of(network, *batch), gradients_of(reference, *batch))

    explanation = jax_convgrad.explain(
        jax.ShapeDtypeStruct((BATCH, 8, 8, 32), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, 1, 32), jnp.float32),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=32,
    )
    console.print(str(explanation), markup=False, highlight=False)
    start, end = np.mean(losses[:5]), np.mean(losses[-5:])
    console.print(f"loss {start:.3f} -> {end:.3f} in {options.steps} steps")
    console.print(f"gradients differ from lax's by {error:.1e}, tolerance {TOLERANCE:g}")
    passed = error <= TOLERANCE and end < start
    console.print("[green]ok[/]" if passed else "[bold red]FAILED[/]")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
