// Writes blocks of the filter gradient (outer.h), the sums of their private copies, to dW
// in whatever layout it has.

#pragma once

#include "chunk.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// One row of a block: the sum of its private copies, pairwise.
template <typename A>
CONVGRAD_INLINE void SumCopies(const A* from, int64_t copies, int64_t apart,
                               Vec<A, kLanes<A>> (&total)[kBlockVectors]) {
  constexpr int N = kLanes<A>, V = kBlockVectors;
  if (copies == 1) {
    CONVGRAD_UNROLL
    for (int v = 0; v < V; ++v) total[v] = Load<N>(from + v * N);
    return;
  }
  Vec<A, N> sum[kMaxSplits][V];
  for (int64_t s = 0; s < copies; ++s) {
    CONVGRAD_UNROLL
    for (int v = 0; v < V; ++v) sum[s][v] = Load<N>(from + s * apart + v * N);
  }
  for (int64_t step = 1; step < copies; step *= 2) {
    for (int64_t s = 0; s + step < copies; s += 2 * step) {
      CONVGRAD_UNROLL
      for (int v = 0; v < V; ++v) sum[s][v] += sum[s + step][v];
    }
  }
  CONVGRAD_UNROLL
  for (int v = 0; v < V; ++v) total[v] = sum[0][v];
}

// WriteSlice where rows lie side by side for a lane, in runs of `length` that are `step`
// apart: transposes squares of rows and lanes. A run is a channel's taps or, as OIHW has
// them one after the other, those of all channels.
template <typename T>
CONVGRAD_NOINLINE void WriteRuns(const Acc<T>* from, int64_t channels, int64_t taps,
                                 int64_t copies, int64_t apart, const int64_t* of_lane,
                                 int64_t lanes, int64_t length, int64_t step, T* to) {
  using A = Acc<T>;
  constexpr int N = kLanes<A>, B = kBlock<A>, V = kBlockVectors;
  for (int64_t run = 0; run < channels * taps / length; ++run, to += step) {
    int64_t c = run, t = 0;
    for (int64_t first = 0; first < length; first += N) {
      const int64_t count = Min(N, length - first);
      Vec<A, N> square[V][N];
      for (int i = 0; i < N; ++i) {
        Vec<A, N> row[V] = {};
        if (i < count) SumCopies<A>(from + (t * channels + c) * B, copies, apart, row);
        CONVGRAD_UNROLL
        for (int v = 0; v < V; ++v) square[v][i] = row[v];
        if (++t == taps) {
          t = 0;
          ++c;
        }
      }
      CONVGRAD_UNROLL
      for (int v = 0; v < V; ++v) Transpose<A, N>(square[v]);
      for (int64_t l = 0; l < lanes; ++l) {
        T* const of = to + of_lane[l] + first;
        const Vec<A, N> values = square[l / N][l % N];
        if (count == N) {
          Store<N>(of, values);
        } else {
          for (int64_t i = 0; i < count; ++i) StoreOne(of + i, values[i]);
        }
      }
    }
  }
}

constexpr int64_t kRunTaps = 32;  // of a lane, at most

// WriteSlice where a channel's taps lie side by side for a lane, followed by those of the
// next lane, as in OIHW with x and dY exchanged.
template <typename T>
CONVGRAD_NOINLINE void WriteLaneRuns(const Acc<T>* from, int64_t channels, int64_t taps,
                                     bool backwards, int64_t copies, int64_t apart,
                                     int64_t channel_step, int64_t lanes, T* to) {
  using A = Acc<T>;
  constexpr int N = kLanes<A>, B = kBlock<A>, V = kBlockVectors;
  if (backwards) to -= taps - 1;  // where the last tap is
  for (int64_t c = 0; c < channels; ++c) {
    A run[kRunTaps * B];
    int64_t t = 0;
    for (; t + N <= taps; t += N) {  // squares of taps and lanes
      Vec<A, N> square[V][N];
      for (int i = 0; i < N; ++i) {
        const int64_t tap = backwards ? taps - 1 - (t + i) : t + i;
        Vec<A, N> row[V];
        SumCopies<A>(from + (tap * channels + c) * B, copies, apart, row);
        CONVGRAD_UNROLL
        for (int v = 0; v < V; ++v) square[v][i] = row[v];
      }
      CONVGRAD_UNROLL
      for (int v = 0; v < V; ++v) Transpose<A, N>(square[v]);
      for (int64_t l = 0; l < lanes; ++l) {
        Store<N>(run + l * taps + t, square[l / N][l % N]);
      }
    }
    for (; t < taps; ++t) {
      const int64_t tap = backwards ? taps - 1 - t : t;
      Vec<A, N> sum[V];
      SumCopies<A>(from + (tap * channels + c) * B, copies, apart, sum);
      A values[B];
      CONVGRAD_UNROLL
      for (int v = 0; v < V; ++v) Store<N>(values + v * N, sum[v]);
      for (int64_t l = 0; l < lanes; ++l) run[l * taps + t] = values[l];
    }
    StoreRun(to + c * channel_step, run, lanes * taps);
  }
}

// Where a tap of the filter lies in dW.
CONVGRAD_INLINE int64_t TapPlace(const FilterArgs& a, int64_t tap) {
  const int64_t* const r = a.tap[tap].r;
  const int64_t* const step = a.problem.w.axis;
  return r[0] * step[0] + r[1] * step[1] + r[2] * step[2];
}

// A slice's rows of one block, the sum of the private copies, to dW.
template <typename T>
CONVGRAD_NOINLINE void WriteSlice(const FilterArgs& a, int64_t unit, const Slice& slice,
                                  const Acc<T>* from, int64_t copies, int64_t apart) {
  using A = Acc<T>;
  constexpr int N = kLanes<A>, B = kBlock<A>, V = kBlockVectors;
  const Problem& p = a.problem;
  const FilterPlan& plan = a.plan;
  const int64_t group = unit / plan.blocks, lane = unit % plan.blocks * B;
  const int64_t lanes = Min(B, plan.lane_count - lane);
  T* const dw = static_cast<T*>(a.dw) + group * p.w.group;
  int64_t of_lane[B] = {};
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t g = plan.many_groups ? (lane + l) / p.out_channels : 0;
    of_lane[l] = g * p.w.group + (lane + l - g * p.out_channels) * p.w.out_channel;
  }
  const auto lanes_are_apart = [&](int64_t step) {
    bool are_apart = true;
    for (int64_t l = 1; l < lanes; ++l) {
      are_apart = are_apart && of_lane[l] == of_lane[0] + l * step;
    }
    return are_apart;
  };
  const bool is_run = lanes_are_apart(1);
  if (const int64_t direction = is_run ? 0 : RunOfTaps(p); direction != 0) {
    T* const to = dw + slice.first * p.w.in_channel;
    const bool is_one_run = p.in_channels == 1 || p.w.in_channel == plan.taps;
    if (direction == 1 && (is_one_run || plan.taps >= kLanes<A>)) {
      const int64_t length = is_one_run ? slice.channels * plan.taps : plan.taps;
      return WriteRuns(from, slice.channels, plan.taps, copies, apart, of_lane, lanes,
                       length, p.w.in_channel, to);
    }
    if (plan.taps <= kRunTaps && lanes_are_apart(plan.taps)) {
      return WriteLaneRuns(from, slice.channels, plan.taps, direction < 0, copies, apart,
                           p.w.in_channel, lanes, to + of_lane[0]);
    }
  }
  for (int64_t t = 0; t < plan.taps; ++t) {
    const int64_t at = TapPlace(a, t);
    for (int64_t c = 0; c < slice.channels; ++c, from += B) {
      T* const to = dw + at + (slice.first + c) * p.w.in_channel;
      if (is_run && copies == 1) {
        StoreRun(to + of_lane[0], from, lanes);
        continue;
      }
      Vec<A, N> sum[V];
      SumCopies<A>(from, copies, apart, sum);
      A values[B];
      CONVGRAD_UNROLL
      for (int v = 0; v < V; ++v) Store<N>(values + v * N, sum[v]);
      if (is_run) {
        StoreRun(to + of_lane[0], values, lanes);
      } else {
        for (int64_t l = 0; l < lanes; ++l) StoreOne(to + of_lane[l], values[l]);
      }
    }
  }
}

// Where rows of a slice, at most a tile's, lie in dW.
struct RowPlaces {
  int64_t at[kTileRows];
};

CONVGRAD_INLINE RowPlaces PlaceRows(const FilterArgs& a, const Slice& slice,
                                    int64_t first, int64_t end) {
  RowPlaces places;
  int64_t tap = first / slice.channels, channel = first % slice.channels;
  for (int64_t row = first; row < end; ++row) {
    places.at[row - first] =
        TapPlace(a, tap) + (slice.first + channel) * a.problem.w.in_channel;
    if (++channel == slice.channels) {
      channel = 0;
      ++tap;
    }
  }
  return places;
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
