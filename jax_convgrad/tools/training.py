"""The training step of a net: compiled, compared and timed, as the docstring of `step` defines."""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import dispatch, integration
from . import ToolError, layers, machine, models, results, timing
from .references import distance, reference
from .workloads import Workload, make_pool

PROGRAMS = ("lax", "ours")
_MOMENTUM, _LEARNING_RATE = 0.9, 0.01

Function = Callable[..., Any]
Report = dict[str, Any]


def training_step(net: models.Net) -> Function:
    """A function of (params, velocity, images, labels) to (params, velocity, loss)."""

    def step(params: Any, velocity: Any, images: jax.Array, labels: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(net.loss)(params, images, labels)
        velocity = jax.tree.map(lambda v, g: _MOMENTUM * v + g, velocity, gradients)
        params = jax.tree.map(lambda p, v: p - _LEARNING_RATE * v, params, velocity)
        return params, velocity, loss

    return step


class _StepPeer:
    """A compiled step, which trains on one batch for as long as it is timed."""

    def __init__(self, name: str, net: models.Net, params: Any, batch: Sequence[Any]) -> None:
        self.name = name
        self._batch = batch
        # Copies: the memory of a step's arguments becomes that of its results.
        self._state = jax.tree.map(jnp.array, (params, jax.tree.map(np.zeros_like, params)))
        jitted = jax.jit(training_step(net), donate_argnums=(0, 1))
        with integration.installed(name == "ours"):
            self._step = jitted.lower(*self._state, *batch).compile()

    def first(self) -> tuple[float, Any]:
        """The loss and the gradients of the first step: momentum starts from zero.

        The gradients are the peer's own state: they last until its next step.
        """
        *self._state, loss = self._step(*self._state, *self._batch)
        return float(loss), self._state[1]

    def run(self, first: int, instances: int, calls: int) -> float:
        """As `timing.Peer.run` says."""
        del first
        start = time.perf_counter()
        for _ in range(instances * calls):
            *self._state, _ = self._step(*self._state, *self._batch)
        jax.block_until_ready(self._state)
        return 1e6 * (time.perf_counter() - start) / (instances * calls)


class _CallsPeer:
    """Compiled functions that are called one after the other, their operands with them.

    On a CPU each is waited for, since JAX would otherwise run several at once.
    """

    def __init__(self, name: str, calls: Sequence[tuple[Function, Sequence[Any]]]) -> None:
        self.name = name
        self._calls = calls
        self.samples_us: list[list[float]] = [[] for _ in calls]  # of each function, on a CPU

    def run(self, first: int, instances: int, calls: int) -> float:
        """As `timing.Peer.run` says."""
        del first
        wait = not machine.is_gpu()
        start = time.perf_counter()
        for _ in range(instances * calls):
            for (function, operands), samples in zip(self._calls, self.samples_us, strict=True):
                began = time.perf_counter()
                out = function(*operands)
                if wait:
                    out.block_until_ready()
                    samples.append(1e6 * (time.perf_counter() - began))
        out.block_until_ready()
        return 1e6 * (time.perf_counter() - start) / (instances * calls)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of the functions that it calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                called = getattr(inner, "jaxpr", inner)
                if hasattr(called, "eqns"):
                    yield from _equations(called)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A geometry whose input gradient a step computes, and in how many places."""

    workload: Workload
    choice: dispatch.Choice
    count: int


def _layers(net: models.Net, operands: Sequence[Any], precision: str) -> tuple[int, list[_Layer]]:
    """How many convolutions a net has, and the input gradients of its step."""
    params, *batch = operands
    forward = jax.make_jaxpr(net.loss)(params, *batch)
    convolutions = sum(
        equation.primitive is lax.conv_general_dilated_p for equation in _equations(forward.jaxpr)
    )
    with integration.installed():
        step = jax.make_jaxpr(training_step(net))(params, params, *batch)
    bound = [e.params for e in _equations(step.jaxpr) if e.primitive.name == "conv_input_grad"]
    counts = collections.Counter((p["geometry"], p["precision"]) for p in bound)
    found = []
    for index, ((geometry, canonical), count) in enumerate(counts.items()):
        choice = dispatch.choose(geometry, net.dtype, machine.lowering_platform(), None, canonical)
        workload = Workload(
            layers.of_geometry(geometry, net.title, index=index), "dx", net.dtype, precision
        )
        found.append(_Layer(workload, choice, count))
    return convolutions, found


def _layer_row(layer: _Layer) -> Report:
    choice = layer.choice
    return {
        "geometry": layers.short(layer.workload.geometry),
        "count": layer.count,
        "implementation": choice.implementation,
        "kernel": choice.kernel,
        "reason": choice.reason,
        "bound": None,
        "errors": {},
        "times_us": {},
    }


def measure_net(name: str, *, dtype: str, batch: int, image: int, seconds: float,
                precision: str, seed: int) -> Report:  # fmt: skip
    """Checks and times one net.

    Args:
        name: a key of `models.NETS`.
        dtype: as `models.Net` has it.
        batch: images.
        image: their height and width.
        seconds: time to spend on timing.
        precision: "default" or "highest", of every product.
        seed: of parameters, images and labels.

    Returns:
        The net's object, as `step` documents it.
    """
    net = dataclasses.replace(models.NETS[name], dtype=dtype)
    rng = np.random.default_rng(seed)
    params = net.params(seed)
    data = (
        jnp.asarray(rng.standard_normal((batch, image, image, 3), dtype=np.float32)),
        jnp.asarray(rng.integers(models.CLASSES, size=batch)),
    )
    with jax.default_matmul_precision(precision):
        convolutions, found = _layers(net, (params, *data), precision)
        report: Report = {
            "net": name,
            "title": net.title,
            "dtype": dtype,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "batch": batch,
            "image": image,
            "convolutions": convolutions,
            "input_gradients": sum(layer.count for layer in found),
            "native": sum(x.count for x in found if x.choice.implementation == "native"),
            "kernels": {},
            "layers": [_layer_row(layer) for layer in found],
            "failures": [],
        }
        for layer in found:
            kernel = layer.choice.kernel or "lax"
            report["kernels"][kernel] = report["kernels"].get(kernel, 0) + layer.count
        if not found:
            raise ToolError(f"install() changes nothing of {net.title} here: {dispatch.SWITCH}=off")
        steps = [_StepPeer(program, net, params, data) for program in PROGRAMS]
        _compare(report, found, net, params, data)
        on_device = jax.tree.map(jnp.asarray, params)
        losses = {}
        for program in PROGRAMS:
            with integration.installed(program == "ours"):
                losses[program] = jax.jit(net.loss).lower(on_device, *data).compile()
    gradients = _input_gradients(report, found, seed)
    if report["failures"]:
        return report
    forwards = [
        _CallsPeer(f"forward_{program}", [(loss, (on_device, *data))])
        for program, loss in losses.items()
    ]
    timings = timing.measure(
        [*steps, *forwards, *gradients], pool=1, batched=machine.is_gpu(), row_seconds=seconds
    )
    _derive(report, timings)
    for program, peer in zip(PROGRAMS, gradients, strict=True):
        index = 0
        for row in report["layers"]:
            of_all = [peer.samples_us[index + i] for i in range(row["count"])]
            index += row["count"]
            samples = [us for each in of_all for us in each]
            row["times_us"][program] = statistics.median(samples) if samples else None
    return report


def _compare(
    report: Report, found: Sequence[_Layer], net: models.Net, params: Any, data: Sequence[Any]
) -> None:
    """Compares losses and gradients of the two programs.

    Of the smooth net: what a ReLU passes turns on the last bit of its argument. In 16 bits
    two right programs are far apart; ours is compared with the step in float32 then, from
    which it may be twice as far as lax's.
    """
    smooth = net.smooth()
    firsts = [_StepPeer(program, smooth, params, data).first() for program in PROGRAMS]
    (lax_loss, lax_gradients), (our_loss, our_gradients) = firsts
    # The error of one layer reaches every layer after it in either direction, so that those
    # of all may add up; forwards and backwards, and either program has its own.
    bound = 4 * sum(layer.count * layer.workload.bound for layer in found)
    reference = lax_gradients
    if net.dtype in ("bfloat16", "float16"):
        exact = dataclasses.replace(smooth, dtype="float32")
        _, reference = _StepPeer("lax", exact, params, data).first()
    off = jax.tree.map(lambda a, b: float(distance(a, b)), lax_gradients, reference)
    bound = max(bound, 2 * max(jax.tree.leaves(off)))
    apart = jax.tree.map(lambda a, b: float(distance(a, b)), our_gradients, reference)
    path, worst = max(jax.tree.leaves_with_path(apart), key=lambda leaf: leaf[1])
    loss_error = abs(our_loss - lax_loss) / abs(lax_loss)
    report.update(
        losses={"lax": lax_loss, "ours": our_loss},
        loss_error=loss_error,
        gradient_error=worst,
        bound=bound,
    )
    if not loss_error <= bound:
        message = f"{our_loss}, {loss_error:.3e} away from lax's {lax_loss}, above {bound:.3e}"
        report["failures"].append({"what": "loss", "message": message})
    # Written so that NaN fails, wherever the maximum has found it.
    if not all(error <= bound for error in jax.tree.leaves(apart)):
        message = f"of params{jax.tree_util.keystr(path)} {worst:.3e} apart, above {bound:.3e}"
        report["failures"].append({"what": "gradients", "message": message})


def _input_gradients(report: Report, found: Sequence[_Layer], seed: int) -> list[_CallsPeer]:
    """The peers dx_lax and dx_ours, once every layer agrees with float64."""
    calls: dict[str, list[tuple[Function, Any]]] = {program: [] for program in PROGRAMS}
    for layer, row in zip(found, report["layers"], strict=True):
        workload = layer.workload
        pool = make_pool(workload, seed, layer.count)
        trusted = reference(workload, pool[0])
        row["bound"] = trusted.bound
        on_device = [tuple(map(jnp.asarray, pair)) for pair in pool]
        for program, function in (
            ("lax", workload.lax_function()),
            ("ours", workload.our_function(None)),
        ):
            compiled = jax.jit(function).lower(*on_device[0]).compile()
            row["errors"][program] = error = trusted.error(compiled(*on_device[0]))
            if program == "ours" and not error <= trusted.bound:
                message = f"normwise error {error:.3e} above {trusted.bound:.3e}"
                report["failures"].append({"what": row["geometry"], "message": message})
            calls[program] += [(compiled, pair) for pair in on_device]
    return [_CallsPeer(f"dx_{program}", calls[program]) for program in PROGRAMS]


def _derive(report: Report, timings: dict[str, timing.Timing]) -> None:
    """Adds times and what follows from them."""
    us = {name: of.us.median for name, of in timings.items()}
    rest = us["lax"] - us["forward_lax"] - us["dx_lax"]
    report.update(
        times_us={name: results.time_entry(of) for name, of in timings.items()},
        speedup=results.ratio_entry(timings["ours"].ratio_of(timings["lax"])),
        dx_speedup=results.ratio_entry(timings["dx_ours"].ratio_of(timings["dx_lax"])),
        backward_us=us["lax"] - us["forward_lax"],
        dx_of_backward=us["dx_lax"] / (us["lax"] - us["forward_lax"]),
        dx_of_step=us["dx_lax"] / us["lax"],
        # None where the layers alone took longer than the step.
        ceiling=us["lax"] / rest if rest > 0 else None,
        expected=us["lax"] / (rest + us["forward_ours"] + us["dx_ours"]) if rest > 0 else None,
    )
