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
// it gathers. A position lies in several windows, in each under another tap; it adds the
// dY of those whose winner is that tap. For the others it adds -0, which changes no bit
// of any sum. The windows at the edge of a tile are looked at by its neighbour, too; in
// return no two tasks write to one place, and the order of the sums is fixed.
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

#include "winners.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// ---- the sums ---------------------------------------------------------------------

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

// a + b, and a where both are NaN: of two x86 keeps the first operand, which a compiler
// may choose. XLA's code adds the sum so far, b, to dY.
template <typename A, int N>
CONVGRAD_INLINE Vec<A, N> AddInOrder(const Vec<A, N>& a, const Vec<A, N>& b) {
#if defined(__AVX__)
  Vec<A, N> sum;
  if constexpr (sizeof(A) == 8) {
    asm("vaddpd %2, %1, %0" : "=v"(sum) : "v"(a), "v"(b));
  } else {
    asm("vaddps %2, %1, %0" : "=v"(sum) : "v"(a), "v"(b));
  }
  return sum;
#else
  return a + b;
#endif
}

// The windows first .. last along an axis that cover a position, or a tile.
struct PoolCover {
  int64_t first, last;
};

CONVGRAD_INLINE PoolCover CoverOf(const PoolAxis& x, const PoolSpan& s,
                                  int64_t position) {
  const int64_t before = position - x.window;  // where a window would just not reach
  return {Most(s.first_window, before < 0 ? 0 : before / x.stride + 1),
          Least(s.first_window + s.windows - 1, position / x.stride)};
}

// A row of dX: its positions along the leading axes and the windows there.
struct PoolRow {
  int64_t h0, h1;
  PoolCover cover0, cover1;
};

// A row of windows that covers a phase of a row of dX, all of them by one tap. Lane i of
// the phase meets lane i of `winner` and `dy`, from `first` to `end`.
template <typename T>
struct PoolCoveringRow {
  const typename PoolTile<T>::I* winner;
  const Acc<T>* dy;
  typename PoolTile<T>::I tap;
  int64_t first, end;
};

constexpr int kPoolCoveringRows = 32;  // that are added at once

// Adds dY of the windows that these taps have won, lane by lane, to sums that are zero if
// fresh, whatever is there.
template <typename T, bool kFresh>
CONVGRAD_NOINLINE void AddWon(const PoolCoveringRow<T>* rows, int count, int64_t lanes,
                              Acc<T>* sums) {
  using A = Acc<T>;
  using E = typename PoolTile<T>::I;
  constexpr int N = kLanes<A>, V = kPoolVectors;
  using F = Vec<A, N>;
  using I = Vec<E, N>;
  const F nothing = -F{};
  for (int64_t lane = 0; lane < lanes; lane += V * N) {
    F sum[V];
    CONVGRAD_UNROLL
    for (int v = 0; v < V; ++v) sum[v] = kFresh ? F{} : Load<N>(sums + lane + v * N);
    bool exact = kFresh;  // the sum with the next dY: it has T's bits without rounding
    for (const PoolCoveringRow<T>* row = rows; row < rows + count; ++row) {
      if (lane + V * N <= row->first || lane >= row->end) continue;
      const I tap = I{} + row->tap;
      CONVGRAD_UNROLL
      for (int v = 0; v < V; ++v) {
        const I won = LoadRaw<E, N>(row->winner + lane + v * N) == tap;
        const F term = won ? Load<N>(row->dy + lane + v * N) : nothing;
        sum[v] = AddInOrder<A, N>(term, sum[v]);
      }
      if (!exact) {
        CONVGRAD_UNROLL
        for (int v = 0; v < V; ++v) sum[v] = Rounded<T, N>(sum[v]);
      }
      exact = false;
    }
    CONVGRAD_UNROLL
    for (int v = 0; v < V; ++v) Store<N>(sums + lane + v * N, sum[v]);
  }
}

// One phase of a row of dX.
template <typename T>
CONVGRAD_NOINLINE void Gather(const PoolTile<T>& tile, const PoolRow& to, int64_t phase,
                              Acc<T>* sums) {
  using E = typename PoolTile<T>::I;
  const PoolArgs& a = *tile.args;
  const PoolSpan &s0 = tile.span[0], &s1 = tile.span[1], &s = tile.span[2];
  const PoolAxis& x = a.axis[2];
  const int64_t c = tile.channels, groups = s.end_group - s.first_group;
  // The last taps of a window reach its first phases alone.
  const int64_t taps = x.cover - (phase >= x.window - (x.cover - 1) * x.stride ? 1 : 0);
  const int64_t ahead = s.first_group - s.first_window;
  PoolCoveringRow<T> rows[kPoolCoveringRows];
  int count = 0;
  bool fresh = true;
  const auto add = [&] {
    (fresh ? AddWon<T, true> : AddWon<T, false>)(rows, count, groups * c, sums);
    count = 0;
    fresh = false;
  };
  for (int64_t p0 = to.cover0.first; p0 <= to.cover0.last; ++p0) {
    const int64_t r0 = to.h0 - p0 * a.axis[0].stride;
    for (int64_t p1 = to.cover1.first; p1 <= to.cover1.last; ++p1) {
      const int64_t r1 = to.h1 - p1 * a.axis[1].stride;
      const int64_t row =
          ((p0 - s0.first_window) * s1.windows + p1 - s1.first_window) * a.row;
      const int64_t number = (r0 * a.axis[1].window + r1) * x.window + phase;
      // Group g is at tap phase + k * stride of window g - k.
      for (int64_t k = taps - 1; k >= 0; --k) {
        const int64_t first = Most(0, k - ahead);
        const int64_t end = Least(groups, s.windows + k - ahead);
        if (first >= end) continue;
        if (count == kPoolCoveringRows) add();
        const int64_t at = row + (ahead - k) * c;
        rows[count++] = {tile.winner + at, tile.dy_rows + at,
                         static_cast<E>(number + k * x.stride), first * c, end * c};
      }
    }
  }
  add();
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
CONVGRAD_INLINE void MakeRow(const PoolTile<T>& tile, const PoolRow& row, T* to) {
  const PoolArgs& a = *tile.args;
  const PoolSpan& s = tile.span[2];
  const PoolAxis& x = a.axis[2];
  const int64_t c = tile.channels, groups = s.end_group - s.first_group;
  const int64_t start = s.first_group * x.stride - x.pad_lo;
  Acc<T>* sums = tile.sums;
  FetchRow<T, 1>(tile, to, start, groups * x.stride);
  if (PhasesAtOnce(a) > 1) {
    Acc<T>*odd = sums + a.dx_row, *both = odd + a.dx_row;
    Gather(tile, row, 0, sums);
    Gather(tile, row, 1, odd);
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
    Gather(tile, row, phase, sums);
    if (x.stride * a.inner == c) {
      StoreRun(to + (first + lo) * c, sums + lo * c, (hi - lo) * c);
      continue;
    }
    for (int64_t i = lo; i < hi; ++i) {
      StoreRun(to + (first + i * x.stride) * a.inner, sums + i * c, c);
    }
  }
}

// ---- the task ---------------------------------------------------------------------

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
  PoolRow row;
  for (row.h0 = rows0.first; row.h0 <= rows0.last; ++row.h0) {
    row.cover0 = CoverOf(a.axis[0], s0, row.h0);
    for (row.h1 = rows1.first; row.h1 <= rows1.last; ++row.h1) {
      row.cover1 = CoverOf(a.axis[1], s1, row.h1);
      const int64_t at =
          (row.h0 - a.axis[0].pad_lo) * a.axis[1].in + row.h1 - a.axis[1].pad_lo;
      MakeRow(tile, row, tile.dx + at * a.axis[2].in * a.inner);
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
