"""Training steps of nets in Flax and Equinox: by lax, under `install()`, and the same in PyTorch.

    python benchmarks/step.py --json benchmarks/results/NAME.json --png benchmarks/results/NAME.png

A step is the forward pass, the loss, the gradients for all parameters and SGD with momentum: in
JAX one jitted program by optax that is given its parameters' memory, in PyTorch what its users
write, on every core, in both memory formats: the faster one counts. All in float32 and on a
CPU. How the programs are compared, timed and taken apart is `python -m jax_convgrad step`'s, whose
docstring says what the JSON holds (jax_convgrad/tools/step.py). Here are besides

    torch           PyTorch's settings, None where it is no peer
    nets            each with
      framework                 "flax" or "equinox"
      torch                     None where it is no peer, else {parameters, multiply_adds, losses,
                                memory_format, times_us}: the faster format, and the times of each.
                                A net of other sizes than JAX's is a failure
      notes                     what else is printed
    and "torch" among times_us and ratios, in the faster format.

A line in red is a net that takes longer than a peer's.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from nets import SPECS, TINY, Spec

from jax_convgrad.tools import ToolError, machine, results, step, torch_peer
from jax_convgrad.tools.training import Report, Training, measure

NETS = {name: (name, "flax") for name in SPECS}
NETS |= {f"{name}_equinox": (name, "equinox") for name in ("resnet18", "tasnet")}
LEARNING_RATE, MOMENTUM, LOSSES = 0.01, 0.9, 3


def data(spec: Spec, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random inputs and targets, channels last."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((spec.batch, *spec.sizes, spec.channels), dtype=np.float32)
    if spec.target == "signal":
        return x, rng.standard_normal(spec.target_shape, dtype=np.float32)
    return x, rng.integers(spec.outputs, size=spec.target_shape)


def channels_first(spec: Spec, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Inputs and targets as PyTorch and Equinox take them."""
    x, target = batch
    if spec.target == "signal":
        target = np.moveaxis(target, -1, 1)
    return [np.ascontiguousarray(np.moveaxis(x, -1, 1)), np.ascontiguousarray(target)]


def loss_of(spec: Spec, outputs: jax.Array, target: jax.Array) -> jax.Array:
    """The mean cross-entropy, or of a signal the mean squared error."""
    if spec.target == "signal":
        return jnp.mean((outputs - target) ** 2)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, target).mean()


def training(framework: str, spec: Spec, seed: int, smooth: bool) -> Training:
    """A net of a framework of JAX in training."""
    params, others, apply = importlib.import_module(f"nets.in_{framework}").build(
        spec, seed, smooth
    )
    batch = data(spec, seed)
    if framework == "equinox":
        batch = channels_first(spec, batch)
    optimizer = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)

    def train(state: Any, x: jax.Array, target: jax.Array) -> Any:
        params, momentum, others = state

        def loss(params: Any) -> Any:
            outputs, changed = apply(params, others, x)
            return loss_of(spec, outputs, target), changed

        (value, others), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(gradients, momentum, params)
        return (optax.apply_updates(params, updates), momentum, others), value

    return Training(
        train,
        (params, optimizer.init(params), others),
        tuple(map(jnp.asarray, batch)),
        # Momentum starts from zero, so that after one step it is the gradient.
        lambda state: optax.tree.get(state[1], "trace"),
    )


class TorchStep:
    """A step of PyTorch, which trains on one batch for as long as it is timed."""

    def __init__(self, torch: Any, spec: Spec, memory_format: str, seed: int) -> None:
        self.name = f"torch {memory_format}"
        self._torch, self._spec = torch, spec
        torch.manual_seed(seed)
        net = importlib.import_module("nets.in_torch").build(spec)
        x, target = map(torch.from_numpy, channels_first(spec, data(spec, seed)))
        if memory_format != "contiguous":
            last = {2: torch.channels_last, 3: torch.channels_last_3d}[len(spec.sizes)]
            net, x = net.to(memory_format=last), x.to(memory_format=last)
        self._net, self._x, self._target = net, x, target
        self._optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM)
        functional = torch.nn.functional
        self._loss = functional.mse_loss if spec.target == "signal" else functional.cross_entropy

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self._net.parameters())

    def _advance(self) -> Any:
        self._optimizer.zero_grad()
        loss = self._loss(self._net(self._x), self._target)
        loss.backward()
        self._optimizer.step()
        return loss

    def first(self) -> tuple[int, list[float]]:
        """The multiply-adds of all convolutions of a forward pass, and the first losses."""
        count = 0

        def hook(layer: Any, arguments: Any, out: Any) -> None:
            nonlocal count
            placed = arguments[0] if layer.transposed else out
            count += placed.shape[0] * placed[0, 0].numel() * layer.weight.numel()

        convolutions = [layer for layer in self._net.modules() if hasattr(layer, "transposed")]
        hooks = [layer.register_forward_hook(hook) for layer in convolutions]
        losses = [self._advance().item()]
        for each in hooks:
            each.remove()
        return count, losses + [self._advance().item() for _ in range(1, LOSSES)]

    def run(self, first: int, instances: int, calls: int) -> float:
        """As `timing.Peer.run` says."""
        del first
        start = time.perf_counter()
        for _ in range(instances * calls):
            self._advance()
        return 1e6 * (time.perf_counter() - start) / (instances * calls)


def _take_faster(report: Report, peers: Sequence[TorchStep], counts: dict[str, Any]) -> None:
    """Puts the faster format of PyTorch in the place of all, and compares its sizes with ours."""
    for key, of_jax in (("parameters", report["parameters"]),
                        ("multiply_adds", report["multiply_adds"])):  # fmt: skip
        if counts[key] != of_jax:
            message = f"{counts[key]} {key} instead of {of_jax}"
            report["failures"].append({"what": "torch", "message": message})
    report["torch"] = counts
    if "times_us" not in report:
        return
    times = {peer.name: report["times_us"].pop(peer.name) for peer in peers}
    ratios = {peer.name: report["ratios"].pop(peer.name) for peer in peers}
    best = min(times, key=lambda name: times[name]["median"])
    report["times_us"]["torch"], report["ratios"]["torch"] = times[best], ratios[best]
    counts["memory_format"] = best.split()[1]
    counts["times_us"] = {name.split()[1]: us for name, us in times.items()}
    report["notes"] = [f"{name}: {us['median'] / 1e3:.4g} ms" for name, us in times.items()]


def measure_net(name: str, *, torch: Any, tiny: bool, seconds: float, seed: int) -> Report:
    """Checks and times one net.

    Args:
        name: a key of NETS.
        torch: the module, None if it is no peer.
        tiny: with the sizes of TINY.
        seconds: time to spend on timing.
        seed: of parameters and data.

    Returns:
        The net's object.
    """
    key, framework = NETS[name]
    spec = (TINY if tiny else SPECS)[key]
    peers, counts = [], {}
    if torch is not None:
        formats = ["contiguous"] + ["channels_last"] * (len(spec.sizes) > 1)
        peers = [TorchStep(torch, spec, memory_format, seed) for memory_format in formats]
        multiply_adds, losses = peers[0].first()
        counts = {"parameters": peers[0].parameters, "multiply_adds": multiply_adds,
                  "losses": losses}  # fmt: skip
    net = training(framework, spec, seed, smooth=False)
    report = {
        "net": name,
        "title": spec.title + (", Equinox" if framework == "equinox" else ""),
        "framework": framework,
        "dtype": "float32",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(net.state[0])),
        "batch": spec.batch,
        "image": list(spec.sizes),
        "torch": None,
        **measure(net, training(framework, spec, seed, smooth=True), seconds=seconds, peers=peers),
    }
    if torch is not None:
        _take_faster(report, peers, counts)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        arguments: of the command line, None for those of the process.

    Returns:
        The exit status: 1 if a result was wrong, 2 for a request that cannot be served.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--net", dest="nets", action="append", choices=NETS, metavar="NAME",
        help=f"{', '.join(NETS)}; may be repeated (default: all)")  # fmt: skip
    add("--peers", choices=("lax", "lax,torch"), default="lax,torch", help="default lax,torch")
    add("--tiny", action="store_true", help="nets of a few channels, to try the program")
    add("--seconds", type=float, default=30.0, help="time to measure one net (default 30)")
    add("--seed", type=int, default=0)
    add("--json", type=pathlib.Path, dest="json_path", help="write the results here")
    add("--png", type=pathlib.Path, dest="png_path", help="draw them here")
    options = parser.parse_args(arguments)
    try:
        if machine.is_gpu():
            raise ToolError("PyTorch's peers are on a CPU, but JAX runs on a GPU")
        torch = torch_peer.load("default") if "torch" in options.peers else None
        measured = functools.partial(measure_net, torch=torch, tiny=options.tiny,
                                     seconds=options.seconds, seed=options.seed)  # fmt: skip
        return step.report_all(
            options.nets or list(NETS),
            measured,
            results.portable_options(vars(options)),
            options.json_path,
            options.png_path,
            torch=None if torch is None else torch_peer.settings(torch),
        )
    except ToolError as e:
        print(f"benchmarks/step.py: error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
