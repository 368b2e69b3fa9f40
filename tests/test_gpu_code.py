"""What is said where the CUDA module's code does not fit the GPU or the driver. No GPU needed."""

import re
import types

import jax
import pytest

import jax_convgrad
from jax_convgrad import dispatch, gpu_code, native, roofline
from jax_convgrad.tools import info
from jax_convgrad.tools.geometries import make_geometry

ALL = "sm_80 sm_90 sm_100 sm_120 compute_80 sm_90a"
PTX = "compute_80"
KERNELS = ["direct", "tiled", "mma"]

# capability, code, toolkit, driver, what the reason says (None: the kernels run)
OBSTACLES = [
    (80, ALL, 13000, 13000, None),
    (86, ALL, 13000, 13010, None),  # by the machine code for 8.0
    (90, ALL, 13000, 13000, None),
    (103, ALL, 13000, 13000, None),
    (121, "sm_120", 13000, 13000, None),
    (80, PTX, 13000, 13000, None),
    (90, PTX, 12040, 12060, None),
    (90, PTX, 13000, 0, None),  # a driver that says nothing is taken for new enough
    (75, ALL, 13000, 13000, "compute capability 7.5, the kernels need 8.0"),
    (75, PTX, 13000, 13000, "compute capability 7.5, the kernels need 8.0"),
    (90, "sm_80", 13000, 13000, "holds sm_80, none of it for .* 9.0: rebuild with .*=90"),
    (90, "sm_90a", 13000, 13000, None),
    (100, "sm_90a", 13000, 13000, "none of it for .* 10.0: rebuild with .*=100"),
    (80, "sm_86", 13000, 13000, "none of it for .* 8.0"),  # not for an earlier minor one
    (120, "sm_100", 13000, 13000, "none of it for .* 12.0"),
    (90, PTX, 13010, 13000, "PTX of CUDA 13.1 .* for CUDA 13.0, cannot translate: rebuild .*=90"),
    (90, ALL, 13010, 13000, None),  # machine code needs no translation
    (80, ALL, 13000, 12080, "built with CUDA 13.0, the driver serves 12.8: update it"),
]


@pytest.mark.parametrize(("capability", "code", "toolkit", "driver", "expected"), OBSTACLES)
def test_obstacle(capability, code, toolkit, driver, expected):
    found = gpu_code.obstacle(capability, code, toolkit, driver)
    if expected is None:
        assert found is None
    else:
        assert re.search(expected, found), found


@pytest.mark.parametrize(
    ("capability", "code", "lacks"),
    [(90, PTX, True), (90, "sm_90", True), (90, ALL, False), (80, PTX, False), (100, PTX, False)],
)
def test_only_a_hopper_gpu_lacks_the_wgmma_kernel(capability, code, lacks):
    found = gpu_code.missing_kernel(capability, code, KERNELS)
    assert (found is not None) == lacks
    if lacks:
        assert "JAX_CONVGRAD_CUDA_ARCHITECTURES=90" in found


def test_a_rebuild_serves_all_gpus_of_the_machine():
    reason = gpu_code.obstacle(90, "sm_80", 13000, 13000, [75, 80, 90])
    assert reason is not None
    assert reason.endswith("JAX_CONVGRAD_CUDA_ARCHITECTURES=80,90")
    note = gpu_code.missing_kernel(90, PTX, KERNELS, [80, 90])
    assert note is not None
    assert note.endswith("=80,90")


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_a_module_built_without_a_gpu_lacks_the_specialised_kernels(capability):
    note = gpu_code.missing_kernel(capability, PTX, ["direct", "tiled"])
    assert note is not None
    assert "specialised" in note
    assert note.endswith(f"JAX_CONVGRAD_CUDA_ARCHITECTURES={capability}")


@pytest.fixture
def gpu(monkeypatch):
    """Makes this process one with a GPU, and with a CUDA module whose planner is the CPU's."""

    def make(capability, code, toolkit=13000, driver=13000):
        planner = native.cpu
        module = types.SimpleNamespace(
            code=code, toolkit_version=toolkit, driver_version=lambda: driver,
            plan=lambda *call, **kw: {**planner.plan(*call, **kw), "resident": 1, "model_us": 1.0},
            kernel_names=lambda: [*planner.kernel_names(), "mma"], ffi_api_version=(0, 3),
            reference_gpu=lambda dtype, allow_tf32: {
                "name": "GPU", "multiprocessors": 1, "flops_per_s": 1.0, "bytes_per_s": 1.0
            },
        )  # fmt: skip
        monkeypatch.setattr(native, "cuda", module)
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(gpu_code.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(gpu_code.jax, "local_devices", lambda: [device])
        # Of a GPU, it would take a CPU a minute.
        rates = roofline.Roofs(1.0, 1.0, "none")
        monkeypatch.setattr(roofline, "measure", lambda dtype: rates)

    return make


def test_no_gpu_is_no_obstacle():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert gpu_code.local_capabilities() == []
    assert gpu_code.local_obstacle() is None


@pytest.mark.parametrize(("kernels", "lacks"), [(KERNELS, False), (["direct", "tiled"], True)])
def test_what_is_missing_is_said_where_there_is_no_gpu(monkeypatch, kernels, lacks):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    module = types.SimpleNamespace(code=PTX, kernel_names=lambda: kernels)
    monkeypatch.setattr(native, "cuda", module)
    note = gpu_code.local_missing_kernel()
    assert (note is not None) == lacks
    if lacks:
        assert note.endswith("JAX_CONVGRAD_CUDA_ARCHITECTURES=all")


@pytest.mark.native
def test_lax_runs_where_the_module_has_no_code(gpu):
    gpu("9.0", "sm_80")
    g = make_geometry((8, 8), (3, 3), (8, 8))
    choice = dispatch.choose(g, "float32", "cuda")
    assert choice.implementation == "xla"
    assert "rebuild with JAX_CONVGRAD_CUDA_ARCHITECTURES=90" in choice.reason
    with pytest.raises(ValueError, match=r"none of it for a GPU of compute capability 9\.0"):
        dispatch.choose(g, "float32", "cuda", "native")
    assert any("none of it" in line for line in info._lacking_lines())


@pytest.mark.native
def test_explain_and_info_name_the_rebuild_that_brings_wgmma(gpu):
    gpu("9.0", PTX)
    x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 8, 8, 8), (8, 8, 3, 3)))
    explanation = jax_convgrad.explain(x, w, (1, 1), "SAME", implementation="native",
                                       platform="cuda")  # fmt: skip
    assert explanation.implementation == "native"
    assert "wgmma" in explanation.rebuild
    assert "  rebuild   the cuda module lacks the wgmma kernel" in str(explanation)
    (line,) = info._lacking_lines()
    assert line.startswith("GPU code ")
    gpu("9.0", ALL)
    assert info._lacking_lines() == []
    assert f" for {ALL};" in info._module_line("cuda")
