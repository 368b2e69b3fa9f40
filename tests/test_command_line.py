"""`python -m jax_convgrad`: its exit statuses and what it prints.

One command of each outcome in a process of its own, the others in this one, where nothing is
imported again.
"""

import json
import pathlib

import jax
import pytest
from conftest import SEED

import jax_convgrad
from jax_convgrad import __main__, dispatch, native, planner
from jax_convgrad.tools import check, random_layers, references, results, timing, workloads
from jax_convgrad.tools import layers as layer_lists
from jax_convgrad.tools.geometries import make_geometry, named_cases

MODULE = ("-m", "jax_convgrad")
ROOT = pathlib.Path(__file__).resolve().parents[1]

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


@pytest.fixture
def some_cases(monkeypatch):
    """Leaves `check` some of its named geometries; test_numerics.py has all of them."""

    def leave(cases):
        monkeypatch.setattr(check, "named_cases", lambda: cases)

    return leave


@pytest.mark.native
def test_check_passes_with_kernels(some_cases, capsys):
    cases = named_cases()[SEED % 8 :: 8]
    some_cases(cases)
    assert __main__.main(["check", "--count", "3", "--dtype", "f32", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    results = 3 * (len(cases) + 3)  # of dX, y and dW
    assert f"{results} results, {results} native, 0 failed" in out
    assert "pass" in out
    assert "FAIL" not in out


@pytest.mark.native
def test_check_takes_one_kernel_by_name(some_cases, capsys):
    taken = [case for case in named_cases() if "few_channels" in kernels(case.geometry)]
    others = [case for case in named_cases() if case not in taken]
    some_cases([*taken[:3], *others[:3]])
    arguments = ("check", "--count", "0", "--dtype", "bf16", "--kernel", "few_channels")
    assert __main__.main((*arguments, "--map", "dx")) == 0
    assert "3 results, 3 native, 0 failed" in (out := capsys.readouterr().out)
    assert "few_channels: 3" in out


def kernels(geometry):
    """Names of the CPU kernels that take a geometry in bfloat16."""
    found = []
    for name in native.cpu.kernel_names():
        try:
            planner.plan(geometry, "bfloat16", "cpu", None, name)
        except ValueError:
            continue
        found.append(name)
    return found


def test_check_without_kernels_says_so(some_cases, monkeypatch, capsys):
    some_cases(named_cases()[:2])
    monkeypatch.setattr(dispatch, "switch", lambda: "off")
    arguments = ("check", "--count", "0", "--dtype", "f32", "--require-native")
    assert __main__.main(arguments) == 1
    out = capsys.readouterr().out
    assert "6 results, 0 native" in out
    assert "compared lax with itself" in out
    assert "--require-native" in out


@pytest.mark.native
@pytest.mark.parametrize(
    ("name", "map_name"),
    [
        ("conv_input_grad", "input_grad"),
        ("conv_general_dilated", "forward"),
        ("conv_filter_grad", "filter_grad"),
    ],
)
def test_check_fails_where_a_result_is_wrong(some_cases, monkeypatch, capsys, name, map_name):
    some_cases(named_cases()[:2])
    right = getattr(workloads, name)
    monkeypatch.setattr(workloads, name, lambda *a, **k: 1.01 * right(*a, **k))
    assert __main__.main(["check", "--count", "0", "--dtype", "f32"]) == 1
    out = capsys.readouterr().out
    assert out.count("\nFAIL ") == 2
    assert out.count(f"\nFAIL {map_name} float32 ") == 2


@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_map_that_there_is_not_is_refused(command, capsys):
    assert __main__.main([command, "--map", "y,dz"]) == 2
    assert "--map must name some of dx, y, dw, got 'dz'" in capsys.readouterr().err


def test_a_process_ends_with_the_commands_status(run_python):
    result = run_python(*MODULE, "bench", "--layers", "missing.json", check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "missing.json" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required"),
        (("train",), "invalid choice"),
        (("check", "--dtype", "f8"), "f8"),
        (("check", "--count", "few"), "few"),
        (("bench", "--layout", "CHWN"), "CHWN"),
        (("bench", "--peers", "numpy"), "numpy"),
        (("bench", "--scan", "0"), "at least 1"),
        (("step", "--net", "vgg"), "vgg"),
        (("step", "--image", "40"), "multiple of 32"),
        (("step", "--seconds", "0"), "positive"),
        (("overhead", "--processes", "0"), "at least 1"),
    ],
)
def test_bad_arguments_exit_with_status_two(capsys, arguments, message):
    try:
        status = __main__.main(arguments)
    except SystemExit as e:  # of argparse
        status = e.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.native
def test_check_names_the_kernels_that_there_are(capsys):
    assert __main__.main(["check", "--count", "0", "--kernel", "none"]) == 2
    err = capsys.readouterr().err
    assert "'none'" in err
    assert all(name in err for name in native.cpu.kernel_names())


@pytest.mark.native
def test_bench_prints_and_writes_every_row(layers, tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = ("--layers", str(layers), "--row-seconds", "0.05", "--json", str(path))
    assert __main__.main(["bench", *arguments]) == 0
    out = capsys.readouterr().out
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


def test_bench_can_be_limited(layers, tmp_path):
    path = tmp_path / "out.json"
    arguments = ("--layers", str(layers), "--row-seconds", "0.05", "--limit", "1")
    more = ("--implementation", "xla", "--json", str(path))
    assert __main__.main(["bench", *arguments, *more]) == 0
    assert len(json.loads(path.read_text())["rows"]) == 1


@pytest.mark.native
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_bench_runs_inside_a_scan(layers, tmp_path, layout):
    path = tmp_path / "out.json"
    arguments = ("--layers", str(layers), "--row-seconds", "0.05", "--scan", "3")
    more = ("--layout", layout, "--json", str(path))
    assert __main__.main(["bench", *arguments, *more]) == 0
    results = json.loads(path.read_text())
    assert results["options"]["scan"] == 3
    assert len(results["rows"]) == len(ROWS)
    for row in results["rows"]:
        assert row["failures"] == []
        assert row["implementation"] == "native"
        assert {time["instances"] for time in row["times_us"].values()} == {3}


def test_bench_gives_every_peer_as_many_problems_in_a_call():
    """One slow first run had fewer in a call ever after: lax lost to itself by 1.7."""

    class Peer:
        def __init__(self, name, us, first_us):
            self.name, self.us, self.next_us = name, us, first_us

        def run(self, first, instances, calls):
            del first, instances, calls
            took, self.next_us = self.next_us, self.us
            return took

    peers = [Peer("ours", 100.0, 5000.0), Peer("lax", 120.0, 120.0)]
    timings = timing.measure(peers, pool=16, batched=False, row_seconds=0.0)
    assert {name: t.instances for name, t in timings.items()} == {"ours": 10, "lax": 10}


@pytest.mark.parametrize("direction", ["y", "dx", "dw"])
def test_bench_has_a_reference_with_batch_groups(direction):
    """Of a forward pass it was asked for as many images as x has."""
    g = make_geometry((9,), (2,), (3, 6), batch=6, batch_groups=3)
    layer = layer_lists.Layer(0, "batch groups", "test", "test", g, batch=6, batch_in_file=6)
    (workload,) = workloads.workloads(layer, "float32", "default", [direction])
    arrays = workloads.make_pool(workload, SEED, 1)[0]
    expected = references.by_definition(workload.map_, *arrays, g)
    assert references.reference(workload, arrays).error(expected) <= workload.bound


@pytest.mark.native
@pytest.mark.thorough
def test_bench_draws_convolutions_and_lists_its_losses(tmp_path, capsys, monkeypatch):
    path = tmp_path / "out.json"
    monkeypatch.setattr(results, "LISTED_LOSS", 1e-9)  # everything is one
    arguments = ("--random", "4", "--seed", str(SEED % 100), "--row-seconds", "0.02")
    assert __main__.main(["bench", *arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["options"]["random"] == 4
    assert len(report["rows"]) == 4
    timed = [row for row in report["rows"] if row["ratios"]]
    out = capsys.readouterr().out
    assert f"{len(timed)} of {len(timed)} rows (1e+02 %) take over 1e-09 times lax's" in out
    for row in timed:
        assert f"{row['name']} {row['direction']} {row['dtype']} {row['geometry']}: " in out


def test_random_problems_are_drawn_one_by_one_and_of_every_kind():
    drawn = [random_layers.random_workload(SEED, i, None, "default") for i in range(300)]
    again = random_layers.random_workload(SEED, 7, None, "default")
    assert again == drawn[7]
    assert {w.dtype for w in drawn} == {"float64", "float32", "bfloat16", "float16"}
    assert {w.direction for w in drawn} == {"dx", "fwd", "dw"}
    geometries = [w.geometry for w in drawn]
    assert {g.axes for g in geometries} == {1, 2, 3}
    assert any(g.batch_group_count > 1 for g in geometries)
    assert any(g.feature_group_count > 1 for g in geometries)
    assert any(max(g.window_sizes) >= 50 for g in geometries)
    assert any(
        s > w for g in geometries for s, w in zip(g.window_strides, g.window_sizes, strict=True)
    )
    # Images in the place of filters: their channels are the batch.
    assert len({g.dimension_numbers.lhs_spec for g in geometries}) >= 8


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_a_row_may_stand_for_its_filter_gradient(layout):
    """As lax writes it: an image for each channel, and a filter that is dy."""
    listed = {"n": 2, "c": 3, "h": 9, "w": 8, "k": 5, "stride": 2, "pad": [[1, 0], [2, 1]]}
    layer = layer_lists.parse(ROWS[0] | listed, 0, layout).geometry
    exchanged = layer_lists.parse(ROWS[0] | listed | {"exchanged": True}, 0, layout).geometry
    lhs_spec, rhs_spec, out_spec = exchanged.dimension_numbers
    assert [exchanged.lhs_shape[d] for d in lhs_spec[:2]] == [3, 2]
    assert [exchanged.rhs_shape[d] for d in rhs_spec] == [5, 2, *layer.out_sizes]
    assert [exchanged.out_shape[d] for d in out_spec] == [3, 5, *layer.window_sizes]
    with pytest.raises(ValueError, match="must have one group, got 2"):
        layer_lists.parse(ROWS[0] | {"exchanged": True, "groups": 2}, 0, layout)
    with pytest.raises(TypeError, match="exchanged must be true or false, got 1"):
        layer_lists.parse(ROWS[0] | {"exchanged": 1}, 0, layout)


def test_rows_of_reports_are_convolutions():
    for layout in ("NHWC", "NCHW"):
        rows = layer_lists.load(ROOT / "benchmarks/layers_reports.json", layout)
        assert len({row.class_name for row in rows}) == 6
