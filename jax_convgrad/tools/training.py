"""Training steps of whole nets: compiled, compared, timed and taken apart.

Of any net: a `Training` says what a step is. The docstring of `step` defines the fields of
the report.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import dispatch, integration
from ..geometry import ConvGeometry
from ..maps import FILTER_GRAD, FORWARD, INPUT_GRAD, Map
from . import ToolError, machine, models, results, step_trace, timing
from .geometries import reduction_taps, tolerance

PROGRAMS = ("lax", "ours")
_MOMENTUM, _LEARNING_RATE = 0.9, 0.01
_LOSSES = 3  # steps whose losses are compared
_TRACE_S, _TRACED_STEPS = 0.5, (2, 10)  # for so long, but at least and at most so many
# A parameter whose gradient is nothing but rounding, such as an offset before batch norm, is
# compared at this part of the norm of all gradients.
_LEAST_NORM = 1e-2
_LISTED = 8  # operations of the rest
_PRIMITIVES: dict[str, tuple[str, Map]] = {
    "conv_general_dilated": ("y", FORWARD),
    "conv_input_grad": ("dx", INPUT_GRAD),
    "conv_filter_grad": ("dw", FILTER_GRAD),
}

Function = Callable[..., Any]
Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Training:
    """A net in training.

    Attributes:
        step: (state, *batch) to (state, loss), to be jitted.
        state: the first one: parameters, momentum and whatever else a step changes.
        batch: the data of every step.
        gradients: from the state after the first step, the gradients for the parameters.
    """

    step: Function
    state: Any
    batch: tuple[Any, ...]
    gradients: Function


def training_step(net: models.Net) -> Function:
    """A function of ((params, velocity), images, labels) to ((params, velocity), loss)."""

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, velocity = state
        loss, gradients = jax.value_and_grad(net.loss)(params, images, labels)
        velocity = jax.tree.map(lambda v, g: _MOMENTUM * v + g, velocity, gradients)
        params = jax.tree.map(lambda p, v: p - _LEARNING_RATE * v, params, velocity)
        return (params, velocity), loss

    return step


def of_net(net: models.Net, batch: int, image: int, seed: int) -> Training:
    """A net of `models` in training, on random images."""
    rng = np.random.default_rng(seed)
    data = (
        jnp.asarray(rng.standard_normal((batch, image, image, 3), dtype=np.float32)),
        jnp.asarray(rng.integers(models.CLASSES, size=batch)),
    )
    params = net.params(seed)
    # Momentum starts from zero, so that after one step it is the gradient.
    state = params, jax.tree.map(np.zeros_like, params)
    return Training(training_step(net), state, data, lambda state: state[1])


@jax.jit  # one program: of each leaf's own the compilation takes longer
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class StepPeer:
    """A compiled step, which trains on one batch for as long as it is timed."""

    def __init__(self, name: str, training: Training) -> None:
        self.name = name
        self._training = training
        # Copies: the memory of a step's arguments becomes that of its results.
        self._state = _copied(training.state)
        jitted = jax.jit(training.step, donate_argnums=0)
        with integration.installed(name == "ours"):
            self._step = jitted.lower(self._state, *training.batch).compile()

    def _advance(self) -> jax.Array:
        self._state, loss = self._step(self._state, *self._training.batch)
        return loss

    def first(self) -> tuple[list[float], Any]:
        """The losses of the first steps, and the gradients of the first one."""
        losses = [float(self._advance())]
        gradients = _copied(self._training.gradients(self._state))
        return losses + [float(self._advance()) for _ in range(1, _LOSSES)], gradients

    def run(self, first: int, instances: int, calls: int) -> float:
        """As `timing.Peer.run` says."""
        del first
        start = time.perf_counter()
        for _ in range(instances * calls):
            self._advance()
        jax.block_until_ready(self._state)
        return 1e6 * (time.perf_counter() - start) / (instances * calls)

    def trace(self, step_us: float) -> dict[str, Any] | None:
        """What `step_trace.trace` finds, given about how long a step takes."""
        least, most = _TRACED_STEPS
        steps = min(most, max(least, int(_TRACE_S * 1e6 / step_us)))
        return step_trace.trace(self._step.as_text() or "", lambda: self.run(0, steps, 1))


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
class Convolution:
    """A map of a geometry in a step under `install()`, and in how many places.

    Attributes:
        part: "y", "dx" or "dw".
        map_: the same as a map.
        geometry: of the forward convolution.
        choice: what computes it.
        bound: on its normwise error.
        count: the places.
    """

    part: str
    map_: Map
    geometry: ConvGeometry
    choice: dispatch.Choice
    bound: float
    count: int

    @property
    def multiply_adds(self) -> int:
        """As they are counted for nets: products with padding too, those with dilation not."""
        g = self.geometry
        positions = g.in_sizes if max(g.lhs_dilation) > 1 else g.out_sizes
        images = g.lhs_shape[g.dimension_numbers.lhs_spec[0]]
        return self.count * images * math.prod(positions) * math.prod(g.rhs_shape)


def convolutions(training: Training, precision: str = "default") -> list[Convolution]:
    """The convolutions of a step and their gradients, each geometry once."""
    with integration.installed():
        step = jax.make_jaxpr(training.step)(training.state, *training.batch)
    counts: dict[Any, int] = collections.Counter()
    for equation in _equations(step.jaxpr):
        params = dict(equation.params)
        if equation.primitive is lax.conv_general_dilated_p:
            del params["preferred_element_type"], params["out_sharding"]
            asked = params.pop("precision")
            shapes = [variable.aval.shape for variable in equation.invars]
            geometry = ConvGeometry(lhs_shape=shapes[0], rhs_shape=shapes[1], **params)
        elif equation.primitive.name in _PRIMITIVES:
            geometry, asked = params["geometry"], params["precision"]
        else:
            continue
        dtype = equation.outvars[0].aval.dtype.name
        counts[equation.primitive.name, geometry, dtype, asked] += 1
    found = []
    for (name, geometry, dtype, asked), count in counts.items():
        part, map_ = _PRIMITIVES[name]
        choice = dispatch.choose(
            geometry, dtype, machine.lowering_platform(), None, asked, map_=map_
        )
        tf32 = machine.is_gpu() and dtype == "float32" and precision != "highest"
        bound = tolerance("tf32" if tf32 else dtype, reduction_taps(geometry, map_))
        found.append(Convolution(part, map_, geometry, choice, bound, count))
    return found


def _kernels(found: Sequence[Convolution]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {"y": {}, "dx": {}, "dw": {}}
    for each in found:
        kernel = each.choice.kernel or "lax"
        counts[each.part][kernel] = counts[each.part].get(kernel, 0) + each.count
    return counts


def measure(
    training: Training,
    smooth: Training,
    *,
    seconds: float,
    precision: str = "default",
    exact: Training | None = None,
    peers: Sequence[timing.Peer] = (),
) -> Report:
    """Checks, times and takes apart the steps of one net.

    Args:
        training: the net.
        smooth: the same net with smooth functions for ReLU and the maximum of a window, of
            which losses and gradients are compared.
        seconds: time to spend on timing.
        precision: "default" or "highest", of every product.
        exact: `smooth` in float32, for a net in 16 bits.
        peers: others to be timed in turns with lax and ours.

    Returns:
        The net's object, as `step` documents it, from `convolutions` on.
    """
    with jax.default_matmul_precision(precision):
        found = convolutions(training, precision)
        if not any(each.part == "dx" for each in found):
            raise ToolError(f"install() changes nothing here: {dispatch.SWITCH}=off")
        kernels = _kernels(found)
        report: Report = {
            "convolutions": {part: sum(of.values()) for part, of in kernels.items()},
            "kernels": kernels,
            "multiply_adds": sum(each.multiply_adds for each in found if each.part == "y"),
            "failures": [],
        }
        _compare(report, found, smooth, exact)
        steps = [StepPeer(program, training) for program in PROGRAMS]
    if report["failures"]:
        return report
    timings = timing.measure(
        [*steps, *peers], pool=1, batched=machine.is_gpu(), row_seconds=seconds
    )
    report["times_us"] = {name: results.time_entry(of) for name, of in timings.items()}
    report["ratios"] = {
        name: results.ratio_entry(timings["ours"].ratio_of(of))
        for name, of in timings.items()
        if name != "ours"
    }
    report |= {"parts_us": {}, "rest_us": {}}
    for step in steps:
        us = report["times_us"][step.name]["median"]
        # A GPU's operations are not the host's.
        parts = None if machine.is_gpu() else step.trace(us)
        if parts is not None:
            shares = parts["shares"]
            report["parts_us"][step.name] = {part: us * of for part, of in shares.items()}
            report["rest_us"][step.name] = {name: us * of for name, of in parts["rest"][:_LISTED]}
    return report


@jax.jit
def _distances(gradients: Any, reference: Any) -> Any:
    """The normwise distance of each parameter's two gradients."""

    def norm(*leaves: jax.Array) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in leaves))

    least = _LEAST_NORM * norm(*jax.tree.leaves(reference))
    return jax.tree.map(lambda a, b: norm(a - b) / jnp.maximum(norm(b), least),
                        gradients, reference)  # fmt: skip


def _compare(
    report: Report, found: Sequence[Convolution], smooth: Training, exact: Training | None
) -> None:
    """Compares losses and gradients of the two programs.

    Of the smooth net: what a ReLU passes turns on the last bit of its argument. In 16 bits
    two right programs are far apart; ours is compared with the step in float32 then, from
    which it may be twice as far as lax's.
    """
    firsts = {program: StepPeer(program, smooth).first() for program in PROGRAMS}
    losses = {program: of for program, (of, _) in firsts.items()}
    gradients = {program: of for program, (_, of) in firsts.items()}
    # The error of one layer reaches every layer after it in either direction, so that those
    # of all may add up; forwards and backwards, and either program has its own.
    bound = 4 * sum(each.count * each.bound for each in found if each.part != "dw")
    reference = gradients["lax"]
    if exact is not None:
        _, reference = StepPeer("lax", exact).first()
    off = _distances(gradients["lax"], reference)
    bound = max(bound, 2 * max(map(float, jax.tree.leaves(off))))
    apart = jax.tree.map(float, _distances(gradients["ours"], reference))
    path, worst = max(jax.tree.leaves_with_path(apart), key=lambda leaf: leaf[1])
    loss_error = max(
        abs(ours - lax) / abs(lax) for lax, ours in zip(losses["lax"], losses["ours"], strict=True)
    )
    report.update(losses=losses, loss_error=loss_error, gradient_error=worst, bound=bound)
    if not loss_error <= bound:
        message = f"{losses}, {loss_error:.3e} apart, above {bound:.3e}"
        report["failures"].append({"what": "losses", "message": message})
    # Written so that NaN fails, wherever the maximum has found it.
    if not all(error <= bound for error in jax.tree.leaves(apart)):
        message = f"of params{jax.tree_util.keystr(path)} {worst:.3e} apart, above {bound:.3e}"
        report["failures"].append({"what": "gradients", "message": message})
