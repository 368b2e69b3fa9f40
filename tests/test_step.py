"""`python -m jax_convgrad step` on nets of a few channels, and the nets themselves.

Nearly all the time is XLA's, which compiles a step three times and every layer three times.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from oracles import TARGET

from jax_convgrad import __main__, installed, integration
from jax_convgrad.tools import models, training

# Convolutions in the forward pass; all but the first have an input gradient.
CONVOLUTIONS = {"resnet18": 6, "convnext": 4}


def narrow(monkeypatch, *widths):
    """Makes both nets ones of a narrow block for each stage."""
    nets = {
        name: dataclasses.replace(net, widths=widths, depths=(1,) * len(widths))
        for name, net in models.NETS.items()
    }
    monkeypatch.setattr(models, "NETS", nets)
    return nets


@pytest.fixture
def tiny(monkeypatch):
    """Both nets with two stages."""
    return narrow(monkeypatch, 8, 16)


@pytest.fixture
def tiniest(monkeypatch):
    """Both nets with one stage."""
    return narrow(monkeypatch, 8)


def run(*arguments):
    options = ("--batch", "2", "--image", "32", "--seconds", "0.01")
    return __main__.main(["step", *options, *arguments])


@pytest.mark.native
@pytest.mark.thorough
def test_step_prints_and_writes_both_nets(tiny, tmp_path, capsys):
    path = tmp_path / "step.json"
    assert run("--json", str(path)) == 0
    report = json.loads(path.read_text())
    assert report["complete"]
    assert [net["net"] for net in report["nets"]] == list(models.DEFAULT_NETS)
    out = capsys.readouterr().out
    for net in report["nets"]:
        assert net["failures"] == []
        assert net["convolutions"] == CONVOLUTIONS[net["net"]]
        assert net["native"] == net["input_gradients"] == net["convolutions"] - 1
        assert sum(net["kernels"].values()) == sum(row["count"] for row in net["layers"])
        assert max(net["loss_error"], net["gradient_error"]) <= net["bound"] < 1e-3
        assert all(row["errors"]["ours"] <= row["bound"] for row in net["layers"])
        us = {name: time["median"] for name, time in net["times_us"].items()}
        assert set(us) == {"lax", "ours", "forward_lax", "forward_ours", "dx_lax", "dx_ours"}
        assert min(us.values()) > 0
        assert net["dx_of_step"] == us["dx_lax"] / us["lax"]
        assert net["backward_us"] == us["lax"] - us["forward_lax"]
        if net["ceiling"] is not None:  # else dX alone took longer than the step
            rest = us["lax"] - us["forward_lax"] - us["dx_lax"]
            ours = rest + us["forward_ours"] + us["dx_ours"]
            assert net["ceiling"] == pytest.approx(us["lax"] / rest)
            assert net["expected"] == pytest.approx(us["lax"] / ours)
        assert f"{net['title']}, " in out
        assert f"| {net['title']} | {net['native']} of {net['input_gradients']} |" in out


@pytest.mark.thorough
def test_step_can_take_one_net_and_draw_it(tiniest, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "step.png"
    assert run("--net", "convnext", "--png", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "ResNet" not in capsys.readouterr().out


@pytest.mark.native
@pytest.mark.thorough
def test_step_in_bfloat16(tiniest, tmp_path, capsys):
    path = tmp_path / "step.json"
    assert run("--net", "resnet50", "--dtype", "bf16", "--json", str(path)) == 0
    (net,) = json.loads(path.read_text())["nets"]
    assert net["native"] == net["input_gradients"] == net["convolutions"] - 1
    assert net["gradient_error"] <= net["bound"]
    assert "images, bfloat16" in capsys.readouterr().out


def test_bfloat16_keeps_float32_parameters():
    net = dataclasses.replace(
        models.NETS["convnext_tiny"], widths=(8,), depths=(1,), dtype="bfloat16"
    )
    images, labels = np.ones((1, 8, 8, 3), np.float32), np.zeros(1, np.int32)
    loss, gradients = jax.eval_shape(jax.value_and_grad(net.loss), net.params(0), images, labels)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((loss, gradients))} == {"float32"}
    text = jax.make_jaxpr(net.loss)(net.params(0), images, labels).pretty_print()
    assert "bf16[1,2,2,8] = conv_general_dilated" in text


def test_a_wrong_input_gradient_fails_the_step(tiniest, monkeypatch, capsys):
    right = integration.input_cotangent
    monkeypatch.setattr(integration, "input_cotangent", lambda *a, **k: 1.01 * right(*a, **k))
    assert run("--net", "resnet18") == 1
    out = capsys.readouterr().out
    assert "FAILED gradients: of params" in out
    assert "| ResNet-18 |" not in out


@pytest.mark.native
def test_the_step_under_install_holds_the_kernel_for_every_layer(tiny):
    net = tiny["resnet18"]
    params = net.params(0)
    images, labels = np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, np.int32)
    counts = []
    for active in (False, True):
        with installed(active):
            step = jax.jit(training.training_step(net))
            counts.append(step.lower(params, params, images, labels).as_text().count(TARGET))
    assert counts == [0, CONVOLUTIONS["resnet18"] - 1]


def test_the_nets_have_the_published_sizes():
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(net.params(0)))
        for name, net in models.NETS.items()
    }
    assert sizes["resnet18"] == 11_689_512
    resnet50 = jax.tree.leaves(models.RESNET50.params(0))
    assert sum(leaf.size for leaf in resnet50) == 25_557_032
    assert sizes["convnext"] == pytest.approx(3.70e6, rel=2e-3)
    assert sizes["convnext_tiny"] == 28_589_128
