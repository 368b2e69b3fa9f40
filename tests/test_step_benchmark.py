"""`benchmarks/step.py` on nets of a few channels, which are the same nets in every framework."""

import dataclasses
import json
import pathlib
import sys

import jax
import pytest

from jax_convgrad.tools import training

for library in ("flax", "equinox", "optax"):
    pytest.importorskip(library)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
import step  # noqa: E402
from nets import SPECS, TINY  # noqa: E402

PUBLISHED = {"resnet18": 11_689_512, "resnet50": 25_557_032, "mobilenet": 3_504_872}


def abstract(name, smooth):
    """The training of a tiny net, nothing of which is computed."""
    made = []
    key, framework = step.NETS[name]

    def make():
        made.append(step.training(framework, TINY[key], 0, smooth))
        return made[0].state

    batch = step.data(TINY[key], 0)
    if framework == "equinox":
        batch = step.channels_first(TINY[key], batch)
    state = jax.eval_shape(make)
    return dataclasses.replace(made[0], state=state, batch=tuple(batch))


@pytest.mark.parametrize("name", step.NETS)
def test_a_net_is_the_same_in_pytorch(name):
    torch = pytest.importorskip("torch")
    net = abstract(name, smooth=False)
    found = training.convolutions(net)
    spec = TINY[step.NETS[name][0]]
    multiply_adds, losses = (peer := step.TorchStep(torch, spec, "contiguous", 0)).first()
    assert len(losses) == step.LOSSES
    assert sum(leaf.size for leaf in jax.tree.leaves(net.state[0])) == peer.parameters
    assert sum(each.multiply_adds for each in found if each.part == "y") == multiply_adds
    of_smooth = training.convolutions(abstract(name, smooth=True))
    assert [(each.part, each.geometry) for each in of_smooth] == [
        (each.part, each.geometry) for each in found
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_net_has_the_published_size(name):
    torch = pytest.importorskip("torch")
    from nets import in_torch

    with torch.device("meta"):
        net = in_torch.build(SPECS[name])
    assert sum(parameter.numel() for parameter in net.parameters()) == PUBLISHED[name]


@pytest.mark.native
@pytest.mark.thorough
def test_it_writes_and_draws_a_net(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("torch")
    tiniest = dataclasses.replace(TINY["convnext"], widths=(4, 8), depths=(1, 0))
    monkeypatch.setitem(TINY, "convnext", tiniest)
    options = ("--tiny", "--net", "convnext", "--seconds", "0.01")
    files = [tmp_path / f"step.{kind}" for kind in ("json", "png")]
    assert step.main([*options, "--json", str(files[0]), "--png", str(files[1])]) == 0
    assert files[1].read_bytes().startswith(b"\x89PNG")
    report = json.loads(files[0].read_text())
    assert report["complete"]
    assert report["torch"]["threads"] >= 1
    (net,) = report["nets"]
    assert net["framework"] == "flax"
    assert net["failures"] == []
    assert max(net["loss_error"], net["gradient_error"]) <= net["bound"]
    assert net["torch"]["parameters"] == net["parameters"]
    assert net["torch"]["memory_format"] in net["torch"]["times_us"]
    assert set(net["times_us"]) == {"lax", "ours", "torch"}
    assert set(net["ratios"]) == {"lax", "torch"}
    assert set(net["parts_us"]) == set(net["rest_us"]) == {"lax", "ours"}
    assert {"y", "dx", "dw", "rest"} == set(net["parts_us"]["ours"])
    assert "| ConvNeXt-Atto |" in capsys.readouterr().out


def test_other_sizes_than_pytorchs_are_a_failure():
    report = {"parameters": 10, "multiply_adds": 7, "failures": []}
    step._take_faster(report, [], {"parameters": 11, "multiply_adds": 7})
    assert report["failures"] == [{"what": "torch", "message": "11 parameters instead of 10"}]
