// The gradient of max pooling, with the bits of XLA:CPU's select-and-scatter:
//
//   dX[h] = sum of dY[p] over the windows p, in row-major order, whose winner is h
//
// A window is visited in row-major order too, with its padding, which holds -Inf. A tap
// wins unless the winner so far is at least as large: so the first of equal ones stays,
// and a NaN wins and loses against what follows. Each sum starts from +0 and rounds to
// the element type at each step.
//
// A task makes a tile of dX: some groups along each axis (job.h) of some channels. First
// it finds the winner of each window that covers the tile, as the number of its tap. Then
// it gathers: a position knows by which tap it lies in which window, and adds the dY of
// those windows whose winner is that tap. It adds a zero for the others, which changes no
// bit, since no sum is -0. The windows at the edge of a tile are looked at by its
// neighbour, too; in return no two tasks write to one place, and the order of the sums is
// fixed.
//
// Vector lanes hold the windows of a row with their channels, (p, c), as one sequence. So
// the same loops serve channels-last arrays and planes. For their sake a row of x is
// brought to the accumulation type and split into its phases first: then one tap of all
// windows is one contiguous piece. Where windows are long, only some taps are packed at a
// time. A row of dX is made phase by phase as well.
//
// Limit: the winners of all windows that cover a group must fit on the stack, which
// plan.cc checks.

#pragma once

#include "../vec.h"
#include "job.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// Vectors that a loop takes at once, so that they share what the loop itself costs.
constexpr int kPoolVectors = 2;
static_assert(kPoolVectors * kVectorBytes <= kPoolBlockBytes, "rows have too few lanes");

CONVGRAD_INLINE int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
CONVGRAD_INLINE int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }

// How many of the numbers first, first + step, .. are below limit, at most count.
CONVGRAD_INLINE int64_t CountBelow(int64_t limit, int64_t first, int64_t step,
                                   int64_t count) {
  return first >= limit ? 0 : Least(count, CeilDiv(limit - first, step));
}

// The bits of a float32 beyond those of T.
template <typename T>
constexpr int kExtraBits = 0;
template <>
constexpr int kExtraBits<BF16> = 16;
template <>
constexpr int kExtraBits<F16> = 13;

// A sum of two values of T, rounded to T. Its NaNs and, for float16, its subnormal values
// have no bits that rounding would drop.
template <typename T, int N>
CONVGRAD_INLINE Vec<Acc<T>, N> Rounded(const Vec<Acc<T>, N>& sum) {
  constexpr int kExtra = kExtraBits<T>;
  if constexpr (kExtra == 0) {
    return sum;
  } else {
    using I = Vec<int32_t, N>;
    constexpr int32_t kBelowHalf = (1 << (kExtra - 1)) - 1;
    const I bits = (I)sum;
    I out = (bits + kBelowHalf + ((bits >> kExtra) & 1)) & ~(2 * kBelowHalf + 1);
    if constexpr (kExtra == 13) {
      // 65520 is the least magnitude that rounds to infinity.
      const I magnitude = bits & 0x7fffffff;
      const I over = (magnitude >= 0x477ff000) & (magnitude < 0x7f800000);
      out = over ? ((bits & ~0x7fffffff) | 0x7f800000) : out;
    }
    return (Vec<float, N>)out;
  }
}

// ---- the tile of a task -------------------------------------------------------------

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
  I* winner;   // [window][row], of which the first lane lies behind a margin
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

// ---- the winners ----------------------------------------------------------------------

template <typename T>
CONVGRAD_INLINE void Widen(Acc<T>* to, const T* from, int64_t count) {
  constexpr int N = kLanes<Acc<T>>;
  int64_t i = 0;
  for (; i + N <= count; i += N) Store<N>(to + i, Load<N>(from + i));
  for (; i < count; ++i) to[i] = LoadOne(from + i);
}

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
  if (step == channels) return Widen(to, from, count * channels);
  int64_t i = 0;
  if (step == 2) {
    Vec<typename IntOf<A>::type, N> even;
    for (int lane = 0; lane < N; ++lane) even[lane] = 2 * lane;
    for (; i + N <= count && end - from >= 2 * (i + N); i += N) {
      Store<N>(to + i,
               Pick<A, N>(Load<N>(from + 2 * i), Load<N>(from + 2 * i + N), even));
    }
  }
  if (channels == 1) {
    for (; i < count; ++i) to[i] = LoadOne(from + i * step);
    return;
  }
  for (; i < count; ++i) Widen(to + i * channels, from + i * step, channels);
}

// How a packed row of x lies: tap + i * stride of the first window is number i of a
// phase.
struct PackedRow {
  int64_t taps, phases, length;  // of a phase, in pieces of `channels`
};

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
// i * row_taps on. `anew` for the windows' first rows; `last` for the last ones, after
// which no one needs the values of the winners.
template <typename A>
CONVGRAD_NOINLINE void Compete(const A* const* rows, int64_t row_count,
                               const PackedRow& packed, int64_t channels, int64_t stride,
                               int64_t number, int64_t row_taps, bool anew, bool last,
                               int64_t lanes, A* best_row,
                               typename IntOf<A>::type* winner_row) {
  constexpr int N = kLanes<A>, V = kPoolVectors;
  using E = typename IntOf<A>::type;
  using F = Vec<A, N>;
  using I = Vec<E, N>;
  const int64_t phase_step = packed.length * channels;
  const int64_t back = channels - (stride - 1) * phase_step;
  for (int64_t lane = 0; lane < lanes; lane += V * N) {
    F best[V];
    I winner[V];
    CONVGRAD_UNROLL
    for (int v = 0; v < V; ++v) {
      // Of a window of -Inf alone the first tap is the winner.
      best[v] =
          anew ? F{} - static_cast<A>(__builtin_inf()) : Load<N>(best_row + lane + v * N);
      winner[v] = anew ? I{} : LoadRaw<E, N>(winner_row + lane + v * N);
    }
    for (int64_t row = 0; row < row_count; ++row) {
      const A* at = rows[row] + lane;
      I tap = I{} + static_cast<E>(number + row * row_taps);
      for (int64_t q = 0, phase = 0; q < packed.taps; ++q) {
        CONVGRAD_UNROLL
        for (int v = 0; v < V; ++v) {
          const F x = Load<N>(at + v * N);
          const I stays = best[v] >= x;
          best[v] = stays ? best[v] : x;
          winner[v] = stays ? winner[v] : tap;
        }
        tap += 1;
        at += ++phase == stride ? back : phase_step;
        if (phase == stride) phase = 0;
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
  const auto packed_of = [&](int64_t taps) {
    return PackedRow{taps, Least(x.stride, taps), windows + (taps - 1) / x.stride};
  };
  if (a.x_slots > 1) {
    const PackedRow packed = packed_of(x.window);
    const A* rows[kPoolSlots];
    for (int64_t r0 = 0; r0 < rows0; ++r0) {
      for (int64_t r1 = 0; r1 < rows1; ++r1) {
        A* to = tile.x_row + (r0 * rows1 + (h1 + r1) % rows1) * a.x_row;
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
    Compete<A>(rows, rows0 * rows1, packed, c, x.stride, 0, x.window, true, true, lanes,
               tile.best, winner);
    return;
  }
  const int64_t most_taps = Least(x.window, Most(1, a.x_row / (c * (windows + 1))));
  const int64_t count = rows0 * rows1;
  for (int64_t row = 0; row < count; ++row) {
    const T* from = RowOfX(tile, h0 + row / rows1, h1 + row % rows1);
    for (int64_t r2 = 0; r2 < x.window; r2 += most_taps) {
      const PackedRow packed = packed_of(Least(most_taps, x.window - r2));
      const A* packed_row = tile.x_row;
      PackRow(tile, from, r2, packed, tile.x_row);
      Compete<A>(&packed_row, 1, packed, c, x.stride, row * x.window + r2, 0,
                 row == 0 && r2 == 0, row == count - 1 && r2 + most_taps >= x.window,
                 lanes, tile.best, winner);
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

// ---- the sums -------------------------------------------------------------------------

// The windows first .. last along an axis in which a position lies, and of a tile.
struct PoolCover {
  int64_t first, last;
};

CONVGRAD_INLINE PoolCover CoverOf(const PoolAxis& x, const PoolSpan& s,
                                  int64_t position) {
  const int64_t before = position - x.window;  // where a window would just not reach
  return {Most(s.first_window, before < 0 ? 0 : before / x.stride + 1),
          Least(s.first_window + s.windows - 1, position / x.stride)};
}

// Adds dY of the windows that tap `tap` has won, lane by lane; `fresh` sums are zero.
template <typename T>
CONVGRAD_INLINE void AddWon(const typename PoolTile<T>::I* winner, const Acc<T>* dy,
                            int64_t tap, bool fresh, int64_t first, int64_t last,
                            Acc<T>* sums) {
  using A = Acc<T>;
  using E = typename PoolTile<T>::I;
  constexpr int N = kLanes<A>, V = kPoolVectors;
  using F = Vec<A, N>;
  using I = Vec<E, N>;
  const I number = I{} + static_cast<E>(tap);
  for (int64_t i = first; i < last; i += V * N) {
    CONVGRAD_UNROLL
    for (int v = 0; v < V; ++v) {
      const I won = LoadRaw<E, N>(winner + i + v * N) == number;
      const F term = (F)(won & LoadRaw<E, N>(dy + i + v * N));
      // The sum is the second operand, as in XLA's code: of two NaNs x86 keeps the first.
      A* to = sums + i + v * N;
      Store<N>(to, fresh ? term + F{} : Rounded<T, N>(term + Load<N>(to)));
    }
  }
}

// One phase of the row of dX at positions h0 and h1.
template <typename T>
CONVGRAD_NOINLINE void Gather(const PoolTile<T>& tile, int64_t h0, int64_t h1,
                              int64_t phase, Acc<T>* sums) {
  constexpr int64_t kBlock = kPoolVectors * kLanes<Acc<T>>;
  const PoolArgs& a = *tile.args;
  const PoolSpan &s0 = tile.span[0], &s1 = tile.span[1], &s = tile.span[2];
  const PoolAxis& x = a.axis[2];
  const PoolCover cover0 = CoverOf(a.axis[0], s0, h0),
                  cover1 = CoverOf(a.axis[1], s1, h1);
  const int64_t c = tile.channels, groups = s.end_group - s.first_group;
  const int64_t taps = phase < x.window ? (x.window - 1 - phase) / x.stride + 1 : 0;
  const int64_t ahead = s.first_group - s.first_window;
  bool fresh = true;
  for (int64_t p0 = cover0.first; p0 <= cover0.last; ++p0) {
    const int64_t r0 = h0 - p0 * a.axis[0].stride;
    for (int64_t p1 = cover1.first; p1 <= cover1.last; ++p1) {
      const int64_t r1 = h1 - p1 * a.axis[1].stride;
      const int64_t row =
          ((p0 - s0.first_window) * s1.windows + p1 - s1.first_window) * a.row;
      const int64_t number = (r0 * a.axis[1].window + r1) * x.window + phase;
      // Group g is at tap phase + k * stride of window g - k.
      for (int64_t k = taps - 1; k >= 0; --k) {
        const int64_t first = Most(0, k - ahead);
        const int64_t last = Least(groups, s.windows + k - ahead);
        if (first >= last) continue;
        if (fresh && (first > 0 || last < groups)) {
          __builtin_memset(sums, 0, a.dx_row * sizeof(Acc<T>));
          fresh = false;
        }
        const int64_t at = row + (ahead - k) * c;
        AddWon<T>(tile.winner + at, tile.dy_rows + at, number + k * x.stride, fresh,
                  first * c / kBlock * kBlock, last * c, sums);
        fresh = false;
      }
    }
  }
  if (fresh) __builtin_memset(sums, 0, a.dx_row * sizeof(Acc<T>));
}

// The two phases of stride 2, alternately.
template <typename A>
CONVGRAD_INLINE void Alternate(const A* even, const A* odd, int64_t count, A* to) {
  constexpr int N = kLanes<A>;
  for (int64_t i = 0; i < count; i += N) {
    const Vec<A, N> a = Load<N>(even + i), b = Load<N>(odd + i);
    Store<N>(to + 2 * i, Interleave<A, N, 0>(a, b));
    Store<N>(to + 2 * i + N, Interleave<A, N, N>(a, b));
  }
}

template <typename T>
CONVGRAD_INLINE void MakeRow(const PoolTile<T>& tile, int64_t h0, int64_t h1, T* to) {
  const PoolArgs& a = *tile.args;
  const PoolSpan& s = tile.span[2];
  const PoolAxis& x = a.axis[2];
  const int64_t c = tile.channels, groups = s.end_group - s.first_group;
  const int64_t start = s.first_group * x.stride - x.pad_lo;
  Acc<T>* sums = tile.sums;
  FetchRow<T, 1>(tile, to, start, groups * x.stride);
  if (PhasesAtOnce(a) > 1) {
    Acc<T>*odd = sums + a.dx_row, *both = odd + a.dx_row;
    Gather(tile, h0, h1, 0, sums);
    Gather(tile, h0, h1, 1, odd);
    Alternate(sums, odd, groups, both);
    const int64_t skip = Most(0, -start);
    StoreRun(to + start + skip, both + skip, Least(2 * groups, x.in - start) - skip);
    return;
  }
  for (int64_t phase = 0; phase < x.stride; ++phase) {
    const int64_t first = start + phase;
    const int64_t lo = CountBelow(0, first, x.stride, groups);
    const int64_t hi = CountBelow(x.in, first, x.stride, groups);
    if (hi <= lo) continue;
    Gather(tile, h0, h1, phase, sums);
    if (x.stride * a.inner == c) {
      StoreRun(to + (first + lo) * c, sums + lo * c, (hi - lo) * c);
      continue;
    }
    for (int64_t i = lo; i < hi; ++i) {
      StoreRun(to + (first + i * x.stride) * a.inner, sums + i * c, c);
    }
  }
}

// ---- the task -------------------------------------------------------------------------

// The positions of x that a tile makes along an axis, as positions with the padding.
CONVGRAD_INLINE PoolCover PositionsOf(const PoolAxis& x, const PoolSpan& s) {
  return {Most(s.first_group * x.stride, x.pad_lo),
          Least(s.end_group * x.stride, x.pad_lo + x.in) - 1};
}

template <typename T>
void PoolGradTask(const void* state, int64_t index) {
  using A = Acc<T>;
  const PoolArgs& a = *static_cast<const PoolArgs*>(state);
  alignas(64) A stack[kPoolStackBytes / sizeof(A)];
  PoolTile<T> tile;
  tile.args = &a;
  const int64_t first_channel = index % a.channel_tiles * a.channels;
  tile.channels = Least(a.channels, a.inner - first_channel);
  index /= a.channel_tiles;
  for (int i = kPoolAxes - 1; i >= 0; --i) {
    tile.span[i] = SpanOf(a.axis[i], index % a.axis[i].tiles);
    index /= a.axis[i].tiles;
  }
  const int64_t in = a.axis[0].in * a.axis[1].in * a.axis[2].in * a.inner;
  const int64_t out = a.axis[0].out * a.axis[1].out * a.axis[2].out * a.inner;
  tile.x = static_cast<const T*>(a.x) + index * in + first_channel;
  tile.x_end = static_cast<const T*>(a.x) + a.outer * in;
  tile.dy = static_cast<const T*>(a.dy) + index * out + first_channel;
  tile.dx = static_cast<T*>(a.dx) + index * in + first_channel;
  constexpr int64_t kMargin = kPoolBlockBytes / sizeof(A);
  tile.best = stack;
  tile.x_row = tile.best + a.row;
  tile.sums = tile.x_row + a.x_slots * a.x_row + kMargin;
  tile.dy_rows = tile.sums + PhasesAtOnce(a) * a.dx_row + kMargin;
  tile.winner = reinterpret_cast<typename PoolTile<T>::I*>(tile.dy_rows + a.rows * a.row);

  const PoolSpan &s0 = tile.span[0], &s1 = tile.span[1];
  const int64_t lanes = tile.span[2].windows * tile.channels;
  for (int64_t i = 0; i < s0.windows && lanes > 0; ++i) {
    int64_t next = 0;
    for (int64_t j = 0; j < s1.windows; ++j) {
      const int64_t p0 = s0.first_window + i, p1 = s1.first_window + j;
      const int64_t row = (i * s1.windows + j) * a.row;
      auto* winner = tile.winner + row;
      FindWinners(tile, p0, p1, &next, winner);
      // No tap has the number -1: what lies beside the row adds nothing.
      constexpr int64_t kBlock = kPoolVectors * kLanes<A>;
      __builtin_memset(winner - kBlock, 0xff, kBlock * sizeof(*winner));
      __builtin_memset(winner + lanes, 0xff, kBlock * sizeof(*winner));
      FetchDy(tile, p0, p1, tile.dy_rows + row);
    }
  }
  const PoolCover rows0 = PositionsOf(a.axis[0], s0), rows1 = PositionsOf(a.axis[1], s1);
  for (int64_t h0 = rows0.first; h0 <= rows0.last; ++h0) {
    for (int64_t h1 = rows1.first; h1 <= rows1.last; ++h1) {
      const int64_t row = (h0 - a.axis[0].pad_lo) * a.axis[1].in + h1 - a.axis[1].pad_lo;
      MakeRow(tile, h0, h1, tile.dx + row * a.axis[2].in * a.inner);
    }
  }
}

template <typename T>
void PreparePoolGrad(const PoolArgs& a, CpuJob* job) {
  SetState(job, a);
  job->stages = 1;
  job->stage[0] = {
      a.outer * a.axis[0].tiles * a.axis[1].tiles * a.axis[2].tiles * a.channel_tiles,
      PoolGradTask<T>};
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
