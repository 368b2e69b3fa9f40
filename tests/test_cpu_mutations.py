"""Mistakes in the filter gradient's kernel and planner, each of which the driver notices."""

import dataclasses
import shutil

import cpu_programs
import pytest
from emulator import build, cases, mutations
from test_cpu_driver import problems

from jax_convgrad.tools.geometries import Case, make_geometry

if (reason := build.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

_CHUNK, _DOTS, _KERNEL, _PACK, _PLAN, _WRITE = (
    f"csrc/cpu/filter/{name}"
    for name in ("chunk.h", "dots.h", "outer.h", "pack.h", "plan.cc", "write.h")
)


def _mutation(name: str, file: str, old: str, new: str, count: int = 1) -> mutations.Mutation:
    return mutations.Mutation(name, file, old, new, count=count)


MUTATIONS = (
    _mutation("a sum forgets the chunks before", _KERNEL, "i % plan.run != 0", "false"),
    _mutation("a run's sum starts with the last run's", _KERNEL,
              "const bool add = i % plan.run != 0", "const bool add = i != 0"),
    _mutation("a row of the total is left out", _KERNEL,
              "(end - 1) / slice.channels", "(end - 1) / slice.channels - 1"),
    _mutation("copies are not all added", _WRITE,
              "step = 1; step < copies", "step = 1; 2 * step < copies"),
    _mutation("tiles of a tap take the next tap's positions", _KERNEL,
              "if (each_tap) end = Min", "if (false) end = Min"),
    _mutation("the low end of padding is off by one", _CHUNK,
              "Max(0, Ceil(-at, axis.stride))", "Max(0, Ceil(1 - at, axis.stride))"),
    _mutation("the high end of padding is off by one", _CHUNK,
              "last / axis.stride + 1", "last / axis.stride"),
    _mutation("padding is not cleared", _PACK, "Clear(to, before * width);", ""),
    _mutation("what lies behind x is not cleared", _PACK,
              "Clear(to + end * width, (side.x_count - end) * width);", ""),
    _mutation("rows outside x are not cleared", _PACK,
              "            Clear(to, side.x_count * width);\n            continue;",
              "            continue;"),
    _mutation("NaN and Inf of dY are not noticed", _PACK,
              "return HasNonfinite(total);", "return false;"),
    _mutation("a step between positions that a tap meets", _CHUNK,
              "m.x_step = m.step * axis.stride / axis.lhs_dilation", "m.x_step = m.step"),
    _mutation("the last channels of a slice", _CHUNK,
              "Min(kSliceChannels, a.problem.in_channels - first)", "kSliceChannels"),
    _mutation("lanes of the wrong group", _WRITE,
              "of_lane[l] = g * p.w.group +", "of_lane[l] ="),
    _mutation("permuted lanes of the wrong channel", _PACK, "i / k * k + c)", "i / k * k)"),
    _mutation("by rows, every block takes the first one's dY", _KERNEL,
              "y + u * plan.packed_y + y_first", "y + y_first"),
    _mutation("by rows, a tile is written where the slice begins", _KERNEL,
              "PlaceRows(a, slice, row, end)", "PlaceRows(a, slice, 0, end - row)"),
    _mutation("squares of the first channel alone", _WRITE,
              "int64_t c = run, t = 0;", "int64_t c = 0, t = 0;"),
    _mutation("taps of a lane that lie backwards are written forwards", _WRITE,
              "backwards ? taps - 1 - t : t", "t"),
    _mutation("squares of a lane's taps that lie backwards are written forwards", _WRITE,
              "backwards ? taps - 1 - (t + i) : t + i", "t + i"),
    _mutation("positions that the last vector has had count again", _DOTS,
              "(N - rest)", "(N - rest - 1)"),
    _mutation("all out channels of a block in the place of the first", _DOTS,
              "row * kBlock<A> + k;", "row * kBlock<A>;"),
    _mutation("at once, a slice is written where dW begins", _DOTS,
              "slice.first * p.w.in_channel;", "0;"),
    _mutation("rows of x are a row of dY apart", _DOTS,
              "p.axis[i].stride * p.dx.axis[i]", "p.dx.axis[i]"),
    _mutation("an empty position counts", _PLAN,
              "const int64_t dilation = x.win == 1 ? 0 : x.rhs_dilation;",
              "const int64_t dilation = x.win == 1 ? 0 : 1;"),
    _mutation("padding goes unseen at the end", _PLAN, "|| last >= x.in", "|| last > x.in + 1"),
    _mutation("taps are a stride apart", _PLAN,
              "plan.tap_step[a] = dilation / step", "plan.tap_step[a] = x.stride / step"),
    _mutation("chunks leave out the rest", _PLAN,
              "plan->grid[i] = CeilDiv(sizes[i], plan->chunk[i])",
              "plan->grid[i] = sizes[i] / plan->chunk[i]"),
    _mutation("each tap begins where the first does", _PLAN,
              "a < kAxes && !plan.each_tap", "a < kAxes"),
    _mutation("dW begins with its first tap also if exchanged", _PLAN,
              "way.w_at * SizeInBytes", "0 * SizeInBytes"),
    _mutation("images in a row are counted as before", _PLAN, "  p.batch = 1;\n", ""),
)  # fmt: skip


# Private copies of dW, which only a large problem has, and padding behind the last x alone.
CASES = (
    Case("split", make_geometry((64, 64), (3, 3), (16, 24), padding=1)),
    Case("padded_behind", make_geometry((2, 2), (2, 2), (5, 17), padding=((0, 1), (0, 1)))),
)


def _lines() -> list[str]:
    more = [
        cases.line(case, "float32", platform="cpu", allow_tf32=False, special=special)
        for case in CASES
        for special in (False, True)
    ]
    return [*problems(1 << 19, 60, ("float32", "bfloat16")), *more]


@pytest.mark.mutation
def test_without_a_mutation_all_is_well(tmp_path):
    program = cpu_programs.driver(build.VARIANTS["plain"])
    result = cpu_programs.run(program, _lines(), tmp_path, threads="1,3")
    cpu_programs.check(result, "portable")


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(tmp_path, mutation):
    copy = mutations.apply(mutation, tmp_path / "copy")
    shutil.copy(build.ROOT / cpu_programs.DRIVER, copy / cpu_programs.DRIVER)
    program = cpu_programs.driver((*build.VARIANTS["plain"], "-w"), root=copy)
    result = cpu_programs.run(program, _lines(), tmp_path, threads="1,3")
    assert result.returncode != 0, result.stdout[-2000:]  # a crash, too
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL ")]
    assert all(" filter:" in line for line in failed), failed[:5]


def test_every_mutation_still_applies(tmp_path):
    for index, mutation in enumerate(MUTATIONS):
        mutations.apply(mutation, tmp_path / str(index))
    assert len({dataclasses.astuple(mutation) for mutation in MUTATIONS}) == len(MUTATIONS)
