"""What is said where the CPU module was compiled for less than the processor has."""

import importlib
import types

import jax
import pytest

import jax_convgrad
from jax_convgrad import cpu_code, native
from jax_convgrad.tools import info


def test_missing_isa_names_the_rebuild(monkeypatch):
    module = types.SimpleNamespace(
        isa=lambda: "avx2", best_isa=lambda: "avx512", isas=lambda: ["avx2"]
    )
    monkeypatch.setattr(native, "cpu", module)
    monkeypatch.delenv("JAX_CONVGRAD_CPU_ISA", raising=False)
    note = cpu_code.local_missing_isa()
    assert "lacks avx512 kernels" in note
    assert "JAX_CONVGRAD_CPU_ISAS=all" in note
    for wish in ("avx512", "nonsense"):  # not granted
        monkeypatch.setenv("JAX_CONVGRAD_CPU_ISA", wish)
        assert cpu_code.local_missing_isa() == note
    monkeypatch.setenv("JAX_CONVGRAD_CPU_ISA", "avx2")
    assert cpu_code.local_missing_isa() is None
    monkeypatch.setenv("JAX_CONVGRAD_CPU_ISA", "portable")
    monkeypatch.setattr(module, "isas", lambda: ["avx512", "avx2"])
    assert cpu_code.local_missing_isa() is None


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
