"""Deliberate mistakes in the CUDA sources, each of which a check has to catch.

A mutation replaces one piece of text, which must occur exactly as often as the row says,
in a copy of the sources. The copy is compiled into core.cc's program, which then runs over
this file's problems in the mode that is meant to notice.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
from collections.abc import Iterable

from jax_convgrad.tools.geometries import Case, make_geometry

from . import build, cases


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One mistake, and what notices it.

    `check` is the kind of problem: "values", "special" (NaN and Inf), "walking" (blocks
    that take several tiles), "far" (images beyond 32-bit offsets) or "shifted" (arrays
    that are not aligned). `variant` is that of `build.VARIANTS`, and `mode` a row of
    `cases.MODES`.
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
_MMA, _MMA_HOST = "csrc/cuda/mma.cuh", "csrc/cuda/mma.cu"
_TILES = "csrc/cuda/tiles.cuh"
_DEPTHWISE = "csrc/cuda/depthwise.cuh"
_FRAGMENTS = "csrc/cuda/fragments.cuh"
_GROUPED = "csrc/cuda/grouped.cuh"
_FEW = "csrc/cuda/few_channels.cuh"
_WGMMA, _WGMMA_HOST = "csrc/cuda/wgmma.cuh", "csrc/cuda/wgmma.cu"
_WGMMA_WORK, _WGMMA_FEED = "csrc/cuda/wgmma_work.cuh", "csrc/cuda/wgmma_producers.cuh"
_EPILOGUE, _PLANNING = "csrc/cuda/epilogue.cuh", "csrc/cuda/planning.h"
_PLATFORM, _KERNEL = "csrc/cuda/platform.cuh", "csrc/kernel.cu"

_PUBLISH_BARRIER = "const bool masked = __syncthreads_or(special) != 0;"

MUTATIONS = [
    # ---- geometry, shared by the kernels
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
    # ---- tiles of the implicit GEMMs
    Mutation("taps dropped at a tile's edge", _TILES,
             "together ? first[a] : lowest, together ? last[a] : highest",
             "first[a], last[a]"),
    Mutation("phases in the order of the wrong axis", _TILES,
             "TakeDigit(grid.phases[a]", "TakeDigit(grid.phases[kAxes - 1 - a]"),
    Mutation("long phases have as many positions as short ones", _GEOMETRY,
             "phase < a.longer ? 1 : 0", "0"),
    # ---- types and planner
    Mutation("bfloat16 sums are narrowed as they grow", _DIRECT,
             "Narrow(sum, T{}), dx_at", "Narrow(sum * 1.02f, T{}), dx_at"),
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
             "    rows[r] = MakeTileRow(g, at, at.m0 + r);\n  }\n  __syncthreads();",
             "    rows[r] = MakeTileRow(g, at, at.m0 + r);\n  }",
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
             "if (at.m0 + row_of(i) >= at.row_count) continue;", ""),
    Mutation("tiled stores channels beyond the last", _TILED,
             "if (c + j < g.in_channels) {", "{", variant="address"),
    Mutation("tiled stores unaligned vectors", _TILED,
             "if (problem.dx.axis[i] % S::kVector != 0) params.vector_store = false;", "",
             variant="address"),
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
    Mutation("mma leaves a phase without taps as it was", _MMA,
             "    StoreZeros<T, S::kM, S::kN, S::kThreads>(params, at, thread, dx);\n", ""),
    Mutation("mma writes a phase without taps to the first channels", _MMA,
             "const int32_t c = at.c0 + thread % kAcross * kCount;",
             "const int32_t c = thread % kAcross * kCount;"),
    Mutation("mma drops slices that its parts do not share evenly", _MMA,
             "(part < left ? 1 : 0)", "0"),
    Mutation("mma parts of a sum overlap", _MMA,
             "(part < left ? part : left)", "part"),
    Mutation("mma transposes half a quad", _FRAGMENTS, "bit <= 2", "bit <= 1"),
    Mutation("mma puts all patches' rows side by side", _MMA,
             "params.run.Quotient(c) * params.run_gap +", ""),
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
    # ---- grouped. Finite poison: it repairs results that are not finite.
    Mutation("grouped does not wait for its copies", _GROUPED,
             "CopyAsyncWait<0>();", "CopyAsyncWait<1>();", mode=("0", "1")),
    Mutation("grouped without its barrier", _GROUPED,
             "    CopyAsyncWait<0>();\n    __syncthreads();",
             "    CopyAsyncWait<0>();\n    __syncwarp();", mode=("0", "1")),
    Mutation("grouped copies into the stage being read", _GROUPED,
             "stage_at = params.stage_bytes - stage_at;", "", check="walking",
             mode=("1", "1")),
    Mutation("grouped without the barrier between tiles", _GROUPED,
             "    CopyAsyncWait<0>();\n    __syncthreads();",
             "    CopyAsyncWait<0>();\n"
             "    if (tile < params.parts) __syncthreads(); else __syncwarp();",
             check="walking", mode=("1", "1")),
    Mutation("grouped multiplies a term that is not there", _GROUPED,
             "term.exists = rest < count;", "term.exists = 1;"),
    Mutation("grouped mixes groups", _GROUPED,
             "exists && same_group ? w[", "exists && (same_group || k % 2 == 0) ? w[",
             variant="address"),
    Mutation("grouped reads the pair before", _GROUPED,
             "if (pair + 1 < pairs) next_at = term->dy;", ""),
    Mutation("grouped begins bundles too early", _GROUPED,
             "(FirstChunk<S::kChunk>(params, c) - first_chunk)",
             "(FirstChunk<S::kChunk>(params, c) - first_chunk) / 2"),
    Mutation("grouped writes all phases to one place", _GROUPED,
             "phase.dx += phase.h0[a] * axis.dx_stride;", ""),
    Mutation("grouped takes padding for dY", _GROUPED,
             "static_cast<uint32_t>(p2) < static_cast<uint32_t>(g.axis[2].out)",
             "p2 < g.axis[2].out", variant="address"),
    Mutation("grouped copies chunks beyond the last", _GROUPED,
             "row_exists && first_chunk + chunk < params.dy_chunks &&", "row_exists &&",
             variant="address"),
    Mutation("grouped stores rows beyond the last", _GROUPED,
             "at.i[2] + static_cast<int32_t>(row.i1_i2 & 0xffff) < phase.positions[2]",
             "at.i[2] + static_cast<int32_t>(row.i1_i2 & 0xffff) <= phase.positions[2]",
             variant="address"),
    Mutation("grouped stores channels beyond the last", _GROUPED,
             "row_exists[half] && (sizeof(T) == 4 || lane % 4 < kTiles) &&\n"
             "           channel(j) < params.dx_channels;",
             "row_exists[half] && (sizeof(T) == 4 || lane % 4 < kTiles);",
             variant="address"),
    Mutation("grouped repairs nothing", _GROUPED,
             "if (check[0] + check[1] + check[2] + check[3] != 0.0f) {", "if (false) {",
             check="special"),
    Mutation("grouped forgets one of three products", _GROUPED,
             "Mma(part[j], a, lo[j], T{});", "Mma(part[j], a_lo, hi[j], T{});"),
    # ---- few_channels. Finite poison, as above.
    Mutation("few_channels waits for one copy too few", _FEW,
             "CopyAsyncWait<kFewStages - 2>()", "CopyAsyncWait<kFewStages - 1>()",
             mode=("0", "1")),
    Mutation("few_channels without the barrier of its ring", _FEW,
             "CopyAsyncWait<kFewStages - 2>();\n        __syncthreads();",
             "CopyAsyncWait<kFewStages - 2>();\n        __syncwarp();", mode=("0", "1")),
    Mutation("few_channels copies into the stage being read", _FEW,
             "copy_row(x + kFewStages - 1);", "copy_row(x + kFewStages);", mode=("1", "1")),
    Mutation("few_channels gathers sums that are being written", _FEW,
             "((x - 1) & 1)", "(x & 1)"),
    Mutation("few_channels without the barrier between strips", _FEW,
             "    __syncthreads();  // nobody still reads about the strip before\n", "",
             variant="thread"),
    Mutation("few_channels copies pixels beyond dY", _FEW,
             "(q_end < last.out ? q_end : last.out)", "q_end", variant="address"),
    Mutation("few_channels adds one part of K only", _FEW,
             "part < params.parts", "part < 1"),
    Mutation("few_channels drops the last tap of the rows", _FEW,
             "if (kTaps == 1 || all_taps) {", "if (kTaps == 1 || (all_taps && kTaps > 7)) {"),
    Mutation("few_channels takes all phases for the first", _FEW,
             "u - g.axis[1].tabled[h0].p0", "u - g.axis[1].tabled[0].p0"),
    Mutation("few_channels takes all classes of rows for the first", _FEW,
             "params.u_first + of_class + first * apart", "params.u_first + first * apart"),
    Mutation("few_channels gathers one pixel off", _FEW,
             "live.first * axis.p_per_r.divisor - at.q0",
             "live.first * axis.p_per_r.divisor - at.q0 + 1"),
    Mutation("few_channels repairs nothing", _FEW,
             "const bool finite = sum[e] - sum[e] == 0.0f;", "const bool finite = true;",
             check="special"),
    # ---- wgmma. Finite poison, as above.
    Mutation("wgmma fills a stage that is being read", _WGMMA_FEED,
             "MbarrierWait(empty + place.stage, place.parity ^ 1);\n      uint64_t*",
             "uint64_t*"),
    Mutation("wgmma multiplies what has not come", _WGMMA,
             "MbarrierWait(full + place.stage, place.parity);", "", mode=("0", "1")),
    Mutation("wgmma gives a stage back too early", _WGMMA,
             "      WgmmaWait<1>();", "      WgmmaWait<2>();", mode=("0", "1")),
    Mutation("wgmma stores sums that are not finished", _WGMMA,
             "    WgmmaWait<0>();", "    WgmmaWait<1>();"),
    Mutation("wgmma expects one operand only", _WGMMA_FEED,
             "MbarrierArriveExpect(barrier, S::kStageBytes);",
             "MbarrierArriveExpect(barrier, S::kBytesA);"),
    Mutation("wgmma never turns the parity", _WGMMA_WORK, "parity ^= 1;", ""),
    Mutation("wgmma without the fence before products", _WGMMA, "  WgmmaFence();\n", ""),
    Mutation("wgmma walks the taps of dY backwards", _WGMMA_FEED,
             "furthest[a] - shift[a]", "shift[a]"),
    Mutation("wgmma takes the taps of W for adjacent", _WGMMA_WORK,
             "work.spans[a].r + slice.t[a] * g.axis[a].r_step",
             "work.spans[a].r + slice.t[a]"),
    Mutation("wgmma takes another phase's map", _WGMMA_FEED,
             "phase * static_cast<unsigned>(params.mma.grid.phases[a].divisor) +", "phase +"),
    Mutation("wgmma copies the first panel of W again", _WGMMA_FEED,
             "{at.c0 + panel * S::kPanel", "{at.c0"),
    Mutation("wgmma drops slices that its parts do not share evenly", _WGMMA_WORK,
             "work.first_slice - tap * work.slices_per_tap", "0"),
    Mutation("wgmma reads the same k of B for every step", _WGMMA,
             "step * kDepth * kSwizzleBytes", "0"),
    Mutation("wgmma gives both consumers the same columns", _WGMMA,
             "const int group_n = thread / kWarpgroupThreads % S::kGroupsN;",
             "const int group_n = 0;"),
    Mutation("wgmma leaves a phase without taps as it was", _WGMMA,
             "          StoreZeros<T, S::kM, S::kN, kWgmmaConsumers * kWarpgroupThreads>("
             "params.mma, at,\n"
             f"{'':75}thread, dx);\n", ""),
    Mutation("wgmma takes the first round's tiles only", _WGMMA_WORK,
             "return round * gridDim.x + static_cast<unsigned>(", "return static_cast<unsigned>(",
             check="walking"),
    Mutation("wgmma repairs the first four strips only", _WGMMA,
             "special[s / 4] |=", "special[0] |=", check="special"),
    Mutation("wgmma repairs nothing", _WGMMA,
             "special[s / 4] |= static_cast<uint64_t>(found)",
             "special[s / 4] |= static_cast<uint64_t>(found & 0)", check="special"),
    Mutation("wgmma begins a phase's pixels at its first tap", _WGMMA_HOST,
             "const int64_t lower = f.p0 - furthest;", "const int64_t lower = f.p0;"),
    Mutation("wgmma ends a phase's rows a pixel late", _WGMMA_HOST,
             "- (a.out - 1)", "- (a.out - 2)"),
    Mutation("wgmma takes every pixel of a dilated gradient", _WGMMA_HOST,
             "static_cast<int>(f.p_per_h)", "1"),
    Mutation("wgmma asks TMA for steps that it has not", _WGMMA_HOST,
             "if (f.p_per_h > kMostStep) return false;", ""),
    Mutation("wgmma's threads fill a stage that is being read", _WGMMA_FEED,
             "MbarrierWait(empty + place.stage, place.parity ^ 1);\n      unsigned",
             "unsigned"),
    Mutation("wgmma's threads lag until nobody goes on", _WGMMA_FEED,
             "kLag = S::kStages - 2;", "kLag = S::kStages - 1;"),
    Mutation("wgmma's threads announce what has not come", _WGMMA_FEED,
             "CopyAsyncWait<kLag>();", "CopyAsyncWait<S::kStages>();", mode=("0", "1")),
    Mutation("wgmma's threads do not fence what they copied", _WGMMA_FEED,
             "    FenceProxyAsync();\n", "", mode=("1", "1")),
    Mutation("wgmma's threads fence what one lane copied", _WGMMA_FEED,
             "    FenceProxyAsync();\n", "    if (lane == 0) FenceProxyAsync();\n"),
    Mutation("wgmma's threads take padding for dY", _WGMMA_FEED,
             "Reaches(g, rows[i], shift) ? rows[i].dy + dy_tap : -1", "rows[i].dy + dy_tap"),
    Mutation("wgmma's threads copy rows that nobody has written", _WGMMA_FEED,
             "dy_tap : -1;\n        }\n        __syncwarp();", "dy_tap : -1;\n        }"),
    Mutation("wgmma's threads keep the rows of the first tap", _WGMMA_FEED,
             "if (other_tap) {", "if (slice == 0) {"),
    Mutation("wgmma's threads put chunks where they were", _WGMMA_FEED,
             "(byte / 16 ^ row % 8)", "(byte / 16)"),
    Mutation("wgmma's threads copy beyond the last channel", _WGMMA_FEED,
             "const int rest = left - byte < kBytes ? left - byte : kBytes;",
             "const int rest = kBytes;", variant="address"),
    Mutation("wgmma stores whole vectors of any channels", _WGMMA,
             "Consume<!kCopies, T, S>", "Consume<true, T, S>", variant="address"),
    Mutation("wgmma has TMA copy the first group only", _WGMMA_FEED,
             "at.group * g.out_channels + next.k0", "next.k0"),
    Mutation("wgmma's threads copy the first group's filter only", _WGMMA_FEED,
             "w_tap = at.group * g.w_group;", "w_tap = 0;"),
    Mutation("wgmma repacks the first group only", _WGMMA,
             "group * params.w_group + ", ""),
    Mutation("wgmma repacks rows without their padding", _WGMMA_HOST,
             "params.row = static_cast<int32_t>(RepackedRow(problem));",
             "params.row = params.out_channels;"),
    Mutation("wgmma repacks W as it was", _WGMMA, "values[x][row]", "values[row][x]"),
    # ---- epilogues
    Mutation("an epilogue lets through where the ReLU was zero", _EPILOGUE,
             "Widen(relu) > 0", "Widen(relu) >= 0"),
    Mutation("an epilogue undoes the ReLU before it adds", _EPILOGUE,
             "value[e] = UndoRelu(value[e], operands.relu.element[e]);",
             "if (!(Widen(operands.relu.element[e]) > 0)) value[e] = epilogue.residual == nullptr"
             " ? T{} : operands.residual.element[e];"),
    Mutation("an epilogue is not applied where no tap reaches", _MMA,
             "      ApplyEpilogue(params.epilogue, value.element, at);\n", ""),
    Mutation("mma stores narrow channels without the epilogue", _MMA,
             "      ApplyEpilogue(params.epilogue, pair.element, at);\n", ""),
    Mutation("mma stores a narrow row's channels where the first one lies", _MMA,
             "const int32_t at = row_at + ChannelAt(params, c + e + i);",
             "const int32_t at = row_at + ChannelAt(params, c + i);"),
    Mutation("an epilogue is not applied to parts that are added up", _MMA_HOST,
             "params.epilogue = epilogue;", "if (parts == 1) params.epilogue = epilogue;"),
    Mutation("mma repairs without the epilogue", _MMA,
             "ApplyEpilogue(params.epilogue, Narrow(sum, T{}), dx_at)", "Narrow(sum, T{})",
             check="special"),
    Mutation("grouped repairs without the epilogue", _GROUPED,
             "ApplyEpilogue(params.epilogue, Narrow(sum, T{}), dx_at)", "Narrow(sum, T{})",
             check="special"),
    Mutation("few_channels repairs without the epilogue", _FEW,
             "ApplyEpilogue(params.epilogue, Narrow(exact, T{}), dx_at)", "Narrow(exact, T{})",
             check="special"),
    Mutation("few_channels stores the end of a run without the epilogue", _FEW,
             "dx[at + i] = ApplyEpilogue(epilogue, from[i], at + i);", "dx[at + i] = from[i];"),
    Mutation("mma takes another row's residual", _MMA,
             "LoadOperands(params.epilogue, row_at[half] + ChannelAt",
             "LoadOperands(params.epilogue, row_at[0] + ChannelAt"),
    Mutation("all parts of the batch add the first one's residual", _GEOMETRY,
             "static_cast<const T*>(of_dx) + n * problem.dx.batch",
             "static_cast<const T*>(of_dx)", check="far"),
    Mutation("the arrays of an epilogue are held to be aligned", _PLANNING,
             "bits_ |= reinterpret_cast<uintptr_t>(base);", "(void)base;", check="shifted",
             variant="address"),
    # ---- parts of the batch
    Mutation("all parts of the batch are written to the first", _GEOMETRY,
             "static_cast<T*>(dx) + n * problem.dx.batch", "static_cast<T*>(dx)", check="far"),
    Mutation("all images are held to fit in 32-bit offsets", _GEOMETRY,
             "problem.batch = low + (high - low + 1) / 2;\n    if (FitsIn32Bits(problem, slack)) {",
             "problem.batch = low + (high - low + 1) / 2;\n    if (true) {", check="far",
             variant="address"),
    Mutation("part of a block leaves before a barrier", _TILED,
             "  Acc sum[S::kThreadM][S::kThreadN] = {};",
             "  if (thread >= S::kThreads - 32 && at.c0 + S::kN > g.in_channels) return;\n"
             "  Acc sum[S::kThreadM][S::kThreadN] = {};"),
]  # fmt: skip


def problems(check: str) -> list[str]:
    """Lines for core.cc that together reach what the mutations of a kind change."""
    if check == "walking":
        return [
            cases.line(cases.walking_case(), "bfloat16", kernel="grouped"),
            *(
                cases.line(case, "bfloat16", kernel="wgmma")
                for case in cases.hopper_walking_cases()
            ),
        ]
    if check == "far":
        return list(cases.far_lines())
    if check == "shifted":
        return list(cases.shifted_lines())
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
        # Phases without taps, and more than one tile of channels.
        "pointwise": make_geometry((5, 4), (1, 1), (72, 8), stride=2),
        "long_sum": make_geometry((4, 4), (3, 3), (8, 200), batch=1, padding=1),
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
        "grouped": make_geometry((7, 9), (3, 3), (48, 48), batch=3, stride=2, padding=1,
                                 feature_groups=12),
        "grouped_wide": make_geometry((5, 6), (3, 3), (64, 32), padding=1, feature_groups=2),
        "grouped_tail": make_geometry((6,), (3,), (40, 80), padding=1, feature_groups=10),
        "patches": make_geometry((4, 6), (2, 2), (3, 8), stride=2),
        "few_stem": make_geometry((9, 10), (7, 5), (3, 5), batch=1, stride=2, padding=3),
        "few_deep": make_geometry((4, 5), (3, 3), (2, 200), batch=1, padding=1),
        "few_rows_dilated": make_geometry((9, 8), (3, 2), (2, 9), rhs_dilation=(2, 3),
                                          padding=3),
        "few_one_row": make_geometry((61,), (10,), (1, 12), batch=1, stride=5, padding=2),
        "few_many_images": make_geometry((2, 3), (2, 2), (1, 2), batch=1700),
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
    for case in [*cases.hopper_cases(), *cases.copied_cases()]:
        for dtype in ("bfloat16", "float32"):
            special = check == "special"
            lines.append(cases.line(case, dtype, kernel="wgmma", special=special))
    tiled = [case for case in cases.hopper_cases() if case.name in ("hopper_64", "hopper_wide")]
    for case in tiled:
        for tile in cases.TILES["wgmma"]:
            special = check == "special"
            lines.append(cases.line(case, "float16", kernel="wgmma", special=special, tile=tile))
    return lines


_COPIES = {"0": "copies late", "1": "copies at once"}
_ORDERS = {"0": "natural order", "1": "reversed order"}
_VARIANTS = {"plain": "", "address": ", ASan", "thread": ", TSan"}


def table() -> list[str]:
    """The lines of the table in docs/cuda.md."""
    return [
        f"| {m.name} | `{pathlib.Path(m.file).name}` | {m.check}, {_COPIES[m.mode[0]]}, "
        f"{_ORDERS[m.mode[1]]}{_VARIANTS[m.variant]} |"
        for m in MUTATIONS
    ]


def apply(mutation: Mutation, folder: pathlib.Path) -> pathlib.Path:
    """A copy of the sources with the mistake in it."""
    path = build.copy_sources(folder) / mutation.file
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
    program: pathlib.Path,
    lines: Iterable[str],
    mode: tuple[str, str],
    folder: pathlib.Path,
    repeats: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Runs core.cc's program over lines; its status and output."""
    return subprocess.run(
        [program, cases.write(folder / "problems.txt", lines), str(repeats)],
        env={**os.environ, **build.SANITIZER_OPTIONS, **cases.environment(mode)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
