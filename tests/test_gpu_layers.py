"""benchmarks/gpu_layers.cu on the emulator: what it checks and reports; its times mean nothing."""

import json
import subprocess

import pytest
from emulator import build, cases, on_gpu

from jax_convgrad.tools.geometries import Case, make_geometry

pytestmark = pytest.mark.emulator  # compiles every kernel

if (reason := build.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

TINY = {
    "dense": make_geometry((6, 5), (3, 3), (8, 16), batch=1, stride=2, padding=1),
    "depthwise": make_geometry((5, 4), (3, 3), (8, 8), batch=1, padding=1, feature_groups=8),
}
TILES = [("mma", (128, 64)), ("wgmma", (64, 128))]


@pytest.fixture(scope="module")
def program():
    # The kernels' objects are those of test_emulator_core.py. This source is quick at -O0.
    parts = [
        (source, ("-O0",) if source.parent.name == "benchmarks" else (), build.ROOT)
        for source in build.layers_sources()
    ]
    return build.program_of("gpu_layers", parts, build.VARIANTS["plain"])


@pytest.fixture
def run(program, tmp_path):
    """Runs the program on the tiny layers; its status, output and rows."""

    def run(*arguments, **environment):
        lines = [cases.line(Case(name, g), "bfloat16") for name, g in TINY.items()]
        lines[1:1] = [
            cases.line(Case("dense", TINY["dense"]), "bfloat16", kernel=kernel, tile=tile)
            for kernel, tile in TILES
        ]
        lines.append(cases.line(Case("dense", TINY["dense"]), "float32", allow_tf32=False))
        to = tmp_path / "rows.json"
        done = subprocess.run(
            [program, cases.write(tmp_path / "problems", lines), to, *arguments],
            env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=200,
        )  # fmt: skip
        return done.returncode, done.stdout, json.loads(to.read_text())["rows"]

    return run


def test_every_kernel_and_tile_is_checked_and_timed(run):
    status, output, rows = run()
    assert status == 0, output
    assert {row["status"] for row in rows} == {"ok"}
    found = {(row["layer"], row["dtype"], row["kernel"], *row["tile"]) for row in rows}
    assert {(layer, "bfloat16", "direct", 0, 0) for layer in TINY} <= found
    assert ("depthwise", "bfloat16", "depthwise", 0, 0) in {row[:3] + (0, 0) for row in found}
    assert ("dense", "float32", "mma_3xtf32") in {row[:3] for row in found}
    for kernel, tile in TILES:
        assert ("dense", "bfloat16", kernel, *tile) in found
    # What the planner would run is marked, once for each layer and dtype.
    planned = [(row["layer"], row["dtype"]) for row in rows if row["planned"]]
    assert sorted(planned) == sorted({(row["layer"], row["dtype"]) for row in rows})
    assert output.count("/1* ") + output.count("/0* ") >= len(planned) - 1
    for row in rows:
        assert row["us"]["median"] > 0
        assert row["copy_us"] > 0
        # A tile that is asked for has no model of its own.
        asked = (row["kernel"], tuple(row["tile"])) in TILES and row["model_us"] is None
        assert asked or row["model_us"] > 0
        # Against the definition, and then against `direct`, which rounded as the others do.
        assert 0 <= row["error"] < 1e-2
    assert len(output.splitlines()) == 2 + 2 * len(rows)


def test_a_wrong_result_is_reported_and_not_timed(run):
    status, output, rows = run("1000", "mma")
    assert status == 1
    wrong = [row for row in rows if row["status"] != "ok"]
    assert {row["kernel"] for row in wrong} == {"mma"}
    assert len(wrong) == sum(row["kernel"] == "mma" for row in rows)
    assert {row["us"]["rounds"] for row in wrong} == {0}
    assert output.count("FAIL wrong") == len(wrong)
    assert f"{len(rows)} rows, {len(wrong)} failures" in output


def test_an_excluded_kernel_is_left_out(run):
    status, _, rows = run(JAX_CONVGRAD_CUDA_EXCLUDE="wgmma, depthwise")
    assert status == 0
    assert {"direct", "mma"} <= {row["kernel"] for row in rows}
    assert not {"wgmma", "depthwise"} & {row["kernel"] for row in rows}
    # Another one takes its place.
    assert {row["layer"] for row in rows if row["planned"]} == set(TINY)


def test_nothing_begins_after_its_seconds(run):
    status, output, rows = run("0")
    assert (status, rows) == (2, [])
    assert "stopped after" in output


def test_the_layers_on_a_gpu_are_in_the_table():
    lines = on_gpu.timed_layers()
    names = [line.split()[0] for line in lines if line.split()[2] == "*"]
    assert len(set(names)) == len(on_gpu.TIMED)
    assert len(lines) < 200
