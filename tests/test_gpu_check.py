"""benchmarks/gpu_check.sh where there is no GPU: what it would run, and that it goes on."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu_check.sh"


def run(*arguments, **environment):
    """Runs the script; its status and output."""
    done = subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def rungs():
    """Names in the planner's table."""
    source = (ROOT / "csrc/kernel.cu").read_text()
    return re.findall(r'\{"(\w+)", Plan\w+, Launch', source)


def test_every_rung_is_compared_and_sanitized(tmp_path):
    status, text = run("--dry-run", str(tmp_path))
    assert status == 0
    parts = [line.split()[0] for line in text.splitlines()]
    assert len(rungs()) >= 4
    for prefix in ("float64", "memcheck", "racecheck", "synccheck"):
        assert [f"{prefix}_{name}" for name in rungs() if f"{prefix}_{name}" not in parts] == []
    in_turn = ("build", "tests", "memcheck_direct", "calibrate", "bench_bf16")
    order = [parts.index(name) for name in in_turn]
    assert order == sorted(order)
    assert parts[-2:] == ["bench_bf16", "bench_f32"]
    (calibrate,) = (line for line in text.splitlines() if line.startswith("calibrate "))
    for name in ("--write", "rates.h", "--json", "calibration.json"):
        assert name in calibrate
    assert str(tmp_path) in calibrate
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit_s", ["60", "1"])
def test_a_part_that_fails_does_not_stop_the_others(tmp_path, limit_s):
    # Neither program was built: not found, or no time left to look.
    status, text = run(
        str(tmp_path), ONLY="^(primitives|float64_direct)$", TIME_LIMIT_S=limit_s, BENCH_S="0"
    )
    assert status == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [step["name"] for step in report["steps"]] == ["primitives", "float64_direct"]
    expected = 127 if limit_s == "60" else 124
    assert {step["status"] for step in report["steps"]} == {expected}
    assert "2 parts, failed: primitives, float64_direct" in text
