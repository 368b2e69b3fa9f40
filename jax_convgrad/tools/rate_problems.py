"""The problems that `calibrate` measures, picked by the planner's model itself."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from .. import custom_call, native
from ..compat import canonicalize_precision
from ..geometry import ConvGeometry
from . import layers
from .geometries import make_geometry
from .layers import Layer
from .rates import Bound, Cost, Rates
from .workloads import Workload

# How the operands of a row come about: dtype and precision.
REQUESTS = {
    "f64": ("float64", "default"),
    "f32": ("float32", "highest"),
    "tf32": ("float32", "default"),
    "16bit": ("bfloat16", "default"),
}
# A problem stands for a bound that is so many times the other time, or at least as many
# where too few are; arithmetic and memory are most of its model; and it takes this long.
_CLEAR, _LEAST_CLEAR = 2.0, 1.25
_SHARE = 0.6
_RANGE_US = (12.0, 2000.0)
_MOST_BYTES = 3e8
# Kernels that are measured beside one: the fastest by the model, within this of the best.
_BESIDE, _WITHIN = 3, 1.5


@dataclasses.dataclass(frozen=True)
class Planned:
    """A kernel's plan for a problem: the table's row it belongs to, and what it costs."""

    kernel: str
    operands: str
    cost: Cost


def layer_of(name: str, geometry: ConvGeometry) -> Layer:
    """A constructed problem as a row of the table of layers."""
    return layers.of_geometry(geometry, name, "constructed")


def constructed() -> Iterator[Layer]:
    """Problems that the table of layers lacks: extremes of every kernel's arithmetic."""
    widths = (1, 2, 3, 8, 16, 32, 64, 128, 256, 1024)
    for c, k in itertools.product(widths, widths):
        for window, size, batch in ((1, 56, 32), (1, 112, 32), (3, 28, 32), (7, 28, 32)):
            if window == 1 or min(c, k) <= 64:
                g = make_geometry((size, size), (window,) * 2, (c, k), batch=batch, padding="SAME")
                yield layer_of(f"c{c} k{k}", g)
    for channels, window in itertools.product((32, 128, 512), (1, 3, 5, 7, 13, 31)):
        for size, stride in ((14, 1), (28, 1), (56, 1), (112, 1), (56, 2), (112, 2), (112, 4)):
            g = make_geometry((size, size), (window,) * 2, (channels,) * 2, batch=32,
                              stride=stride, padding="SAME", feature_groups=channels)  # fmt: skip
            yield layer_of("depthwise", g)
    for each, groups in itertools.product((4, 8, 16, 32, 64), (4, 16, 32)):
        for window, size in ((1, 56), (3, 28), (7, 28)):
            g = make_geometry((size, size), (window,) * 2, (each * groups,) * 2, batch=32,
                              padding="SAME", feature_groups=groups)  # fmt: skip
            yield layer_of("grouped", g)


def launches() -> Iterator[Layer]:
    """Problems of nearly no arithmetic and no bytes."""
    for size in (2, 4, 6):
        yield layer_of("launch", make_geometry((size, size), (1, 1), (8, 8), batch=1))


def plans(workload: Workload, capability: int) -> dict[str, Planned]:
    """Every kernel that takes a problem, by name."""
    precision = canonicalize_precision(workload.precision)
    g, module = workload.geometry, native.cuda
    assert module is not None
    found = {}
    for kernel in module.kernel_names():
        attributes = custom_call.attributes(g, "cuda", precision, kernel)
        try:
            cost = module.cost(
                workload.dtype, g.lhs_shape, g.rhs_shape, g.out_shape, attributes, capability
            )
        except ValueError:
            continue
        found[kernel] = Planned(kernel, cost.pop("operands"), Cost(**cost))
    return found


Candidate = tuple[Workload, str, dict[str, Planned]]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A candidate for one row and bound: how clear that is, how far from being planned."""

    index: int
    planned: Planned
    clearness: float
    away: int


def select(
    candidates: Sequence[Candidate], table: Rates, per_bound: int
) -> list[tuple[Workload, list[Planned]]]:
    """Picks what to measure.

    Args:
        candidates: problems, each with its kind of operands and the kernels that take it.
        table: the model's present corrections.
        per_bound: problems for each row of the table and each of its bounds.

    Returns:
        Problems with the kernels to measure: first one for every row and bound, then a second
        one, and so on, so that a run that is stopped has some of each.
    """
    queues: dict[tuple[str, str, Bound], list[_Entry]] = {}
    beside: list[list[Planned]] = []
    for index, (workload, operands, found) in enumerate(candidates):
        model = {
            kernel: table.model_us(p.cost, table.correction(kernel, p.operands))
            for kernel, p in found.items()
        }
        order = sorted(model, key=lambda kernel, model=model: model[kernel])  # type: ignore[misc]
        least_us = model[order[0]]
        near = [found[kernel] for kernel in order if model[kernel] <= _WITHIN * least_us]
        beside.append(near[:_BESIDE])
        for kernel, p in found.items():
            bound, clearness = table.correction(kernel, p.operands).bound(p.cost)
            hidden_us = model[kernel] - table.launch_us * p.cost.launches - p.cost.fixed_us
            if (
                p.operands == operands
                and clearness >= _LEAST_CLEAR
                and workload.bytes_moved <= _MOST_BYTES
                and hidden_us >= _SHARE * model[kernel]
                and _RANGE_US[0] <= model[kernel] <= _RANGE_US[1]
            ):
                away = math.floor(math.log2(model[kernel] / least_us))
                entry = _Entry(index, p, clearness, away)
                queues.setdefault((kernel, operands, bound), []).append(entry)
    chosen: dict[int, dict[str, Planned]] = {}
    for turn in itertools.zip_longest(*(_spread(queue, per_bound) for queue in queues.values())):
        for entry in filter(None, turn):
            kernels = chosen.setdefault(entry.index, {})
            for each in (entry.planned, *beside[entry.index]):
                kernels.setdefault(each.kernel, each)
    return [(candidates[index][0], list(kernels.values())) for index, kernels in chosen.items()]


def _spread(queue: list[_Entry], count: int) -> list[_Entry]:
    """Some where the kernel comes nearest to being planned, from the whole list."""
    clear = [entry for entry in queue if entry.clearness >= _CLEAR]
    if len(clear) < count:
        return sorted(queue, key=lambda entry: -entry.clearness)[:count]
    ordered = sorted(clear, key=lambda entry: entry.away)
    near = [entry for entry in ordered if entry.away == ordered[0].away]
    pool = near if len(near) >= count else ordered[:count]
    return [pool[i * len(pool) // count] for i in range(count)]


def candidates_on(capability: int) -> list[Candidate]:
    """Every problem that could be measured, with the plans for a GPU of that capability."""
    listed = layers.load(layers.default_path(), "NHWC")
    found = []
    for layer in (*listed, *constructed()):
        for operands, request in REQUESTS.items():
            workload = Workload(layer, "dx", *request)
            found.append((workload, operands, plans(workload, capability)))
    return found
