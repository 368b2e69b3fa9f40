"""`jax.export`: programs with the kernel, serialised, and run by a process of their own."""

import functools

import jax
import numpy as np
import oracles
import pytest
from jax import export

import jax_convgrad
from jax_convgrad import native
from jax_convgrad.tools import geometries

GEOMETRY = oracles.geometry((2, 6, 9, 8), (4, 3, 3, 2), (2, 1), "SAME", feature_group_count=2)


def gradient(g=GEOMETRY, **options):
    """The function of (x, w, dy) whose results are dX and dW."""
    conv = functools.partial(
        jax_convgrad.conv_general_dilated, **g.conv_params(), precision="highest", **options
    )
    return lambda x, w, dy: jax.vjp(conv, x, w)[1](dy)


def operands(rng, g=GEOMETRY, dtype="float32"):
    """Standard normal x, w and dy."""
    shapes = (g.lhs_shape, g.rhs_shape, g.out_shape)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def specs(arrays):
    return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]


def exported(function, args, platforms=("cpu",)):
    checks = jax_convgrad.export_checks()
    return export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*args)


def calls(program):
    """How many of this package's custom calls an exported program holds."""
    return program.mlir_module().count(oracles.TARGET)


def assert_close(actual, expected, g=GEOMETRY):
    error = geometries.normwise_error(actual, expected)
    assert error <= geometries.tolerance("float32", geometries.reduction_taps(g)), error


# Runs the program in one file on the arguments in another.
RUN = """
import pathlib, sys
import numpy as np
from jax import export
{imports}
program = export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
arguments = np.load(sys.argv[2])
results = {call}
np.savez(sys.argv[3], *results)
"""
CALL = "program.call(*(arguments[name] for name in arguments))"


@pytest.fixture
def run_exported(run_python, tmp_path):
    """Runs an exported program in a fresh process, whose result it returns."""
    pytest.importorskip("flatbuffers")

    def run(program, arguments, imports="import jax_convgrad", call=CALL, **options):
        paths = [tmp_path / name for name in ("program", "arguments.npz", "results.npz")]
        paths[0].write_bytes(program.serialize())
        np.savez(paths[1], *arguments)
        code = RUN.format(imports=imports, call=call)
        process = run_python("-W", "error", "-c", code, *map(str, paths), **options)
        if process.returncode != 0:
            return process
        with np.load(paths[2]) as results:
            return [results[name] for name in results]

    return run


@pytest.mark.native
def test_without_the_checks_jax_refuses(rng):
    with pytest.raises(ValueError, match=native.TARGET):
        export.export(jax.jit(gradient()), platforms=("cpu",))(*specs(operands(rng)))


@pytest.mark.native
def test_a_fresh_process_runs_it(rng, run_exported):
    x, w, dy = operands(rng)
    program = exported(gradient(), specs([x, w, dy]), ("cpu", "cuda"))
    dx, dw = run_exported(program, [x, w, dy])
    assert_close(dx, oracles.lax_input_grad(dy, w, GEOMETRY))
    np.testing.assert_array_equal(dw, jax.jit(gradient())(x, w, dy)[1])


@pytest.mark.native
def test_a_process_without_the_package_says_what_is_missing(rng, run_exported):
    arguments = operands(rng)
    program = exported(gradient(), specs(arguments))
    process = run_exported(program, arguments, imports="", check=False)
    assert process.returncode != 0
    assert any(target in process.stderr for target in native.TARGETS.values()), process.stderr


@pytest.mark.native
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("cpu", "cuda"), ("tpu", "cpu")])
def test_platforms_that_need_not_be_here(rng, platforms, implementation):
    args = specs(operands(rng))
    program = exported(gradient(implementation=implementation), args, platforms)
    assert program.platforms == platforms
    # The tests' JAX_CONVGRAD=on lets the CUDA kernel run wherever its module was built.
    served = {"cpu": native.cpu is not None, "cuda": native.cuda is not None, "tpu": False}
    expected = sum(map(served.get, platforms)) if implementation is None else 0
    assert calls(program) == expected


def test_native_for_a_platform_without_a_kernel_says_why(rng):
    args = specs(operands(rng))
    with pytest.raises(ValueError, match=r"native.*no kernel for platform"):
        exported(gradient(implementation="native"), args, ("tpu",))
    if native.cuda is None:
        with pytest.raises(ValueError, match=r"native.*cuda module was not built"):
            exported(gradient(implementation="native"), args, ("cuda",))


@pytest.mark.native
def test_installed_program(rng):
    x, w, dy = operands(rng)
    conv = oracles.lax_conv(GEOMETRY, precision="highest")
    with jax_convgrad.installed():
        program = exported(lambda x, w, dy: jax.vjp(conv, x, w)[1](dy)[0], specs([x, w, dy]))
    assert calls(program) == 1
    assert_close(program.call(x, w, dy), oracles.lax_input_grad(dy, w, GEOMETRY))


@pytest.mark.native
def test_an_exported_function_has_a_gradient(rng):
    """Serialised with its derivatives: vjp_order in JAX's terms."""
    x, w, dy = operands(rng)
    conv = functools.partial(jax_convgrad.conv_general_dilated, **GEOMETRY.conv_params())
    program = exported(conv, specs([x, w]))
    assert calls(program) == 0
    dx = jax.vjp(program.call, x, w)[1](dy)[0]
    assert_close(dx, oracles.lax_input_grad(dy, w, GEOMETRY))
    assert calls(program.vjp()) == 1


SHARDED = """
import functools, pathlib, sys
import jax, jax.numpy as jnp, numpy as np, jax_convgrad, oracles
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
conv = functools.partial(
    jax_convgrad.conv_general_dilated, window_strides=(2,), padding="SAME"
)
def local(x, w):
    return jax.grad(lambda x: jnp.sum(jnp.sin(conv(x, w))))(x)
function = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d")))
"""
SHARDED_EXPORT = """
args = [jax.ShapeDtypeStruct(s, "float32") for s in ((16, 3, 10), (4, 3, 3))]
program = export.export(
    function, platforms=("cpu",), disabled_checks=jax_convgrad.export_checks()
)(*args)
assert program.nr_devices == 8
assert program.mlir_module().count(oracles.TARGET) == 1
pathlib.Path(sys.argv[1]).write_bytes(program.serialize())
"""
SHARDED_RUN = """
program = export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
rng = np.random.default_rng(7)
x, w = (rng.standard_normal(s).astype("f4") for s in ((16, 3, 10), (4, 3, 3)))
shardings = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
dx = jax.jit(program.call, in_shardings=shardings)(x, w)
expected = jax.grad(
    lambda x: jnp.sum(jnp.sin(lax.conv_general_dilated(x, w, (2,), "SAME")))
)(x)
np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)
assert len(dx.devices()) == 8
"""


@pytest.mark.native
def test_shard_map_over_eight_devices(run_python, tmp_path):
    pytest.importorskip("flatbuffers")
    for code in (SHARDED_EXPORT, SHARDED_RUN):
        run_python(
            "-W", "error", "-c", SHARDED + code, str(tmp_path / "program"),
            XLA_FLAGS="--xla_force_host_platform_device_count=8",
        )  # fmt: skip


AUTOMATIC = """
import functools
import jax, jax.numpy as jnp, jax_convgrad, oracles
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
def program(implementation):
    conv = functools.partial(jax_convgrad.conv_general_dilated, implementation=implementation)
    dx = jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w, (2,), "SAME"))))
    shardings = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    args = [jax.ShapeDtypeStruct(s, "float32") for s in ((16, 3, 10), (4, 3, 3))]
    checks = jax_convgrad.export_checks()
    return export.export(
        jax.jit(dx, in_shardings=shardings), platforms=("cpu",), disabled_checks=checks
    )(*args)
for implementation in (None, "xla"):
    exported = program(implementation)
    assert exported.nr_devices == 8
    assert exported.mlir_module().count(oracles.TARGET) == 0
try:
    program("native")
except ValueError as e:
    assert "implementation='xla'" in str(e) and "exported" in str(e), e
else:
    raise AssertionError("nothing was raised")
"""


@pytest.mark.native
def test_program_that_xla_partitions(run_python):
    flags = "--xla_force_host_platform_device_count=8"
    run_python("-W", "error", "-c", AUTOMATIC, XLA_FLAGS=flags)


@pytest.mark.native
def test_ahead_of_time_compilation(rng):
    x, w, dy = operands(rng)
    lowered = jax.jit(gradient()).lower(x, w, dy)
    assert oracles.TARGET in lowered.as_text()
    compiled = lowered.compile()
    assert native.TARGET in compiled.as_text()
    # Of XLA, which does not know what a custom call costs.
    assert compiled.cost_analysis()["bytes accessed"] > 0
    assert compiled.memory_analysis() is not None
    assert_close(compiled(x, w, dy)[0], oracles.lax_input_grad(dy, w, GEOMETRY))


def test_lowering_for_an_absent_platform(rng):
    traced = jax.jit(gradient()).trace(*specs(operands(rng)))
    assert "stablehlo.convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert traced.lower(lowering_platforms=("cuda",)).as_text()
