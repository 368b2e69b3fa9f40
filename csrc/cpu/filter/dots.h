// The filter gradient of one tap as dot products (job.h), for channels-first layers,
// whose rows of positions are runs of memory in x and in dY:
//
//   dW[c, k] = sum over p   X[c, p] * dY[k, p]
//
// Lanes hold neighbouring positions p, so nothing is packed, which for one tap costs as
// much as the products. A tile is kDotChannels of x by kDotLanes of dY: on AVX2 twelve
// sums, three vectors of x and one of dY at a time. It runs over a chunk, and its sums
// are added across lanes at the end.
//
// The last vector of a run overlaps the one before; the lanes that were had are cleared
// in both operands, so that an infinite or NaN element does not count twice.
//
// Limits: runs of kLeastDotRun positions, and one tap that is inside x everywhere.

#pragma once

#include "chunk.h"
#include "loop.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

constexpr int kDotChannels = kVectorRegisters == 32 ? 6 : 3;
constexpr int kDotLanes = 4;
static_assert(kLeastDotRun >= kVectorBytes / static_cast<int>(sizeof(float)),
              "a run is a vector at least");

// Where a tile's sums go: to a block of dW, or, at once, to dW itself.
template <typename T>
struct DotSums {
  Acc<T>* block;
  bool add;
  T* dw;
  int64_t channel, lane;  // strides of dW
};

// Channel c of x begins at x + c*x_channel, and out channel k of dY at y + k*y_channel.
// Beyond the last one a tile computes it again.
template <typename T>
CONVGRAD_NOINLINE void DotTile(const T* x, int64_t x_channel, int64_t channels,
                               const T* y, int64_t y_channel, int64_t lanes,
                               const Loop& loop, const DotSums<T>& sums) {
  using A = Acc<T>;
  constexpr int N = kLanes<A>, C = kDotChannels, K = kDotLanes;
  using I = Vec<typename IntOf<A>::type, N>;
  const T *x_row[C], *y_row[K];
  CONVGRAD_UNROLL
  for (int c = 0; c < C; ++c) x_row[c] = x + Min(c, channels - 1) * x_channel;
  CONVGRAD_UNROLL
  for (int k = 0; k < K; ++k) y_row[k] = y + Min(k, lanes - 1) * y_channel;
  constexpr int kPart = K < N ? K : N;  // of a tile's sums, in a vector
  const int64_t length = loop.count[kAxes], rest = length % N;
  I lane;
  for (int i = 0; i < N; ++i) lane[i] = i;
  const I is_new = lane >= static_cast<typename IntOf<A>::type>(N - rest);

  Vec<A, N> sum[C][K] = {};
  for (int64_t n = 0; n < loop.count[0]; ++n) {
    for (int64_t p0 = 0; p0 < loop.count[1]; ++p0) {
      for (int64_t p1 = 0; p1 < loop.count[2]; ++p1) {
        int64_t at = n * loop.x_step[0] + p0 * loop.x_step[1] + p1 * loop.x_step[2];
        int64_t dy = n * loop.y_step[0] + p0 * loop.y_step[1] + p1 * loop.y_step[2];
        const int64_t end = at + length - rest;
        for (; at < end; at += N, dy += N) {
          Vec<A, N> of_x[C];
          CONVGRAD_UNROLL
          for (int c = 0; c < C; ++c) of_x[c] = Load<N>(x_row[c] + at);
          CONVGRAD_UNROLL
          for (int k = 0; k < K; ++k) {
            const Vec<A, N> of_y = Load<N>(y_row[k] + dy);
            CONVGRAD_UNROLL
            for (int c = 0; c < C; ++c) sum[c][k] += of_x[c] * of_y;
          }
        }
        if (rest == 0) continue;
        at += rest - N;
        dy += rest - N;
        Vec<A, N> of_x[C];
        CONVGRAD_UNROLL
        for (int c = 0; c < C; ++c) {
          of_x[c] = (Vec<A, N>)((I)Load<N>(x_row[c] + at) & is_new);
        }
        CONVGRAD_UNROLL
        for (int k = 0; k < K; ++k) {
          const Vec<A, N> of_y = (Vec<A, N>)((I)Load<N>(y_row[k] + dy) & is_new);
          CONVGRAD_UNROLL
          for (int c = 0; c < C; ++c) sum[c][k] += of_x[c] * of_y;
        }
      }
    }
  }
  static_assert(K % kPart == 0, "vectors hold whole parts of a tile's sums");
  CONVGRAD_UNROLL
  for (int c = 0; c < C; ++c) {
    if (c >= channels) break;
    CONVGRAD_UNROLL
    for (int k = 0; k < K; k += kPart) {
      Vec<A, N> all = AddLanes<A, kPart>(&sum[c][k]);
      Vec<A, kPart> total;
      __builtin_memcpy(&total, &all, sizeof(total));
      if (sums.dw != nullptr) {
        T* const to = sums.dw + c * sums.channel;
        for (int64_t i = 0; i < Min(kPart, lanes - k); ++i) {
          StoreOne(to + (k + i) * sums.lane, total[i]);
        }
        continue;
      }
      A* const to = sums.block + c * kBlock<A> + k;
      Store<kPart>(to, sums.add ? Load<kPart>(to) + total : total);
    }
  }
}

// Adds one chunk to some units of dW, which begin at `sums`; or, at once, writes them.
template <typename T>
CONVGRAD_NOINLINE void DotChunk(const FilterArgs& a, const Chunk& c, int64_t first_unit,
                                int64_t end_unit, bool add, Acc<T>* sums) {
  using A = Acc<T>;
  const Problem& p = a.problem;
  const FilterPlan& plan = a.plan;
  const T* x = static_cast<const T*>(a.x) + c.image * p.dx.batch;
  const T* y = static_cast<const T*>(a.dy) + c.image * p.dy.batch;
  Loop loop;
  loop.count[0] = c.images;
  loop.x_step[0] = p.dx.batch;
  loop.y_step[0] = p.dy.batch;
  for (int i = 0; i < kAxes; ++i) {
    loop.count[1 + i] = c.side[i].count;
    loop.x_step[1 + i] = p.axis[i].stride * p.dx.axis[i];
    loop.y_step[1 + i] = p.dy.axis[i];
    x += c.side[i].h0 * p.dx.axis[i];
    y += c.side[i].first * p.dy.axis[i];
  }
  Flatten(&loop);
  // A slice's channels of x stay in a second-level cache for all units.
  for (int64_t s = 0; s < SliceCount(a); ++s) {
    const Slice slice = SliceAt<A>(a, s);
    for (int64_t unit = first_unit; unit < end_unit; ++unit) {
      const int64_t group = unit / plan.blocks, lane = unit % plan.blocks * kBlock<A>;
      const int64_t lanes = Min(kBlock<A>, plan.lane_count - lane);
      const T* const of_x = x + group * p.dx.group + slice.first * p.dx.channel;
      const T* const of_y = y + group * p.dy.group + lane * p.dy.channel;
      DotSums<T> to{nullptr, add, nullptr, p.w.in_channel, p.w.out_channel};
      if (plan.at_once) {
        to.dw = static_cast<T*>(a.dw) + group * p.w.group + lane * p.w.out_channel +
                slice.first * p.w.in_channel;
      } else {
        to.block = sums + (unit * plan.rows + slice.first) * kBlock<A>;
      }
      for (int64_t k = 0; k < lanes; k += kDotLanes) {
        for (int64_t row = 0; row < slice.channels; row += kDotChannels) {
          DotSums<T> of_tile = to;
          if (plan.at_once) {
            of_tile.dw += row * to.channel + k * to.lane;
          } else {
            of_tile.block += row * kBlock<A> + k;
          }
          DotTile(of_x + row * p.dx.channel, p.dx.channel, slice.channels - row,
                  of_y + k * p.dy.channel, p.dy.channel, lanes - k, loop, of_tile);
        }
      }
    }
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
