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
//   a task     (phase, group, a range of rows, a range of panels).
// No reduction is ever split between tasks, so the bits do not depend on the threads.
//
// Multiplying the zero row is exact unless the filter holds an Inf or a NaN. Packing
// notes that, and such a panel is computed row by row where a tap misses some row.
//
// Limits: none on geometry. With few channels most lanes are idle.

#pragma once

#include "gemm_pack.h"
#include "gemm_rows.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

constexpr int64_t kBlockBytes = 32 * 1024;
constexpr int kBlockTaps = 16;  // pointer tables are on the stack
static_assert(kMaxTaskRows * kVectorBytes * kPanelVectors<float> <= 48 * 1024,
              "a task's tile has to leave room on a 64 KiB stack");

struct GemmState {
  CpuArgs args;
  const void* dy;           // packed or in place
  ActivationStrides dy_at;  // of that
  int64_t panels, task_panels, panel_groups;
  int64_t task_rows, row_groups, phases;
  bool pack_dy;
};

// A block of B: some taps of the phase, channels [k0, k0 + k_count) of each.
struct GemmBlock {
  int taps;
  int64_t k0, k_count;
  int32_t tap[kBlockTaps][kAxes];
  int64_t dy_back[kBlockTaps];  // how far before tap 0 the tap reads
  int64_t filter[kBlockTaps];   // the tap's place in the packed panel
};

// tile[kRows][kVecs vectors] += sum over taps, k of rows[t][i][k] * b[t][k][...], where
// a fresh tile counts as zeros whatever it holds.
template <typename A, int kRows, int kVecs>
__attribute__((noinline)) void Multiply(int taps, int64_t k_count,
                                        const A* const (*rows)[kRows], const A* const* b,
                                        bool fresh, A* tile, int64_t tile_step) {
  constexpr int L = kLanes<A>;
  using V = Vec<A, L>;
  V sum[kRows][kVecs];
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      sum[i][v] = fresh ? V{} : Load<L>(tile + i * tile_step + v * L);
    }
  }
  for (int t = 0; t < taps; ++t) {
    const A* row[kRows];
    CONVGRAD_UNROLL
    for (int i = 0; i < kRows; ++i) row[i] = rows[t][i];
    const A* bk = b[t];
    for (int64_t k = 0; k < k_count; ++k) {
      V column[kVecs];
      CONVGRAD_UNROLL
      for (int v = 0; v < kVecs; ++v) column[v] = Load<L>(bk + v * L);
      CONVGRAD_UNROLL
      for (int i = 0; i < kRows; ++i) {
        CONVGRAD_UNROLL
        for (int v = 0; v < kVecs; ++v) sum[i][v] += column[v] * row[i][k];
      }
      bk += kVecs * L;
    }
  }
  CONVGRAD_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < kVecs; ++v) Store<L>(tile + i * tile_step + v * L, sum[i][v]);
  }
}

// Adds one block of B to all rows of the task's tile, which is fresh at the first one.
template <typename A, int kVecs>
inline void AddBlock(const GemmState& s, const GemmRows& rows, const GemmBlock& block,
                     const A* dy, const A* panel, bool exact, bool fresh, A* tile) {
  constexpr int kRows = RowsFor(kVecs);
  constexpr int64_t kStep = kVecs * kLanes<A>;
  const A* zeros = static_cast<const A*>(s.args.zeros);
  for (int64_t m = 0; m < rows.count; m += kRows) {
    const A* row[kBlockTaps][kRows];
    const A* filter[kBlockTaps];
    int taps = 0;
    bool mixed = false;
    const int live = rows.count - m < kRows ? static_cast<int>(rows.count - m) : kRows;
    for (int t = 0; t < block.taps; ++t) {
      const int32_t t0 = block.tap[t][0], t1 = block.tap[t][1], t2 = block.tap[t][2];
      int hits = 0;
      for (int i = 0; i < kRows; ++i) {
        const int64_t r = m + (i < live ? i : 0);
        const bool hit = (t0 >= rows.lo[0][r]) & (t0 < rows.hi[0][r]) &
                         (t1 >= rows.lo[1][r]) & (t1 < rows.hi[1][r]) &
                         (t2 >= rows.lo[2][r]) & (t2 < rows.hi[2][r]);
        row[taps][i] = hit ? dy + (rows.dy[r] - block.dy_back[t] + block.k0) : zeros;
        hits += hit;
      }
      if (hits == 0) continue;
      mixed |= hits != kRows;
      filter[taps++] = panel + block.filter[t];
    }
    A* out = tile + m * kStep;
    if (fresh && (taps == 0 || (exact && mixed))) {
      for (int64_t i = 0; i < live * kStep; ++i) out[i] = 0;
    }
    if (taps == 0) continue;
    if (exact && mixed) {
      for (int i = 0; i < live; ++i) {
        for (int t = 0; t < taps; ++t) {
          if (row[t][i] == zeros) continue;
          const A* const one[1][1] = {{row[t][i]}};
          Multiply<A, 1, kVecs>(1, block.k_count, one, filter + t, false, out + i * kStep,
                                kStep);
        }
      }
    } else if (live == kRows) {
      Multiply<A, kRows, kVecs>(taps, block.k_count, row, filter, fresh, out, kStep);
    } else {
      A spare[kRows * kStep];  // the tile ends before the register tile does
      for (int64_t i = 0; i < kRows * kStep; ++i) {
        spare[i] = !fresh && i < live * kStep ? out[i] : 0;
      }
      Multiply<A, kRows, kVecs>(taps, block.k_count, row, filter, false, spare, kStep);
      for (int64_t i = 0; i < live * kStep; ++i) out[i] = spare[i];
    }
  }
}

// Walks the blocks of B. Whole taps while they fit, else equal parts of one tap.
template <typename A, int kVecs>
inline void AddTaps(const GemmState& s, const GemmRows& rows, const Phase* const* phase,
                    const A* dy, const A* panel, bool exact, A* tile) {
  const Problem& p = s.args.problem;
  constexpr int64_t kWidth = kVecs * kLanes<A>;
  constexpr int64_t kBlockRows = kBlockBytes / (kWidth * static_cast<int>(sizeof(A)));
  const int64_t k_parts = CeilDiv(p.out_channels, kBlockRows);
  const int64_t k_step = CeilDiv(p.out_channels, k_parts);
  int64_t taps_in_block = kBlockRows / k_step;
  if (taps_in_block > kBlockTaps) taps_in_block = kBlockTaps;

  bool fresh = true;
  for (int64_t k0 = 0; k0 < p.out_channels; k0 += k_step) {
    GemmBlock block;
    block.taps = 0;
    block.k0 = k0;
    block.k_count = p.out_channels - k0 < k_step ? p.out_channels - k0 : k_step;
    for (int64_t t0 = 0; t0 < phase[0]->r_count; ++t0) {
      for (int64_t t1 = 0; t1 < phase[1]->r_count; ++t1) {
        for (int64_t t2 = 0; t2 < phase[2]->r_count; ++t2) {
          const int64_t t[kAxes] = {t0, t1, t2};
          int64_t back = 0, r = 0;
          for (int x = 0; x < kAxes; ++x) {
            back += t[x] * phase[x]->p_per_r * s.dy_at.axis[x];
            r = r * p.axis[x].win + phase[x]->r0 + t[x] * phase[x]->r_step;
            block.tap[block.taps][x] = static_cast<int32_t>(t[x]);
          }
          block.dy_back[block.taps] = back;
          block.filter[block.taps] = (r * p.out_channels + k0) * kWidth;
          if (++block.taps == taps_in_block) {
            AddBlock<A, kVecs>(s, rows, block, dy, panel, exact, fresh, tile);
            fresh = false;
            block.taps = 0;
          }
        }
      }
    }
    if (block.taps > 0) {
      AddBlock<A, kVecs>(s, rows, block, dy, panel, exact, fresh, tile);
      fresh = false;
    }
  }
  if (fresh) __builtin_memset(tile, 0, sizeof(A) * rows.count * kWidth);  // no taps
}

CONVGRAD_INLINE bool PanelIsTainted(const CpuArgs& a, int64_t group, int64_t panels,
                                    int64_t panel) {
  const int64_t chunks = FilterChunks(a.problem);
  const unsigned char* bytes = a.taint + (group * panels + panel) * chunks;
  bool tainted = false;
  for (int64_t i = 0; i < chunks; ++i) tainted |= bytes[i] != 0;
  return tainted;
}

template <typename T>
void GemmTask(const void* state, int64_t index) {
  using A = Acc<T>;
  const GemmState& s = *static_cast<const GemmState*>(state);
  const CpuArgs& a = s.args;
  const Problem& p = a.problem;

  // Phases are innermost: tasks that write the same cache lines run close in time.
  const int64_t phase_index = index % s.phases;
  index /= s.phases;
  const int64_t panel_group = index % s.panel_groups;
  index /= s.panel_groups;
  const int64_t row_group = index % s.row_groups;
  const int64_t group = index / s.row_groups;

  const Phase* phase[kAxes];
  phase[2] = &a.phase[2][phase_index % a.phase_count[2]];
  phase[1] = &a.phase[1][phase_index / a.phase_count[2] % a.phase_count[1]];
  phase[0] = &a.phase[0][phase_index / a.phase_count[2] / a.phase_count[1]];
  const int64_t all_rows =
      p.batch * phase[0]->h_count * phase[1]->h_count * phase[2]->h_count;
  const int64_t first = row_group * s.task_rows;
  if (first >= all_rows) return;

  GemmRows rows;
  LayOutRows(p, s.dy_at, phase, first,
             all_rows - first < s.task_rows ? all_rows - first : s.task_rows, &rows);
  const A* dy = static_cast<const A*>(s.dy) + group * s.dy_at.group;

  alignas(64) A tile[kMaxTaskRows * kPanelColumns<A>];
  const int64_t end = (panel_group + 1) * s.task_panels;
  for (int64_t i = panel_group * s.task_panels; i < end && i < s.panels; ++i) {
    const Panel panel = PanelAt<A>(p, i);
    const A* filter = PackedPanel<A>(a, group, panel);
    const bool exact = PanelIsTainted(a, group, s.panels, i);
    const int64_t width = panel.vectors * kLanes<A>;
    switch (panel.vectors) {
      case 1: AddTaps<A, 1>(s, rows, phase, dy, filter, exact, tile); break;
      case 2: AddTaps<A, 2>(s, rows, phase, dy, filter, exact, tile); break;
      default:
        if constexpr (kPanelVectors<A> == 4) {
          if (panel.vectors == 3) {
            AddTaps<A, 3>(s, rows, phase, dy, filter, exact, tile);
          } else {
            AddTaps<A, 4>(s, rows, phase, dy, filter, exact, tile);
          }
        }
    }
    StoreTile<T>(rows, tile, width, panel.columns, a.column_dx + panel.first,
                 static_cast<T*>(a.dx) + group * p.dx.group);
  }
}

// The first stage: packs the filter, clears the zero row, and packs dY.
template <typename T>
void GemmPackTask(const void* state, int64_t index) {
  const GemmState& s = *static_cast<const GemmState*>(state);
  const Problem& p = s.args.problem;
  if (index == 0) {
    __builtin_memset(s.args.zeros, 0, sizeof(Acc<T>) * p.out_channels);
    return;
  }
  index -= 1;
  const int64_t filter_tasks = p.groups * s.panels * FilterChunks(p);
  if (index < filter_tasks) return PackFilterTask<T>(s.args, index);
  PackDyTask<T>(s.args, index - filter_tasks);
}

// How many rows and panels a task takes: few enough tasks that each amortises what it
// sets up, enough of them for tens of threads. A block of B is reused over the rows of
// a task but never over its panels, so panels are split first.
template <typename A>
inline void ChooseTasks(const Problem& p, GemmState* s) {
  constexpr int64_t kEnoughTasks = 96;
  constexpr double kLeastWork = 1e6;  // multiply-adds
  constexpr int64_t kLeastRows = kMaxTaskRows / 4;
  const CpuArgs& a = s->args;
  int64_t rows = p.batch;  // of the phase that has most
  for (int x = 0; x < kAxes; ++x) rows *= a.phase[x][0].h_count;
  const double work = 1.0 * p.batch * p.axis[0].out * p.axis[1].out * p.axis[2].out *
                      p.groups * p.out_channels * p.in_channels * Taps(p);

  s->phases = a.phase_count[0] * a.phase_count[1] * a.phase_count[2];
  s->panels = CeilDiv(p.in_channels, kPanelColumns<A>);
  s->task_panels = s->panels;
  s->task_rows = kMaxTaskRows;
  while (true) {
    s->row_groups = CeilDiv(rows, s->task_rows);
    s->panel_groups = CeilDiv(s->panels, s->task_panels);
    const int64_t tasks = s->phases * p.groups * s->row_groups * s->panel_groups;
    if (tasks >= kEnoughTasks || work / tasks < 2 * kLeastWork) break;
    if (s->task_panels > 1) {
      s->task_panels = CeilDiv(s->task_panels, 2);
    } else if (s->task_rows > kLeastRows && s->task_rows < 2 * rows) {
      s->task_rows /= 2;
    } else {
      break;
    }
  }
}

template <typename T>
void PrepareGemm(const CpuArgs& a, CpuJob* job) {
  const Problem& p = a.problem;
  GemmState s{};
  s.args = a;
  s.pack_dy = a.packed_dy != nullptr;
  s.dy = s.pack_dy ? a.packed_dy : a.dy;
  s.dy_at = s.pack_dy ? PackedDyStrides(p) : p.dy;
  ChooseTasks<Acc<T>>(p, &s);
  SetState(job, s);
  const int64_t pack_tasks =
      1 + p.groups * s.panels * FilterChunks(p) + (s.pack_dy ? PackDyTasks(p) : 0);
  job->stages = 2;
  job->stage[0] = {pack_tasks, GemmPackTask<T>};
  job->stage[1] = {s.phases * p.groups * s.row_groups * s.panel_groups, GemmTask<T>};
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
