"""Fresh random data with a seed that is printed, and skips that CI turns into failures."""

import os
import re
import secrets
import subprocess
import sys
import zlib

# In the environment, so that the workers of a parallel run draw the same geometries.
os.environ.setdefault("JAX_CONVGRAD_TEST_SEED", str(secrets.randbits(31)))
SEED = int(os.environ["JAX_CONVGRAD_TEST_SEED"])
# The kernel wherever it covers a case, also where lax is preferred for its speed.
os.environ["JAX_CONVGRAD"] = "on"
# Eight CPU devices, for programs that are split over several. The others run on the first.
DEVICES_FLAG = "--xla_force_host_platform_device_count=8"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import machine_code  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import jax_convgrad  # noqa: E402
from jax_convgrad import native  # noqa: E402
from jax_convgrad.tools.machine import usable_cores  # noqa: E402

hypothesis.settings.register_profile(
    "convgrad", database=None, deadline=None, print_blob=True, max_examples=60
)
hypothesis.settings.load_profile("convgrad")

# Of a run of the whole suite: each takes up to 3 GB.
MOST_PROCESSES = 4
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# marker: the variable that turns its skips into failures
MODULES = {
    "native": "JAX_CONVGRAD_REQUIRE_NATIVE",
    "cuda": "JAX_CONVGRAD_REQUIRE_CUDA",
    "static": "JAX_CONVGRAD_REQUIRE_STATIC",
}


def chosen(config, *markers):
    """Whether `-m` asks for tests with one of these markers."""
    return any(re.search(rf"(?<!\bnot ){m}\b", config.option.markexpr) for m in markers)


def missing(marker):
    """What a marked test lacks on this machine, or None."""
    if marker == "native":
        return "the CPU module was not built" if native.cpu is None else None
    if native.cuda is None:
        return "the CUDA module was not built"
    if marker == "static":
        return machine_code.missing()
    try:
        jax.devices("cuda")
    except RuntimeError as e:
        return f"no GPU: {e}"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Spreads a run of the whole suite over processes, where pytest-xdist is there to do it.

    By files, whose tests share compiled programs. `-n` says otherwise, `-n 0` for one process.
    """
    whole = config.args_source is config.ArgsSource.TESTPATHS and not config.option.keyword
    apart = chosen(config, "cuda", "static")  # one memory; a table is printed
    # A worker's options are not those of the command line.
    free = not (config.option.usepdb or apart or IS_WORKER)
    processes = min(MOST_PROCESSES, usable_cores())
    if whole and free and processes > 1 and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = processes
        # Mutants have a program each, and all are in one file.
        config.option.dist = "worksteal" if chosen(config, "mutation") else "loadfile"
        # By default files of many tests come first. The slow ones have few, and would be last,
        # on one process.
        config.option.loadscopereorder = False


def pytest_configure(config):
    if IS_WORKER:
        # Each process would else take most of a GPU's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Programs are small and run once: optimising them took half of the time. Not for a GPU's
    # own run; the programs of run_python and examples/ are compiled as users' are.
    if not chosen(config, "cuda") and "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        jax.config.update("jax_disable_most_optimizations", True)
    # Not on import, which the programs of run_python do too: each device has a pool of threads.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES_FLAG}".strip()
    config.addinivalue_line("markers", "native: needs the compiled CPU module")


# Run only by -m with their name. Where one stands beside `emulator`, by that one alone.
LONG = ("slow", "thorough", "emulator", "sanitizer", "cross", "mutation", "static")


def pytest_collection_modifyitems(config, items):
    left_out = {marker for marker in LONG if not chosen(config, marker)}

    def is_left_out(item):
        markers = {marker.name for marker in item.iter_markers()} & set(LONG)
        return bool((markers - {"emulator"} or markers) & left_out)

    deselected = set(filter(is_left_out, items))
    if deselected:
        config.hook.pytest_deselected(items=list(deselected))
        items[:] = [item for item in items if item not in deselected]


def pytest_report_header():
    kernels = "not built" if native.cpu is None else f"{native.cpu.isa()}"
    return [
        f"jax {jax.__version__}, jax_convgrad {jax_convgrad.__version__}, CPU module {kernels}, "
        f"CUDA module {'not built' if native.cuda is None else 'built'}",
        f"JAX_CONVGRAD_TEST_SEED={SEED}",
    ]


def lacks(marker, reason):
    """Skips the test, or fails it where that is forbidden."""
    if os.environ.get(variable := MODULES[marker]) == "1":
        pytest.fail(f"{reason}, and {variable}=1", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item):
    for marker in MODULES:
        if item.get_closest_marker(marker) is not None and (reason := missing(marker)):
            lacks(marker, reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("random data", f"reproduce with JAX_CONVGRAD_TEST_SEED={SEED}"))
    return report


@pytest.fixture
def rng(request):
    """A generator of its own for every test, of this run's seed."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_one_file():
    """Compiled programs are hardly shared between files, and gigabytes of them pile up."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """64-bit types inside this test only."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Each platform's first device, made the default one."""
    found = jax.devices(request.param)[0]
    with jax.default_device(found):
        yield found


@pytest.fixture
def run_python():
    """Runs code in a fresh interpreter that imports the package from where this one did."""

    def run(*arguments, check=True, timeout_s=240, **environment):
        env = {k: v for k, v in os.environ.items() if k not in ("JAX_CONVGRAD", "XLA_FLAGS")}
        places = [os.path.dirname(path) for path in jax_convgrad.__path__]
        places.append(os.path.dirname(__file__))
        env["PYTHONPATH"] = os.pathsep.join(places)
        env["JAX_PLATFORMS"] = "cpu"
        env.update(environment)
        result = subprocess.run(
            [sys.executable, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            # Away from a checkout, whose source tree would hide the installed package.
            cwd=os.path.dirname(__file__),
        )
        if check:
            assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result

    return run
