"""The CUDA emulator: its primitives against models, and the mistakes that it must report."""

import pathlib
import subprocess

import pytest
from emulator import build

pytestmark = pytest.mark.emulator

if (reason := build.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

# kernel of planted_bugs.cu: (variant, eager copies, what is reported)
PLANTED = {
    "ReadOutOfBounds": ("address", "0", "heap-buffer-overflow"),
    "SharedOverflow": ("address", "0", "heap-buffer-overflow"),
    "MisalignedVector": ("address", "0", "misaligned address"),
    "MissingBarrier": ("thread", "0", "data race"),
    "MissingTrailingBarrier": ("thread", "1", "data race"),
    "ShuffleForBarrier": ("thread", "0", "data race"),
    "MissingCopyWait": ("plain", "0", "wrong: element 0 is nan"),
    "DivergentBarrier": ("plain", "0", "divergent barrier: __syncthreads at"),
    "EarlyExit": ("plain", "0", "divergent barrier: the thread exited"),
    "DivergentWarp": ("plain", "0", "divergent warp: __shfl_sync at"),
    "Deadlock": ("plain", "0", "deadlock; from thread 0 on in __syncwarp at"),
    "ShuffleFromNobody": ("plain", "0", "lane 3 reads lane 20, which takes no part"),
    "MisalignedCopy": ("plain", "0", "CopyAsync at"),
    "MisalignedMatrix": ("plain", "0", "the row is not aligned to 16 bytes"),
    "StaticSharedUnwritten": ("plain", "0", "wrong: element 0 is nan"),
    "DynamicSharedUnwritten": ("plain", "0", "wrong: element 0 is nan"),
    "TooManyThreads": ("plain", "0", "error: invalid configuration argument"),
    "NoThreads": ("plain", "0", "error: invalid configuration argument"),
    "TooMuchShared": ("plain", "0", "error: invalid argument"),
}

# kernel of planted_hopper_bugs.cu: (eager copies and products, order, what is reported)
PLANTED_HOPPER = {
    "TooFewBytes": ("0", "1", "a barrier that lacks -16384 bytes"),
    "TooManyBytes": ("0", "0", "deadlock; from thread 0 on in MbarrierWait at"),
    "WrongParity": ("1", "0", "deadlock; from thread 0 on in MbarrierWait at"),
    "NoWaitForData": ("0", "0", "more arrivals than the 1 that the barrier counts"),
    "NoWaitForSpace": ("0", "0", "more arrivals than the 1 that the barrier counts"),
    "EarlyRelease": ("0", "1", "wrong: element 0 is"),
    "NoWaitForSums": ("0", "0", "wrong: element 0 is 0"),
    "NoProductFence": ("1", "0", "no WgmmaFence since the last group"),
    "NoInitFence": ("0", "0", "the barrier's initialisation has not been fenced"),
    "NoBarrierAfterInit": ("0", "1", "the barrier is not initialised"),
    "MisalignedBox": ("0", "0", "the address is not aligned to 128 bytes"),
    "TooSmallCount": ("1", "1", "deadlock; from thread 0 on in MbarrierWait at"),
    "OtherRows": ("1", "0", "the warps' operands differ"),
    "LeftCopy": ("0", "0", "the block ended with a barrier that lacks 8192 bytes"),
    "NoProxyFence": ("1", "0", "a store that no FenceProxyAsync has shown it"),
    "NoProxyFenceAfterCopy": ("1", "0", "a store that no FenceProxyAsync has shown it"),
    "ProxyFenceBeforeWait": ("0", "1", "a store that no FenceProxyAsync has shown it"),
    "OneThreadFences": ("0", "0", "a store that no FenceProxyAsync has shown it"),
}


def run(path, *arguments, eager="0", order="0"):
    """Runs a program of the emulator; its status and everything that it printed."""
    settings = {"CUDA_EMULATOR_EAGER": eager, "CUDA_EMULATOR_ORDER": order}
    result = subprocess.run(
        [path, *arguments],
        env={**build.SANITIZER_OPTIONS, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return result.returncode, result.stdout


@pytest.fixture(scope="module")
def program():
    """Builds a source of the emulator's own tests, by name and variant."""

    def get(name, variant="plain", **options):
        return build.program([build.EMULATOR / name], variant, **options)

    return get


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_reported(program, name):
    variant, eager, report = PLANTED[name]
    status, text = run(program("planted_bugs.cu", variant), name, "planted", eager=eager)
    assert status != 0
    assert report in text, text


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_correct_twin_is_silent(program, variant):
    path = program("planted_bugs.cu", variant)
    for name in PLANTED:
        for eager, order in (("0", "0"), ("1", "1"), ("0", "5")):
            assert run(path, name, "correct", eager=eager, order=order) == (0, ""), name


def test_every_planted_bug_has_a_row():
    source = pathlib.Path(build.ROOT, build.EMULATOR, "planted_bugs.cu").read_text()
    assert [name for name in PLANTED if name not in source] == []
    assert source.count("PAIR(") - 1 == len(PLANTED) - 3  # three are configurations


@pytest.mark.parametrize("name", PLANTED_HOPPER)
def test_planted_bug_of_sm_90a_is_reported(program, name):
    eager, order, report = PLANTED_HOPPER[name]
    path = program("planted_hopper_bugs.cu")
    status, text = run(path, name, "planted", eager=eager, order=order)
    assert status != 0
    assert report in text, text


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_correct_twin_for_sm_90a_is_silent(program, variant):
    path = program("planted_hopper_bugs.cu", variant)
    for name in ("TooFewBytes", "NoProxyFence", "ProxyFenceBeforeWait"):  # all twins
        for eager, order in (("0", "0"), ("1", "1"), ("0", "5"), ("1", "9")):
            assert run(path, name, "correct", eager=eager, order=order) == (0, ""), name


def test_every_planted_bug_of_sm_90a_has_a_row():
    source = pathlib.Path(build.ROOT, build.EMULATOR, "planted_hopper_bugs.cu").read_text()
    bugs = source.split("enum class Bug {")[1].split("}")[0].replace(",", " ").split()
    assert sorted(bugs) == sorted(["kNone", *(f"k{name}" for name in PLANTED_HOPPER)])


@pytest.mark.parametrize("source", ["primitives.cu", "hopper_primitives.cu"])
@pytest.mark.parametrize("eager", ["0", "1"])
@pytest.mark.parametrize("order", ["0", "1", "9"])
def test_primitives(program, source, eager, order):
    assert run(program(source), eager=eager, order=order) == (0, "0 failures\n")


@pytest.mark.sanitizer
def test_primitives_of_sm_90a_under_address_sanitizer(program):
    assert run(program("hopper_primitives.cu", "address")) == (0, "0 failures\n")


def test_primitives_where_fibres_are_ucontexts(program):
    path = program("primitives.cu", flags=("-DCUDA_EMULATOR_UCONTEXT",))
    assert run(path, order="1") == (0, "0 failures\n")
