"""What devices say to each other in a compiled program: kinds and bytes, from its HLO."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_LINE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"[a-z]+(\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """One collective of the program that every device runs.

    Attributes:
        kind: HLO's name of it.
        bytes: of its result on one device.
    """

    kind: str
    bytes: int


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled program, sorted.

    Args:
        compiled: what `jax.jit(...).lower(...).compile()` returns.

    Examples:
        >>> import jax
        >>> collectives(jax.jit(lambda x: x + 1).lower(1.0).compile())
        []
    """
    found = []
    for result, kind in _LINE.findall(compiled.as_text()):
        size = 0
        for bits, dims in _ARRAY.findall(result):
            size += int(bits) // 8 * math.prod(int(d) for d in dims.split(",") if d)
        found.append(Collective(kind, size))
    return sorted(found)
