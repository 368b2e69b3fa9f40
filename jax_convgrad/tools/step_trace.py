"""Where the time of a compiled step goes, by a trace of XLA's operations on a CPU.

Every operation of the compiled program is an event, named as in the program's text, whose
metadata say which primitive of JAX it stems from. Operations run at the same time where the
program lets them: each instant is divided among the operations that run then, so that all
parts together, and the time in which none runs, are the whole.
"""

from __future__ import annotations

import collections
import math
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

# The parts of a step. Of lax's own convolutions XLA loses which of the three maps they are.
PARTS = {
    "y": "conv y",
    "dx": "conv dX",
    "dw": "conv dW",
    "conv": "convolutions by lax",
    "pool": "pooling and its gradient",
    "rest": "the rest",
}
_PRIMITIVES = {"conv_forward": "y", "conv_input_grad": "dx", "conv_filter_grad": "dw"}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?[\])}] ([\w-]+)\((.*)$", re.MULTILINE)
_CALLERS = ("while", "call", "conditional")  # whose time is that of the operations inside
_END = "end: "  # an event by this name follows, on any thread

Event = tuple[float, float, str]


def instructions(text: str) -> dict[str, tuple[str, str]]:
    """By instruction of a compiled program's text, its opcode and the name that JAX gave it."""
    found = {}
    for name, opcode, rest in _INSTRUCTION.findall(text):
        path = re.search(r'op_name="([^"]*)"', rest)
        found[name] = (opcode, path[1] if path else "")
    return found


def part_of(name: str, path: str, unnamed: Mapping[str, re.Pattern[str]]) -> str:
    """The key in PARTS of an instruction.

    Args:
        name: its own.
        path: the name that JAX gave it.
        unnamed: what `unnamed_parts` finds in its program.
    """
    steps = path.split("/")
    for primitive, part in _PRIMITIVES.items():
        if primitive in steps:
            return part
    if "conv_general_dilated" in steps:
        return "conv"
    if "reduce_window" in path or "select_and_scatter" in path:
        return "pool"
    if not path:
        return next((part for part, names in unnamed.items() if names.search(name)), "rest")
    return "rest"


def unnamed_parts(text: str) -> dict[str, re.Pattern[str]]:
    """How XLA calls what it writes in the place of an operation, and JAX's name is lost.

    That is the gradient of a maximum, and lax's filter gradient with the copies around it.
    """
    found = {}
    if "select_and_scatter" in text:
        found["pool"] = re.compile("iota|reduce-window|scatter|concatenate")
    if re.search(r'op_name="[^"]*/conv_general_dilated', text):
        found["conv"] = re.compile("conv|ynn|reverse|transpose")
    return found


def divided(events: list[Event]) -> dict[str, float]:
    """The time of each operation, from (start, end, operation), "" for when none ran.

    Operations that run together have equal parts of that time.
    """
    bounds = [(start, True, name) for start, _, name in events]
    bounds += [(end, False, name) for _, end, name in events]
    bounds.sort(key=lambda bound: bound[0])
    running: collections.Counter[str] = collections.Counter()
    time: dict[str, float] = collections.defaultdict(float)
    last = bounds[0][0] if bounds else 0.0
    for at, starts, name in bounds:
        for each in running or ("",):
            time[each] += (at - last) / max(1, len(running))
        running[name] += 1 if starts else -1
        if not running[name]:
            del running[name]
        last = at
    return dict(time)


def completed(events: Sequence[Event], ends: Mapping[str, Sequence[float]]) -> list[Event]:
    """Events that last until their operation has ended.

    Args:
        events: calls of operations, each over when the call returns.
        ends: by operation, when one that outlived its call ended.
    """
    later: dict[str, float] = {}  # when the operation is called the next time
    found = []
    for start, end, name in sorted(events, reverse=True):
        until = later.get(name, math.inf)
        found.append((start, max([end, *(at for at in ends[name] if start <= at < until)]), name))
        later[name] = start
    return found[::-1]


def _events(folder: str, known: Mapping[str, tuple[str, str]]) -> list[Event]:
    events: list[Event] = []
    ends: dict[str, list[float]] = collections.defaultdict(list)
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for event in (event for line in plane.lines for event in line.events):
                if event.name.startswith(_END):
                    ends[event.name.removeprefix(_END)].append(event.start_ns)
                    continue
                opcode, _ = known.get(event.name, ("", ""))
                if opcode and opcode not in _CALLERS and "hlo_op" in dict(event.stats):
                    events.append((event.start_ns, event.start_ns + event.duration_ns, event.name))
    return completed(events, ends)


def trace(text: str, run: Callable[[], Any]) -> dict[str, Any] | None:
    """Traces some steps of a compiled program.

    Args:
        text: the program's, `compiled.as_text()`.
        run: runs some steps and waits for them.

    Returns:
        {shares, rest}: by key in PARTS, if there is any, its share of the time; and of the rest
        [operation, share], the costliest first. None where no operation was seen.
    """
    known = instructions(text)
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 3
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            run()
        finally:
            jax.profiler.stop_trace()
        time = divided(_events(folder, known))
    unnamed = unnamed_parts(text)
    total = sum(time.values())
    if not total:
        return None
    shares: dict[str, float] = collections.defaultdict(float)
    rest: dict[str, float] = collections.defaultdict(float)
    for name, of_it in time.items():
        path = known[name][1] if name else ""
        part = part_of(name, path, unnamed) if name else "rest"
        shares[part] += of_it / total
        if part == "rest":
            kind = re.sub(r"[.\d]+$", "", name) or "no operation"
            origin = path.rpartition("/")[2]
            rest[f"{kind} ({origin})" if origin else kind] += of_it / total
    ordered = {part: shares[part] for part in PARTS if part in shares}
    return {"shares": ordered, "rest": sorted(rest.items(), key=lambda item: -item[1])}
