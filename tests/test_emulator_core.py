"""The CUDA kernels on the CPU without JAX: quick, under sanitizers, and with mistakes put in."""

import subprocess

import pytest
from conftest import SEED
from emulator import build, cases, mutations

pytestmark = pytest.mark.emulator

if (reason := build.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)


def check(program, problems, mode, folder):
    result = mutations.run_core(program, problems, mode, folder)
    failed = [line for line in result.stdout.splitlines() if ": pass " not in line]
    assert result.returncode == 0, "\n".join(failed[:40])
    assert result.stdout.count(": pass ") > 0


@pytest.mark.parametrize("mode", cases.MODES, ids="eager{0[0]}-order{0[1]}".format)
def test_kernels_against_the_literal_sum(tmp_path, mode):
    # Each problem in one of the six modes, and in another one with another seed.
    small = cases.small_cases(10, SEED, 1 << 18)
    problems = list(cases.lines(small, most_groups=cases.MOST_GROUPS, first=SEED))
    first = (cases.MODES.index(mode) + SEED) % len(cases.MODES)
    check(build.core(), problems[first :: len(cases.MODES)], mode, tmp_path)


@pytest.mark.parametrize("mode", cases.MODES, ids="eager{0[0]}-order{0[1]}".format)
def test_wgmma_against_the_literal_sum(tmp_path, mode):
    # As above: the named cases, random ones, and the layers of the table made small.
    problems = list(cases.hopper_lines(cases.hopper_sweep(24, SEED)))
    first = (cases.MODES.index(mode) + SEED) % len(cases.MODES)
    check(build.core(), problems[first :: len(cases.MODES)], mode, tmp_path)


@pytest.mark.parametrize("kernel", cases.TILES)
def test_every_tile_against_the_literal_sum(tmp_path, kernel):
    if kernel == "wgmma":
        small = [*cases.hopper_cases(), *cases.copied_cases()]
    else:
        small = [
            case
            for case in cases.small_cases(0, SEED, 1 << 17)
            if case.geometry.groups <= cases.MOST_GROUPS
        ]
    lines = cases.tile_lines(kernel, small[SEED % 2 :: 2])
    check(build.core(), lines, cases.MODES[SEED % 6], tmp_path)


@pytest.mark.parametrize("mode", cases.MODES[:2], ids="eager{0[0]}-order{0[1]}".format)
def test_blocks_that_take_several_tiles(tmp_path, mode):
    check(build.core(), mutations.problems("walking"), mode, tmp_path)


def test_who_runs_is_named_before(tmp_path):
    """So that the last line says who hung, however the program was stopped."""
    case = next(case for case in cases.hopper_cases() if case.name == "hopper_wide")
    problems = cases.write(tmp_path / "problems", [cases.line(case, "bfloat16", kernel="tiled")])
    with subprocess.Popen([build.core(), problems], stdout=subprocess.PIPE) as process:
        first = process.stdout.read1()
        process.kill()
    assert first.startswith(b"hopper_wide bfloat16 tiled ")
    assert first.endswith(b": ")


def test_images_beyond_32_bit_offsets(tmp_path):
    check(build.core(), cases.far_lines(), cases.MODES[0], tmp_path)


def test_arrays_that_are_not_aligned(tmp_path):
    check(build.core(), cases.shifted_lines(), cases.MODES[1], tmp_path)


@pytest.mark.parametrize("shared_bytes", [40 << 10, 12 << 10])
def test_where_a_block_has_less_shared_memory(tmp_path, monkeypatch, shared_bytes):
    # Smaller tiles than usual, or other kernels.
    monkeypatch.setenv("CUDA_EMULATOR_SHARED", str(shared_bytes))
    problems = [
        cases.line(case, dtype)
        for case in cases.small_cases(0, SEED, 1 << 17)
        if case.name.startswith(("grouped", "few", "stem", "gray", "patch"))
        for dtype in ("float32", "bfloat16")
    ]
    check(build.core(), [*problems, *mutations.problems("walking")], cases.MODES[0], tmp_path)


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_where_a_device_has_few_multiprocessors(tmp_path, monkeypatch, multiprocessors):
    # Blocks that stay take all tiles of it.
    monkeypatch.setenv("CUDA_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
    small = [*cases.hopper_cases(), *cases.copied_cases()]
    check(build.core(), cases.hopper_lines(small), cases.MODES[SEED % 6], tmp_path)


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("variant", "most_products", "mode"),
    [("address", 1 << 17, ("0", "1")), ("thread", 1 << 13, ("1", "0"))],
)
def test_kernels_under_a_sanitizer(tmp_path, variant, most_products, mode):
    small = list(cases.small_cases(6, SEED, most_products))
    # Each in one dtype: the kernels differ by it in a template parameter.
    problems = [
        cases.line(case, cases.DTYPES[index % 4], special=index % 5 == 4, allow_tf32=index % 2 == 0)
        for index, case in enumerate(small)
    ]
    hopper = list(cases.hopper_lines([*cases.hopper_cases(), *cases.copied_cases()]))
    problems += hopper[SEED % 3 :: 3] if variant == "address" else hopper[SEED % 9 :: 9]
    check(build.core(variant), problems, mode, tmp_path)


@pytest.mark.mutation
@pytest.mark.parametrize("kind", ["values", "special"])
@pytest.mark.parametrize("variant", build.VARIANTS)
def test_without_a_mutation_all_is_well(tmp_path, variant, kind):
    check(build.core(variant), mutations.problems(kind), cases.MODES[0], tmp_path)


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(tmp_path, mutation):
    program = mutations.compile_mutant(mutation, tmp_path / "copy")
    problems = mutations.problems(mutation.check)
    result = mutations.run_core(program, problems, mutation.mode, tmp_path)
    expected = 1 if mutation.variant == "plain" else build.SANITIZER_STATUS
    assert result.returncode == expected, result.stdout[-2000:]


def test_every_mutation_still_applies(tmp_path):
    for index, mutation in enumerate(mutations.MUTATIONS):
        mutations.apply(mutation, tmp_path / str(index))


def test_the_documented_table_is_that_of_the_mutations():
    text = (build.ROOT / "docs/cuda.md").read_text()
    assert "\n".join(mutations.table()) in text
