// Packs what a chunk of the filter gradient reads (outer.h) to the accumulation type:
// channels beside each other, whatever the layout was, and zeros where x is padded.

#pragma once

#include "chunk.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

template <typename A>
CONVGRAD_INLINE void Clear(A* to, int64_t count) {
  __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(A));
}

// Some channels of neighbouring positions, to `width` elements a position.
template <typename T>
CONVGRAD_NOINLINE void PackRow(const T* from, int64_t position, int64_t channel,
                               int64_t count, int64_t channels, int64_t width,
                               Acc<T>* to) {
  using A = Acc<T>;
  constexpr int N = kLanes<A>;
  if (channels < width) {
    Clear(to, count * width);
  } else if (channels == 1) {
    channel = 1;
  }
  if (channel == 1) {
    if (position == width && channels == width) {
      return LoadRun(from, count * channels, to);
    }
    for (int64_t p = 0; p < count; ++p) {
      // The next block of lanes, which will be packed soon, is beyond any hardware's
      // guess.
      __builtin_prefetch(from + p * position + channels);
      LoadRun(from + p * position, channels, to + p * width);
    }
    return;
  }
  int64_t done = 0;  // channels
  if (position == 1) {
    for (; done + N <= channels; done += N) {
      int64_t p = 0;
      for (; p + N <= count; p += N) {
        Vec<A, N> rows[N];
        CONVGRAD_UNROLL
        for (int i = 0; i < N; ++i) rows[i] = Load<N>(from + (done + i) * channel + p);
        Transpose<A, N>(rows);
        CONVGRAD_UNROLL
        for (int i = 0; i < N; ++i) Store<N>(to + (p + i) * width + done, rows[i]);
      }
      for (; p < count; ++p) {
        for (int64_t c = done; c < done + N; ++c) {
          to[p * width + c] = LoadOne(from + c * channel + p);
        }
      }
    }
  }
  for (int64_t c = done; c < channels; ++c) {
    const T* const row = from + c * channel;
    int64_t p = 0;
    if (position == 1) {
      for (; p + N <= count; p += N) {
        const Vec<A, N> values = Load<N>(row + p);
        CONVGRAD_UNROLL
        for (int i = 0; i < N; ++i) to[(p + i) * width + c] = values[i];
      }
    }
    for (; p < count; ++p) to[p * width + c] = LoadOne(row + p * position);
  }
}

// Channel c of each lane's group, for the out channels from `lane` on.
template <typename T>
CONVGRAD_NOINLINE void PackLanes(const Problem& p, const T* from, int64_t position,
                                 int64_t lane, int64_t lanes, int64_t c, int64_t count,
                                 Acc<T>* to) {
  using A = Acc<T>;
  constexpr int N = kLanes<A>, B = kBlock<A>;
  const int64_t k = p.out_channels;
  from += c * p.dx.channel;
  if (k == 1) {
    return PackRow(from + lane * p.dx.group, position, p.dx.group, count, lanes, B, to);
  }
  if (k == p.in_channels && N % k == 0 && lanes == B && p.dx.channel == 1 &&
      p.dx.group == k) {
    Vec<typename IntOf<A>::type, N> index;
    for (int i = 0; i < N; ++i) {
      index[i] = static_cast<typename IntOf<A>::type>(i / k * k + c);
    }
    const T* first = from - c + lane;
    for (int64_t i = 0; i < count; ++i) {
      CONVGRAD_UNROLL
      for (int v = 0; v < B / N; ++v) {
        const Vec<A, N> all = Load<N>(first + i * position + v * N);
        Store<N>(to + i * B + v * N, Permute<A, N>(all, index));
      }
    }
    return;
  }
  if (lanes < B) Clear(to, count * B);
  for (int64_t l = 0; l < lanes; ++l) {
    const T* of_lane = from + (lane + l) / k * p.dx.group;
    for (int64_t i = 0; i < count; ++i) to[i * B + l] = LoadOne(of_lane + i * position);
  }
}

template <typename T>
CONVGRAD_INLINE void PackX(const FilterArgs& a, const Chunk& c, int64_t group,
                           int64_t lane, int64_t lanes, Acc<T>* packed) {
  using A = Acc<T>;
  const Problem& p = a.problem;
  const FilterPlan& plan = a.plan;
  const int64_t positions = PackedPositions(plan);
  const int64_t slices = plan.many_groups ? p.in_channels : SliceCount(a);
  // Along the row, what lies before x, inside and behind it.
  const Side& side = c.side[2];
  const int64_t step = plan.x_step[2];
  const int64_t before = Min(side.x_count, side.h0 < 0 ? CeilDiv(-side.h0, step) : 0);
  const int64_t room = p.axis[2].in - side.h0;
  const int64_t end = Max(before, Min(side.x_count, room > 0 ? CeilDiv(room, step) : 0));
  const int64_t position = step * p.dx.axis[2];
  for (int64_t s = 0; s < slices; ++s) {
    const Slice slice = SliceAt<A>(a, plan.many_groups ? 0 : s);
    const int64_t width = slice.width;
    A* const base = packed + positions * (plan.many_groups ? s * width : slice.first);
    for (int64_t n = 0; n < c.images; ++n) {
      for (int64_t j0 = 0; j0 < c.side[0].x_count; ++j0) {
        const int64_t h0 = c.side[0].h0 + j0 * plan.x_step[0];
        for (int64_t j1 = 0; j1 < c.side[1].x_count; ++j1) {
          const int64_t h1 = c.side[1].h0 + j1 * plan.x_step[1];
          A* to = base + ((n * plan.extent[0] + j0) * plan.extent[1] + j1) *
                             plan.extent[2] * width;
          if (h0 < 0 || h0 >= p.axis[0].in || h1 < 0 || h1 >= p.axis[1].in) {
            Clear(to, side.x_count * width);
            continue;
          }
          Clear(to, before * width);
          Clear(to + end * width, (side.x_count - end) * width);
          to += before * width;
          if (end == before) continue;
          const T* from = static_cast<const T*>(a.x) + (c.image + n) * p.dx.batch +
                          h0 * p.dx.axis[0] + h1 * p.dx.axis[1] +
                          (side.h0 + before * step) * p.dx.axis[2];
          if (plan.many_groups) {
            PackLanes(p, from, position, lane, lanes, s, end - before, to);
          } else {
            PackRow(from + group * p.dx.group + slice.first * p.dx.channel, position,
                    p.dx.channel, end - before, slice.channels, width, to);
          }
        }
      }
    }
  }
}

// Returns whether an infinity or a NaN is in it, where that matters.
template <typename T>
CONVGRAD_INLINE bool PackY(const FilterArgs& a, const Chunk& c, int64_t group,
                           int64_t lane, int64_t lanes, Acc<T>* packed) {
  using A = Acc<T>;
  constexpr int N = kLanes<A>, B = kBlock<A>;
  const Problem& p = a.problem;
  // Lanes that hold several groups count their out channels, which lie evenly (plan.cc).
  const int64_t channel =
      a.plan.many_groups && p.out_channels == 1 ? p.dy.group : p.dy.channel;
  const T* first = static_cast<const T*>(a.dy) + group * p.dy.group + lane * channel;
  A* to = packed;
  for (int64_t n = 0; n < c.images; ++n) {
    for (int64_t p0 = 0; p0 < c.side[0].count; ++p0) {
      for (int64_t p1 = 0; p1 < c.side[1].count; ++p1) {
        const T* from =
            first + (c.image + n) * p.dy.batch + (c.side[0].first + p0) * p.dy.axis[0] +
            (c.side[1].first + p1) * p.dy.axis[1] + c.side[2].first * p.dy.axis[2];
        PackRow(from, p.dy.axis[2], channel, c.side[2].count, lanes, B, to);
        to += c.side[2].count * B;
      }
    }
  }
  if (!a.plan.pads || a.plan.each_tap) return false;
  Vec<A, N> sum = {};
  for (const A* at = packed; at < to; at += N) sum += Load<N>(at) * A{0};
  A total = 0;
  for (int i = 0; i < N; ++i) total += sum[i];
  return HasNonfinite(total);
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
