// Indirect implicit GEMM: dense convolutions, and groups with enough channels.
//
// For one stride phase and group,
//
//   dX[m, c] = sum over taps t, k   dY[at(m, t), k] * W[t][k][c]
//
// with m over (n, positions of the phase). A row of A is not copied: it is a pointer
// to the out channels of one dY position, one pointer for each (m, tap), and a row of
// zeros where the tap falls outside dY. B is the packed filter (gemm_pack.h).
//
// Tiling, from the inside out:
//   registers  kRows x vectors of accumulators, kRows broadcasts of A for a row of B;
//   L1         a block of B, kBlockBytes of (taps, k), used by all the rows of a task;
//   stack      the task's tile of dX, up to kMaxTaskRows x one panel, accumulated over
//              the blocks of B and then rounded, transposed if need be, and stored;
//   a task     (phase, group, a range of rows, a range of panels), or, if groups are
//              narrow, (phase, a range of groups, a range of rows).
// No reduction is ever split between tasks, so the bits do not depend on the threads.
//
// Multiplying the zero row is exact unless the filter holds an Inf or a NaN. Packing
// notes that, and such a panel is computed row by row where a tap misses some row.
//
// Limits: none on geometry. With few channels most lanes are idle.

#pragma once

#include "gemm_pack.h"
#include "gemm_rows.h"
#include "gemm_tiles.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

struct GemmState {
  CpuArgs args;
  const void* dy;           // packed or in place
  ActivationStrides dy_at;  // of that, in operands
  int64_t panels, task_panels, panel_groups;
  int64_t task_rows, row_groups, phases;
  int64_t task_groups, group_parts;  // of gemm_groups.h
  bool pack_dy, rows_first;
};

// Walks the blocks of B. Whole taps while they fit, else equal parts of one tap.
template <typename O, int kVecs>
inline void AddTaps(const GemmState& s, const GemmRows& rows, const Phase* const* phase,
                    const O* dy, const O* panel, bool exact, Sum<O>* tile) {
  const Problem& p = s.args.problem;
  constexpr int64_t kWidth = kVecs * kLanes<O>;
  constexpr int64_t kBlockRows = BlockRows<O>(kVecs);
  const int64_t depth = Depth<O>(p);
  const int64_t k_parts = CeilDiv(depth, kBlockRows);
  const int64_t k_step = CeilDiv(CeilDiv(depth, k_parts), kDepthStep) * kDepthStep;
  int64_t taps_in_block = kBlockRows / k_step;
  if (taps_in_block > kBlockTaps) taps_in_block = kBlockTaps;

  const O* zeros = static_cast<const O*>(s.args.zeros);
  bool fresh = true;
  for (int64_t k0 = 0; k0 < depth; k0 += k_step) {
    GemmBlock block;
    block.taps = 0;
    block.k0 = k0;
    block.k_count = depth - k0 < k_step ? depth - k0 : k_step;
    for (int64_t t0 = 0; t0 < phase[0]->r_count; ++t0) {
      for (int64_t t1 = 0; t1 < phase[1]->r_count; ++t1) {
        for (int64_t t2 = 0; t2 < phase[2]->r_count; ++t2) {
          AppendTap<O>(s.dy_at, p, phase, {t0, t1, t2}, kWidth, &block);
          if (block.taps == taps_in_block) {
            AddBlock<O, kVecs>(rows, block, dy, zeros, panel, exact, fresh, tile);
            fresh = false;
            block.taps = 0;
          }
        }
      }
    }
    if (block.taps > 0) {
      AddBlock<O, kVecs>(rows, block, dy, zeros, panel, exact, fresh, tile);
      fresh = false;
    }
  }
  if (fresh) __builtin_memset(tile, 0, sizeof(O) * rows.count * kWidth);  // no taps
}

CONVGRAD_INLINE bool PanelIsTainted(const CpuArgs& a, int64_t group, int64_t panels,
                                    int64_t panel) {
  const int64_t chunks = FilterChunks(a.problem);
  const unsigned char* bytes = a.taint + (group * panels + panel) * chunks;
  bool tainted = false;
  for (int64_t i = 0; i < chunks; ++i) tainted |= bytes[i] != 0;
  return tainted;
}

// Part `row_group` of the rows of a phase; false if it has none.
inline bool RowsOfTask(const GemmState& s, int64_t phase_index, int64_t row_group,
                       const Phase** phase, GemmRows* rows) {
  const CpuArgs& a = s.args;
  phase[2] = &a.phase[2][phase_index % a.phase_count[2]];
  phase[1] = &a.phase[1][phase_index / a.phase_count[2] % a.phase_count[1]];
  phase[0] = &a.phase[0][phase_index / a.phase_count[2] / a.phase_count[1]];
  const int64_t all =
      a.problem.batch * phase[0]->h_count * phase[1]->h_count * phase[2]->h_count;
  const int64_t first = row_group * s.task_rows;
  if (first >= all) return false;
  LayOutRows(a.problem, s.dy_at, phase, first,
             all - first < s.task_rows ? all - first : s.task_rows, rows);
  return true;
}

template <typename T>
void GemmTask(const void* state, int64_t index) {
  using O = Operand<T>;
  const GemmState& s = *static_cast<const GemmState*>(state);
  const CpuArgs& a = s.args;
  const Problem& p = a.problem;

  // Phases are innermost: tasks that write the same cache lines run close in time.
  const int64_t phase_index = index % s.phases;
  index /= s.phases;
  const int64_t inner = s.rows_first ? s.row_groups : s.panel_groups;
  const int64_t first = index % inner;
  index /= inner;
  const int64_t outer = s.rows_first ? s.panel_groups : s.row_groups;
  const int64_t second = index % outer;
  const int64_t group = index / outer;
  const int64_t panel_group = s.rows_first ? second : first;
  const int64_t row_group = s.rows_first ? first : second;

  const Phase* phase[kAxes];
  GemmRows rows;
  if (!RowsOfTask(s, phase_index, row_group, phase, &rows)) return;
  const O* dy = static_cast<const O*>(s.dy) + group * s.dy_at.group;

  [[maybe_unused]] const TileScope tiles;
  alignas(64) Sum<O> tile[kMaxTaskRows * kPanelColumns<O>];
  const int64_t end = (panel_group + 1) * s.task_panels;
  for (int64_t i = panel_group * s.task_panels; i < end && i < s.panels; ++i) {
    const Panel panel = PanelAt<O>(p, i);
    const O* filter = PackedPanel<O>(a, group, panel);
    const bool exact = PanelIsTainted(a, group, s.panels, i);
    const int64_t width = panel.vectors * kLanes<O>;
    switch (panel.vectors) {
      case 1: AddTaps<O, 1>(s, rows, phase, dy, filter, exact, tile); break;
      case 2: AddTaps<O, 2>(s, rows, phase, dy, filter, exact, tile); break;
      default:
        if constexpr (kPanelVectors<O> == 4) {
          if (panel.vectors == 3) {
            AddTaps<O, 3>(s, rows, phase, dy, filter, exact, tile);
          } else {
            AddTaps<O, 4>(s, rows, phase, dy, filter, exact, tile);
          }
        }
    }
    StoreTile<T>(rows, tile, width, panel.columns, a.column_dx + panel.first,
                 static_cast<T*>(a.dx) + group * p.dx.group);
  }
}

// ---- narrow groups ----------------------------------------------------------------

// With few channels a group the pointers cost as much as the products, so that a task
// finds them once and uses them for many groups, whose channels lie side by side in dY.
constexpr int kMaxNarrowVectors = 2;

template <typename O>
inline bool GroupsAreNarrow(const GemmState& s) {
  const CpuArgs& a = s.args;
  const Problem& p = a.problem;
  const Panel panel = PanelAt<O>(p, 0);
  if (p.groups == 1 || panel.columns < p.in_channels) return false;
  if (panel.vectors > kMaxNarrowVectors || s.dy_at.group != Depth<O>(p)) return false;
  int64_t taps = 1;
  for (int x = 0; x < kAxes; ++x) {
    int64_t most = 0;
    for (int64_t i = 0; i < a.phase_count[x]; ++i) {
      if (a.phase[x][i].r_count > most) most = a.phase[x][i].r_count;
    }
    taps *= most;
  }
  return taps <= kBlockTaps && taps * PackedDepth<O>(p) <= BlockRows<O>(panel.vectors);
}

template <typename T, int kVecs>
void NarrowGroupsTask(const void* state, int64_t index) {
  using O = Operand<T>;
  constexpr int kRows = RowsFor(kVecs);
  constexpr int64_t kWidth = kVecs * kLanes<O>;
  const GemmState& s = *static_cast<const GemmState*>(state);
  const CpuArgs& a = s.args;
  const Problem& p = a.problem;
  const int64_t phase_index = index % s.phases;
  index /= s.phases;
  const int64_t group_part = index % s.group_parts;
  const Phase* phase[kAxes];
  GemmRows rows;
  if (!RowsOfTask(s, phase_index, index / s.group_parts, phase, &rows)) return;

  GemmBlock block;
  block.taps = 0;
  block.k0 = 0;
  block.k_count = Depth<O>(p);
  for (int64_t t0 = 0; t0 < phase[0]->r_count; ++t0) {
    for (int64_t t1 = 0; t1 < phase[1]->r_count; ++t1) {
      for (int64_t t2 = 0; t2 < phase[2]->r_count; ++t2) {
        AppendTap<O>(s.dy_at, p, phase, {t0, t1, t2}, kWidth, &block);
      }
    }
  }
  const O* zeros = static_cast<const O*>(a.zeros);
  TapRows<O, kRows> found[kMaxTaskRows / kRows];
  for (int64_t m = 0; m < rows.count; m += kRows) {
    FindTapRows(rows, block, m, static_cast<const O*>(s.dy), zeros, &found[m / kRows]);
  }

  [[maybe_unused]] const TileScope tiles;
  alignas(64) Sum<O> tile[kMaxTaskRows * kWidth];
  const Panel panel = PanelAt<O>(p, 0);
  const int64_t end = (group_part + 1) * s.task_groups;
  for (int64_t g = group_part * s.task_groups; g < end && g < p.groups; ++g) {
    T* const dx = static_cast<T*>(a.dx) + g * p.dx.group;
    const O* filter = PackedPanel<O>(a, g, panel);
    const bool exact = PanelIsTainted(a, g, 1, 0);
    for (int64_t m = 0; m < rows.count; m += kRows) {
      AddTapRows<O, kVecs>(found[m / kRows], g * s.dy_at.group, block, filter, zeros,
                           exact, true, tile + m * kWidth);
    }
    StoreTile<T>(rows, tile, kWidth, panel.columns, a.column_dx, dx);
  }
}

// ---- stages and tasks -------------------------------------------------------------

// The first stage: packs the filter, clears the row of zeros, and packs dY.
template <typename T>
void GemmPackTask(const void* state, int64_t index) {
  const GemmState& s = *static_cast<const GemmState*>(state);
  const Problem& p = s.args.problem;
  if (index == 0) {
    using O = Operand<T>;
    __builtin_memset(s.args.zeros, 0, sizeof(O) * Depth<O>(p) * p.groups);
    return;
  }
  index -= 1;
  const int64_t filter_tasks = p.groups * s.panels * FilterChunks(p);
  if (index < filter_tasks) return PackFilterTask<T>(s.args, index);
  PackDyTask<T>(s.args, index - filter_tasks);
}

// How many rows and panels, or groups, a task takes: few enough tasks that each amortises
// what it sets up, enough of them for tens of threads. A block of B is reused over the
// rows of a task but never over its panels, so panels are split first; groups last,
// because neighbouring ones share cache lines of dX, or pages.
template <typename O>
inline void ChooseTasks(const Problem& p, bool narrow, GemmState* s) {
  constexpr int64_t kEnoughTasks = 96;
  constexpr double kLeastWork = 1e6;  // multiply-adds
  constexpr int64_t kLeastRows = kMaxTaskRows / 4;
  const CpuArgs& a = s->args;
  int64_t rows = p.batch;  // of the phase that has most
  for (int x = 0; x < kAxes; ++x) rows *= a.phase[x][0].h_count;
  const double work = 1.0 * p.batch * p.axis[0].out * p.axis[1].out * p.axis[2].out *
                      p.groups * p.out_channels * p.in_channels * Taps(p);

  s->phases = a.phase_count[0] * a.phase_count[1] * a.phase_count[2];
  s->panels = CeilDiv(p.in_channels, kPanelColumns<O>);
  s->task_panels = s->panels;
  s->task_groups = narrow ? p.groups : 1;
  s->task_rows = kMaxTaskRows;
  while (true) {
    s->row_groups = CeilDiv(rows, s->task_rows);
    s->panel_groups = CeilDiv(s->panels, s->task_panels);
    s->group_parts = CeilDiv(p.groups, s->task_groups);
    const int64_t tasks = s->phases * s->group_parts * s->row_groups * s->panel_groups;
    if (tasks >= kEnoughTasks || work / tasks < 2 * kLeastWork) break;
    if (s->task_panels > 1) {
      s->task_panels = CeilDiv(s->task_panels, 2);
    } else if (s->task_rows > kLeastRows && s->task_rows < 2 * rows) {
      s->task_rows /= 2;
    } else if (s->task_groups > 1) {
      s->task_groups = CeilDiv(s->task_groups, 2);
    } else {
      break;
    }
  }
}

template <typename T>
void PrepareGemm(const CpuArgs& a, CpuJob* job) {
  using O = Operand<T>;
  const Problem& p = a.problem;
  GemmState s{};
  s.args = a;
  s.pack_dy = !ReadsDyInPlace<T>(a);
  s.dy = s.pack_dy ? a.packed_dy : a.dy;
  s.dy_at = DyOperandStrides<T>(a);
  const bool narrow = GroupsAreNarrow<O>(s);
  ChooseTasks<O>(p, narrow, &s);
  // Which of dY and the filter stays in a cache while the other one is read again.
  const double dy_size = 1.0 * p.batch * p.axis[0].out * p.axis[1].out * p.axis[2].out;
  const double w_size = 1.0 * Taps(p) * p.in_channels;
  s.rows_first = (s.row_groups - 1) * w_size > (s.panel_groups - 1) * dy_size;
  SetState(job, s);
  const int64_t pack_tasks =
      1 + p.groups * s.panels * FilterChunks(p) + (s.pack_dy ? PackDyTasks(p) : 0);
  job->stages = 2;
  job->stage[0] = {pack_tasks, GemmPackTask<T>};
  job->stage[1] = {s.phases * s.group_parts * s.row_groups * s.panel_groups,
                   !narrow                         ? GemmTask<T>
                   : PanelAt<O>(p, 0).vectors == 1 ? NarrowGroupsTask<T, 1>
                                                   : NarrowGroupsTask<T, 2>};
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
