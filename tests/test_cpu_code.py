"""What is said where the CPU module was compiled for less than the processor has."""

import importlib
import types

import jax
import pytest

import jax_convgrad
from jax_convgrad import cpu_code, native
from jax_convgrad.tools import info


def test_missing_isa_names_the_rebuild():
    assert cpu_code.missing_isa(None, "avx2", "avx2") is None
    assert cpu_code.missing_isa("portable", "portable", "avx2") is None  # as asked for
    note = cpu_code.missing_isa(None, "avx2", "avx512")
    assert "avx512" in note
    assert "JAX_CONVGRAD_CPU_ISAS=all" in note


@pytest.mark.native
def test_info_and_explain_say_what_a_rebuild_adds(monkeypatch):
    assert native.cpu.best_isa() in ("amx", "avx512_bf16", "avx512", "avx2", "portable")
    monkeypatch.setattr(cpu_code, "local_missing_isa", lambda: "lacks nothing")
    assert "CPU code      lacks nothing" in info.report()
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 4, 8, 8), (4, 4, 3, 3)))
    explanation = jax_convgrad.explain(x, w, (1, 1), "SAME", platform="cpu")
    assert explanation.rebuild == "lacks nothing"


def test_a_module_without_kernels_for_this_processor_is_left_out(monkeypatch):
    module = types.SimpleNamespace(
        version=native.__version__,
        ffi_api_version=native.runtime_ffi_version(),
        isa=lambda: "",
        isas=lambda: ["avx512", "avx2"],
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    with pytest.warns(RuntimeWarning, match="compiled for avx512, avx2, which this processor"):
        assert native._load("_cpu", "cpu") is None
