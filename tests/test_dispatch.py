"""What runs, why, and what the package does without its compiled modules."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax

import jax_convgrad
from jax_convgrad import dispatch, native, planner, preference
from jax_convgrad.maps import FILTER_GRAD, FORWARD, INPUT_GRAD
from jax_convgrad.tools import workloads
from jax_convgrad.tools.geometries import make_geometry

G = oracles.geometry((2, 3, 8, 8), (4, 3, 3, 3), (2, 2), "SAME")
X, W = jnp.ones(G.lhs_shape), jnp.ones(G.rhs_shape)

# Code for fresh interpreters: a gradient, checked, and the number of custom calls in it.
GRADIENT = """
import jax, jax.numpy as jnp, numpy as np, oracles, jax_convgrad
from jax_convgrad import native
x, w = jnp.ones((2, 3, 8, 8)), jnp.arange(108.0).reshape(4, 3, 3, 3)
def loss(conv):
    return lambda x: (conv(x, w, (2, 2), "SAME") ** 2).sum()
gradient = jax.grad(loss(jax_convgrad.conv_general_dilated))
expected = jax.grad(loss(jax.lax.conv_general_dilated))(x)
np.testing.assert_allclose(gradient(x), expected, rtol=1e-5)
with jax_convgrad.installed():
    installed = jax.grad(loss(jax.lax.conv_general_dilated))
    np.testing.assert_allclose(installed(x), expected, rtol=1e-5)
    calls = oracles.custom_calls(installed, x)
print(oracles.custom_calls(gradient, x), calls)
"""

# Makes the compiled modules impossible to import.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in ("jax_convgrad._cpu", "jax_convgrad._cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.native
def test_kernel_is_chosen_where_it_is_no_slower(monkeypatch):
    kernel, workspace_bytes = oracles.plan(G, "float32")
    monkeypatch.setattr(dispatch, "switch", lambda: None)
    monkeypatch.setattr(preference, "slower_than_xla", lambda *_: None)
    choice = dispatch.choose(G, "float32", "cpu")
    assert (choice.implementation, choice.kernel) == ("native", kernel)
    assert choice.workspace_bytes == workspace_bytes
    assert kernel in choice.reason
    monkeypatch.setattr(preference, "slower_than_xla", lambda *_: "slower on snails")
    assert dispatch.choose(G, "float32", "cpu") == dispatch.Choice("xla", "slower on snails")


@pytest.mark.native
@pytest.mark.parametrize(("switch", "implementation"), [("on", None), (None, "native")])
def test_kernel_can_be_asked_for_where_it_is_slower(monkeypatch, switch, implementation):
    monkeypatch.setattr(dispatch, "switch", lambda: switch)
    monkeypatch.setattr(preference, "slower_than_xla", lambda *_: "slower on snails")
    choice = dispatch.choose(G, "float32", "cpu", implementation)
    assert (choice.implementation, choice.kernel) == ("native", oracles.plan(G, "float32")[0])


@pytest.mark.native
@pytest.mark.parametrize("map_", [FORWARD, INPUT_GRAD])
def test_products_of_elements_are_left_to_lax(monkeypatch, map_):
    monkeypatch.setattr(dispatch, "switch", lambda: None)

    def implementation(lhs, rhs, groups, strides=(1, 1)):
        g = oracles.geometry(lhs, rhs, strides, "SAME", feature_group_count=groups)
        return dispatch.choose(g, "float32", "cpu", map_=map_).implementation

    assert implementation((2, 6, 8, 8), (6, 1, 1, 1), 6) == "xla"
    assert implementation((2, 6, 8, 8), (12, 1, 1, 1), 6) == "native"
    assert implementation((2, 6, 8, 8), (6, 1, 1, 1), 6, (2, 2)) == "native"
    assert implementation((2, 6, 8, 8), (6, 1, 3, 1), 6) == "native"
    assert implementation((2, 6, 8, 8), (6, 6, 1, 1), 1) == "native"


@pytest.mark.native
@pytest.mark.parametrize("map_", [FORWARD, INPUT_GRAD])
def test_sums_of_few_elements_are_left_to_lax(monkeypatch, map_):
    monkeypatch.setattr(dispatch, "switch", lambda: None)

    def implementation(channels, window=1, layout="last", **options):
        g = make_geometry((64,), (window,), channels, dimension_numbers=layout, **options)
        return dispatch.choose(g, "float32", "cpu", map_=map_).implementation

    assert implementation((3, 2)) == "xla"
    assert implementation((4, 2)) == "native"
    assert implementation((3, 2), layout="first") == "native"
    assert implementation((3, 2), window=2) == "native"
    assert implementation((3, 2), stride=2) == "native"


@pytest.mark.native
@pytest.mark.parametrize("map_", [FORWARD, INPUT_GRAD])
def test_sixteen_bits_of_few_channels_are_widened(monkeypatch, rng, map_):
    monkeypatch.setattr(dispatch, "switch", lambda: None)
    channels = (3, 33) if map_ is FORWARD else (33, 3)
    g = make_geometry((9, 10), (3, 3), channels, padding=1)
    choice = dispatch.choose(g, "float16", "cpu", map_=map_)
    assert (choice.implementation, choice.kernel_dtype) == ("native", "float32")
    assert "in float32" in choice.reason
    first, second = oracles.operands(rng, g, "float16", map_)
    function = workloads.public_function(map_, g, implementation="native")
    out = jax.jit(function)(first, second)
    assert out.dtype == "float16"
    wide = jax.jit(function)(first.astype("float32"), second.astype("float32"))
    np.testing.assert_array_equal(out, wide.astype("float16"))
    transposed = make_geometry((9, 10), (3, 3), channels, lhs_dilation=2)
    choice = dispatch.choose(transposed, "float16", "cpu", map_=map_)
    assert choice.implementation == ("xla" if map_ is INPUT_GRAD else "native")
    deep = make_geometry((9, 10), (3, 3), (33, 33), padding=1)
    assert dispatch.choose(deep, "float16", "cpu", map_=map_).kernel_dtype is None
    few_results = make_geometry((9, 10), (9, 9), channels)
    assert dispatch.choose(few_results, "float16", "cpu", map_=map_).kernel_dtype is None
    # It took up to 68 times as long in 16 bits.
    long_window = make_geometry((65536,), (60000,), (1, 1), batch=1)
    assert dispatch.choose(long_window, "float16", "cpu").kernel_dtype is None
    choice = dispatch.choose(long_window, "float16", "cpu", map_=FORWARD)
    assert choice.kernel_dtype == "float32"


@pytest.mark.native
@pytest.mark.parametrize("channels", [(8, 8), (4, 8), (12, 8)])
@pytest.mark.parametrize("map_", [FORWARD, INPUT_GRAD])
def test_groups_of_several_channels_in_float64_are_not_permuted(x64, rng, channels, map_):
    g = make_geometry((20, 20), (3, 3), channels, feature_groups=4)
    assert oracles.plan(g, "float64", map_=map_)[0] == "few_channels"
    g = make_geometry((20, 20), (3, 3), [16 * n for n in channels], feature_groups=64)
    assert oracles.plan(g, "float64", map_=map_)[0] == "gemm"
    assert oracles.plan(g, "float32", map_=map_)[0] == "depthwise"
    # A program stored before that brings the other kernel's workspace, which is smaller.
    stored = "auto", oracles.plan(g, "float64", "depthwise", map_=map_)[1]
    assert stored[1] < oracles.plan(g, "float64", map_=map_)[1]
    operands = oracles.operands(rng, g, map_=map_)
    actual = oracles._call(*operands, g, stored, "cpu", None, map_=map_)[0]
    results = oracles.call_kernels_of_map(operands, g, map_)
    np.testing.assert_array_equal(actual, results["depthwise"])


@pytest.mark.native
def test_filter_gradients_that_leave_lanes_empty_are_left_to_lax(monkeypatch):
    monkeypatch.setattr(dispatch, "switch", lambda: None)

    def implementation(spatial, window, channels=(1, 1), **options):
        g = make_geometry(spatial, window, channels, **options)
        return dispatch.choose(g, "float32", "cpu", map_=FILTER_GRAD).implementation

    assert implementation((100,), (3,)) == "xla"
    assert implementation((1, 100), (1, 60)) == "xla"
    assert implementation((100,), (3,), (1, 2)) == "native"
    assert implementation((100,), (60,), (2, 2)) == "xla"
    assert implementation((100,), (40,), (2, 2)) == "native"
    assert implementation((100,), (60,), (3, 3)) == "native"
    assert implementation((20, 20), (3, 3)) == "xla"
    assert implementation((20, 20), (9, 9)) == "native"
    assert implementation((100,), (3,), (8, 8), feature_groups=8) == "native"


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu", "rocm"])
def test_xla_is_always_available(platform):
    choice = dispatch.choose(G, "float32", platform, "xla")
    assert (choice.implementation, choice.kernel, choice.workspace_bytes) == ("xla", None, 0)


FOUR_AXES = oracles.geometry((1, 1, 3, 3, 3, 3), (1, 1, 2, 2, 2, 2), None, "VALID")
NO_AXES = oracles.geometry((1, 1), (1, 1), None, ())
REASONS = [
    (G, "int32", "cpu", "int32"),
    (G, "complex64", "cpu", "complex64"),
    (G, jnp.float8_e4m3fn, "cpu", "float8_e4m3fn"),
    (G, "float32", "tpu", "tpu"),
    (FOUR_AXES, "float32", "cpu", "4 spatial axes"),
    (NO_AXES, "float32", "cpu", "0 spatial axes"),
]


@pytest.mark.parametrize(("g", "dtype", "platform", "reason"), REASONS)
def test_what_no_kernel_takes_goes_to_lax_with_a_reason(g, dtype, platform, reason):
    choice = dispatch.choose(g, dtype, platform)
    assert choice.implementation == "xla"
    assert reason in choice.reason
    with pytest.raises(ValueError, match=f"implementation='native'.*{reason}"):
        dispatch.choose(g, dtype, platform, "native")


def test_missing_module_is_a_reason(monkeypatch):
    monkeypatch.setattr(native, "cpu", None)
    assert "not built" in dispatch.choose(G, "float32", "cpu").reason
    with pytest.raises(ValueError, match="the cpu module was not built"):
        dispatch.choose(G, "float32", "cpu", "native")


@pytest.mark.native
def test_what_stands_in_a_kernels_way_is_the_reason():
    obstacle = "the program is of a kind that holds no kernel"
    choice = dispatch.choose(G, "float32", "cpu", obstacle=obstacle)
    assert (choice.implementation, choice.reason) == ("xla", obstacle)
    with pytest.raises(ValueError, match=f'{obstacle}. implementation="xla" always is'):
        dispatch.choose(G, "float32", "cpu", "native", obstacle=obstacle)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "float8_e4m3fn"])
def test_native_with_an_unsupported_dtype_raises_in_every_function(dtype):
    x, w = X.astype(dtype), W.astype(dtype)
    dy = jnp.ones(G.out_shape, dtype)
    options = {"implementation": "native"}
    for call in (
        lambda: jax_convgrad.conv_general_dilated(x, w, (2, 2), "SAME", **options),
        lambda: jax_convgrad.conv_input_grad(dy, w, G.lhs_shape, (2, 2), "SAME", **options),
        lambda: jax_convgrad.conv_transpose(
            x, w, (2, 2), "SAME", None, ("NCHW", "OIHW", "NCHW"), **options
        ),
        lambda: jax_convgrad.explain(x, w, (2, 2), "SAME", **options),
    ):
        with pytest.raises(ValueError, match=f"'native'.*{dtype}"):
            call()


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_unsupported_dtypes_run_through_lax_visibly(rng, dtype):
    dy = jnp.asarray(rng.integers(-3, 4, G.out_shape), dtype)
    w = jnp.asarray(rng.integers(-3, 4, G.rhs_shape), dtype)

    def gradient(dy, w):
        return jax_convgrad.conv_input_grad(dy, w, G.lhs_shape, (2, 2), "SAME")

    np.testing.assert_array_equal(gradient(dy, w), oracles.lax_input_grad(dy.real, w.real, G))
    assert oracles.custom_calls(gradient, dy, w) == 0
    explanation = jax_convgrad.explain(X.astype(dtype), w, (2, 2), "SAME")
    assert explanation.implementation == "xla"
    assert dtype in explanation.reason


@pytest.mark.parametrize("axes", [0, 4])
def test_other_numbers_of_axes_run_through_lax(rng, axes):
    g = oracles.geometry((2, 3) + (3,) * axes, (4, 3) + (2,) * axes, None, ((0, 0),) * axes)
    dy, w = oracles.operands(rng, g, "float32")
    dx = jax_convgrad.conv_input_grad(dy, w, g.lhs_shape, padding=g.padding)
    np.testing.assert_allclose(dx, oracles.literal_input_grad(dy, w, g), rtol=1e-4, atol=1e-4)


@pytest.mark.native
def test_implementation_decides_the_program():
    dy = jnp.ones(G.out_shape)

    def calls(implementation):
        return oracles.custom_calls(
            lambda dy, w: jax_convgrad.conv_input_grad(
                dy, w, G.lhs_shape, (2, 2), "SAME", implementation=implementation
            ),
            dy,
            W,
        )

    assert (calls("native"), calls("xla")) == (1, 0)
    chosen = dispatch.choose(G, "float32", "cpu").implementation
    assert calls(None) == calls(chosen)


def test_explanation_says_what_runs():
    explanation = jax_convgrad.explain(X, W, (2, 2), "SAME", implementation="xla")
    assert explanation.geometry == G
    assert (explanation.dtype, explanation.kernel) == ("float32", None)
    assert explanation.flops == G.flops
    assert explanation.bytes_moved == G.bytes_moved(4)
    assert explanation.roofline_us > 0
    for part in (str(G), "float32", "implementation='xla'", "MFLOP", "roofline"):
        assert part in str(explanation)


@pytest.mark.native
def test_explanation_agrees_with_the_program():
    w = jax.ShapeDtypeStruct(G.rhs_shape, "bfloat16")
    x = jax.ShapeDtypeStruct(G.lhs_shape, "bfloat16")
    explanation = jax_convgrad.explain(x, w, (2, 2), "SAME", implementation="native")
    assert explanation.kernel == oracles.plan(G, "bfloat16")[0]
    assert explanation.workspace_bytes == oracles.plan(G, "bfloat16")[1]
    assert explanation.instruction_set == native.cpu.isa()
    assert f"{native.cpu.isa()} instructions" in str(explanation)
    wide = jax_convgrad.explain(x, w, (2, 2), "SAME", preferred_element_type="float32")
    assert wide.dtype == "float32"


def test_explanation_is_of_what_runs_without_64_bit_types():
    x, w = np.ones(X.shape, "float64"), np.ones(W.shape, "float32")
    assert jax_convgrad.explain(x, w, (2, 2), "SAME").dtype == "float32"


@pytest.mark.parametrize("value", ["", "on"])
def test_an_empty_switch_is_an_unset_one(monkeypatch, value):
    monkeypatch.setenv(dispatch.SWITCH, value)
    assert dispatch.switch.__wrapped__() == (value or None)


def test_explanation_takes_either_name_of_a_gpu():
    names = ("gpu", "cuda")
    assert len({jax_convgrad.explain(X, W, (2, 2), "SAME", platform=p).reason for p in names}) == 1


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_a_window_of_size_zero_gives_zeros(implementation):
    g = oracles.geometry((2, 3, 5, 4), (6, 3, 0, 2), None, ((1, 0), (0, 1)))
    dy, w = jnp.ones(g.out_shape), jnp.ones(g.rhs_shape)
    dx = jax_convgrad.conv_input_grad(
        dy, w, g.lhs_shape, padding=g.padding, implementation=implementation
    )
    np.testing.assert_array_equal(dx, np.zeros(g.lhs_shape))


@pytest.mark.native
def test_gradient_of_a_window_of_size_zero_is_zero():
    """A layer of no tap is none of one tap, which lax has: lax refuses it."""

    def total(dy):
        w = jnp.ones((1, 1, 0))
        return jax_convgrad.conv_input_grad(dy, w, (1, 1, 8), padding=[(0, -1)]).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones((1, 1, 8))), np.zeros((1, 1, 8)))


def test_explanation_for_another_platform_has_no_roofline():
    explanation = jax_convgrad.explain(X, W, (2, 2), "SAME", platform="tpu")
    assert (explanation.implementation, explanation.roofline_us) == ("xla", None)
    assert "no kernel for platform tpu" in str(explanation)


@pytest.mark.parametrize(
    ("value", "names"),
    [("", ()), ("wgmma", ("wgmma",)), ("wgmma, mma", ("wgmma", "mma")), (",mma,", ("mma",))],
)
def test_cuda_kernels_that_are_left_out(monkeypatch, value, names):
    module = types.SimpleNamespace(kernel_names=lambda: ["direct", "mma", "wgmma"])
    monkeypatch.setattr(native, "cuda", module)
    monkeypatch.setenv(planner.EXCLUDE, value)
    assert planner.excluded.__wrapped__() == names


@pytest.mark.parametrize("value", ["wgmm", "mma wgmma;", "direct"])
def test_only_cuda_kernels_that_are_there_can_be_left_out(monkeypatch, value):
    module = types.SimpleNamespace(kernel_names=lambda: ["direct", "mma", "wgmma"])
    monkeypatch.setattr(native, "cuda", module)
    monkeypatch.setenv(planner.EXCLUDE, value)
    message = f"{planner.EXCLUDE} must name some of mma, wgmma, got '{value.split()[-1]}'."
    with pytest.raises(ValueError, match=re.escape(message)):
        planner.excluded.__wrapped__()
    # Each way to a plan asks, on any value that was not read yet.
    planner.excluded.cache_clear()
    for ask in (planner.plan, dispatch.choose):
        with pytest.raises(ValueError, match="must name some of"):
            ask(G, "float32", "cuda")
    planner.excluded.cache_clear()


def test_kill_switch(run_python):
    code = f"""{GRADIENT}
print(jax_convgrad.explain(x, w, (2, 2), "SAME").reason)
try:
    jax_convgrad.explain(x, w, (2, 2), "SAME", implementation="native")
except ValueError as e:
    print(e)
try:
    jax_convgrad.conv_input_grad(jnp.ones((1, 2, 3)), jnp.ones((2, 2, 2)), (1, 2, 4),
                                 implementation="native")
except ValueError as e:
    print(e)
"""
    counts, reason, *refusals = run_python("-c", code, JAX_CONVGRAD="OFF").stdout.splitlines()
    assert counts.split() == ["0", "0"]
    assert reason == "JAX_CONVGRAD=off"
    assert len(refusals) == 2
    for refusal in refusals:
        assert "implementation='native'" in refusal
        assert "JAX_CONVGRAD=off" in refusal


@pytest.mark.native
def test_switch_turns_the_kernels_on(run_python):
    assert run_python("-c", GRADIENT, JAX_CONVGRAD="on").stdout.split() == ["1", "1"]


def test_kill_switch_refuses_other_words(run_python):
    refused = run_python("-c", GRADIENT, check=False, JAX_CONVGRAD="maybe")
    assert refused.returncode == 1
    assert "JAX_CONVGRAD must be 'on' or 'off', got 'maybe'" in refused.stderr


def test_without_compiled_modules_everything_runs_through_lax(run_python):
    code = f"{HIDE}\n{GRADIENT}\nassert native.cpu is None and native.cuda is None"
    assert run_python("-c", code).stdout.split() == ["0", "0"]


def test_a_broken_module_is_not_hidden(run_python):
    """A module that lacks something it imports must not pass for one that was not built."""
    code = HIDE.replace("name=name)", "name='another')") + "\nimport jax_convgrad"
    result = run_python("-c", code, check=False)
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr


def test_module_with_newer_headers_is_refused():
    major, minor = native.runtime_ffi_version()
    version = native.__version__
    native.check_module("m", version, (major, minor))
    native.check_module("m", version, (major, 0))
    for newer in ((major, minor + 1), (major + 1, 0)):
        with pytest.raises(ImportError, match=rf"m was built with XLA FFI {newer[0]}.{newer[1]}"):
            native.check_module("m", version, newer)


def test_module_of_another_release_is_refused():
    with pytest.raises(ImportError, match=r"built from jax-convgrad 0\.0\.1, but the package is"):
        native.check_module("m", "0.0.1", native.runtime_ffi_version())


@pytest.mark.native
def test_module_says_what_it_is():
    assert native.cpu.version == jax_convgrad.__version__
    assert native.cpu.ffi_api_version <= native.runtime_ffi_version()
    assert native.cpu.isa() in ("amx", "avx512_bf16", "avx512", "avx2", "portable")
    targets = {native.FUSED_TARGET, native.MAX_POOL_GRAD_TARGET, *native.TARGETS.values()}
    assert set(native.cpu.targets()) == targets


def test_lowering_for_a_platform_without_a_kernel_uses_lax():
    dy = jax.ShapeDtypeStruct(G.out_shape, "float32")
    w = jax.ShapeDtypeStruct(G.rhs_shape, "float32")

    @jax.jit
    def gradient(dy, w):
        return jax_convgrad.conv_input_grad(dy, w, G.lhs_shape, (2, 2), "SAME")

    text = jax.export.export(gradient, platforms=["tpu"])(dy, w).mlir_module()
    assert oracles.TARGET not in text
    assert "stablehlo.convolution" in text


@pytest.mark.native
def test_precision_reaches_the_call():
    def text(precision):
        function = jax.jit(
            lambda dy, w: jax_convgrad.conv_input_grad(
                dy, w, G.lhs_shape, (2, 2), "SAME", precision=precision, implementation="native"
            )
        )
        return function.lower(jnp.ones(G.out_shape), W).as_text()

    assert "allow_tf32 = true" in text(None)
    assert "allow_tf32 = true" in text("default")
    assert "allow_tf32 = false" in text("highest")
    with jax.default_matmul_precision("highest"):
        assert "allow_tf32 = false" in text(None)


@pytest.mark.skipif(native.cuda is None, reason="the CUDA module was not built")
def test_explanation_shows_how_a_cuda_kernel_cuts_the_problem_up():
    x = jax.ShapeDtypeStruct((64, 128, 56, 56), "float32")
    w = jax.ShapeDtypeStruct((128, 128, 3, 3), "float32")
    explanation = jax_convgrad.explain(
        x, w, (1, 1), "SAME", implementation="native", precision="highest", platform="cuda"
    )
    plan = explanation.plan
    assert plan.blocks > 0
    assert plan.threads % 32 == 0
    assert plan.model_us > 0
    assert explanation.waves == plan.blocks / (132 * plan.resident)
    assert 0 < explanation.reference_roofline_us < plan.model_us
    share = f"is {100 * explanation.reference_roofline_us / plan.model_us:.3g} % of that"
    words = (f"{plan.blocks} blocks", f"{plan.shared_bytes} B shared", "waves of", "model", share)
    for part in words:
        assert part in str(explanation)


@pytest.mark.native
def test_export_takes_the_exemption_that_the_readme_names(rng):
    dy, w = oracles.operands(rng, G, "float32")
    function = jax.jit(
        lambda dy, w: jax_convgrad.conv_input_grad(dy, w, G.lhs_shape, (2, 2), "SAME")
    )
    exemption = jax.export.DisabledSafetyCheck.custom_call(native.TARGET)
    with pytest.raises(ValueError, match=native.TARGET):
        jax.export.export(function)(dy, w)
    exported = jax.export.export(function, disabled_checks=[exemption])(dy, w)
    np.testing.assert_array_equal(exported.call(dy, w), function(dy, w))


@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [("float16", "float32"), ("int8", "int16"), ("int16", "float32"), ("bool", "int32"),
     ("bfloat16", "float16"), ("complex64", "complex64")],
)  # fmt: skip
def test_preferred_element_type_needs_no_promotion_rule(dtype, preferred):
    x, w = jnp.ones((1, 2, 4), dtype), jnp.ones((3, 2, 2), dtype)
    params = {"padding": "VALID", "preferred_element_type": preferred}
    with jax.numpy_dtype_promotion("strict"):
        ours = jax_convgrad.conv_general_dilated(x, w, (1,), **params)
        expected = lax.conv_general_dilated(x, w, (1,), **params)
        dx = jax_convgrad.conv_input_grad(jnp.ones((1, 3, 3), dtype), w, x.shape, **params)
    np.testing.assert_array_equal(ours, expected)
    assert dx.dtype == preferred
