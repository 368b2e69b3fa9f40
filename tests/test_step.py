"""`python -m jax_convgrad step` on nets of a few channels, and the nets themselves."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from oracles import FILTER_TARGET, FORWARD_TARGET, TARGET

from jax_convgrad import __main__, installed, integration
from jax_convgrad.tools import models, step_trace, training

# Convolutions in the forward pass; all but the first have an input gradient.
CONVOLUTIONS = {"resnet18": 6, "resnet50": 5, "convnext": 4}


def narrow(monkeypatch, *widths):
    """Makes all nets ones of a narrow block for each stage."""
    nets = {
        name: dataclasses.replace(net, widths=widths, depths=(1,) * len(widths))
        for name, net in models.NETS.items()
    }
    monkeypatch.setattr(models, "NETS", nets)
    return nets


@pytest.fixture
def tiny(monkeypatch):
    """Nets with two stages."""
    return narrow(monkeypatch, 8, 16)


@pytest.fixture
def tiniest(monkeypatch):
    """Nets with one stage."""
    return narrow(monkeypatch, 8)


def run(*arguments):
    options = ("--batch", "2", "--image", "32", "--seconds", "0.01")
    return __main__.main(["step", *options, *arguments])


def all_by_kernels(net):
    count = CONVOLUTIONS[net["net"]]
    assert net["convolutions"] == {"y": count, "dx": count - 1, "dw": count}
    assert not any("lax" in kernels for kernels in net["kernels"].values())
    assert net["failures"] == []
    assert max(net["loss_error"], net["gradient_error"]) <= net["bound"]


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
        all_by_kernels(net)
        assert net["bound"] < 1e-3
        us = {name: time["median"] for name, time in net["times_us"].items()}
        assert set(us) == set(net["parts_us"]) == {"lax", "ours"}
        for program, parts in net["parts_us"].items():
            assert sum(parts.values()) == pytest.approx(us[program])
            assert sum(net["rest_us"][program].values()) <= 1.001 * parts["rest"]
        assert {"y", "dx", "dw", "rest"} <= set(net["parts_us"]["ours"]) <= set(step_trace.PARTS)
        assert ("pool" in net["parts_us"]["ours"]) == (net["net"] == "resnet18")
        assert {"conv", "rest"} <= set(net["parts_us"]["lax"])
        assert f"{net['title']}, " in out
        assert f"| {net['title']} |" in out


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
    all_by_kernels(net)
    assert "32x32, bfloat16" in capsys.readouterr().out


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
def test_the_step_under_install_holds_a_kernel_for_every_convolution(tiny):
    step = training.of_net(tiny["resnet18"], 2, 32, 0)
    targets, counts = (FORWARD_TARGET, TARGET, FILTER_TARGET), []
    for active in (False, True):
        with installed(active):
            text = jax.jit(step.step).lower(step.state, *step.batch).as_text()
            counts.append([text.count(target) for target in targets])
    forward = CONVOLUTIONS["resnet18"]
    assert counts == [[0, 0, 0], [forward, forward - 1, forward]]
    found = training.convolutions(step)
    for part, count in zip(("y", "dx", "dw"), counts[1], strict=True):
        assert sum(each.count for each in found if each.part == part) == count


def test_time_is_divided_among_what_runs_together():
    events = [(0.0, 4.0, "a"), (2.0, 6.0, "b"), (8.0, 9.0, "a")]
    assert step_trace.divided(events) == {"a": 4.0, "b": 3.0, "": 2.0}
    assert step_trace.divided([]) == {}


def test_an_operation_lasts_until_it_has_ended():
    events = [(0.0, 1.0, "a"), (2.0, 3.0, "b"), (5.0, 9.0, "a")]
    assert step_trace.completed(events, {"a": [4.0, 8.0], "b": []}) == [
        (0.0, 4.0, "a"), (2.0, 3.0, "b"), (5.0, 9.0, "a")
    ]  # fmt: skip


def test_instructions_have_the_part_of_their_primitive():
    text = """
  %conv_input_grad.3 = f32[2,4]{1,0} custom-call(%a), metadata={op_name="jit(f)/conv_input_grad"}
  ROOT %t.1 = (f32[2]{0}, s32[]) fusion(), metadata={op_name="transpose()/conv_general_dilated"}
  %wrapped_iota.2 = s32[8,2]{1,0} fusion(), kind=kLoop
"""
    found = step_trace.instructions(text)
    assert [opcode for opcode, _ in found.values()] == ["custom-call", "fusion", "fusion"]
    unnamed = step_trace.unnamed_parts(text + "select_and_scatter")
    parts = [step_trace.part_of(name, path, unnamed) for name, (_, path) in found.items()]
    assert parts == ["dx", "conv", "pool"]
    assert step_trace.part_of("convolution.2", "", unnamed) == "conv"
    assert step_trace.part_of("wrapped_iota", "", step_trace.unnamed_parts(text)) == "rest"
    assert step_trace.part_of("fusion", "jvp()/add", unnamed) == "rest"


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
