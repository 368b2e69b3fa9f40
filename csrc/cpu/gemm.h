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
//   L2         a block of B, kBlockBytes of (taps, k), used by all the rows of a task;
//   sums       of up to kMaxTaskRows x one panel over the blocks of B: in dX itself where
//              that has their type and the panel's columns side by side, else in a tile
//              on the stack that is then rounded, transposed if need be, and stored;
//   a task     (phase, group, a range of rows, a range of panels), or, if groups are
//              narrow, (phase, a range of groups, a range of rows).
//              Short sums have ways of their own (gemm_strips.h, gemm_short.h).
// No reduction is ever split between tasks, so the bits do not depend on the threads.
//
// Multiplying the zero row is exact unless the filter holds an Inf or a NaN. Packing
// notes that, and such a panel is computed row by row where a tap misses some row.
//
// Limits: none on geometry. With few channels most lanes are idle.

#pragma once

#include "gemm_pack.h"
#include "gemm_rows.h"
#include "gemm_short.h"
#include "gemm_strips.h"
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
  int64_t task_groups, group_parts;  // of narrow groups
  bool pack_dy, rows_first;
  bool small_parts;    // of a tap, as of blocks that fit the stack
  bool whole_windows;  // a block is the panel: all taps are packed together
  bool local_filter;   // blocks fit the stack, each packed by the task that multiplies it
  bool short_sums;     // the way of gemm_short.h
  bool strips;         // the way of gemm_strips.h, of whose strips a task takes task_rows
};

// A panel of the filter: packed, or to be packed block by block into `local`.
template <typename T>
struct GemmFilter {
  const Operand<T>* packed;
  bool has_nonfinite;  // an Inf or a NaN: taps that miss are left out, row by row

  Operand<T>* local;
  const T* w;  // the group's filter
  const int64_t* column_w;
  Panel panel;
};

// Packs a block into filter.local; returns whether it holds an Inf or a NaN.
template <typename T>
CONVGRAD_NOINLINE bool PackBlock(const Problem& p, const GemmFilter<T>& filter,
                                 bool whole_windows, GemmBlock* block) {
  using O = Operand<T>;
  const int64_t width = filter.panel.vectors * kLanes<O>;
  const int64_t size = block->k_count * width, k0 = block->k0;
  for (int t = 0; t < block->taps; ++t) block->filter[t] = t * size;
  if (whole_windows) {  // all of it, whose taps the block has in their order
    return HasNonfinite(PackTaps<T>(p, filter.w, filter.column_w, filter.panel, 0,
                                    block->k_count, filter.local, size));
  }
  const bool contiguous = ColumnsAreContiguous(filter.panel, filter.column_w);
  Sum<O> nonfinite = 0;
  for (int t = 0; t < block->taps; ++t) {
    const T* tap = filter.w + block->w[t] + k0 * p.w.out_channel;
    nonfinite += PackTap<T>(p, tap, filter.column_w, contiguous, filter.panel, 0,
                            block->k_count, filter.local + t * size);
  }
  return HasNonfinite(nonfinite);
}

// Walks the blocks of B. Whole taps while they fit, else equal parts of one tap. The
// order of a sum follows from the parts alone, not from how many taps a block holds.
// Returns whether a block packed on the way turned out to hold an Inf or a NaN though
// `has_nonfinite` was false: then the sums have to be made again.
template <typename T, int kVecs>
inline bool AddTaps(const GemmState& s, const GemmRows& rows, const Phase* const* phase,
                    const Operand<T>* dy, const GemmFilter<T>& filter,
                    const GemmSums<Sum<Operand<T>>>& sums) {
  using O = Operand<T>;
  const Problem& p = s.args.problem;
  constexpr int64_t kWidth = kVecs * kLanes<O>;
  // For panels of any width alike: columns may be images (Exchanged), and how many there
  // are does not decide into how many parts a sum is cut.
  const int64_t most_rows =
      BlockRows(kPanelVectors<O>, s.small_parts ? kTileBytes : kBlockBytes);
  const int64_t depth = Depth<O>(p);
  const int64_t k_parts = CeilDiv(depth, most_rows);
  const int64_t k_step = CeilDiv(CeilDiv(depth, k_parts), kDepthStep) * kDepthStep;
  int64_t taps_in_block =
      BlockRows(kVecs, s.local_filter ? kTileBytes : kBlockBytes) / k_step;
  if (taps_in_block > kBlockTaps) taps_in_block = kBlockTaps;

  const O* zeros = static_cast<const O*>(s.args.zeros);
  bool fresh = true, nonfinite = false;
  GemmBlock block;
  const auto add = [&] {
    if constexpr (kPerOperand<O> == 1) {
      if (filter.local != nullptr) {
        nonfinite |= PackBlock<T>(p, filter, s.whole_windows, &block);
      }
    }
    AddBlock<O, kVecs>(rows, block, dy, zeros,
                       filter.local == nullptr ? filter.packed : filter.local,
                       filter.has_nonfinite, fresh, sums);
    fresh = false;
    block.taps = 0;
  };
  for (int64_t k0 = 0; k0 < depth; k0 += k_step) {
    block.taps = 0;
    block.k0 = k0;
    block.k_count = depth - k0 < k_step ? depth - k0 : k_step;
    for (int64_t t0 = 0; t0 < phase[0]->r_count; ++t0) {
      for (int64_t t1 = 0; t1 < phase[1]->r_count; ++t1) {
        for (int64_t t2 = 0; t2 < phase[2]->r_count; ++t2) {
          AppendTap<O>(s.dy_at, p, phase, {t0, t1, t2}, kWidth, &block);
          if (block.taps == taps_in_block) add();
        }
      }
    }
    if (block.taps > 0) add();
  }
  for (int64_t m = 0; fresh && m < rows.count; ++m) {  // no taps
    Sum<O>* row = sums.Row(rows, m);
    for (int64_t c = 0; c < kWidth; ++c) row[c] = 0;
  }
  return nonfinite && !filter.has_nonfinite;
}

template <typename T>
CONVGRAD_INLINE bool AddTapsOf(int vectors, const GemmState& s, const GemmRows& rows,
                               const Phase* const* phase, const Operand<T>* dy,
                               const GemmFilter<T>& filter,
                               const GemmSums<Sum<Operand<T>>>& sums) {
  if (vectors == 1) return AddTaps<T, 1>(s, rows, phase, dy, filter, sums);
  if constexpr (kPanelVectors<Operand<T>> == 4) {
    if (vectors == 3) return AddTaps<T, 3>(s, rows, phase, dy, filter, sums);
    if (vectors == 4) return AddTaps<T, 4>(s, rows, phase, dy, filter, sums);
  }
  return AddTaps<T, 2>(s, rows, phase, dy, filter, sums);
}

inline void PhasesAt(const CpuArgs& a, int64_t phase_index, const Phase** phase) {
  phase[2] = &a.phase[2][phase_index % a.phase_count[2]];
  phase[1] = &a.phase[1][phase_index / a.phase_count[2] % a.phase_count[1]];
  phase[0] = &a.phase[0][phase_index / a.phase_count[2] / a.phase_count[1]];
}

// Part `row_group` of the rows of a phase; false if it has none.
inline bool RowsOfTask(const GemmState& s, int64_t phase_index, int64_t row_group,
                       const Phase** phase, GemmRows* rows) {
  const CpuArgs& a = s.args;
  PhasesAt(a, phase_index, phase);
  const int64_t all =
      a.problem.batch * phase[0]->h_count * phase[1]->h_count * phase[2]->h_count;
  const int64_t first = row_group * s.task_rows;
  if (first >= all) return false;
  LayOutRows(a.problem, s.dy_at, phase, first,
             all - first < s.task_rows ? all - first : s.task_rows, rows);
  return true;
}

// ---- narrow groups ----------------------------------------------------------------

// With few channels a group, too, a task finds what its rows read once and uses it for
// many groups, whose channels lie side by side in dY.
constexpr int kMaxNarrowVectors = 2;
constexpr int64_t kNarrowBytes = 32 * 1024;  // of a group's filter

template <typename O>
inline bool GroupsAreNarrow(const GemmState& s) {
  const CpuArgs& a = s.args;
  const Problem& p = a.problem;
  const Panel panel = PanelAt<O>(p, 0);
  if (p.groups == 1 || panel.columns < p.in_channels) return false;
  if (panel.vectors > kMaxNarrowVectors || s.dy_at.group != Depth<O>(p)) return false;
  const int64_t taps = MostTaps(a);
  return taps <= kBlockTaps &&
         taps * PackedDepth<O>(p) <= BlockRows(panel.vectors, kNarrowBytes);
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
  Indirection<O, kRows> found[kMaxTileRows / kRows];
  for (int64_t m = 0; m < rows.count; m += kRows) {
    FillIndirection(rows, block, m, static_cast<const O*>(s.dy), zeros,
                    &found[m / kRows]);
  }

  [[maybe_unused]] const TileScope tiles;
  alignas(64) Sum<O> tile[kMaxTileRows * kWidth];
  const Panel panel = PanelAt<O>(p, 0);
  const bool direct = AreSumsOfDx<T>(panel, a.column_dx);
  const int64_t end = (group_part + 1) * s.task_groups;
  for (int64_t g = group_part * s.task_groups; g < end && g < p.groups; ++g) {
    T* const dx = static_cast<T*>(a.dx) + g * p.dx.group;
    GemmSums<Sum<O>> sums = {tile, kWidth};
    if constexpr (kIsAcc<T>) {
      if (direct) sums = {dx, 0};
    }
    const O* filter = PackedPanel<O>(a, g, panel);
    const bool mask_taps = PanelHasNonfinite(a, g, 1, 0);
    for (int64_t m = 0; m < rows.count; m += kRows) {
      AddIndirect<O, kVecs>(found[m / kRows], g * s.dy_at.group, block, filter, zeros,
                            mask_taps, true, rows, m, sums);
    }
    if (!direct) StoreTile<T>(rows, tile, kWidth, panel.columns, a.column_dx, dx);
    if (HasEpilogue(a))
      ApplyEpilogueToTile<T>(a, rows, panel.columns, a.column_dx, g * p.dx.group);
  }
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
  alignas(64) Sum<O> tile[kTileBytes / sizeof(O)];
  // Of sums, where a block of the filter fills the tile.
  alignas(64) Sum<O> few_tile[kMaxFewTileRows * kPanelColumns<O>];
  const int64_t first_panel = panel_group * s.task_panels;
  int64_t end = first_panel + s.task_panels;
  if (end > s.panels) end = s.panels;
  if constexpr (!kHasTiles) {
    if (s.short_sums) {
      MultiplyShortSums<T>(a, dy, s.dy_at, rows, phase, group, first_panel, end);
    }
  }
  for (int64_t i = first_panel; i < end; ++i) {
    if constexpr (!kHasTiles) {
      if (s.short_sums && !PanelHasNonfinite(a, group, s.panels, i)) continue;
    }
    const Panel panel = PanelAt<O>(p, i);
    GemmFilter<T> filter{};
    filter.packed = PackedPanel<O>(a, group, panel);
    if (!s.local_filter) filter.has_nonfinite = PanelHasNonfinite(a, group, s.panels, i);
    if constexpr (kPerOperand<O> == 1) {
      if (s.local_filter) {
        filter.local = tile;
        filter.w = static_cast<const T*>(a.w) + group * p.w.group;
        filter.column_w = a.column_w + panel.first;
        filter.panel = panel;
      }
    }
    const int64_t width = panel.vectors * kLanes<O>;
    T* const dx = static_cast<T*>(a.dx) + group * p.dx.group;
    const int64_t* column_dx = a.column_dx + panel.first;
    const bool direct = AreSumsOfDx<T>(panel, column_dx);
    Sum<O>* const sums_tile = s.local_filter ? few_tile : tile;
    GemmSums<Sum<O>> sums = {sums_tile, width};
    if constexpr (kIsAcc<T>) {
      if (direct) sums = {dx + column_dx[0], 0};
    }
    while (AddTapsOf<T>(panel.vectors, s, rows, phase, dy, filter, sums))
      filter.has_nonfinite = true;
    if (!direct) StoreTile<T>(rows, sums_tile, width, panel.columns, column_dx, dx);
    if (HasEpilogue(a)) {
      ApplyEpilogueToTile<T>(a, rows, panel.columns, column_dx, group * p.dx.group);
    }
    rows.first_time = false;
  }
}

template <typename T>
void StripsTask(const void* state, int64_t index) {
  using O = Operand<T>;
  const GemmState& s = *static_cast<const GemmState*>(state);
  const CpuArgs& a = s.args;
  const int64_t phase_index = index % s.phases, part = index / s.phases % s.row_groups;
  const int64_t group = index / s.phases / s.row_groups;
  const Phase* phase[kAxes];
  PhasesAt(a, phase_index, phase);
  const O* dy = static_cast<const O*>(s.dy) + group * s.dy_at.group;
  MultiplyStrips<T>(a, dy, s.dy_at, phase, group, part * s.task_rows,
                    (part + 1) * s.task_rows);
}

// ---- stages and tasks -------------------------------------------------------------

inline int64_t FilterPackTasks(const GemmState& s) {
  const Problem& p = s.args.problem;
  return s.local_filter ? 0 : p.groups * s.panels * FilterChunks(p);
}

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
  const int64_t filter_tasks = FilterPackTasks(s);
  if (index < filter_tasks) return PackFilterTask<T>(s.args, index);
  PackDyTask<T>(s.args, index - filter_tasks);
}

// The filter's columns as one panel.
template <typename T>
inline Panel AllColumns(const Problem& p) {
  return {0, p.in_channels, static_cast<int>(CeilDiv(p.in_channels, kLanes<Acc<T>>))};
}

// Whether the taps of a filter lie side by side, so that they are best packed together.
template <typename T>
inline bool PacksWholeWindows(const CpuArgs& a) {
  return a.problem.w.out_channel != 1 &&
         !ColumnsAreContiguous(AllColumns<T>(a.problem), a.column_w);
}

// Whether sums are so short that gemm_short.h serves.
template <typename O>
inline bool HasShortSums(const CpuArgs& a) {
  const int64_t taps = MostTaps(a), depth = Depth<O>(a.problem);
  return !kHasTiles && a.problem.in_channels > kPanelColumns<O> && taps <= kShortTaps &&
         taps * depth <= kShortSum && depth <= kShortDepth;
}

// For how many rows tasks can pack what they need of the filter, if it is large enough to
// be worth it; 0 if they cannot. What adds differently, or is decided by the number of
// columns, may not depend on the threads: short sums are always left to their own way,
// and a panel that is added in parts always counts as large.
//
// A task's rows have to be whole register tiles: else the tiles, and with them the signs
// of zero sums, would depend on the tasks. The tiles of a narrower last panel are others;
// then, and where sums are kept in a tile, all rows have to fit one task.
template <typename T>
inline int64_t MostRowsToPackLocally(const CpuArgs& a) {
  using O = Operand<T>;
  constexpr int64_t kLeastBytes = 128 * 1024;
  const Problem& p = a.problem;
  const int64_t taps = Taps(p), c = p.in_channels, rows_of_panel = taps * Depth<O>(p);
  const int64_t bytes = p.out_channels * c * taps * static_cast<int64_t>(sizeof(T));
  const bool fits_block = rows_of_panel <= BlockRows(kPanelVectors<O>, kTileBytes);
  if (kPerOperand<O> != 1 || HasShortSums<O>(a)) return 0;
  if (fits_block && bytes < kLeastBytes) return 0;
  if (PacksWholeWindows<T>(a)) {
    // If some phase has all taps, the others have none.
    const bool has_all = taps <= kBlockTaps && MostTaps(a) == taps;
    return has_all && fits_block ? kMaxFewTileRows : 0;
  }
  const bool sums_in_dx =
      AreSumsOfDx<T>(AllColumns<T>(p), a.column_dx) && c % kPanelColumns<O> == 0;
  return sums_in_dx ? kMaxTaskRows : kMaxFewTileRows;
}

// How many rows and panels, or groups, a task takes: few enough tasks that each amortises
// what it sets up, enough of them for tens of threads. A block of B is reused over the
// rows of a task but never over its panels, so panels are split first; groups last,
// because neighbouring ones share cache lines of dX, or pages.
//
// But if the rows of a phase are few, a packed filter would be used once, and sending it
// to memory and back costs more than the products: tasks that take all rows of a panel
// pack their own blocks, if there are enough panels to keep the threads busy. Where
// images have so few rows the parts of a tap are as small whether or not tasks do so: the
// bits depend neither on the threads nor on the number of images.
template <typename T>
inline void ChooseTasks(const Problem& p, bool narrow, GemmState* s) {
  using O = Operand<T>;
  constexpr int64_t kEnoughTasks = 96;
  constexpr int64_t kEnoughStrips = 8;
  constexpr double kLeastWork = 1e6;  // multiply-adds
  constexpr int64_t kLeastRows = kMaxTileRows / 4;
  constexpr int64_t kTileRowsOfPanel = RowsFor(kPanelVectors<Operand<T>>);
  const CpuArgs& a = s->args;
  int64_t rows = p.batch;  // of the phase that has most
  for (int x = 0; x < kAxes; ++x) rows *= a.phase[x][0].h_count;
  const double work = 1.0 * p.batch * p.axis[0].out * p.axis[1].out * p.axis[2].out *
                      p.groups * p.out_channels * p.in_channels * Taps(p);

  s->phases = a.phase_count[0] * a.phase_count[1] * a.phase_count[2];
  s->panels = CeilDiv(p.in_channels, kPanelColumns<O>);
  s->task_panels = s->panels;
  s->task_groups = narrow ? p.groups : 1;
  s->task_rows = kMaxTileRows;
  const bool strips_alone = a.row_end > 0;
  const int64_t most_rows = MostRowsToPackLocally<T>(a);
  const bool has_few_rows =
      !strips_alone && !narrow && most_rows > 0 && rows / p.batch <= most_rows;
  if (has_few_rows && rows <= most_rows) {
    const int64_t tasks = s->phases * p.groups * s->panels;
    const int64_t turns = CeilDiv(tasks, a.threads);
    s->local_filter = 5 * tasks >= 4 * turns * a.threads;
  }
  if (s->local_filter) {
    s->task_rows = rows;
    s->task_panels = 1;
  }
  // The parts of a single tap follow one another whatever their size.
  s->small_parts = has_few_rows && (s->local_filter || MostTaps(a) > 1);
  s->whole_windows = s->local_filter && PacksWholeWindows<T>(a);
  // Tasks that pack for themselves add long taps in parts, strips whole: not both, since
  // the threads decide about the former.
  const bool adds_in_parts = s->small_parts && MostTaps(a) > 1 &&
                             Depth<O>(p) > BlockRows(kPanelVectors<O>, kTileBytes);
  if (!narrow && !s->local_filter && !adds_in_parts && StripsServe<O>(a)) {
    // Whole strips, of all panels: as many as make a task worth its start.
    const int64_t strips = rows / a.phase[2][0].h_count * StripsOfRow(a);
    const int64_t tasks = s->phases * p.groups * strips;
    s->strips = strips_alone || tasks >= kEnoughStrips;
    if (s->strips) {
      const double work_of_strip = work / tasks;
      const int64_t worth = static_cast<int64_t>(CeilDiv(tasks, kEnoughTasks));
      s->task_rows = work_of_strip * worth < kLeastWork
                         ? static_cast<int64_t>(kLeastWork / work_of_strip) + 1
                         : worth;
      s->row_groups = CeilDiv(strips, s->task_rows);
      s->panel_groups = 1;
      s->group_parts = p.groups;
      return;
    }
  }
  s->short_sums = !narrow && HasShortSums<O>(a);
  if (s->short_sums) {
    s->task_rows = ShortTiles<O>(MostTaps(a) * Depth<O>(p)) * kTileRowsOfPanel;
  }
  while (true) {
    s->row_groups = CeilDiv(rows, s->task_rows);
    s->panel_groups = CeilDiv(s->panels, s->task_panels);
    s->group_parts = CeilDiv(p.groups, s->task_groups);
    const int64_t tasks = s->phases * s->group_parts * s->row_groups * s->panel_groups;
    if (s->local_filter || tasks >= kEnoughTasks || work / tasks < 2 * kLeastWork) break;
    if (s->task_panels > 1 && !s->short_sums) {
      s->task_panels = CeilDiv(s->task_panels, 2);
    } else if (s->task_rows > kLeastRows && s->task_rows < 2 * rows &&
               s->task_rows % (2 * kTileRowsOfPanel) == 0) {
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
  ChooseTasks<T>(p, narrow, &s);
  // Which of dY and the filter stays in a cache while the other one is read again.
  const double dy_size = 1.0 * p.batch * p.axis[0].out * p.axis[1].out * p.axis[2].out;
  const double w_size = 1.0 * Taps(p) * p.in_channels;
  s.rows_first = (s.row_groups - 1) * w_size > (s.panel_groups - 1) * dy_size;
  SetState(job, s);
  const int64_t pack_tasks = 1 + FilterPackTasks(s) + (s.pack_dy ? PackDyTasks(p) : 0);
  job->stages = 2;
  job->stage[0] = {pack_tasks, GemmPackTask<T>};
  job->stage[1] = {s.phases * s.group_parts * s.row_groups * s.panel_groups,
                   s.strips                        ? StripsTask<T>
                   : !narrow                       ? GemmTask<T>
                   : PanelAt<O>(p, 0).vectors == 1 ? NarrowGroupsTask<T, 1>
                                                   : NarrowGroupsTask<T, 2>};
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
