"""`python -m jax_convgrad`: its exit statuses and what it prints."""

import json

import jax
import pytest

import jax_convgrad
from jax_convgrad import native

MODULE = ("-m", "jax_convgrad")

ROWS = [
    {"net": "tiny", "n": 2, "c": 8, "h": 9, "w": 9, "k": 8, "r": 3, "s": 3, "stride": 2,
     "pad": 1, "dilation": 1, "groups": 1, "source": "test", "class": "dense_strided"},
    {"net": "tiny", "n": 2, "c": 16, "h": 8, "w": 8, "k": 16, "r": 3, "s": 3, "stride": 1,
     "pad": 1, "dilation": 1, "groups": 16, "source": "test", "class": "depthwise"},
]  # fmt: skip


@pytest.fixture
def layers(tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_info_says_what_is_installed(run_python):
    out = run_python(*MODULE, "info").stdout
    for part in (jax.__version__, "cpu", "float32", "kill switch", "depthwise"):
        assert part in out
    if native.cpu is not None:
        assert native.cpu.isa() in out
        assert all(name in out for name in native.cpu.kernel_names())


def test_info_reports_the_kill_switch(run_python):
    assert "JAX_CONVGRAD=off" in run_python(*MODULE, "info", JAX_CONVGRAD="off").stdout


@pytest.mark.native
def test_check_passes_with_kernels(run_python):
    out = run_python(*MODULE, "check", "--count", "5", "--dtype", "f32", "--seed", "3").stdout
    assert "pass" in out
    assert "0 failed" in out
    assert "FAIL" not in out


@pytest.mark.native
def test_check_takes_one_kernel_by_name(run_python):
    arguments = ("check", "--count", "0", "--dtype", "bf16", "--kernel", "few_channels")
    out = run_python(*MODULE, *arguments).stdout
    assert "few_channels: " in out
    assert "0 failed" in out


def test_check_without_kernels_says_so(run_python):
    arguments = ("check", "--count", "0", "--dtype", "f32", "--require-native")
    result = run_python(*MODULE, *arguments, check=False, JAX_CONVGRAD="off")
    assert result.returncode == 1
    assert "compared lax with itself" in result.stdout
    assert "--require-native" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required"),
        (("train",), "invalid choice"),
        (("check", "--dtype", "f8"), "f8"),
        (("check", "--count", "few"), "few"),
        (("bench", "--layout", "CHWN"), "CHWN"),
        (("bench", "--layers", "missing.json"), "missing.json"),
        (("bench", "--peers", "numpy"), "numpy"),
        (("bench", "--scan", "0"), "at least 1"),
        (("step", "--net", "vgg"), "vgg"),
        (("step", "--image", "40"), "multiple of 32"),
        (("step", "--seconds", "0"), "positive"),
        (("overhead", "--processes", "0"), "at least 1"),
    ],
)
def test_bad_arguments_exit_with_status_two(run_python, arguments, message):
    result = run_python(*MODULE, *arguments, check=False)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.native
def test_check_names_the_kernels_that_there_are(run_python):
    result = run_python(*MODULE, "check", "--count", "0", "--kernel", "none", check=False)
    assert result.returncode == 2
    assert "'none'" in result.stderr
    assert all(name in result.stderr for name in native.cpu.kernel_names())


@pytest.mark.native
def test_bench_prints_and_writes_every_row(run_python, layers, tmp_path):
    path = tmp_path / "out.json"
    out = run_python(
        *MODULE, "bench", "--layers", str(layers), "--row-seconds", "0.05", "--json", str(path)
    ).stdout
    assert "dense_strided" in out
    assert "depthwise" in out
    results = json.loads(path.read_text())
    assert len(results["rows"]) == len(ROWS)
    for row in results["rows"]:
        assert row["failures"] == []
        assert set(row["times_us"]) == {"ours", "lax"}
        assert all(time["median"] > 0 for time in row["times_us"].values())
        assert row["ratios"]
    assert jax.__version__ in json.dumps(results)
    assert jax_convgrad.__version__ in json.dumps(results)


def test_bench_can_be_limited(run_python, layers, tmp_path):
    path = tmp_path / "out.json"
    arguments = ("--layers", str(layers), "--row-seconds", "0.05", "--limit", "1")
    run_python(*MODULE, "bench", *arguments, "--implementation", "xla", "--json", str(path))
    assert len(json.loads(path.read_text())["rows"]) == 1


@pytest.mark.native
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_bench_runs_inside_a_scan(run_python, layers, tmp_path, layout):
    path = tmp_path / "out.json"
    arguments = ("--layers", str(layers), "--row-seconds", "0.05", "--scan", "3")
    run_python(*MODULE, "bench", *arguments, "--layout", layout, "--json", str(path),
               JAX_CONVGRAD="on")  # fmt: skip
    results = json.loads(path.read_text())
    assert results["options"]["scan"] == 3
    assert len(results["rows"]) == len(ROWS)
    for row in results["rows"]:
        assert row["failures"] == []
        assert row["implementation"] == "native"
        assert {time["instances"] for time in row["times_us"].values()} == {3}
