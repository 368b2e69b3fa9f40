"""What the command line runs, and the lists that tests and benchmarks share.

Nothing here is imported by the library itself. rich, matplotlib and torch are imported
where they are used and nowhere else, so the rest works without them.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from typing import Any

from ..maps import FILTER_GRAD, FORWARD, INPUT_GRAD

# As the command line spells them.
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
MAPS = {"dx": INPUT_GRAD, "y": FORWARD, "dw": FILTER_GRAD}


class ToolError(Exception):
    """A message for the user of the command line, printed as one line without a trace."""


def maps_by_name(names: str) -> list[str]:
    """The keys of `MAPS` that a comma-separated option names, or a ToolError."""
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in MAPS]:
        raise ToolError(f"--map must name some of {', '.join(MAPS)}, got {unknown[0]!r}")
    return wanted


def require(module: str, purpose: str, install: str = "pip install 'jax-convgrad[bench]'") -> Any:
    """Imports an optional dependency, or says in one line how to get it.

    Args:
        module: its import name.
        purpose: what needs it, for the message.
        install: the command that installs it.

    Returns:
        The module.

    Raises:
        ToolError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != module.partition(".")[0]:
            raise
        raise ToolError(f"{purpose} needs {e.name}, which is not installed: {install}") from None


def read_json(path: pathlib.Path, what: str) -> Any:
    """What a JSON file holds, or a ToolError that says what could not be read from where."""
    try:
        return json.loads(path.read_text())
    except OSError as e:
        raise ToolError(f"cannot read {what} from {path}: {e.strerror}") from None
    except ValueError as e:
        raise ToolError(f"{path} is not JSON: {e}") from None
