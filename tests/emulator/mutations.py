"""Deliberate mistakes in the CUDA sources, each of which a check has to catch.

A mutation replaces one piece of text, which must occur exactly as often as the row says,
in a copy of the sources. The copy is compiled into core.cc's program, which then runs over
this file's problems in the mode that is meant to notice.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterable

from jax_convgrad.tools.geometries import Case, make_geometry

from . import build, cases


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One mistake, and what notices it.

    `check` is the kind of problem: "values" or "special" (NaN and Inf). `variant` is that
    of `build.VARIANTS`, and `mode` a row of `cases.MODES`.
    """

    name: str
    file: str
    old: str
    new: str
    check: str = "values"
    variant: str = "plain"
    mode: tuple[str, str] = cases.MODES[0]
    count: int = 1  # occurrences of `old`


_DIRECT, _TILED = "csrc/cuda/direct.cuh", "csrc/cuda/tiled.cuh"
_GEOMETRY, _PHASE = "csrc/cuda/geometry.cuh", "csrc/phase.h"
_MMA, _DEPTHWISE = "csrc/cuda/mma.cuh", "csrc/cuda/depthwise.cuh"
_PLATFORM, _KERNEL = "csrc/cuda/platform.cuh", "csrc/kernel.cu"

_PUBLISH_BARRIER = "const bool masked = __syncthreads_or(special) != 0;"

MUTATIONS = [
    # ---- geometry, shared by the rungs
    Mutation("first live tap one too late", _GEOMETRY,
             "a.p_per_r.Quotient(p_low - a.out) + 1", "a.p_per_r.Quotient(p_low - a.out) + 2"),
    Mutation("first live tap one too early", _GEOMETRY,
             "a.p_per_r.Quotient(p_low - a.out) + 1", "a.p_per_r.Quotient(p_low - a.out)",
             variant="address"),
    Mutation("last tap of a phase dropped", _GEOMETRY,
             "reached < r_count ? reached : r_count - 1",
             "reached < r_count ? reached : r_count - 2"),
    Mutation("tap beyond the phase", _GEOMETRY,
             "reached < r_count ? reached : r_count - 1", "reached", variant="address"),
    Mutation("phase table shifted", _GEOMETRY,
             "MakePhase(from, phase);", "MakePhase(from, phase + 1);"),
    Mutation("division rounds wrong", _GEOMETRY, "(power + d - 1) / d", "power / d"),
    Mutation("phases beyond the table in the wrong place", _GEOMETRY,
             "const Phase f = MakePhase(a.axis, phase);",
             "const Phase f = MakePhase(a.axis, phase - 1);"),
    Mutation("phase offset ignores the padding", _PHASE,
             "phase * a.lhs_dilation + a.pad_lo", "phase * a.lhs_dilation"),
    # ---- types and planner
    Mutation("bfloat16 sums are narrowed as they grow", _DIRECT,
             "    dx[dx_at] = Narrow(sum, T{});", "    dx[dx_at] = Narrow(sum * 1.02f, T{});"),
    Mutation("64-bit problems sent to 32-bit kernels", _KERNEL,
             "const bool small = FitsIn32Bits(problem, 0);", "const bool small = true;"),
    # ---- direct
    Mutation("direct reads one channel too many", _DIRECT,
             "k < g.out_channels", "k <= g.out_channels", variant="address"),
    Mutation("direct leaves the last element", _DIRECT,
             "id < static_cast<Count>(params.outputs)",
             "id + 1 < static_cast<Count>(params.outputs)"),
    Mutation("direct writes one step too far", _DIRECT,
             "dx_at += i * dimension.dx;", "dx_at += (i + 1) * dimension.dx;",
             variant="address"),
    # ---- tiled
    Mutation("tiled without the barrier that publishes rows", _TILED,
             "    rows[r] = row;\n  }\n  __syncthreads();", "    rows[r] = row;\n  }",
             mode=("0", "1")),
    Mutation("tiled without the barrier that publishes a slice", _TILED,
             _PUBLISH_BARRIER, "const bool masked = special;", variant="thread"),
    Mutation("tiled combines no verdicts about W", _TILED,
             _PUBLISH_BARRIER, "__syncthreads(); const bool masked = special;", check="special"),
    Mutation("tiled never masks", _TILED,
             _PUBLISH_BARRIER, "__syncthreads(); const bool masked = false;", check="special"),
    Mutation("tiled has one buffer only", _TILED,
             "static_cast<int>(slice & 1)", "static_cast<int>(0)", mode=("0", "1")),
    Mutation("tiled publishes into the buffer being read", _TILED,
             "publish(buffer ^ 1)", "publish(buffer)"),
    Mutation("tiled ignores that K ends within a slice", _TILED,
             "(w_inside >> j & 1) && w_k + j * w_step.k < k_left", "(w_inside >> j & 1)",
             variant="address"),
    Mutation("tiled reads W beyond its channels", _TILED,
             "(w_inside >> j & 1) && w_k", "w_k", variant="address"),
    Mutation("tiled takes padding for dY", _TILED,
             "(dy_inside >> j & 1) && dy_k", "dy_k", variant="address"),
    Mutation("tiled stores rows beyond the last", _TILED,
             "if (m0 + row_of(i) >= row_count) continue;", ""),
    Mutation("tiled stores channels beyond the last", _TILED,
             "if (c + j < g.in_channels) {", "{", variant="address"),
    Mutation("tiled stores unaligned vectors", _TILED,
             "if (problem.dx.axis[i] % S::kVector != 0) params.vector_store = false;", "",
             variant="address"),
    Mutation("tiled drops taps at a tile's edge", _TILED,
             "together ? first.p[a] : lowest, together ? last.p[a] : highest",
             "first.p[a], last.p[a]"),
    # ---- mma. Finite poison: it repairs results that are not finite.
    Mutation("mma waits for one copy too few", _MMA,
             "CopyAsyncWait<kMmaStages - 2>()", "CopyAsyncWait<kMmaStages - 1>()",
             mode=("0", "1")),
    Mutation("mma without the barrier of its ring", _MMA,
             "    CopyAsyncWait<kMmaStages - 2>();\n    __syncthreads();",
             "    CopyAsyncWait<kMmaStages - 2>();\n    __syncwarp();", mode=("0", "1")),
    Mutation("mma copies into the stage being read", _MMA,
             "if (more) begin_copies(free_stage);", "if (more) begin_copies(stage);",
             mode=("1", "1")),
    Mutation("mma_3xtf32 without one of its products", _MMA,
             "Mma(part[j], a_lo, b[j], T{});", "Mma(part[j], a, b_lo[j], T{});"),
    Mutation("mma reads a row of B at the wrong place", _MMA,
             "(chunk ^ lane % 8)", "chunk"),
    Mutation("mma takes padding for dY", _MMA,
             "inside >> j & 1 ? a_valid : 0", "a_valid", variant="address"),
    Mutation("mma transposes half a quad", _MMA, "bit <= 2", "bit <= 1"),
    # ---- depthwise
    Mutation("depthwise ring without the barrier that publishes filters", _DEPTHWISE,
             "  __syncthreads();\n  int32_t rest = first + thread;",
             "  int32_t rest = first + thread;", mode=("0", "1")),
    Mutation("depthwise ring turns by one row, whatever the stride", _DEPTHWISE,
             "(S::kStepH * turn + r) % S::kRows", "(turn + r) % S::kRows", count=3),
    Mutation("depthwise ring loads a row below the last", _DEPTHWISE,
             "uint32_t exist = j < lattice_h.count ? reads : 0;", "uint32_t exist = reads;",
             variant="address"),
    Mutation("depthwise ring skips a row of dY that reaches into a strip", _DEPTHWISE,
             "int32_t j = i_begin - S::kHaloH;", "int32_t j = i_begin - S::kHaloH + 1;"),
    Mutation("depthwise ring takes filters beyond the last", _DEPTHWISE,
             "if (group >= params.groups) group -= params.groups;", "", variant="address"),
    Mutation("depthwise ring repairs nothing", _DEPTHWISE,
             "if (finite) return;", "if (finite || n >= 0) return;", check="special"),
    Mutation("depthwise window repairs nothing", _DEPTHWISE,
             "if (special == 0) return;", "return;", check="special"),
    Mutation("depthwise window slides the wrong way", _DEPTHWISE,
             "window[(kRun - turn) % kRun]", "window[turn % kRun]"),
    Mutation("depthwise window stages over rows being read", _DEPTHWISE,
             "    __syncthreads();  // nobody reads the rows before\n", ""),
    Mutation("depthwise window loads before the first column", _DEPTHWISE,
             "step(turn, at >= 0);", "step(turn, true);", variant="address"),
    Mutation("depthwise lattices in the wrong order", _DEPTHWISE,
             "p0 = p0 * a.inverse % a.spacing;", ""),
    Mutation("part of a block leaves before a barrier", _TILED,
             "  Acc sum[S::kThreadM][S::kThreadN] = {};",
             "  if (thread >= S::kThreads - 32 && c0 + S::kN > g.in_channels) return;\n"
             "  Acc sum[S::kThreadM][S::kThreadN] = {};"),
]  # fmt: skip


def problems(check: str) -> list[str]:
    """Lines for core.cc that together reach what the mutations of a kind change."""
    table = {
        "edges": make_geometry((7, 6), (3, 3), (10, 11), batch=3, padding=1),
        "strided": make_geometry((11, 9), (3, 3), (9, 5), stride=2, padding=((1, 2), (0, 1))),
        "batch": make_geometry((6, 6), (2, 3), (8, 16), batch=5, padding=((1, 0), (1, 1))),
        "dilated": make_geometry((6, 5), (3, 3), (6, 10), stride=(2, 3), lhs_dilation=(3, 2),
                                 rhs_dilation=(2, 3), padding=((4, 3), (5, 2))),
        "odd_channels_last": make_geometry((5, 5), (3, 3), (6, 9), stride=2, padding=1),
        # Strides over images are whole vectors, those over pixels are not.
        "vectors": make_geometry((4, 4), (3, 3), (6, 8), batch=4, padding=1, batch_groups=2),
        "one_image": make_geometry((6, 6), (3, 3), (8, 9), batch=1, padding=1),
        "two_tiles": make_geometry((14, 14), (1, 5), (4, 5), batch=1, padding=((0, 0), (2, 2))),
        "depthwise": make_geometry((9, 6), (3, 3), (6, 6), padding=1, feature_groups=6),
        "depthwise_s2": make_geometry((13, 6), (3, 3), (6, 6), stride=2, padding=((2, 1), (0, 1)),
                                      feature_groups=6),
        "depthwise_lattices": make_geometry((11, 9), (3, 3), (4, 4), stride=2, rhs_dilation=3,
                                            padding=4, feature_groups=4),
        "depthwise_many": make_geometry((3, 4), (3, 3), (300, 300), batch=1, padding=1,
                                        feature_groups=300),
        "depthwise_large": make_geometry((4, 3), (10, 25), (32, 32), batch=1,
                                         padding=((5, 4), (12, 12)), feature_groups=32),
        "wide": make_geometry((75,), (40,), (5, 6), stride=37, padding=((3, 2),)),
    }  # fmt: skip
    lines = []
    for name, geometry in table.items():
        for dtype in cases.DTYPES:
            for platform in ("cuda", "cpu"):
                lines.append(
                    cases.line(
                        Case(f"{name}-{platform}", geometry),
                        dtype,
                        special=check == "special",
                        allow_tf32=False,
                        platform=platform,
                    )
                )
    return lines


def apply(mutation: Mutation, folder: pathlib.Path) -> pathlib.Path:
    """A copy of the sources with the mistake in it."""
    for part in ("csrc", str(build.EMULATOR)):
        shutil.copytree(build.ROOT / part, folder / part)
    path = folder / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != mutation.count:
        raise AssertionError(
            f"{mutation.name}: {mutation.file} holds {mutation.old!r} {text.count(mutation.old)} "
            f"times, not {mutation.count}"
        )
    path.write_text(text.replace(mutation.old, mutation.new))
    return folder


def compile_mutant(mutation: Mutation, folder: pathlib.Path) -> pathlib.Path:
    """core.cc's program with the mistake in it; what becomes unused is not warned about."""
    return build.core(mutation.variant, apply(mutation, folder), ("-w",))


def run_core(
    program: pathlib.Path, lines: Iterable[str], mode: tuple[str, str], folder: pathlib.Path
) -> subprocess.CompletedProcess[str]:
    """Runs core.cc's program over lines; its status and output."""
    return subprocess.run(
        [program, cases.write(folder / "problems.txt", lines)],
        env={**os.environ, **build.SANITIZER_OPTIONS, **cases.environment(mode)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
