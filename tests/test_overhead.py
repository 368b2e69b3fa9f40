"""`python -m jax_convgrad overhead` on a net of a few channels, for a moment."""

import dataclasses
import json

import pytest

from jax_convgrad import __main__, native
from jax_convgrad.tools import models


@pytest.fixture
def tiny(monkeypatch):
    """One bottleneck in each of two stages: nine convolutions with the stem and shortcuts."""
    net = dataclasses.replace(models.RESNET50, widths=(4, 8), depths=(1, 1))
    monkeypatch.setattr(models, "RESNET50", net)


@pytest.mark.thorough
def test_overhead_prints_and_writes_everything(tiny, tmp_path, capsys):
    path = tmp_path / "overhead.json"
    arguments = ["overhead", "--seconds", "0.01", "--processes", "2", "--json", str(path)]
    assert __main__.main(arguments) == 0
    report = json.loads(path.read_text())
    assert report["complete"]
    tracing, eager, importing = (report[name] for name in ("tracing", "eager", "importing"))
    # Forward and filter gradient of nine, and the input gradient of all but the first.
    assert tracing["convolutions"] == 26
    assert tracing["native"] == (0 if native.cpu is None else 8)
    parts = {"trace and lower": tracing}
    parts |= {f"eager {name}": part for name, part in eager.items()}
    out = capsys.readouterr().out
    for what, part in parts.items():
        for name, time_us in part["times_us"].items():
            assert 0 < time_us["q1"] <= time_us["median"] <= time_us["q3"]
            assert f"{what}, {name}" in out
        assert set(part["ratios"]) == set(part["times_us"]) - {"lax"}
    assert importing["processes"] == 2
    assert importing["jax_us"]["median"] > 0
    assert importing["jax_convgrad_us"]["median"] > 0
