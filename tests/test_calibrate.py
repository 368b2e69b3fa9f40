"""`python -m jax_convgrad calibrate`: the fit, the table's text, and the command without a GPU."""

import dataclasses
import json
import math
import pathlib
import re

import numpy as np
import pytest

from jax_convgrad import __main__
from jax_convgrad.tools import ToolError, calibrate, rate_fit, rates

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / "csrc/cuda/rates.h"
MEASUREMENTS = ROOT / "benchmarks/results/calibration.json"
PRESENT = rates.parse(TABLE.read_text())

# What the table holds until a GPU has been measured.
UNMEASURED = {"gpu": "H200 SXM", "launch_us": 2.5, "copy_bytes_per_us": 4.3e6}


def planted_table(rng):
    """The present table with other numbers, from half to twice."""

    def factor():
        return rates.rounded(math.exp(rng.uniform(-0.7, 0.7)))

    rows = tuple(
        dataclasses.replace(row, arithmetic=factor(), memory=factor())
        for row in PRESENT.corrections
    )
    return dataclasses.replace(PRESENT, launch_us=1.9, corrections=rows)


def time_entry(us):
    return {"median": us, "q1": us, "q3": us, "rounds": 5, "instances": 8, "calls": 1}


def measured(rng, planted, problems=400, noise=0.04, outliers=0.15):
    """A report as if a GPU worked as a table says, plus noise, outliers and failures.

    Each problem has three kernels of a kind of operands. Arithmetic over memory is anything from
    a tenth to ten times, so that many problems are near both bounds.
    """
    by_operands = {}
    for row in PRESENT.corrections:
        by_operands.setdefault(row.operands, []).append(row.kernel)
    entries = []

    def entry(launch, rows):
        entries.append({"name": "net", "geometry": "n1", "launch": launch, "kernels": rows})

    def row(kernel, operands, cost, us):
        failed = rng.random() < 0.02
        return {
            "kernel": kernel,
            "operands": operands,
            "cost": dataclasses.asdict(cost),
            "time_us": None if failed else time_entry(us),
            "failure": "broke" if failed else None,
        }

    for _ in range(5):
        cost = rates.Cost(1, 0, 1e-3, 1e-3, 0)
        us = planted.launch_us * math.exp(rng.normal(0, noise))
        entry(True, [row("direct", "f32", cost, us)])
    for index in range(problems):
        operands = list(by_operands)[index % len(by_operands)]
        kernels = by_operands[operands]
        rows, problem_us = [], math.exp(rng.uniform(1.5, 6))
        for kernel in rng.choice(kernels, min(3, len(kernels)), replace=False):
            tilt = rng.uniform(-2.3, 2.3)
            size_us = problem_us * math.exp(rng.uniform(-0.3, 0.3))
            cost = rates.Cost(
                launches=int(rng.integers(1, 3)),
                fixed_us=rng.uniform(0, 3),
                arithmetic_us=size_us * math.exp(max(tilt, 0)),
                memory_us=size_us * math.exp(max(-tilt, 0)),
                unhidden=0.1 if kernel == "grouped" else 0.0,
            )
            us = planted.model_us(cost, planted.correction(kernel, operands))
            us *= math.exp(rng.normal(0, noise))
            if rng.random() < outliers:
                us *= rng.uniform(1.5, 4)
            rows.append(row(str(kernel), operands, cost, us))
        entry(False, rows)
    return {
        "machine": {"device_kind": "NVIDIA H200", "driver": "570.1"},
        "versions": {"jax-convgrad": "1.0", "jax": "0.10.2", "jax-cuda13-plugin": "0.10.2"},
        "git_commit": "0123456789abcdef-dirty",
        "date_utc": "2026-01-02T03:04:05+00:00",
        "rates": dataclasses.asdict(PRESENT),
        "multiprocessors": {"gpu": 132, "model": 132},
        "copy_bytes_per_us": 3.7e6,
        "complete": True,
        "problems": entries,
    }


def off(fitted, planted):
    """How far every factor is from the planted one, as a logarithm."""
    return {
        (row.kernel, row.operands, bound): abs(math.log(getattr(row, bound) / getattr(true, bound)))
        for row, true in zip(fitted.corrections, planted.corrections, strict=True)
        for bound in ("arithmetic", "memory")
    }


# ---- the fit ------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", range(3))
def test_the_fit_finds_what_was_planted(rng, repeat):
    planted = planted_table(rng)
    fit = rate_fit.fit(measured(rng, planted, problems=1200))
    assert fit.after.launch_us == pytest.approx(planted.launch_us, rel=0.1)
    # The unit of the planner's counts stays; what was measured is reported.
    assert fit.after.copy_bytes_per_us == PRESENT.copy_bytes_per_us
    assert fit.copy_bytes_per_us == 3.7e6
    assert "3.7 TB/s" in rate_fit.describe(fit)[-3]
    errors = off(fit.after, planted)
    assert max(errors.values()) < 0.15, max(errors, key=errors.get)
    assert np.median(list(errors.values())) < 0.03
    before = off(PRESENT, planted)
    assert np.median(list(before.values())) > 0.2
    for row in fit.after.corrections:
        assert min(row.arithmetic_rows, row.memory_rows) >= rate_fit.MIN_ROWS


def test_exact_measurements_are_fitted_exactly(rng):
    planted = planted_table(rng)
    fit = rate_fit.fit(measured(rng, planted, problems=600, noise=0, outliers=0))
    # As many digits as the table has, of the launch too.
    assert max(off(fit.after, planted).values()) < 2e-3
    chosen = [rate_fit.choice_line(fit, table, "") for table in (PRESENT, fit.after)]
    (before, of), (after, again) = (
        map(int, re.search(r"in (\d+) of (\d+)", line).groups()) for line in chosen
    )
    assert of == again > 300
    assert before < 0.9 * of
    assert after >= 0.98 * of


def test_outliers_beyond_a_mean_do_not_move_the_fit(rng):
    planted = planted_table(rng)
    report = measured(rng, planted, problems=600, noise=0, outliers=0)
    for index, problem in enumerate(report["problems"]):
        for row in problem["kernels"]:
            if index % 5 == 0 and row["time_us"] is not None:
                row["time_us"] = time_entry(1000 * row["time_us"]["median"])
    assert np.median(list(off(rate_fit.fit(report).after, planted).values())) < 0.01


def costs(*pairs):
    """Samples of one row with (arithmetic, memory, measured) microseconds."""
    return [
        rate_fit.Sample(i, "", "mma", "16bit", rates.Cost(1, 0, a, m, 0), us)
        for i, (a, m, us) in enumerate(pairs)
    ]


def test_too_few_measurements_leave_a_factor_as_it_was():
    present = rates.Correction("mma", "16bit", 1.3, 0.8, 7, 0)
    samples = costs((100, 10, 200), (200, 20, 400), (300, 30, 600), (10, 100, 300), (10, 99, 300))
    row = rate_fit.fit_correction(samples, present, 0.0)
    assert (row.arithmetic, row.arithmetic_rows) == (2.0, 3)
    assert (row.memory, row.memory_rows) == (0.8, 0)
    assert rate_fit.fit_correction([], present, 0.0) == present


def test_what_is_near_both_bounds_or_mostly_launches_is_left_out():
    clear = [(100, 10, 200), (200, 20, 400), (300, 30, 600)]
    near = [(100, 200, 200)] * 3  # at the factors that the others say
    launches = [(1, 0.1, 30)] * 9  # of which 28 are the launch
    present = rates.Correction("mma", "16bit")
    row = rate_fit.fit_correction(costs(*clear), present, 0.0)
    with_launches = costs(*((a, m, us + 28) for a, m, us in clear), *launches)
    assert rate_fit.fit_correction(with_launches, present, 28.0) == row
    assert (row.arithmetic, row.arithmetic_rows, row.memory_rows) == (2.0, 3, 0)
    assert rate_fit.fit_correction(costs(*clear, *near), present, 0.0) == row


def test_bounds_follow_the_factors():
    # Arithmetic is a quarter of what the model says, so memory bounds most of these.
    pairs = [(a, m, max(0.25 * a, m)) for a in (100, 200, 300, 400, 500) for m in (10, 50, 90, 95)]
    row = rate_fit.fit_correction(costs(*pairs), rates.Correction("mma", "16bit"), 0.0)
    assert (row.arithmetic, row.memory) == (0.25, 1.0)


# ---- the table's text ---------------------------------------------------------------


def test_the_table_in_the_repository_is_what_the_command_writes():
    assert rates.render(PRESENT) == TABLE.read_text()
    if PRESENT.source.startswith("estimates"):
        assert all(row == rates.Correction(row.kernel, row.operands) for row in PRESENT.corrections)
        assert dataclasses.asdict(PRESENT).items() >= UNMEASURED.items()
    else:  # hand edits, and a table without its measurements
        assert rate_fit.fit(json.loads(MEASUREMENTS.read_text())).after == PRESENT


def test_every_kernel_has_its_rows():
    kernels = re.findall(r'\{"(\w+)", Plan\w+, Launch', (ROOT / "csrc/kernel.cu").read_text())
    assert [r for i, r in enumerate(PRESENT.corrections) if r in PRESENT.corrections[:i]] == []
    assert list(dict.fromkeys(row.kernel for row in PRESENT.corrections)) == kernels


def test_any_table_survives_its_text(rng):
    for _ in range(20):
        table = planted_table(rng)
        table = dataclasses.replace(
            table,
            launch_us=rates.rounded(rng.uniform(0.1, 30)),
            copy_bytes_per_us=rates.rounded(math.exp(rng.uniform(0, 20))),
            source="NVIDIA H200, driver 570.1, commit 0123, 2026-01-02",
            corrections=(
                *table.corrections,
                rates.Correction("new", "tf32", 1e-5, 123400.0, 12, 3),
            ),
        )
        assert rates.parse(rates.render(table)) == table


@pytest.mark.parametrize("text", ['a "quoted" GPU', "two\nlines", "back\\slash", ""])
def test_a_name_that_is_no_string_of_c_is_refused(text):
    with pytest.raises(ToolError, match="cannot hold the text"):
        rates.render(dataclasses.replace(PRESENT, gpu=text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kRatesLaunchUs", "kLaunch", "no kRatesLaunchUs"),
        ("Operands::kTf32", "Operands::kFp8", "kFp8"),
        ("kRatesCopyBytesPerUs = 4.3e6", "kRatesCopyBytesPerUs = fast", "fast"),
    ],
)
def test_a_text_that_is_no_table_is_refused(old, new, message):
    text = rates.render(dataclasses.replace(PRESENT, copy_bytes_per_us=4.3e6))
    with pytest.raises(ToolError, match=message):
        rates.parse(text.replace(old, new))


# ---- the command --------------------------------------------------------------------


def run(*arguments):
    return __main__.main(["calibrate", *map(str, arguments)])


def test_a_table_is_fitted_to_kept_measurements(rng, tmp_path, capsys):
    path, out = tmp_path / "measured.json", tmp_path / "new" / "rates.h"
    report = measured(rng, planted_table(rng), problems=100)
    path.write_text(json.dumps(report))
    assert run("--measurements", path, "--write", out) == 1  # kernels that broke
    printed = capsys.readouterr().out
    broken = sum(r["failure"] is not None for p in report["problems"] for r in p["kernels"])
    assert printed.count("FAIL ") == broken > 0
    table = rates.parse(out.read_text())
    assert table == rate_fit.fit(json.loads(path.read_text())).after
    assert table.gpu == "NVIDIA H200"
    for part in ("driver 570.1", "jax 0.10.2", "jax-cuda13-plugin", "0123456789ab+", "2026-01-02"):
        assert part in table.source
    for part in ("model before", "model after", "measured over the model", "before: the kernel"):
        assert part in printed
    # Without a path the table is printed; without failures all is well.
    for problem in report["problems"]:
        problem["kernels"] = [row for row in problem["kernels"] if row["failure"] is None]
    path.write_text(json.dumps(report))
    assert run("--measurements", path) == 0
    assert rates.render(rate_fit.fit(report).after) in capsys.readouterr().out


def test_a_gpu_of_another_size_writes_no_table(rng, tmp_path, capsys):
    path, out = tmp_path / "measured.json", tmp_path / "rates.h"
    report = measured(rng, planted_table(rng), problems=50)
    report["multiprocessors"]["gpu"] = 108
    path.write_text(json.dumps(report))
    assert run("--measurements", path, "--write", out) == 2
    assert "108" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "not JSON"),
        ("[]", "must hold an object"),
        ("{}", "no measurements of calibrate"),
        ('{"rates": {}}', "no measurements of calibrate"),
    ],
)
def test_what_is_no_measurement_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "measured.json"
    if text is not None:
        path.write_text(text)
    assert run("--measurements", path) == 2
    assert message in capsys.readouterr().err


def test_nothing_measured_is_nothing_to_fit(rng, tmp_path, capsys):
    path = tmp_path / "measured.json"
    report = measured(rng, planted_table(rng), problems=0)
    path.write_text(json.dumps(report))
    assert run("--measurements", path) == 2
    assert "no measurement to fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a GPU"),
        (("--measurements", "a.json", "--json", "b.json"), "--measurements takes old ones"),
    ],
)
def test_what_cannot_be_served_is_an_error(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(calibrate.machine, "is_gpu", lambda: False)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_without_its_module_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(calibrate.machine, "is_gpu", lambda: True)
    monkeypatch.setattr(calibrate.native, "cuda", None)
    assert run() == 2
    assert "CUDA module" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seconds", "--per-bound", "--row-seconds"])
def test_options_are_checked(capsys, option):
    with pytest.raises(SystemExit) as error:
        run(option, "0")
    assert error.value.code == 2
    assert option in capsys.readouterr().err
