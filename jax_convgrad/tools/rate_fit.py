"""From measurements to the planner's table: robust factors, and what they are worth.

Every kernel's model is arithmetic and memory traffic that hide behind each other, plus what
nothing hides (`rates.Cost`). A measurement says something about the longer of the two alone,
so a factor is the median, over the measurements that it bounds, of what was measured over
what the model says, nothing hidden taken off both. Which of the two bounds a measurement
follows from the factors, and so both are repeated until that stays as it is.

A measurement is left out where launches and starts are most of it, and where arithmetic and
memory are too close to tell them apart.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from . import ToolError
from .console import table
from .rates import Bound, Correction, Cost, Rates, rounded
from .results import geometric_mean
from .timing import Spread

MIN_ROWS = 3  # fewer measurements leave a factor as it was
_CLEAR = 1.2  # how many times longer the bound has to be
_LEAST_SHARE = 0.4  # of a time, what arithmetic and memory have to be
_MOST_ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class Sample:
    """One kernel on one problem: the model's cost, and the microseconds measured."""

    problem: int
    name: str
    kernel: str
    operands: str
    cost: Cost
    us: float

    @property
    def key(self) -> tuple[str, str]:
        """The table's row that it belongs to."""
        return self.kernel, self.operands


@dataclasses.dataclass(frozen=True)
class Fit:
    """A table from measurements, with what it was made from.

    Attributes:
        before: the table that the measured plans were made with.
        after: the new one.
        samples: the measurements.
        copy_bytes_per_us: of a large copy, as measured. The tables' is the unit in which
            costs are counted, which stays.
    """

    before: Rates
    after: Rates
    samples: tuple[Sample, ...]
    copy_bytes_per_us: float

    def model_us(self, sample: Sample, rates: Rates) -> float:
        """What a table makes of a sample, the plan being the one that was measured."""
        return rates.model_us(sample.cost, rates.correction(*sample.key))


def _ratio(sample: Sample, correction: Correction, launch_us: float) -> tuple[Bound, float] | None:
    """The bound of a sample and what it says about that factor, None if nothing."""
    cost = sample.cost
    rest_us = sample.us - launch_us * cost.launches - cost.fixed_us
    if rest_us < _LEAST_SHARE * sample.us:
        return None
    bound, clearness = correction.bound(cost)
    if clearness < _CLEAR:
        return None
    longer_us, shorter_us = cost.arithmetic_us, correction.memory * cost.memory_us
    if bound == "memory":
        longer_us, shorter_us = cost.memory_us, correction.arithmetic * cost.arithmetic_us
    rest_us -= cost.unhidden * shorter_us
    return None if rest_us <= 0 else (bound, rest_us / longer_us)


def _ratios(
    samples: Sequence[Sample], correction: Correction, launch_us: float
) -> dict[Bound, list[float]]:
    ratios: dict[Bound, list[float]] = {"arithmetic": [], "memory": []}
    for sample in samples:
        if (found := _ratio(sample, correction, launch_us)) is not None:
            ratios[found[0]].append(found[1])
    return ratios


def _refine(samples: Sequence[Sample], start: Correction, launch_us: float) -> Correction:
    """Repeats medians and bounds from a start."""
    current = start
    for _ in range(_MOST_ROUNDS):
        ratios = _ratios(samples, current, launch_us)
        medians: dict[str, Any] = {
            bound: statistics.median(values)
            for bound, values in ratios.items()
            if len(values) >= MIN_ROWS
        }
        refined = dataclasses.replace(current, **medians)
        if refined == current:
            break
        current = refined
    return current


def fit_correction(samples: Sequence[Sample], present: Correction, launch_us: float) -> Correction:
    """The row of the table for samples that all belong to it.

    Args:
        samples: measurements.
        present: the row as it is, which a factor without enough measurements keeps.
        launch_us: of a kernel that does nothing.

    Returns:
        The row, factors rounded as the table keeps them.
    """
    if not samples:
        return present
    # Bounds and factors depend on each other, so more than one pair can be stable: several
    # starts, and the one that explains the measurements best.
    factor = statistics.median(
        max(s.us - launch_us * s.cost.launches - s.cost.fixed_us, 1e-3)
        / max(s.cost.arithmetic_us, s.cost.memory_us)
        for s in samples
    )
    starts = [
        present,
        dataclasses.replace(present, arithmetic=factor, memory=factor),
        dataclasses.replace(present, arithmetic=factor),
        dataclasses.replace(present, memory=factor),
    ]

    def in_table(refined: Correction) -> Correction:
        counts = {bound: len(r) for bound, r in _ratios(samples, refined, launch_us).items()}
        row = present
        if counts["arithmetic"] >= MIN_ROWS:
            row = dataclasses.replace(
                row, arithmetic=rounded(refined.arithmetic), arithmetic_rows=counts["arithmetic"]
            )
        if counts["memory"] >= MIN_ROWS:
            row = dataclasses.replace(
                row, memory=rounded(refined.memory), memory_rows=counts["memory"]
            )
        return row

    def badness(row: Correction) -> float:
        rates = Rates("", "", launch_us, 1.0, ())
        return statistics.fmean(abs(math.log(s.us / rates.model_us(s.cost, row))) for s in samples)

    return min((in_table(_refine(samples, start, launch_us)) for start in starts), key=badness)


def _samples(report: dict[str, Any], *, launch: bool) -> Iterator[Sample]:
    for index, problem in enumerate(report["problems"]):
        if problem["launch"] != launch:
            continue
        name = f"{problem['name']} {problem['geometry']}"
        for row in problem["kernels"]:
            if row["time_us"] is not None:
                cost = Cost(**row["cost"])
                us = row["time_us"]["median"]
                yield Sample(index, name, row["kernel"], row["operands"], cost, us)


def _launch_us(samples: Sequence[Sample], before: Rates) -> float:
    """What a launch takes, from problems that are nothing else; as it was without one."""
    idle = dataclasses.replace(before, launch_us=0.0)
    rests = [
        (s.us - idle.model_us(s.cost, before.correction(*s.key))) / s.cost.launches for s in samples
    ]
    rest_us = statistics.median(rests) if rests else before.launch_us
    return rounded(rest_us) if rest_us > 0 else before.launch_us


def fit(report: dict[str, Any]) -> Fit:
    """The table that a calibration's JSON gives.

    Args:
        report: the JSON, as `calibrate` documents it.

    Returns:
        The table and what it rests on.

    Raises:
        ToolError: the JSON is no such report, or holds no measurement.
    """
    try:
        before = Rates.from_json(report["rates"])
        samples = tuple(_samples(report, launch=False))
        launches = tuple(_samples(report, launch=True))
        copy_bytes_per_us = float(report["copy_bytes_per_us"])
        after = dataclasses.replace(
            before,
            gpu=report["machine"]["device_kind"],
            source=_source(report),
            launch_us=_launch_us(launches, before),
        )
    except (KeyError, TypeError) as e:
        raise ToolError(f"these are no measurements of calibrate: {type(e).__name__} {e}") from None
    if not samples:
        raise ToolError("there is no measurement to fit")
    by_key: dict[tuple[str, str], list[Sample]] = {row_key(row): [] for row in before.corrections}
    for sample in samples:
        by_key.setdefault(sample.key, []).append(sample)
    rows = tuple(
        fit_correction(members, before.correction(*key), after.launch_us)
        for key, members in by_key.items()
    )
    return Fit(before, dataclasses.replace(after, corrections=rows), samples, copy_bytes_per_us)


def row_key(row: Correction) -> tuple[str, str]:
    """What a row is found by."""
    return row.kernel, row.operands


def _source(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    packages = [f"{name} {versions[name]}" for name in ("jax-convgrad", "jax") if name in versions]
    packages += [f"{name} {v}" for name, v in versions.items() if name.endswith("-plugin")]
    commit = report["git_commit"]
    parts = [
        machine["device_kind"],
        f"driver {machine['driver']}",
        *packages,
        *([] if commit is None else [f"commit {commit[:12]}{'+' * commit.endswith('-dirty')}"]),
        str(report["date_utc"])[:10],
        *([] if report["complete"] else ["stopped early"]),
    ]
    return ", ".join(parts)


# ---- what is printed ----------------------------------------------------------------


def _planned(samples: Sequence[Sample], fitted: Fit, rates: Rates) -> list[tuple[float, bool]]:
    """By problem with several kernels: time of the planned one over the fastest, and if it is."""
    by_problem: dict[int, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem, []).append(sample)
    losses = []
    for members in by_problem.values():
        if len(members) > 1:
            planned = min(members, key=lambda s: fitted.model_us(s, rates))
            fastest = min(members, key=lambda s: s.us)
            losses.append((planned.us / fastest.us, planned is fastest))
    return losses


def choice_line(fitted: Fit, rates: Rates, name: str) -> str:
    """How often a table's choice among the measured kernels is the fastest, and what it costs."""
    losses = _planned(fitted.samples, fitted, rates)
    if not losses:
        return f"{name}: no problem was measured with more than one kernel"
    ratios = [ratio for ratio, _ in losses]
    return (
        f"{name}: the kernel planned is the fastest measured in "
        f"{sum(best for _, best in losses)} of {len(losses)} problems; its time over the "
        f"fastest's: geometric mean {geometric_mean(ratios):.3g}, worst {max(ratios):.3g}"
    )


def describe(fitted: Fit) -> list[str]:
    """The lines about every measurement, every row of the table, and the planner's choice."""
    before, after = fitted.before, fitted.after
    rows = []
    ratios: dict[tuple[tuple[str, str], Bound], list[float]] = {}
    for s in fitted.samples:
        model = [fitted.model_us(s, rates) for rates in (before, after)]
        bound, _ = after.correction(*s.key).bound(s.cost)
        ratios.setdefault((s.key, bound), []).append(s.us / model[1])
        cells = (f"{s.us:.4g}", *(f"{us:.4g} ({s.us / us:.2f}x)" for us in model))
        rows.append((s.name, s.kernel, s.operands, bound, *cells))
    headers = ("problem", "kernel", "operands", "bound", "us", "model before", "model after")
    factors = []
    for row in after.corrections:
        of_bound: tuple[tuple[Bound, float, int], ...] = (
            ("arithmetic", row.arithmetic, row.arithmetic_rows),
            ("memory", row.memory, row.memory_rows),
        )
        for bound, factor, count in of_bound:
            left = ratios.get((row_key(row), bound))
            spread = None if left is None else Spread.of(left)
            cells = (
                ("-",) * 3
                if spread is None
                else tuple(f"{v:.2f}" for v in (spread.q1, spread.median, spread.q3))
            )
            factors.append((row.kernel, row.operands, bound, f"{factor:.4g}", str(count), *cells))
    return [
        table(headers, rows),
        "",
        "measured over the model, after the fit:",
        table(("kernel", "operands", "bound", "factor", "used", "q1", "median", "q3"), factors),
        "",
        f"launch {before.launch_us:.4g} -> {after.launch_us:.4g} us; a large copy "
        f"{fitted.copy_bytes_per_us / 1e6:.4g} TB/s, bytes are counted at "
        f"{after.copy_bytes_per_us / 1e6:.4g}",
        choice_line(fitted, before, "before"),
        choice_line(fitted, after, "after"),
    ]
