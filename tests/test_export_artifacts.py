"""Stored programs, which this version and every later one must run (docs/export.md)."""

import pathlib

import make_export_artifacts
import oracles
import pytest
from jax import export

from jax_convgrad import custom_call
from jax_convgrad.maps import FILTER_GRAD, INPUT_GRAD
from jax_convgrad.tools import geometries

pytestmark = pytest.mark.native
pytest.importorskip("flatbuffers")

ARTIFACTS = sorted((pathlib.Path(__file__).parent / "data").glob("*.jax_export"))
SIZES = [(2, 9, 8), (1, 4, 7), (3, 1, 2)]  # images and positions of symbolic programs


def program_of(path):
    """The name in `PROGRAMS` of a file VERSION_NAME.jax_export."""
    return path.stem.split("_", 1)[1]


def map_of(path):
    """What a file computes."""
    return FILTER_GRAD if program_of(path) == "filter_grad" else INPUT_GRAD


def target_of(path):
    """The call that a file holds."""
    return oracles.FUSED_TARGET if program_of(path) == "fused" else f"@{map_of(path).target}("


def test_there_is_one_of_every_kind():
    assert {program_of(path) for path in ARTIFACTS} == set(make_export_artifacts.PROGRAMS)


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)
def test_stored_program_runs(rng, path):
    shape, w_shape, dtype, params = make_export_artifacts.PROGRAMS[program_of(path)]
    program = export.deserialize(bytearray(path.read_bytes()))
    fused = program_of(path) == "fused"
    assert program.mlir_module().count(target_of(path)) == 1
    if isinstance(shape, str):
        channels = dict.fromkeys("nhw")
        names = shape.split(", ")
        shapes = []
        for sizes in SIZES:
            channels.update(zip("nhw", sizes, strict=True))
            shapes.append(tuple(channels.get(name) or int(name) for name in names))
    else:
        shapes = [shape]
    for x_shape in shapes:
        g = oracles.geometry(x_shape, w_shape, **params)
        dy, w = oracles.operands(rng, g, dtype)
        x = rng.standard_normal(x_shape).astype(dy.dtype)
        if map_of(path) is FILTER_GRAD:
            reference = oracles.literal_filter_grad(x, dy, g)
        else:
            reference = oracles.sliced_input_grad(dy, w, g)
        reference = oracles.finish(reference, x, x) if fused else reference
        error = geometries.normwise_error(program.call(x, dy, w), reference)
        taps = geometries.reduction_taps(g, map_of(path))
        assert error <= geometries.tolerance(dtype, taps), error


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)
def test_attributes_are_those_of_this_version(path):
    """A stored call holds every attribute that the handler decodes, and no other."""
    text = export.deserialize(bytearray(path.read_bytes())).mlir_module()
    call = next(line for line in text.splitlines() if target_of(path) in line)
    config = call.split("mhlo.backend_config = {", 1)[1].split("}", 1)[0]
    names = {part.split(" = ")[0].strip() for part in config.split(", ") if " = " in part}
    g = oracles.geometry((1, 1, 1), (1, 1, 1), (1,), "VALID")
    assert names == set(custom_call.attributes(g, "cpu", None))
