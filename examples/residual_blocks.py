"""Residual blocks whose backward pass does the ReLU and the skip connection on the way.

A block is x -> relu(conv2(relu(conv1(x))) + x). On its way back, autodiff writes the
gradient of each convolution to memory and reads it again: to multiply it by a ReLU's mask,
to add what came past the skip connection. `conv_input_grad` does both while it holds the
gradient (`relu_mask`, `residual`), and a `jax.custom_vjp` says where. Trains a small net of
such blocks on scikit-learn's digits, checks its gradients against those of autodiff, and
reports how long both take for a block of larger images. Exits with status 1 if they differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from sklearn.datasets import load_digits

from jax_convgrad import conv_general_dilated, conv_input_grad

BATCH = 64
CHANNELS = 32
BLOCKS = 3
# |a - b| / |b| over an array: the same sums, added up in different orders.
TOLERANCE = 1e-5
PARAMS: dict[str, Any] = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
CALL = 'custom_call_target="convgrad_input_grad_fused"'
Weights = tuple[jax.Array, jax.Array]


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    """A 3x3 convolution of images [N, H, W, C]."""
    return conv_general_dilated(x, w, (1, 1), **PARAMS)


def plain_block(x: jax.Array, weights: Weights) -> jax.Array:
    """The block as one writes it, differentiated by JAX."""
    w1, w2 = weights
    return jax.nn.relu(conv(jax.nn.relu(conv(x, w1)), w2) + x)


@jax.custom_vjp
def fused_block(x: jax.Array, weights: Weights) -> jax.Array:
    """The same, where x is the result of a ReLU: its cotangent is zero where x is.

    That ReLU would set those zeros itself, so nothing changes but who does it.
    """
    return plain_block(x, weights)


def _forward(x: jax.Array, weights: Weights) -> tuple[jax.Array, Any]:
    w1, w2 = weights
    h = jax.nn.relu(conv(x, w1))
    y = jax.nn.relu(conv(h, w2) + x)
    return y, (x, h, y, weights)


def _backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, Weights]:
    x, h, y, (w1, w2) = saved
    # No work if the next block was one of these: it left zeros there.
    dy = jnp.where(y > 0, dy, 0)
    dh = conv_input_grad(dy, w2, h.shape, (1, 1), **PARAMS, relu_mask=h)
    dx = conv_input_grad(dh, w1, x.shape, (1, 1), **PARAMS, residual=dy, relu_mask=x)
    (dw2,) = jax.vjp(lambda w: conv(h, w), w2)[1](dy)
    (dw1,) = jax.vjp(lambda w: conv(x, w), w1)[1](dh)
    return dx, (dw1, dw2)


fused_block.defvjp(_forward, _backward)
Block = Callable[[jax.Array, Weights], jax.Array]


def init(key: jax.Array) -> dict[str, Any]:
    """A stem, the blocks' pairs of filters and a read-out, of He's variance."""
    stem, readout, *keys = jax.random.split(key, 2 + 2 * BLOCKS)

    def filters(key: jax.Array, inputs: int) -> jax.Array:
        return jax.random.normal(key, (3, 3, inputs, CHANNELS)) * (2 / (9 * inputs)) ** 0.5

    return {
        "stem": filters(stem, 1),
        "blocks": [
            (filters(a, CHANNELS), filters(b, CHANNELS) / BLOCKS)
            for a, b in zip(keys[::2], keys[1::2], strict=True)
        ],
        "readout": jax.random.normal(readout, (CHANNELS, 10)) / CHANNELS**0.5,
    }


def loss_of(block: Block) -> Callable[..., jax.Array]:
    """The mean cross-entropy of a net of such blocks over a batch."""

    def loss(weights: dict[str, Any], images: jax.Array, labels: jax.Array) -> jax.Array:
        x = jax.nn.relu(conv(images, weights["stem"]))
        for pair in weights["blocks"]:
            x = block(x, pair)
        logits = x.mean((1, 2)) @ weights["readout"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def train(block: Block, weights: Any, batches: Sequence[Any]) -> list[float]:
    """The losses of a training run by Adam."""
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(weights: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of(block))(weights, images, labels)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(weights, updates), state, loss

    state, losses = optimizer.init(weights), []
    for images, labels in batches:
        weights, state, loss = step(weights, state, images, labels)
        losses.append(float(loss))
    return losses


def normwise_error(tree: Any, reference: Any) -> float:
    """The largest |a - b| / |b| over the arrays of two trees."""

    def error(a: jax.Array, b: jax.Array) -> float:
        return float(np.linalg.norm(np.subtract(a, b)) / max(np.linalg.norm(b), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(error, tree, reference)))


def median_us(blocks: dict[str, Block], shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """How long the gradient of one block takes, measured by turns."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.nn.relu(jax.random.normal(keys[0], shape))
    filters = (3, 3, shape[-1], shape[-1])
    weights = tuple(jax.random.normal(key, filters) / shape[-1] for key in keys[1:])

    def gradient(block: Block) -> Any:
        return jax.jit(jax.grad(lambda x, weights: jnp.sum(block(x, weights) ** 2), (0, 1)))

    compiled = {name: gradient(block).lower(x, weights).compile() for name, block in blocks.items()}
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for turn in range(rounds + 1):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(x, weights))
            if turn > 0:  # the first one warms up
                times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example and returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="batches (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console()
    # On a GPU the default would round products to TF32, in other places with than without.
    jax.config.update("jax_default_matmul_precision", "highest")

    bundle = load_digits()
    random = np.random.default_rng(options.seed)
    chosen = random.integers(0, len(bundle.images), (options.steps, BATCH))
    batches = [
        (jnp.asarray(bundle.images[batch, ..., None] / 16, jnp.float32), bundle.target[batch])
        for batch in chosen
    ]
    weights = init(jax.random.key(options.seed))
    blocks: dict[str, Block] = {"fused": fused_block, "plain": plain_block}
    gradients = {name: jax.jit(jax.grad(loss_of(block))) for name, block in blocks.items()}
    error = normwise_error(*(gradient(weights, *batches[0]) for gradient in gradients.values()))
    text = gradients["fused"].lower(weights, *batches[0]).compile().as_text()
    losses = {name: train(block, weights, batches) for name, block in blocks.items()}

    for name, curve in losses.items():
        console.print(f"{name}: loss {curve[0]:.3f} -> {curve[-1]:.3f} in {options.steps} steps")
    console.print(f"fused calls of the kernel: {text.count(CALL)} for {BLOCKS} blocks")
    console.print(f"gradients differ by {error:.1e}, tolerance {TOLERANCE:g}")
    shape = (8, 56, 56, 64)
    times = median_us(blocks, shape, options.rounds)
    console.print(
        f"gradient of one block, images {shape}: fused {times['fused']:.0f} us, "
        f"plain {times['plain']:.0f} us (medians of {options.rounds}, by turns)"
    )
    passed = error <= TOLERANCE and all(curve[-1] < curve[0] for curve in losses.values())
    console.print("[green]ok[/]" if passed else "[bold red]FAILED[/]")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
