"""The planner's table of rates, csrc/cuda/rates.h, and the model that it corrects.

The model is that of csrc/cuda/kernel_table.h: a kernel takes its launches, what nothing hides, and
the longer of its arithmetic and its memory traffic. A table has one row for each kernel and
kind of operands, with a factor for either; its rows without a measurement are estimates.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from . import ToolError

OPERANDS = {"f64": "kF64", "f32": "kF32", "tf32": "kTf32", "16bit": "k16Bit"}

Bound = Literal["arithmetic", "memory"]

_TEMPLATE = """\
// What the planner counts with that only a GPU can tell (docs/cuda.md, "The planner's
// model"). Written by `python -m jax_convgrad calibrate`; a test catches edits.

#pragma once

#include "correction.h"

namespace convgrad {{

// clang-format off
constexpr const char* kRatesGpu = "{gpu}";
constexpr const char* kRatesSource = "{source}";
constexpr double kRatesLaunchUs = {launch_us};  // a kernel that does nothing
constexpr double kRatesCopyBytesPerUs = {copy_bytes_per_us};  // a large copy, read and written

constexpr Correction kCorrections[] = {{
    // kernel, operands, factors of arithmetic and memory, measurements of each
{rows}
}};
// clang-format on

}}  // namespace convgrad
"""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the model of one plan adds up, uncorrected: `Cost` of csrc/kernel.h."""

    launches: float
    fixed_us: float
    arithmetic_us: float
    memory_us: float
    unhidden: float


@dataclasses.dataclass(frozen=True)
class Correction:
    """One row: factors of the model's arithmetic and memory time, and their measurements."""

    kernel: str
    operands: str
    arithmetic: float = 1.0
    memory: float = 1.0
    arithmetic_rows: int = 0
    memory_rows: int = 0

    def bound(self, cost: Cost) -> tuple[Bound, float]:
        """The longer of arithmetic and memory, and how many times longer it is."""
        arithmetic, memory = self.arithmetic * cost.arithmetic_us, self.memory * cost.memory_us
        longer: Bound = "arithmetic" if arithmetic >= memory else "memory"
        shorter_us = min(arithmetic, memory)
        return longer, max(arithmetic, memory) / shorter_us if shorter_us > 0 else float("inf")


@dataclasses.dataclass(frozen=True)
class Rates:
    """The table.

    Attributes:
        gpu: what the models count with, by its name.
        source: where the numbers are from.
        launch_us: time of a kernel that does nothing.
        copy_bytes_per_us: of a large copy, read and written.
        corrections: the rows.
    """

    gpu: str
    source: str
    launch_us: float
    copy_bytes_per_us: float
    corrections: tuple[Correction, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Rates:
        """From what the CUDA module's `rates` gives, or `dataclasses.asdict` of a table."""
        rows = [
            Correction(**row) if isinstance(row, dict) else Correction(*row)
            for row in value["corrections"]
        ]
        return cls(**{**value, "corrections": tuple(rows)})

    def correction(self, kernel: str, operands: str) -> Correction:
        """The row of a kernel, or an uncorrected one where there is none."""
        for row in self.corrections:
            if (row.kernel, row.operands) == (kernel, operands):
                return row
        return Correction(kernel, operands)

    def model_us(self, cost: Cost, correction: Correction) -> float:
        """The estimate that the planner compares: `ModelUs` of csrc/cuda/kernel_table.h."""
        parts = (correction.arithmetic * cost.arithmetic_us, correction.memory * cost.memory_us)
        hidden = max(parts) + cost.unhidden * min(parts)
        return self.launch_us * cost.launches + cost.fixed_us + hidden


def _number(value: float) -> str:
    """Four digits, as C++ and people read them."""
    return re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", f"{value:.4g}")


def rounded(value: float) -> float:
    """A number as the table keeps it."""
    return float(_number(value))


def render(rates: Rates) -> str:
    """The text of csrc/cuda/rates.h.

    Raises:
        ToolError: a name or the source cannot be a C++ string as it is.
    """
    for text in (rates.gpu, rates.source):
        if not re.fullmatch(r'[^"\\\n?]+', text):
            raise ToolError(f"the table cannot hold the text {text!r}")
    rows = [
        f'    {{"{row.kernel}", Operands::{OPERANDS[row.operands]}, {_number(row.arithmetic)}, '
        f"{_number(row.memory)}, {row.arithmetic_rows}, {row.memory_rows}}},"
        for row in rates.corrections
    ]
    return _TEMPLATE.format(
        gpu=rates.gpu,
        source=rates.source,
        launch_us=_number(rates.launch_us),
        copy_bytes_per_us=_number(rates.copy_bytes_per_us),
        rows="\n".join(rows),
    )


def parse(text: str) -> Rates:
    """Reads what `render` wrote.

    Raises:
        ToolError: the text is no such table.
    """

    def constant(name: str) -> str:
        match = re.search(rf'\bkRates{name} = "?([^";]+)"?;', text)
        if match is None:
            raise ToolError(f"the table of rates has no kRates{name}")
        return match[1]

    names = {code: name for name, code in OPERANDS.items()}
    row = r'^    \{"(\w+)", Operands::(\w+), ([^,]+), ([^,]+), (\d+), (\d+)\},$'
    found = re.findall(row, text, re.MULTILINE)
    try:
        return Rates(
            constant("Gpu"),
            constant("Source"),
            float(constant("LaunchUs")),
            float(constant("CopyBytesPerUs")),
            tuple(
                Correction(kernel, names[code], float(a), float(m), int(a_rows), int(m_rows))
                for kernel, code, a, m, a_rows, m_rows in found
            ),
        )
    except (KeyError, ValueError) as e:
        raise ToolError(f"the table of rates holds {e}") from None
