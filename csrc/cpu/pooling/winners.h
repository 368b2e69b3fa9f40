// The tile of dX that a task makes, and the winners of the windows that cover it, of
// which max_grad.h has the rules.

#pragma once

#include "../vec.h"
#include "job.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// Vectors that a loop takes at once, so that they share what the loop itself costs. Each
// has a winner and its value in registers. There are at least 16 registers.
constexpr int kPoolVectors = kVectorBytes == 64 ? 2 : 4;
static_assert(kPoolVectors * kVectorBytes <= kPoolBlockBytes, "rows have too few lanes");

CONVGRAD_INLINE int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
CONVGRAD_INLINE int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }

// How many of the numbers first, first + step, .. are below limit, at most count. Mostly
// all or none are, and rows of planes are so short that they would feel a division.
CONVGRAD_INLINE int64_t CountBelow(int64_t limit, int64_t first, int64_t step,
                                   int64_t count) {
  if (first >= limit) return 0;
  return limit - first > (count - 1) * step ? count : CeilDiv(limit - first, step);
}

// The bits of a float32 beyond those of T.
template <typename T>
constexpr int kExtraBits = 0;
template <>
constexpr int kExtraBits<BF16> = 16;
template <>
constexpr int kExtraBits<F16> = 13;

// ---- the tile of a task -----------------------------------------------------------

// Along an axis: the groups of dX, first_group .. end_group - 1, and the windows.
struct PoolSpan {
  int64_t first_group, end_group, first_window, windows;
};

CONVGRAD_INLINE PoolSpan SpanOf(const PoolAxis& x, int64_t tile) {
  PoolSpan s;
  s.first_group = x.first_group + tile * x.tile_groups;
  s.end_group = Least(s.first_group + x.tile_groups, x.first_group + x.groups);
  s.first_window = Most(0, s.first_group - x.cover + 1);
  s.windows = Most(0, Least(x.out, s.end_group) - s.first_window);
  return s;
}

template <typename T>
struct PoolTile {
  using A = Acc<T>;
  using I = typename IntOf<A>::type;
  const PoolArgs* args;
  PoolSpan span[kPoolAxes];
  int64_t channels;    // of this tile
  const T *x, *x_end;  // x of this image and channel; where x ends
  const T* dy;         // likewise
  T* dx;
  I* winner;   // [window][row]; the first lane lies behind a margin
  A* dy_rows;  // likewise
  A *best, *x_row, *sums;
};

// Has the cache fetch `columns` of a row of x or dX, from its first on, while something
// else is computed.
template <typename T, int kWrite>
CONVGRAD_INLINE void FetchRow(const PoolTile<T>& tile, const T* row, int64_t column,
                              int64_t columns) {
  const int64_t inner = tile.args->inner, in = tile.args->axis[2].in;
  const int64_t first = Most(0, column), last = Least(in, column + columns);
  const bool whole = tile.channels == inner;
  const int64_t count = whole ? 1 : last - first;
  const int64_t piece = whole ? (last - first) * inner : tile.channels;
  for (int64_t i = 0; i < count; ++i) {
    const char* from = reinterpret_cast<const char*>(row + (first + i) * inner);
    const int64_t bytes = piece * static_cast<int64_t>(sizeof(T));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, kWrite);
  }
}

// ---- the winners ------------------------------------------------------------------

template <typename A>
CONVGRAD_INLINE void FillLowest(A* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = -static_cast<A>(__builtin_inf());
}

// `count` pieces of `channels` elements, `step` apart, side by side.
template <typename T>
CONVGRAD_INLINE void Collect(Acc<T>* to, const T* from, int64_t count, int64_t step,
                             int64_t channels, const T* end) {
  using A = Acc<T>;
  constexpr int N = kLanes<A>;
  if (step == channels) return LoadRun(from, count * channels, to);
  int64_t i = 0;
  if (step == 2) {
    Vec<typename IntOf<A>::type, N> even;
    for (int lane = 0; lane < N; ++lane) even[lane] = 2 * lane;
    const int64_t readable = Least(count, (end - from) / 2);
    for (; i + N <= readable; i += N) {
      Store<N>(to + i,
               Pick<A, N>(Load<N>(from + 2 * i), Load<N>(from + 2 * i + N), even));
    }
  }
  if (channels == 1) {
    for (; i < count; ++i) to[i] = LoadOne(from + i * step);
    return;
  }
  for (; i < count; ++i) {
    LoadRun(from + i * step, channels, to + i * channels);
  }
}

// Some taps of all windows, from a row of x: tap + i * stride of the first window is
// piece i of the phase that the tap is in.
struct PackedRow {
  int64_t taps, phases, length;  // of a phase, in pieces of `channels`
  int64_t offset[kPoolTaps];     // where the first window's taps are
};

CONVGRAD_INLINE void SetTaps(const PoolAxis& x, int64_t windows, int64_t channels,
                             int64_t taps, PackedRow* packed) {
  packed->taps = taps;
  packed->phases = Least(x.stride, taps);
  packed->length = windows + (taps - 1) / x.stride;
  for (int64_t q = 0, phase = 0, piece = 0; q < taps; ++q) {
    packed->offset[q] = (phase * packed->length + piece) * channels;
    if (++phase == x.stride) {
      phase = 0;
      ++piece;
    }
  }
}

// Packs taps first_tap .. of all windows from a row of x; null is a row of the padding.
template <typename T>
CONVGRAD_NOINLINE void PackRow(const PoolTile<T>& tile, const T* from, int64_t first_tap,
                               const PackedRow& packed, Acc<T>* x_row) {
  const PoolAxis& x = tile.args->axis[2];
  const int64_t c = tile.channels, inner = tile.args->inner;
  const int64_t start = tile.span[2].first_window * x.stride + first_tap - x.pad_lo;
  for (int64_t phase = 0; phase < packed.phases; ++phase) {
    Acc<T>* to = x_row + phase * packed.length * c;
    const int64_t first = start + phase;
    const int64_t lo =
        from == nullptr ? packed.length : CountBelow(0, first, x.stride, packed.length);
    const int64_t hi = Most(lo, CountBelow(x.in, first, x.stride, packed.length));
    FillLowest(to, lo * c);
    if (hi > lo) {
      Collect(to + lo * c, from + (first + lo * x.stride) * inner, hi - lo,
              x.stride * inner, c, tile.x_end);
    }
    FillLowest(to + hi * c, (packed.length - hi) * c);
  }
}

// Has the taps of some packed rows compete for windows, those of row i from number +
// i * row_taps on. `fresh` for the windows' first rows; `last` for the last ones: nobody
// needs the winners' values after that.
template <typename A>
CONVGRAD_NOINLINE void Compete(const A* const* rows, int64_t row_count,
                               const PackedRow& packed, int64_t number, int64_t row_taps,
                               bool fresh, bool last, int64_t lanes, A* best_row,
                               typename IntOf<A>::type* winner_row) {
  constexpr int N = kLanes<A>, V = kPoolVectors;
  using E = typename IntOf<A>::type;
  using F = Vec<A, N>;
  using I = Vec<E, N>;
  for (int64_t lane = 0; lane < lanes; lane += V * N) {
    F best[V];
    I winner[V];
    CONVGRAD_UNROLL
    for (int v = 0; v < V; ++v) {
      // Of a window of -Inf alone the first tap is the winner.
      best[v] = fresh ? F{} - static_cast<A>(__builtin_inf())
                      : Load<N>(best_row + lane + v * N);
      winner[v] = fresh ? I{} : LoadRaw<E, N>(winner_row + lane + v * N);
    }
    for (int64_t row = 0; row < row_count; ++row) {
      const A* from = rows[row] + lane;
      I tap = I{} + static_cast<E>(number + row * row_taps);
      for (int64_t q = 0; q < packed.taps; ++q) {
        const A* at = from + packed.offset[q];
        CONVGRAD_UNROLL
        for (int v = 0; v < V; ++v) {
          const F x = Load<N>(at + v * N);
          const I stays = best[v] >= x;
          best[v] = stays ? best[v] : x;
          winner[v] = stays ? winner[v] : tap;
        }
        tap += 1;
      }
    }
    CONVGRAD_UNROLL
    for (int v = 0; v < V; ++v) {
      if (!last) Store<N>(best_row + lane + v * N, best[v]);
      __builtin_memcpy(winner_row + lane + v * N, &winner[v], sizeof(I));
    }
  }
}

// Where the row of x at positions h0 and h1 begins, null in the padding.
template <typename T>
CONVGRAD_INLINE const T* RowOfX(const PoolTile<T>& tile, int64_t h0, int64_t h1) {
  const PoolAxis* axis = tile.args->axis;
  h0 -= axis[0].pad_lo;
  h1 -= axis[1].pad_lo;
  const bool inside = h0 >= 0 && h0 < axis[0].in && h1 >= 0 && h1 < axis[1].in;
  return inside ? tile.x + (h0 * axis[1].in + h1) * axis[2].in * tile.args->inner
                : nullptr;
}

// Finds the winners of a row of windows. `next` is the first h1 whose row of x is not
// packed yet, where the windows of the row before have left theirs.
template <typename T>
CONVGRAD_INLINE void FindWinners(const PoolTile<T>& tile, int64_t p0, int64_t p1,
                                 int64_t* next, typename PoolTile<T>::I* winner) {
  using A = Acc<T>;
  const PoolArgs& a = *tile.args;
  const PoolAxis& x = a.axis[2];
  const int64_t c = tile.channels, windows = tile.span[2].windows, lanes = windows * c;
  const int64_t h0 = p0 * a.axis[0].stride, h1 = p1 * a.axis[1].stride;
  const int64_t rows0 = a.axis[0].window, rows1 = a.axis[1].window;
  PackedRow packed;
  if (a.x_slots > 1) {
    SetTaps(x, windows, c, x.window, &packed);
    const A* rows[kPoolSlots];
    const int64_t first_slot = h1 % rows1;
    for (int64_t r0 = 0; r0 < rows0; ++r0) {
      for (int64_t r1 = 0, slot = first_slot; r1 < rows1; ++r1, ++slot) {
        if (slot == rows1) slot = 0;
        A* to = tile.x_row + (r0 * rows1 + slot) * a.x_row;
        if (h1 + r1 >= *next) {
          PackRow(tile, RowOfX(tile, h0 + r0, h1 + r1), 0, packed, to);
        }
        rows[r0 * rows1 + r1] = to;
      }
    }
    *next = h1 + rows1;
    const PoolSpan& s = tile.span[2];
    for (int64_t h = *next; h < *next + a.axis[1].stride; ++h) {
      if (const T* row = RowOfX(tile, h0, h)) {
        FetchRow<T, 0>(tile, row, s.first_window * x.stride - x.pad_lo,
                       (windows - 1) * x.stride + x.window);
      }
    }
    Compete<A>(rows, rows0 * rows1, packed, 0, x.window, true, true, lanes, tile.best,
               winner);
    return;
  }
  const int64_t most_taps = Least(kPoolTaps, Most(1, a.x_row / (c * (windows + 1))));
  const int64_t count = rows0 * rows1;
  for (int64_t row = 0; row < count; ++row) {
    const T* from = RowOfX(tile, h0 + row / rows1, h1 + row % rows1);
    for (int64_t r2 = 0; r2 < x.window; r2 += most_taps) {
      SetTaps(x, windows, c, Least(most_taps, x.window - r2), &packed);
      const A* packed_row = tile.x_row;
      PackRow(tile, from, r2, packed, tile.x_row);
      Compete<A>(&packed_row, 1, packed, row * x.window + r2, 0, row == 0 && r2 == 0,
                 row == count - 1 && r2 + most_taps >= x.window, lanes, tile.best,
                 winner);
    }
  }
}

// Brings a row of dY to the accumulation type.
template <typename T>
CONVGRAD_INLINE void FetchDy(const PoolTile<T>& tile, int64_t p0, int64_t p1,
                             Acc<T>* to) {
  constexpr int N = kLanes<Acc<T>>;
  const PoolArgs& a = *tile.args;
  const int64_t windows = tile.span[2].windows, c = tile.channels;
  const T* from =
      tile.dy +
      ((p0 * a.axis[1].out + p1) * a.axis[2].out + tile.span[2].first_window) * a.inner;
  Collect(to, from, windows, a.inner, c, from);
  if constexpr (kExtraBits<T> == 16) {  // XLA's NaNs keep nothing but their sign
    for (int64_t i = 0; i < windows * c; i += N) {
      using I = Vec<int32_t, N>;
      const I bits = LoadRaw<int32_t, N>(to + i);
      const I nan = (bits & ~0x7fffffff) | 0x7fc00000;
      const I out = (bits & 0x7fffffff) > 0x7f800000 ? nan : bits;
      __builtin_memcpy(to + i, &out, sizeof(out));
    }
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
