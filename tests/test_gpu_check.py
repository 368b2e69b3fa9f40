"""benchmarks/gpu_check.sh where there is no GPU: all of it, on stand-ins for what it runs."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu_check.sh"

# Says what was run, and in which state; and ends as a variable of its name says.
PROGRAM = """#!/bin/sh
name=$(basename "$0")
echo "$name ${1##*/} exclude=$JAX_CONVGRAD_CUDA_EXCLUDE" >>"$STAND_INS/calls"
echo "output of $name ${1##*/}"
case "$name $1" in
  "gpu_layers "*) echo '{"rows": []}' >"$2"; echo 'a * row' ;;
esac
if [ "$HANGS" = "$name ${1##*/}" ]; then
  echo $$ >"$STAND_INS/hanging"
  exec sleep 60
fi
if [ "$FAILS" = "$name ${1##*/}" ]; then exit "${STATUS:-1}"; fi
"""
PYTHON = f"""#!/bin/sh
case "$*" in
  *torch*) exit 1 ;;
  "-m jax_convgrad"* | "-m pytest"*)
    echo "python $2 $3 exclude=$JAX_CONVGRAD_CUDA_EXCLUDE" >>"$STAND_INS/calls"
    while [ $# -gt 0 ]; do
      case $1 in --json | --write) echo '{{}}' >"$2" ;; esac
      shift
    done ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


def kernels():
    """Names in the planner's table."""
    source = (ROOT / "csrc/kernel.cu").read_text()
    found = re.findall(r'\{"(\w+)", Plan\w+, Launch', source)
    assert len(found) >= 4
    return found


@dataclasses.dataclass
class Call:
    """The script on stand-ins, in a folder: what came out of it."""

    folder: pathlib.Path
    process: subprocess.Popen

    @property
    def out(self):
        return self.folder / "out"

    @property
    def log(self):
        return (self.out / "gpu_check.log").read_text()

    @property
    def report(self):
        return json.loads((self.out / "gpu_check.json").read_text())

    @property
    def calls(self):
        return (self.folder / "calls").read_text().splitlines()

    def status(self):
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output


@pytest.fixture
def start(tmp_path):
    """Starts the script."""
    for folder in ("bin", "prepared/site"):
        (tmp_path / folder).mkdir(parents=True)
    sources = subprocess.run(
        [ROOT / "benchmarks/gpu_prepare.sh", "--sources"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    (tmp_path / "prepared/SOURCES").write_text(sources.stdout)
    for kernel in kernels():
        (tmp_path / f"prepared/short.{kernel}").write_text("a problem\n")
    programs = ("core", "primitives", "hopper_primitives", "gpu_layers")
    for path, text in [
        *((f"prepared/{name}", PROGRAM) for name in programs),
        *((f"bin/{name}", PROGRAM) for name in ("nvidia-smi", "compute-sanitizer")),
        ("bin/python", PYTHON),
    ]:
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(stat.S_IRWXU)
    started = []

    def start(*arguments, **environment):
        variables = {
            **os.environ,
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "bin/python"),
            "PREPARED": str(tmp_path / "prepared"),
            "STAND_INS": str(tmp_path),
            "CONVGRAD_CUBLAS": "none",
        }
        process = subprocess.Popen(
            ["bash", SCRIPT, *arguments, tmp_path / "out"],
            env=variables | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return Call(tmp_path, process)

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def names(report):
    return [step["name"] for step in report["steps"]]


def test_what_decides_most_comes_first(start):
    call = start()
    status, output = call.status()
    assert status == 0, output
    first = [f"short_{kernel}" for kernel in kernels()]
    full = [f"full_{kernel}" for kernel in kernels()]
    assert names(call.report) == [
        "driver", "primitives", "hopper_primitives", *first, "layers", "info", "bench_bf16",
        "bench_f32", *full, "check_bf16", "check_f32", "calibrate", "tests", "memcheck_wgmma",
        "memcheck_mma",
    ]  # fmt: skip
    # Even if all of them take all they may.
    limits = {step["name"]: step["limit_s"] for step in call.report["steps"]}
    assert sum(limits[name] for name in names(call.report)[: 4 + len(first)]) <= 150
    assert {step["status"] for step in call.report["steps"]} == {0}
    assert "a * row" in call.report["steps"][3 + len(first)]["output_tail"]
    files = {path.name for path in call.out.iterdir()}
    assert files == {
        "gpu_check.json", "gpu_check.log", "gpu_layers.json", "bench_bf16.json", "bench_f32.json",
        "rates.h", "calibration.json",
    }  # fmt: skip
    assert all(line.endswith("exclude=") for line in call.calls)
    assert f"{len(limits)} parts, failed: none" in output


def test_what_was_measured_outlasts_a_kill(start):
    call = start(HANGS="gpu_layers layers")
    hanging = call.folder / "hanging"
    deadline = time.monotonic() + 60
    while not (hanging.exists() and hanging.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(call.process.pid, signal.SIGKILL)
    os.kill(int(hanging.read_text()), signal.SIGKILL)  # in a group of its own
    call.process.wait()
    first = [f"short_{kernel}" for kernel in kernels()]
    assert names(call.report) == ["driver", "primitives", "hopper_primitives", *first]
    assert {step["status"] for step in call.report["steps"]} == {0}
    # What ran is named, with what it had printed; what it had written is there.
    assert "=== layers, at" in call.log.splitlines()[-3]
    assert call.log.splitlines()[-1] == "a * row"
    assert json.loads((call.out / "gpu_layers.json").read_text()) == {"rows": []}


@pytest.mark.parametrize(
    ("fails", "excluded"),
    [
        ("hopper_primitives ", "wgmma"),
        ("core short.wgmma", None),  # wrong, but the others are to show where
    ],
)
def test_jax_goes_on_without_a_kernel_that_fails(start, fails, excluded):
    call = start(FAILS=fails, ONLY="^(hopper_primitives|layers|info|.*_wgmma)$")
    status, output = call.status()
    assert status == 1
    steps = {step["name"]: step for step in call.report["steps"]}
    assert f"python jax_convgrad info exclude={excluded or ''}" in call.calls
    assert f"gpu_layers layers exclude={excluded or ''}" in call.calls
    assert (f"excluded_{excluded}" in call.report) == (excluded is not None)
    if excluded is None:
        assert "EXCLUDED" not in output
        return
    assert f"{excluded} is EXCLUDED" in output
    for name in ("full_wgmma", "memcheck_wgmma"):
        assert steps[name]["status"] is None
        assert "wgmma is excluded" in steps[name]["skipped"]


def test_a_kernel_that_breaks_the_context_is_excluded(start):
    call = start(FAILS="core short.mma", STATUS="3", ONLY="^(short_mma|full_mma|info)$")
    assert call.status()[0] == 1
    assert call.calls == ["core short.mma exclude=", "python jax_convgrad info exclude=mma"]


def test_what_has_no_sanitizer_is_skipped_visibly(start):
    # The first problem of all is the probe.
    call = start(FAILS="compute-sanitizer --tool", ONLY="^memcheck")
    status, output = call.status()
    assert status == 0
    assert {step["skipped"] for step in call.report["steps"]} == {
        "compute-sanitizer does not run here"
    }
    assert output.count("SKIPPED") == 2
    assert len(call.calls) == 1


def test_the_second_call_does_what_the_first_did_not_pass(start, tmp_path):
    first = tmp_path / "first.json"
    passed = ["driver", "primitives", "hopper_primitives", "layers", "memcheck_mma"]
    steps = [{"name": name, "status": 0} for name in passed]
    steps += [{"name": "info", "status": 1}, {"name": "tests", "status": None}]
    first.write_text(json.dumps({"steps": steps}))
    call = start(
        "--second", FIRST=str(first), ONLY="primitives$|^(layers|info|tests|.*_mma|driver)$"
    )
    assert call.status()[0] == 0
    assert names(call.report) == [
        "driver", "hopper_primitives", "racecheck_mma", "racecheck_primitives",
        "racecheck_hopper_primitives", "synccheck_mma", "synccheck_primitives",
        "synccheck_hopper_primitives", "short_mma", "info", "full_mma", "tests",
    ]  # fmt: skip


def test_parts_that_have_no_time_left_are_recorded_and_exclude_nothing(start):
    call = start(ONLY="^(driver|short_mma|full_mma)$", TIME_LIMIT_S="1")
    status, output = call.status()
    assert status == 1
    assert [step["skipped"] for step in call.report["steps"]] == ["no time left"] * 3
    assert "EXCLUDED" not in output
    assert "no time left for: driver short_mma full_mma" in output
    assert not (call.folder / "calls").exists()


@pytest.mark.parametrize(
    ("variable", "value"), [("TIME_LIMIT_S", "abc"), ("FIRST", "/nowhere.json")]
)
def test_what_cannot_be_read_is_refused(start, variable, value):
    call = start("--second", **{variable: value})
    status, output = call.status()
    assert status == 2
    assert f"gpu_check.sh: {variable} must be" in output
    assert value in output
    assert not (call.folder / "calls").exists()


def test_programs_of_other_sources_are_not_run(start):
    call = start(ONLY="^primitives$", PREPARED="/nowhere")
    assert call.status()[0] == 1
    assert "/nowhere is not there: it is built here" in call.log
    (call.folder / "prepared/SOURCES").write_text("0123456789abcdef\n")
    call = start(ONLY="^primitives$")
    assert call.status()[0] == 1
    assert "prepared is STALE, of other sources: it is built here" in call.log
    assert not (call.folder / "calls").exists()


def test_every_kernel_is_compared_and_sanitized(tmp_path):
    parts = []
    for option in ((), ("--second",)):
        done = subprocess.run(
            ["bash", SCRIPT, "--dry-run", *option, tmp_path / "out"],
            stdout=subprocess.PIPE, text=True, check=True, timeout=60,
        )  # fmt: skip
        parts += [line.split()[0] for line in done.stdout.splitlines()]
    for prefix in ("short", "full", "memcheck", "racecheck", "synccheck"):
        assert [f"{prefix}_{name}" for name in kernels() if f"{prefix}_{name}" not in parts] == []
    assert not list((tmp_path / "out").iterdir())
