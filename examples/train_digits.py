"""Trains a small convolutional network on handwritten digits, twice from one seed.

Once with `jax.lax.conv_general_dilated`, once with `jax_convgrad.conv_general_dilated`.
Checks that both see the same gradients and the same losses, that the network learned to
read (97 % of the test digits) and that the kernel really ran; then draws what the input
gradient says about single pixels. Exits with status 1 if a check fails.

The data are the 1797 digits of 8 x 8 pixels that come with scikit-learn. Also available
as `python -m jax_convgrad demo`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jax_convgrad

Convolution: TypeAlias = Callable[..., jax.Array]
Params: TypeAlias = dict[str, dict[str, jax.Array]]

BATCH = 64
STEPS = 240
TEST_ACCURACY = 0.97
# Both runs compute the same sums in different orders, so gradients of equal weights differ
# by rounding; measured as |a - b| / |b| over an array. The losses stay that close too,
# since the network is smooth: with relu for gelu, an activation that rounds to the other
# side of zero starts two different trajectories.
GRADIENT_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-5
# On a GPU the default precision rounds products to TF32, differently in each library.
PRECISION = lax.Precision.HIGHEST
CALL = 'custom_call_target="convgrad_input_grad"'


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution of the network: name, HWIO filter shape, stride, feature groups."""

    name: str
    filter_shape: tuple[int, int, int, int]
    stride: int = 1
    groups: int = 1

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `conv_general_dilated`, beside lhs and rhs."""
        return {
            "window_strides": (self.stride, self.stride),
            "padding": "SAME",
            "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
            "feature_group_count": self.groups,
            "precision": PRECISION,
        }


LAYERS = (
    Layer("dense 3x3", (3, 3, 1, 32)),
    Layer("depthwise 3x3", (3, 3, 1, 32), groups=32),
    Layer("strided 3x3", (3, 3, 32, 64), stride=2),
)
FEATURES = 4 * 4 * 64  # what the strided layer leaves of an 8 x 8 image
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images of shape [n, 8, 8, 1] with values from 0 to 1, and labels of shape [n]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_data(seed: int) -> Digits:
    """Returns the digits, a fifth of each class set aside for the test."""
    bundle = load_digits()
    images = (bundle.images / 16).astype(np.float32)[..., None]
    labels = bundle.target.astype(np.int32)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    return Digits(parts[0], parts[2], parts[1], parts[3])


def batch_of(data: Digits, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws a batch of training digits, half of them shifted by up to one pixel."""
    chosen = random.choice(len(data.train_images), BATCH, replace=False)
    shifts = random.integers(-1, 2, (BATCH, 2)) * random.integers(0, 2, (BATCH, 1))
    padded = np.pad(data.train_images[chosen], ((0, 0), (1, 1), (1, 1), (0, 0)))
    images = [
        image[1 + down : 9 + down, 1 + right : 9 + right]
        for image, (down, right) in zip(padded, shifts, strict=True)
    ]
    return np.stack(images), data.train_labels[chosen]


def init_params(seed: int) -> Params:
    """Returns He-initialised filters, a linear read-out and zero biases."""
    keys = jax.random.split(jax.random.key(seed), len(LAYERS) + 1)
    shapes = {layer.name: layer.filter_shape for layer in LAYERS} | {"linear": (FEATURES, CLASSES)}
    params = {}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
        scale = math.sqrt(2 / math.prod(shape[:-1]))
        weights = scale * jax.random.normal(key, shape, jnp.float32)
        params[name] = {"w": weights, "b": jnp.zeros(shape[-1:], jnp.float32)}
    return params


def logits_of(params: Params, images: jax.Array, convolution: Convolution) -> jax.Array:
    """Applies the network: images [n, 8, 8, 1] to logits [n, 10]."""
    x = images
    for layer in LAYERS:
        weights = params[layer.name]
        x = jax.nn.gelu(convolution(x, weights["w"], **layer.arguments()) + weights["b"])
    x = x.reshape(len(x), -1)
    linear = params["linear"]
    return jnp.dot(x, linear["w"], precision=PRECISION) + linear["b"]


def loss_of(
    params: Params, images: jax.Array, labels: jax.Array, convolution: Convolution
) -> jax.Array:
    """Returns the mean cross-entropy over a batch."""
    logits = logits_of(params, images, convolution)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def saliency_of(
    params: Params, images: jax.Array, labels: jax.Array, convolution: Convolution
) -> jax.Array:
    """Returns the gradient of every image's true-class logit with respect to the image.

    The last step back, through the first layer, is that layer's input gradient: an array
    of the images' shape.
    """

    def total(x: jax.Array) -> jax.Array:
        # An image's logits depend on no other image, so one sum serves all of them.
        return jnp.take_along_axis(logits_of(params, x, convolution), labels[:, None], 1).sum()

    return jax.grad(total)(images)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training run leaves behind."""

    params: Params
    losses: np.ndarray
    seconds: float
    custom_calls: int  # calls of the kernel in the compiled training step


def train(
    convolution: Convolution, data: Digits, seed: int, steps: int, advance: Callable[[float], None]
) -> Run:
    """Trains from a seed with Adam on a cosine schedule.

    Args:
        convolution: lax's or this package's `conv_general_dilated`.
        data: the digits.
        seed: of the initial weights and of the order of the batches.
        steps: number of batches.
        advance: called with the loss after each step.

    Returns:
        The trained weights and the loss of every step.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, steps))

    @jax.jit
    def step(params: Params, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, images, labels, convolution)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    params = init_params(seed)
    state = optimizer.init(params)
    random = np.random.default_rng(seed)
    batches = [batch_of(data, random) for _ in range(steps)]
    compiled = step.lower(params, state, *batches[0]).compile()
    losses = []
    start = time.perf_counter()
    for images, labels in batches:
        params, state, loss = compiled(params, state, images, labels)
        losses.append(float(loss))
        advance(losses[-1])
    seconds = time.perf_counter() - start
    return Run(params, np.asarray(losses), seconds, compiled.as_text().count(CALL))


def normwise_error(tree: Any, reference: Any) -> float:
    """Returns the largest |a - b| / |b| over the arrays of two trees."""

    def error(a: jax.Array, b: jax.Array) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))

    return max(jax.tree.leaves(jax.tree.map(error, tree, reference)))


def explain_layers(implementation: str | None) -> list[jax_convgrad.Explanation]:
    """Returns what computes the input gradient of each layer."""
    explanations = []
    shape: tuple[int, ...] = (BATCH, 8, 8, 1)
    for layer in LAYERS:
        explanation = jax_convgrad.explain(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(layer.filter_shape, jnp.float32),
            **layer.arguments(),
            implementation=implementation,
        )
        explanations.append(explanation)
        shape = explanation.geometry.out_shape
    return explanations


def layer_table(explanations: Sequence[jax_convgrad.Explanation]) -> Table:
    """Lays out who computes which input gradient."""
    table = Table(title="Input gradients", title_justify="left")
    for heading in ("layer", "x", "filter", "MFLOP", "runs as"):
        table.add_column(heading, justify="right" if heading == "MFLOP" else "left")
    for layer, explanation in zip(LAYERS, explanations, strict=True):
        table.add_row(
            layer.name,
            "x".join(map(str, explanation.geometry.lhs_shape)),
            "x".join(map(str, explanation.geometry.rhs_shape)),
            f"{explanation.flops / 1e6:.1f}",
            " ".join(filter(None, (explanation.implementation, explanation.kernel))),
        )
    return table


@dataclasses.dataclass(frozen=True)
class Checks:
    """Named conditions, each with what was measured."""

    rows: list[tuple[str, str, bool]] = dataclasses.field(default_factory=list)

    def add(self, name: str, measured: str, passed: bool) -> None:
        """Adds the outcome of one check."""
        self.rows.append((name, measured, passed))

    @property
    def passed(self) -> bool:
        """Whether all of them hold."""
        return all(passed for _, _, passed in self.rows)

    def table(self) -> Table:
        """Lays them out."""
        table = Table(title="Checks", title_justify="left")
        for heading in ("check", "measured", ""):
            table.add_column(heading)
        for name, measured, passed in self.rows:
            table.add_row(name, measured, "[green]ok[/]" if passed else "[bold red]FAILED[/]")
        return table


def check(
    data: Digits,
    seed: int,
    explanations: Sequence[jax_convgrad.Explanation],
    convolution: Convolution,
    reference: Run,
    run: Run,
    saliency: dict[str, np.ndarray],
    check_accuracy: bool,
) -> Checks:
    """Compares the two runs and looks for the kernel in the compiled program.

    Args:
        data: the digits.
        seed: of the initial weights.
        explanations: what computes each layer's input gradient.
        convolution: this package's.
        reference: the run with lax.
        run: the run with this package.
        saliency: gradients of the same images, by "lax" and by "ours".
        check_accuracy: whether the network must have learned to read.

    Returns:
        The outcome of every check.
    """
    checks = Checks()

    # The first layer's images need no gradient, so training never asks for theirs.
    expected = sum(e.implementation == "native" for e in explanations[1:])
    checks.add(
        f"compiled training step calls convgrad_input_grad {expected} times",
        f"{run.custom_calls}",
        run.custom_calls == expected,
    )

    batch = data.train_images[:BATCH], data.train_labels[:BATCH]
    gradient = jax.jit(jax.grad(loss_of), static_argnums=3)
    params = init_params(seed)
    error = normwise_error(
        gradient(params, *batch, convolution),
        gradient(params, *batch, lax.conv_general_dilated),
    )
    checks.add(
        f"gradients of the first weights agree within {GRADIENT_TOLERANCE:g}",
        f"{error:.1e}",
        error <= GRADIENT_TOLERANCE,
    )
    error = normwise_error(saliency["ours"], saliency["lax"])
    checks.add(
        f"dE/dX of the test images agrees within {GRADIENT_TOLERANCE:g}",
        f"{error:.1e}",
        error <= GRADIENT_TOLERANCE,
    )
    difference = float(np.abs(run.losses - reference.losses).max())
    checks.add(
        f"losses of all steps agree within {LOSS_TOLERANCE:g}",
        f"{difference:.1e}",
        difference <= LOSS_TOLERANCE,
    )
    logits = jax.jit(logits_of, static_argnums=2)(run.params, data.test_images, convolution)
    accuracy = float((np.asarray(logits).argmax(axis=1) == data.test_labels).mean())
    if check_accuracy:
        name = f"test accuracy is at least {TEST_ACCURACY:.0%}"
        checks.add(name, f"{accuracy:.2%}", accuracy >= TEST_ACCURACY)
    else:
        checks.add("test accuracy (not checked)", f"{accuracy:.2%}", True)
    return checks


INK, MUTED, OURS, THEIRS = "#22262b", "#6b7280", "#c2410c", "#93b4d8"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": "#c7ccd3",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def draw(
    path: pathlib.Path,
    images: np.ndarray,
    saliency: np.ndarray,
    labels: np.ndarray,
    reference: Run,
    run: Run,
    subtitle: str,
) -> None:
    """Saves the picture: digits above their input gradients, and both loss curves.

    Args:
        path: file to write.
        images: one digit of each class, [10, 8, 8, 1].
        saliency: d logit / d image, of the same shape.
        labels: their classes.
        reference: the run with lax.
        run: the run with this package.
        subtitle: who computed the gradients.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 7.4), dpi=160, facecolor="white")
        figure.text(0.085, 0.945, "What the input gradient sees", fontsize=18, weight="bold")
        figure.text(0.085, 0.908, subtitle, fontsize=10.5, color=MUTED)
        draw_saliency(figure, images, saliency, labels)
        draw_losses(figure, reference, run)
        figure.savefig(path)


def draw_saliency(
    figure: Figure, images: np.ndarray, saliency: np.ndarray, labels: np.ndarray
) -> None:
    """Draws a row of digits above a row of their gradients, on one colour scale."""
    count = len(images)
    rows = figure.add_gridspec(
        2, count, left=0.085, right=0.93, bottom=0.552, top=0.835, wspace=0.07, hspace=0.07
    )
    limit = float(np.percentile(np.abs(saliency), 99.5)) or 1.0
    for i in range(count):
        above, below = (figure.add_subplot(rows[row, i]) for row in range(2))
        for axes in (above, below):
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, color="#d9dde2", linewidth=0.8)
        above.imshow(images[i, ..., 0], cmap="Greys", vmin=0, vmax=1)
        above.set_title(str(labels[i]), loc="center", pad=5, fontsize=12)
        shaded = below.imshow(saliency[i, ..., 0], cmap="RdBu_r", vmin=-limit, vmax=limit)
        # The digit's outline, to see where its ink lies under the colours; the blank
        # border closes the line around ink at the edge.
        bordered, span = np.pad(images[i, ..., 0], 1), np.arange(-1, 9)
        below.contour(span, span, bordered, levels=[0.4], colors=INK, linewidths=1.1)
        below.set(xlim=(-0.5, 7.5), ylim=(7.5, -0.5))
        if i == 0:
            for axes, text in ((above, "digit"), (below, "dE/dX")):
                axes.set_ylabel(
                    text, rotation=0, ha="right", va="center", weight="bold", labelpad=10
                )
        if i == count - 1:
            bar = figure.colorbar(
                shaded, cax=below.inset_axes((1.1, 0, 0.09, 1)), ticks=[-limit, 0, limit]
            )
            bar.ax.set_yticklabels([f"{-limit:.1f}", "0", f"{limit:.1f}"], fontsize=9)
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0)
    figure.text(
        0.085,
        0.515,
        "E is the logit of the true class: more ink on a red pixel would raise it, more ink on a "
        "blue one would lower it. The black line is the digit's outline.",
        fontsize=9.5,
        color=MUTED,
    )


def draw_losses(figure: Figure, reference: Run, run: Run) -> None:
    """Draws both loss curves and the distance between them."""
    columns = figure.add_gridspec(
        1, 2, left=0.085, right=0.955, bottom=0.085, top=0.405, wspace=0.2, width_ratios=(1.55, 1)
    )
    steps = np.arange(1, len(run.losses) + 1)
    axes = figure.add_subplot(columns[0])
    axes.plot(
        steps, reference.losses, color=THEIRS, linewidth=4.5, label="lax", solid_capstyle="round"
    )
    axes.plot(steps, run.losses, color=OURS, linewidth=1.2, label="jax_convgrad")
    axes.set(yscale="log", xlabel="step", ylabel="training loss", title="Two runs, one seed")
    axes.set_yticks([0.1, 1], ["0.1", "1"])
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#eceef1", linewidth=0.8)
    axes.legend(loc="upper right")

    axes = figure.add_subplot(columns[1])
    difference = np.abs(run.losses - reference.losses)
    floor = 1e-9
    axes.scatter(steps, np.maximum(difference, floor), s=9, color=OURS, linewidths=0)
    axes.axhline(LOSS_TOLERANCE, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(steps[-1], LOSS_TOLERANCE * 1.5, "tolerance", ha="right", color=MUTED, fontsize=9)
    if not difference.any():
        axes.text(0.5, 0.45, "no bit differs", transform=axes.transAxes, ha="center", color=MUTED)
    axes.set(
        yscale="log", ylim=(floor / 3, 1e-3), xlabel="step", title="How far apart the losses are"
    )
    axes.set_yticks([1e-9, 1e-7, 1e-5, 1e-3], ["0", "$10^{-7}$", "$10^{-5}$", "$10^{-3}$"])
    axes.minorticks_off()
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#eceef1", linewidth=0.8)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="train_digits", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="batches (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("train_digits.png"),
        help="the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--implementation",
        choices=("auto", "native", "xla"),
        default="auto",
        help="of jax_convgrad's input gradient (default: %(default)s)",
    )
    parser.add_argument(
        "--no-accuracy-check",
        action="store_true",
        help=f"report the test accuracy, require none (implied by fewer than {STEPS} steps)",
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.absolute().parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration and returns its exit status."""
    options = parse(arguments)
    console = Console()
    implementation = None if options.implementation == "auto" else options.implementation
    try:
        explanations = explain_layers(implementation)
    except ValueError as e:  # "native" where there is none
        console.print(f"[bold red]{e}[/]")
        return 1
    console.print(layer_table(explanations))
    for reason in dict.fromkeys(e.reason for e in explanations if e.implementation == "xla"):
        console.print(f"xla because {reason}", style="dim", markup=False, highlight=False)

    data = load_data(options.seed)
    convolution = functools.partial(
        jax_convgrad.conv_general_dilated, implementation=implementation
    )
    with Progress(
        TextColumn("{task.description:<13}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:

        def run(name: str, convolution: Convolution) -> Run:
            task = progress.add_task(name, total=options.steps, loss=math.nan)
            return train(
                convolution,
                data,
                options.seed,
                options.steps,
                lambda loss: progress.update(task, advance=1, loss=loss),
            )

        reference = run("lax", lax.conv_general_dilated)
        trained = run("jax_convgrad", convolution)

    # One test digit of each class, and what its input gradient says.
    first = [int(np.flatnonzero(data.test_labels == label)[0]) for label in range(CLASSES)]
    images, labels = data.test_images[first], data.test_labels[first]
    saliency = {
        name: np.asarray(
            jax.jit(functools.partial(saliency_of, convolution=function))(
                trained.params, images, labels
            )
        )
        for name, function in (("lax", lax.conv_general_dilated), ("ours", convolution))
    }
    checks = check(
        data,
        options.seed,
        explanations,
        convolution,
        reference,
        trained,
        saliency,
        check_accuracy=options.steps >= STEPS and not options.no_accuracy_check,
    )
    console.print(checks.table())

    kernels = {e.kernel for e in explanations if e.kernel is not None}
    computed_by = f"kernels {', '.join(sorted(kernels))}" if kernels else "lax, no kernel used"
    subtitle = (
        f"Convolutional network, {len(data.train_images)} training digits, {options.steps} steps "
        f"on {jax.devices()[0].device_kind}; input gradients computed by {computed_by}"
    )
    draw(options.out, images, saliency["ours"], labels, reference, trained, subtitle)
    console.print(
        f"Training took {reference.seconds:.1f} s with lax and {trained.seconds:.1f} s with "
        f"jax_convgrad. Picture: {options.out}"
    )
    return 0 if checks.passed else 1


if __name__ == "__main__":
    sys.exit(main())
