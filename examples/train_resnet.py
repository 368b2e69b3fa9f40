"""A small ResNet in Flax NNX, trained with and without `jax_convgrad.install()`.

Convolutions, batch norm and max pooling as users write them, on scikit-learn's handwritten
digits, enlarged to CIFAR's 32 x 32 pixels. Checks that both runs start on the same curve and
that both learn, prints the time of a step and draws train_resnet.png. Exits with status 1 if
a check fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.datasets import load_digits

import jax_convgrad

BATCH, TRAINED, ACCURACY = 64, 1536, 0.85
# Losses of the first steps, compared as |a - b| / b: the same sums in different orders. ReLU
# and max pooling choose, so that later on the two runs go their own ways.
COMPARED, TOLERANCE = 3, 1e-3


class ConvNorm(nnx.Module):
    """A 3x3 convolution without bias, and batch norm."""

    def __init__(self, inputs: int, outputs: int, strides: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(inputs, outputs, (3, 3), strides, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Two such layers beside a shortcut, which pools where the first one strides."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
        self.strides = outputs // inputs
        self.first = ConvNorm(inputs, outputs, self.strides, rngs)
        self.second = ConvNorm(outputs, outputs, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.second(nnx.relu(self.first(x)))
        if self.strides > 1:
            x = jnp.tile(nnx.max_pool(x, (2, 2), (2, 2)), 2)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """Eight layers, from images [N, 32, 32, 1] to logits [N, 10]."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = ConvNorm(1, 32, 1, rngs)
        self.blocks = nnx.List([Block(32, 32, rngs), Block(32, 64, rngs), Block(64, 128, rngs)])
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.stem(x)), (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def train(steps: int) -> tuple[list[float], float, float]:
    """Returns the loss of each step, the accuracy on unseen digits, and seconds a step."""
    digits = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
    images, labels = images.repeat(4, 1).repeat(4, 2), jnp.asarray(digits.target)
    model = ResNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    def loss_of(model: ResNet, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    def step(model: ResNet, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, gradients = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(model, gradients)
        return loss

    losses, times = [], []
    for batch in np.random.default_rng(0).integers(0, TRAINED, (steps, BATCH)):
        start = time.perf_counter()
        losses.append(float(step(model, optimizer, images[batch], labels[batch])))
        times.append(time.perf_counter() - start)
    model.eval()
    read = nnx.jit(lambda model, x: model(x).argmax(-1))(model, images[TRAINED:])
    return losses, float((read == labels[TRAINED:]).mean()), float(np.median(times))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=80, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    console, passed, curves, axes = Console(), True, [], Figure(figsize=(6, 3.5)).subplots()
    for name, active in (("lax", False), ("install()", True)):
        with jax_convgrad.installed(active):  # as install(), within the block
            losses, accuracy, seconds = train(options.steps)
        console.print(f"{name:>9}: {1e3 * seconds:.0f} ms a step, accuracy {accuracy:.3f}")
        label = f"{name}, {1e3 * seconds:.0f} ms a step"
        axes.plot(losses, label=label, linewidth=2 if active else 6)  # one upon the other
        curves.append(np.array(losses[:COMPARED]))
        passed &= accuracy >= ACCURACY
    apart = float(np.max(np.abs(curves[0] - curves[1]) / curves[0]))
    console.print(f"the first {COMPARED} losses differ by {apart:.1e}, tolerance {TOLERANCE:g}")
    axes.set(xlabel="step", ylabel="loss", title="ResNet on digits of 32 x 32 pixels")
    axes.legend()
    axes.figure.savefig("train_resnet.png", dpi=150, bbox_inches="tight")
    passed &= apart <= TOLERANCE
    console.print("[green]ok[/]" if passed else "[bold red]FAILED[/]")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
