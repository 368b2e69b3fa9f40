// The rows of dX that a task of the gemm kernel makes: where each reads and writes, and
// how the finished tile is rounded, transposed if dX asks for it, and stored.

#pragma once

#include "epilogue.h"
#include "gemm_pack.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// Rows of the register tile for a panel of so many vectors.
CONVGRAD_INLINE constexpr int RowsFor(int vectors) {
  return kHasTiles ? 32
         : kVectorRegisters == 32
             ? (vectors == 4   ? 6
                : vectors == 3 ? 8
                : vectors == 2 ? 12
                               : 14)
             : (kVectorBytes == 32 ? (vectors == 2 ? 6 : 12) : (vectors == 2 ? 4 : 8));
}

constexpr int64_t kMaxRegisterRows = kHasTiles ? 32 : 14;
// Rows of a task: at most so many if it keeps their sums in a tile, and if it does not.
constexpr int64_t kMaxTileRows = kHasTiles ? 128 : 168;  // a multiple of every RowsFor
constexpr int64_t kMaxTaskRows = 2 * kMaxTileRows;
// And of one whose tile holds a block of the filter, so that it keeps sums elsewhere.
constexpr int64_t kMaxFewTileRows = kMaxTileRows / 4;
static_assert(kMaxTileRows % RowsFor(1) == 0 && kMaxTileRows % RowsFor(2) == 0 &&
                  kMaxTileRows % RowsFor(3) == 0 && kMaxTileRows % RowsFor(4) == 0,
              "a task's tile has to have room for whole register tiles");

// The rows of a task: where each reads and writes, and which taps it has. Up to a
// multiple of the register tile's rows, the last one is repeated.
struct GemmRows {
  int64_t count;
  int64_t dy[kMaxTaskRows];  // of tap 0, in elements; may lie outside
  int64_t dx[kMaxTaskRows];
  int32_t lo[kAxes][kMaxTaskRows], hi[kAxes][kMaxTaskRows];
  bool first_time;  // that the task reads dY
};

template <typename T>
constexpr bool kIsAcc = sizeof(T) == sizeof(Acc<T>);  // sums need no rounding

// Whether the sums of a panel can be kept in dX: whole vectors of neighbouring columns.
template <typename T>
CONVGRAD_INLINE bool AreSumsOfDx(const Panel& panel, const int64_t* column_dx) {
  if (!kIsAcc<T> || panel.columns != panel.vectors * kLanes<Acc<T>>) return false;
  return column_dx[panel.columns - 1] - column_dx[0] == panel.columns - 1;
}

// Columns [run[i], run[i + 1]) are neighbours in memory, for i below the result.
[[maybe_unused]] CONVGRAD_NOINLINE int FindRuns(const int64_t* column_dx, int64_t columns,
                                                int64_t* run) {
  int runs = 0;
  for (int64_t c = 0; c < columns; ++c) {
    if (c == 0 || column_dx[c] != column_dx[c - 1] + 1) run[runs++] = c;
  }
  run[runs] = columns;
  return runs;
}

template <typename T>
constexpr int64_t kMaxTileElements = kMaxTileRows * kPanelColumns<Acc<T>>;
constexpr int64_t kShortRun = 4;    // neighbouring columns that are not worth a vector
constexpr int64_t kCloseRuns = 16;  // elements from one column to the next, on average

// Rounds the tile [rows][width] and stores `columns` of it: row m, column c goes to
// dx + rows.dx[m] + column_dx[c], the latter increasing.
template <typename T>
CONVGRAD_NOINLINE void StoreTile(const GemmRows& rows, const Acc<T>* tile, int64_t width,
                                 int64_t columns, const int64_t* column_dx, T* dx) {
  constexpr int L = kLanes<Acc<T>>;
  int64_t run[kMaxPanelColumns + 1];
  const int runs = FindRuns(column_dx, columns, run);
  int64_t transposed = 0;  // leading rows that are already stored
  if (runs == columns) {
    // Channels-first: transpose squares whose rows are neighbours in memory. Channels
    // are outermost because each is its own stream.
    const auto neighbours = [&rows](int64_t m) {
      if (m + L > rows.count) return false;
      for (int i = 1; i < L; ++i) {
        if (rows.dx[m + i] != rows.dx[m] + i) return false;
      }
      return true;
    };
    while (neighbours(transposed)) transposed += L;
    for (int64_t c = 0; c < columns; c += L) {
      const int live = columns - c < L ? static_cast<int>(columns - c) : L;
      for (int64_t m = 0; m < transposed; m += L) {
        Vec<Acc<T>, L> square[L];
        for (int i = 0; i < L; ++i) square[i] = Load<L>(tile + (m + i) * width + c);
        Transpose<Acc<T>, L>(square);
        T* to = dx + rows.dx[m];
        CONVGRAD_UNROLL
        for (int i = 0; i < L; ++i) {
          if (i < live) Store<L>(to + column_dx[c + i], square[i]);
        }
      }
    }
  }
  if (columns < kShortRun * runs) {
    // Short runs: again each run is its own stream, unless a cache line has several of
    // them. What is to be rounded is rounded in vectors first.
    [[maybe_unused]] T rounded[kIsAcc<T> ? 1 : kMaxTileElements<T>];
    const T* from;
    int64_t step;
    if constexpr (kIsAcc<T>) {
      from = tile;
      step = width;
    } else {
      for (int64_t m = transposed; m < rows.count; ++m) {
        StoreRun(rounded + m * columns, tile + m * width, columns);
      }
      from = rounded;
      step = columns;
    }
    if (column_dx[columns - 1] - column_dx[0] < kCloseRuns * columns) {
      for (int64_t m = transposed; m < rows.count; ++m) {
        const T* const elements = from + m * step;
        for (int64_t c = 0; c < columns; ++c) dx[rows.dx[m] + column_dx[c]] = elements[c];
      }
      return;
    }
    for (int i = 0; i < runs; ++i) {
      T* to = dx + column_dx[run[i]];
      const int64_t count = run[i + 1] - run[i];
      for (int64_t m = transposed; m < rows.count; ++m) {
        const T* element = from + m * step + run[i];
        to[rows.dx[m]] = element[0];
        if (count > 1) to[rows.dx[m] + 1] = element[1];
        if (count > 2) to[rows.dx[m] + 2] = element[2];
        for (int64_t c = 3; c < count; ++c) to[rows.dx[m] + c] = element[c];
      }
    }
    return;
  }
  for (int64_t m = 0; m < rows.count; ++m) {
    const Acc<T>* from = tile + m * width;
    for (int i = 0; i < runs; ++i) {
      StoreRun(dx + rows.dx[m] + column_dx[run[i]], from + run[i], run[i + 1] - run[i]);
    }
  }
}

// The epilogue of what StoreTile stores, `at` elements into dX.
template <typename T>
CONVGRAD_NOINLINE void ApplyEpilogueToTile(const CpuArgs& a, const GemmRows& rows,
                                           int64_t columns, const int64_t* column_dx,
                                           int64_t at) {
  int64_t run[kMaxPanelColumns + 1];
  const int runs = FindRuns(column_dx, columns, run);
  if (runs < columns || runs == 1) {
    for (int64_t m = 0; m < rows.count; ++m) {
      for (int i = 0; i < runs; ++i) {
        ApplyEpilogueToRun<T>(a, at + rows.dx[m] + column_dx[run[i]],
                              run[i + 1] - run[i]);
      }
    }
    return;
  }
  for (int64_t first = 0, end; first < rows.count; first = end) {
    end = first + 1;
    while (end < rows.count && rows.dx[end] == rows.dx[end - 1] + 1) ++end;
    for (int64_t c = 0; c < columns; ++c) {
      ApplyEpilogueToRun<T>(a, at + rows.dx[first] + column_dx[c], end - first);
    }
  }
}

// The most taps that a phase has.
CONVGRAD_INLINE int64_t MostTaps(const CpuArgs& a) {
  int64_t taps = 1;
  for (int x = 0; x < kAxes; ++x) {
    int64_t most = 0;
    for (int64_t i = 0; i < a.phase_count[x]; ++i) {
      if (a.phase[x][i].r_count > most) most = a.phase[x][i].r_count;
    }
    taps *= most;
  }
  return taps;
}

// Fills in rows [first, first + count) of the phase, m = ((n*c0 + i0)*c1 + i1)*c2 + i2.
[[maybe_unused]] CONVGRAD_NOINLINE void LayOutRows(const Problem& p,
                                                   const ActivationStrides& dy_at,
                                                   const Phase* const* phase,
                                                   int64_t first, int64_t count,
                                                   GemmRows* rows) {
  int64_t i[kAxes];
  int64_t n = first;
  for (int x = kAxes - 1; x >= 0; --x) {
    i[x] = n % phase[x]->h_count;
    n /= phase[x]->h_count;
  }
  rows->count = count;
  rows->first_time = true;
  TapRange taps[kAxes];
  int64_t dy_base = 0, dx_base = 0;
  bool moved = true;  // the two leading axes or n
  for (int64_t m = 0; m < count; ++m) {
    if (moved) {
      dy_base = n * dy_at.batch;
      dx_base = n * p.dx.batch;
      for (int x = 0; x < 2; ++x) {
        taps[x] = ValidTaps(*phase[x], p.axis[x].out, i[x]);
        dy_base += (phase[x]->p0 + i[x] * phase[x]->p_per_h) * dy_at.axis[x];
        dx_base += (phase[x]->h0 + i[x] * phase[x]->h_step) * p.dx.axis[x];
      }
      moved = false;
    }
    taps[2] = ValidTaps(*phase[2], p.axis[2].out, i[2]);
    rows->dy[m] = dy_base + (phase[2]->p0 + i[2] * phase[2]->p_per_h) * dy_at.axis[2];
    rows->dx[m] = dx_base + (phase[2]->h0 + i[2] * phase[2]->h_step) * p.dx.axis[2];
    for (int x = 0; x < kAxes; ++x) {
      rows->lo[x][m] = static_cast<int32_t>(taps[x].lo);
      rows->hi[x][m] = static_cast<int32_t>(taps[x].hi);
    }
    if (++i[2] == phase[2]->h_count) {
      moved = true;
      i[2] = 0;
      if (++i[1] == phase[1]->h_count) {
        i[1] = 0;
        if (++i[0] == phase[0]->h_count) {
          i[0] = 0;
          ++n;
        }
      }
    }
  }
  for (int64_t m = count; m < count + kMaxRegisterRows && m < kMaxTaskRows; ++m) {
    rows->dy[m] = rows->dy[count - 1];
    for (int x = 0; x < kAxes; ++x) {
      rows->lo[x][m] = rows->lo[x][count - 1];
      rows->hi[x][m] = rows->hi[x][count - 1];
    }
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
