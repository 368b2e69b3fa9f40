from collections.abc import Sequence
from typing import Any

version: str
ffi_api_version: tuple[int, int]
scratch_bytes: int

def targets() -> dict[str, Any]: ...
def plan(
    dtype: str,
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    out_shape: Sequence[int],
    attributes: dict[str, Any],
    capability: int = 90,
    map_name: str = "input_grad",
) -> dict[str, Any]: ...
def workspace_bound(
    dtype: str,
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    out_shape: Sequence[int],
    attributes: dict[str, Any],
    map_name: str = "input_grad",
) -> tuple[int, int]: ...
def kernel_names() -> list[str]: ...
def isa() -> str: ...
def best_isa() -> str: ...
def isas() -> list[str]: ...
