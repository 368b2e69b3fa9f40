"""Equinox layers, untouched, with jax_convgrad's gradient under lax's convolution.

Equinox calls `jax.lax.conv_general_dilated` itself, on one image at a time, and leaves
the batch to `jax.vmap`. `jax_convgrad.install()` gives lax's convolution the kernel's
input gradient; its batching rule turns the mapped images into one call. Trains a small
network on scikit-learn's digits for a few dozen steps and checks that the gradients equal
those without the package. Exits with status 1 if they do not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from sklearn.datasets import load_digits

import jax_convgrad

BATCH = 64
# |a - b| / |b| over an array: the same sums, added up in different orders.
TOLERANCE = 1e-5
CALL = 'custom_call_target="convgrad_input_grad"'


class Network(eqx.Module):
    """A dense, a depthwise and a strided convolution, then a linear read-out."""

    convolutions: tuple[eqx.nn.Conv2d, ...]
    linear: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        self.convolutions = (
            eqx.nn.Conv2d(1, 32, 3, padding=1, key=keys[0]),
            eqx.nn.Conv2d(32, 32, 3, padding=1, groups=32, key=keys[1]),
            eqx.nn.Conv2d(32, 64, 3, stride=2, padding=1, key=keys[2]),
        )
        self.linear = eqx.nn.Linear(64 * 4 * 4, 10, key=keys[3])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps one image [1, 8, 8] to logits [10]."""
        for layer in self.convolutions:
            x = jax.nn.gelu(layer(x))
        return self.linear(x.reshape(-1))


def loss_of(operands: tuple[Network, jax.Array], labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of (network, images) over a batch."""
    network, images = operands
    logits = jax.vmap(network)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Differentiates the network and the images.
gradients_of = eqx.filter_jit(eqx.filter_grad(loss_of))


def normwise_error(tree: Any, reference: Any) -> float:
    """Returns the largest |a - b| / |b| over the arrays of two trees."""

    def error(a: jax.Array, b: jax.Array) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))

    return max(jax.tree.leaves(jax.tree.map(error, tree, reference)))


def train(network: Network, images: jax.Array, labels: jax.Array, batches: np.ndarray) -> Any:
    """Trains on the batches with Adam and returns the network and its losses."""
    optimizer = optax.adam(2e-3)

    @eqx.filter_jit
    def step(network: Network, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        loss, (gradients, _) = eqx.filter_value_and_grad(loss_of)((network, images), labels)
        updates, state = optimizer.update(gradients, state)
        return eqx.apply_updates(network, updates), state, loss

    state = optimizer.init(eqx.filter(network, eqx.is_array))
    losses = []
    for batch in batches:
        network, state, loss = step(network, state, images[batch], labels[batch])
        losses.append(float(loss))
    return network, losses


def count_calls(network: Network, images: jax.Array, labels: jax.Array) -> int:
    """Returns how many calls of the kernel the compiled gradient contains."""
    arrays, static = eqx.partition(network, eqx.is_array)

    def gradient(arrays: Any, images: jax.Array) -> Any:
        return jax.grad(lambda a, x: loss_of((eqx.combine(a, static), x), labels), (0, 1))(
            arrays, images
        )

    return jax.jit(gradient).lower(arrays, images).compile().as_text().count(CALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="batches (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console()
    # On a GPU the default would round products to TF32, differently in each library.
    jax.config.update("jax_default_matmul_precision", "highest")

    bundle = load_digits()
    images = jnp.asarray(bundle.images[:, None] / 16, jnp.float32)
    labels = jnp.asarray(bundle.target, jnp.int32)
    batches = np.random.default_rng(options.seed).integers(0, len(images), (options.steps, BATCH))

    # For the whole process, as a program would have it ...
    jax_convgrad.install()
    network, losses = train(Network(jax.random.key(options.seed)), images, labels, batches)
    jax_convgrad.uninstall()

    # ... or for a block. The same jitted function retraces on the way in and out.
    batch = images[:BATCH], labels[:BATCH]
    reference = gradients_of((network, batch[0]), batch[1])
    without = count_calls(network, *batch)
    with jax_convgrad.installed():
        gradients = gradients_of((network, batch[0]), batch[1])
        calls = count_calls(network, *batch)
    error = normwise_error(gradients, reference)

    # Images are differentiated too, so every layer asks for its input gradient: one call
    # each, whatever the batch.
    shapes = ((1, 32, 8, 1, 1), (32, 32, 8, 1, 32), (32, 64, 8, 2, 1))
    expected = 0
    for inputs, outputs, size, stride, groups in shapes:
        explanation = jax_convgrad.explain(
            jax.ShapeDtypeStruct((BATCH, inputs, size, size), jnp.float32),
            jax.ShapeDtypeStruct((outputs, inputs // groups, 3, 3), jnp.float32),
            (stride, stride),
            [(1, 1), (1, 1)],
            feature_group_count=groups,
        )
        expected += explanation.implementation == "native"
        name = " ".join(filter(None, (explanation.implementation, explanation.kernel)))
        console.print(f"{explanation.geometry}: {name}", markup=False, highlight=False)

    start, end = np.mean(losses[:5]), np.mean(losses[-5:])
    console.print(f"loss {start:.3f} -> {end:.3f} in {options.steps} steps")
    console.print(f"calls of the kernel: {calls} of {expected} installed, {without} uninstalled")
    console.print(f"gradients differ by {error:.1e}, tolerance {TOLERANCE:g}")
    passed = error <= TOLERANCE and end < start and calls == expected and without == 0
    console.print("[green]ok[/]" if passed else "[bold red]FAILED[/]")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
