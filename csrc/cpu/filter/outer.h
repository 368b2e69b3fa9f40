// The filter gradient as sums of outer products (job.h):
//
//   dW[(r,c), k] += X[p*stride + r*rhs_dilation - pad_lo, c] * dY[p, k]
//
// for one position p after the other. A tile is some rows (r,c) of dW by one block of out
// channels k, held in registers while p runs over a whole chunk: on AVX2 6 rows by 16
// float32, twelve sums for two vectors of dY and six numbers of x. Which rows share a
// tile does not matter, since each has its own place in the packed x: so a first layer's
// 7x7 taps of three channels fill tiles as well as 64 channels of one tap.
//
// Both operands are packed, chunk by chunk, to the accumulation type: channels beside
// each other, whatever the layout was, zeros where x is padded. What it costs is small
// beside the products, since each position of x comes back for every tap and every block
// of out channels.
//
// Where groups have few out channels, one block holds those of several groups, and x is
// packed as vectors: lane k of vector c is channel c of k's group. A depthwise layer is
// the case of one channel a group; its tile is some taps of 16 channels.
//
// A product with a padding zero must not turn an infinite or NaN dY into a NaN. So
// packing notices those, and such a chunk's tiles are cut at each tap, which then visits
// only the positions that lie inside x. The same serves lhs_dilation, where those are
// every so many, and windows that are dilated so far that most of what they span is
// padding: then x is packed as it is.

#pragma once

#include "../reach.h"
#include "../vec.h"
#include "job.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

template <typename A>
constexpr int kBlock = static_cast<int>(kBlockBytes / sizeof(A));
constexpr int kBlockVectors = static_cast<int>(kBlockBytes) / kVectorBytes;
// As many sums as leave registers for a block of dY and a number of x.
constexpr int kTileRows =
    kVectorRegisters == 32 ? (kBlockVectors == 1 ? 12 : 6) : 12 / kBlockVectors;
static_assert(kSliceChannels % kTileRows == 0, "tiles would straddle taps");

CONVGRAD_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
CONVGRAD_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
CONVGRAD_INLINE int64_t Ceil(int64_t a, int64_t b) { return -FloorDiv(-a, b); }

// ---- the product --------------------------------------------------------------------

// Nested loops over images and positions, and how far apart both operands' are.
struct Loop {
  int64_t count[1 + kAxes], x_step[1 + kAxes], y_step[1 + kAxes];
};

// Makes long inner loops of those that walk memory as one would.
CONVGRAD_INLINE void Flatten(Loop* loop) {
  int to = kAxes;
  for (int from = kAxes - 1; from >= 0; --from) {
    if (loop->count[from] == 1) continue;
    if (loop->x_step[from] == loop->count[to] * loop->x_step[to] &&
        loop->y_step[from] == loop->count[to] * loop->y_step[to]) {
      loop->count[to] *= loop->count[from];
      continue;
    }
    if (loop->count[to] > 1) --to;
    loop->count[to] = loop->count[from];
    loop->x_step[to] = loop->x_step[from];
    loop->y_step[to] = loop->y_step[from];
  }
  while (to-- > 0) loop->count[to] = 1;
}

// R rows of sums, each a block. kVectors: x has a number for each lane.
template <typename A, int R, bool kVectors>
CONVGRAD_NOINLINE void Tile(const A* x, const int64_t* offset, const A* y,
                            const Loop& loop, bool add, A* sums) {
  constexpr int N = kLanes<A>, V = kBlockVectors;
  Vec<A, N> sum[R][V] = {};
  const A* row[R];
  CONVGRAD_UNROLL
  for (int i = 0; i < R; ++i) row[i] = x + offset[i];
  for (int64_t n = 0; n < loop.count[0]; ++n) {
    for (int64_t p0 = 0; p0 < loop.count[1]; ++p0) {
      for (int64_t p1 = 0; p1 < loop.count[2]; ++p1) {
        int64_t at = n * loop.x_step[0] + p0 * loop.x_step[1] + p1 * loop.x_step[2];
        const A* dy = y + n * loop.y_step[0] + p0 * loop.y_step[1] + p1 * loop.y_step[2];
        const int64_t x_step = loop.x_step[3], y_step = loop.y_step[3];
        for (int64_t p2 = loop.count[3]; p2 > 0; --p2) {
          Vec<A, N> block[V];
          CONVGRAD_UNROLL
          for (int v = 0; v < V; ++v) block[v] = Load<N>(dy + v * N);
          CONVGRAD_UNROLL
          for (int i = 0; i < R; ++i) {
            CONVGRAD_UNROLL
            for (int v = 0; v < V; ++v) {
              if constexpr (kVectors) {
                sum[i][v] += Load<N>(row[i] + at + v * N) * block[v];
              } else {
                sum[i][v] += row[i][at] * block[v];
              }
            }
          }
          at += x_step;
          dy += y_step;
        }
      }
    }
  }
  CONVGRAD_UNROLL
  for (int i = 0; i < R; ++i) {
    CONVGRAD_UNROLL
    for (int v = 0; v < V; ++v) {
      A* to = sums + i * kBlock<A> + v * N;
      Store<N>(to, add ? Load<N>(to) + sum[i][v] : sum[i][v]);
    }
  }
}

template <typename A, bool kVectors, int R = 1>
CONVGRAD_INLINE void TileOf(int64_t rows, const A* x, const int64_t* offset, const A* y,
                            const Loop& loop, bool add, A* sums) {
  if (rows == R) {
    Tile<A, R, kVectors>(x, offset, y, loop, add, sums);
  } else if constexpr (R < kTileRows) {
    TileOf<A, kVectors, R + 1>(rows, x, offset, y, loop, add, sums);
  }
}

// ---- the geometry of a chunk ----------------------------------------------------------

// Along an axis: the positions of dY, the x that they read as it is packed, and whether
// every tap of every one of them is inside x.
struct Side {
  int64_t first, count;  // of dY
  int64_t h0, x_count;   // of x: h0, h0 + x_step, ..
  bool inside;
};

struct Chunk {
  int64_t image, images;
  Side side[kAxes];
};

CONVGRAD_INLINE Chunk ChunkAt(const Problem& p, const FilterPlan& plan, int64_t index) {
  Chunk c;
  for (int a = kAxes - 1; a >= 0; --a) {
    const Axis& axis = p.axis[a];
    Side& side = c.side[a];
    side.first = index % plan.grid[1 + a] * plan.chunk[1 + a];
    index /= plan.grid[1 + a];
    side.count = Min(plan.chunk[1 + a], axis.out - side.first);
    const int64_t low = side.first * axis.stride - axis.pad_lo;
    const int64_t high =
        low + (side.count - 1) * axis.stride + (axis.win - 1) * axis.rhs_dilation;
    side.inside = !plan.each_tap && low >= 0 && high < axis.in;
    if (plan.each_tap) {
      side.h0 = Max(0, Ceil(low, axis.lhs_dilation));
      side.x_count =
          Max(0, Min(axis.in, FloorDiv(high, axis.lhs_dilation) + 1) - side.h0);
    } else {
      side.h0 = low;
      side.x_count = (high - low) / plan.x_step[a] + 1;
    }
  }
  c.image = index * plan.chunk[0];
  c.images = Min(plan.chunk[0], p.batch - c.image);
  return c;
}

CONVGRAD_INLINE Meets MeetsOf(const Axis& axis, const FilterPlan& plan, int a,
                              const Side& side, int64_t r) {
  const int64_t y_step = plan.y_step[a];
  if (side.inside) return {0, side.count, 1, 0, y_step};
  const int64_t at = side.first * axis.stride - axis.pad_lo + r * axis.rhs_dilation;
  const int64_t last = (axis.in - 1) * axis.lhs_dilation - at;
  Meets m{Max(0, Ceil(-at, axis.stride)), 0, 1, 0, y_step};
  const int64_t end = last < 0 ? 0 : Min(side.count, last / axis.stride + 1);
  if (!plan.each_tap) {
    m.count = Max(0, end - m.first);
    m.x_first = m.first * y_step;
    return m;
  }
  m.step = plan.meets_every[a];
  m.x_step = m.step * axis.stride / axis.lhs_dilation;
  for (int64_t i = 0; i < m.step && m.first < end; ++i, ++m.first) {
    const int64_t position = at + m.first * axis.stride;
    if (position % axis.lhs_dilation != 0) continue;
    m.x_first = position / axis.lhs_dilation - side.h0;
    m.count = (end - 1 - m.first) / m.step + 1;
    break;
  }
  return m;
}

// Of every tap of every axis, one after the other.
CONVGRAD_INLINE void FillMeets(const Problem& p, const FilterPlan& plan, const Chunk& c,
                               Meets* meets) {
  for (int a = 0; a < kAxes; ++a) {
    for (int64_t r = 0; r < p.axis[a].win; ++r) {
      *meets++ = MeetsOf(p.axis[a], plan, a, c.side[a], r);
    }
  }
}

// Both, and what lies between: packed zeros.
CONVGRAD_INLINE void Include(const Meets& other, int64_t y_step, Meets* m) {
  if (other.count == 0) return;
  if (m->count == 0) {
    *m = other;
    return;
  }
  const int64_t first = Min(m->first, other.first);
  m->count = Max(m->first + m->count, other.first + other.count) - first;
  m->first = first;
  m->x_first = first * y_step;
}

// ---- packing --------------------------------------------------------------------------

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
    for (int64_t p = 0; p < count; ++p) {
      to[p * width + c] = LoadOne(from + c * channel + p * position);
    }
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

// ---- the task -------------------------------------------------------------------------

// Of the packed x: the channels of a slice, and elements of a position.
struct Slice {
  int64_t first, channels, width;
};

template <typename A>
CONVGRAD_INLINE Slice SliceAt(const FilterArgs& a, int64_t index) {
  if (a.plan.many_groups) return {0, a.problem.in_channels, kBlock<A>};
  const int64_t first = index * kSliceChannels;
  const int64_t channels = Min(kSliceChannels, a.problem.in_channels - first);
  return {first, channels, channels};
}

CONVGRAD_INLINE int64_t SliceCount(const FilterArgs& a) {
  return a.plan.many_groups ? 1 : CeilDiv(a.problem.in_channels, kSliceChannels);
}

CONVGRAD_INLINE int64_t PackedPositions(const FilterPlan& plan) {
  return plan.chunk[0] * plan.extent[0] * plan.extent[1] * plan.extent[2];
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
  return IsTainted(total);
}

// The products of some taps in a chunk, of which `strides` are one position apart, and
// where both operands begin.
CONVGRAD_INLINE Loop LoopOver(const FilterArgs& a, int64_t images, const Meets* meets,
                              const Loop& strides, int64_t first_tap, int64_t last_tap,
                              int64_t* x_first, int64_t* y_first) {
  Loop loop;
  loop.count[0] = images;
  loop.x_step[0] = strides.x_step[0];
  loop.y_step[0] = strides.y_step[0];
  *x_first = *y_first = 0;
  bool empty = false;
  for (int i = 0; i < kAxes; ++i) {
    Meets m = meets[a.tap[first_tap].r[i]];
    for (int64_t tap = first_tap + 1; tap <= last_tap; ++tap) {
      Include(meets[a.tap[tap].r[i]], a.plan.y_step[i], &m);
    }
    meets += a.problem.axis[i].win;
    loop.count[1 + i] = m.count;
    loop.x_step[1 + i] = m.x_step * strides.x_step[1 + i];
    loop.y_step[1 + i] = m.step * strides.y_step[1 + i];
    *x_first += m.x_first * strides.x_step[1 + i];
    *y_first += m.first * strides.y_step[1 + i];
    empty = empty || m.count == 0;
  }
  if (empty) {
    loop.count[0] = *x_first = *y_first = 0;
  } else {
    Flatten(&loop);
  }
  return loop;
}

// A slice's rows of one block, the sum of the private copies, pairwise, to dW.
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
  int64_t of_lane[B];
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t g = plan.many_groups ? (lane + l) / p.out_channels : 0;
    of_lane[l] = g * p.w.group + (lane + l - g * p.out_channels) * p.w.out_channel;
  }
  bool is_run = true;
  for (int64_t l = 1; l < lanes; ++l) is_run = is_run && of_lane[l] == of_lane[0] + l;
  for (int64_t t = 0; t < plan.taps; ++t) {
    const int64_t* const r = a.tap[t].r;
    const int64_t at =
        r[0] * p.w.axis[0] + r[1] * p.w.axis[1] + r[2] * p.w.axis[2] + of_lane[0];
    for (int64_t c = 0; c < slice.channels; ++c, from += B) {
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
      A values[B];
      CONVGRAD_UNROLL
      for (int v = 0; v < V; ++v) Store<N>(values + v * N, sum[0][v]);
      T* const to = dw + at + (slice.first + c) * p.w.in_channel;
      if (is_run) {
        StoreRun(to, values, lanes);
      } else {
        for (int64_t l = 0; l < lanes; ++l) {
          StoreOne(to + of_lane[l] - of_lane[0], values[l]);
        }
      }
    }
  }
}

// Adds one chunk to all rows of one block of dW; or, at once, writes them.
template <typename T, bool kVectors>
CONVGRAD_NOINLINE void MultiplyChunk(const FilterArgs& a, const Chunk& c, int64_t unit,
                                     const Acc<T>* x, const Acc<T>* y, const Meets* meets,
                                     bool each_tap, bool add, Acc<T>* sums) {
  using A = Acc<T>;
  const FilterPlan& plan = a.plan;
  const int64_t positions = PackedPositions(plan);
  const int64_t slices = SliceCount(a);
  const bool inside =
      !each_tap && c.side[0].inside && c.side[1].inside && c.side[2].inside;
  const int64_t* offset = a.row_offset;
  for (int64_t s = 0; s < slices; ++s) {
    const Slice slice = SliceAt<A>(a, s);
    const int64_t width = slice.width;
    const A* const base = x + (kVectors ? 0 : slice.first * positions);
    Loop strides;
    strides.x_step[3] = width;
    strides.x_step[2] = strides.x_step[3] * plan.extent[2];
    strides.x_step[1] = strides.x_step[2] * plan.extent[1];
    strides.x_step[0] = strides.x_step[1] * plan.extent[0];
    strides.y_step[3] = kBlock<A>;
    strides.y_step[2] = strides.y_step[3] * c.side[2].count;
    strides.y_step[1] = strides.y_step[2] * c.side[1].count;
    strides.y_step[0] = strides.y_step[1] * c.side[0].count;
    int64_t x_first, y_first;
    Loop loop = LoopOver(a, c.images, meets, strides, 0, 0, &x_first, &y_first);
    const int64_t rows = plan.taps * slice.channels;
    const int64_t tiles = CeilDiv(rows, kTileRows);
    int64_t row = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t tile_end = rows * (t + 1) / tiles;
      while (row < tile_end) {
        int64_t end = tile_end;
        if (!inside) {
          const int64_t tap = row / slice.channels;
          if (each_tap) end = Min(end, (tap + 1) * slice.channels);
          loop = LoopOver(a, c.images, meets, strides, tap, (end - 1) / slice.channels,
                          &x_first, &y_first);
        }
        TileOf<A, kVectors>(end - row, base + x_first, offset + row, y + y_first, loop,
                            add, sums + row * kBlock<A>);
        row = end;
      }
    }
    offset += rows;
    if (plan.at_once) {
      WriteSlice<T>(a, unit, slice, sums, 1, 0);
    } else {
      sums += rows * kBlock<A>;
    }
  }
}

// Where the workspace has what tasks need for themselves ends, and copies of dW begin.
CONVGRAD_INLINE int64_t TaskElements(const FilterPlan& plan) {
  return plan.packed_x + plan.packed_y + plan.meets;
}

// A part of dW's blocks, summed over a part of the chunks.
template <typename T>
void MultiplyTask(const void* state, int64_t index) {
  using A = Acc<T>;
  const FilterArgs& a = *static_cast<const FilterArgs*>(state);
  const FilterPlan& plan = a.plan;
  A* const base = static_cast<A*>(a.workspace);
  A* const x = base + index * TaskElements(plan);
  A* const y = x + plan.packed_x;
  Meets* const meets = reinterpret_cast<Meets*>(y + plan.packed_y);
  const int64_t split = index / plan.unit_tasks, part = index % plan.unit_tasks;
  A* const total = base + plan.tasks * TaskElements(plan) +
                   (plan.at_once ? part : split) * plan.copy * (plan.two_levels ? 2 : 1);
  A* const sums = plan.two_levels ? total + plan.copy : total;
  const int64_t first_chunk = plan.chunks * split / plan.splits;
  const int64_t chunks = plan.chunks * (split + 1) / plan.splits - first_chunk;
  const int64_t first_unit = plan.units * part / plan.unit_tasks;
  const int64_t end_unit = plan.units * (part + 1) / plan.unit_tasks;
  const int64_t unit_elements = plan.rows * kBlock<A>;
  for (int64_t i = 0; i < chunks; ++i) {
    const Chunk chunk = ChunkAt(a.problem, plan, first_chunk + i);
    FillMeets(a.problem, plan, chunk, meets);
    int64_t packed_group = -1;
    for (int64_t unit = first_unit; unit < end_unit; ++unit) {
      const int64_t group = unit / plan.blocks;
      const int64_t lane = unit % plan.blocks * kBlock<A>;
      const int64_t lanes = Min(kBlock<A>, plan.lane_count - lane);
      if (plan.many_groups || group != packed_group) {
        PackX<T>(a, chunk, group, lane, lanes, x);
        packed_group = group;
      }
      const bool each_tap = PackY<T>(a, chunk, group, lane, lanes, y) || plan.each_tap;
      const bool add = i % plan.run != 0;
      A* const of_unit = plan.at_once ? sums : sums + unit * unit_elements;
      if (plan.many_groups) {
        MultiplyChunk<T, true>(a, chunk, unit, x, y, meets, each_tap, add, of_unit);
      } else {
        MultiplyChunk<T, false>(a, chunk, unit, x, y, meets, each_tap, add, of_unit);
      }
    }
    if (!plan.two_levels || ((i + 1) % plan.run != 0 && i + 1 < chunks)) continue;
    constexpr int N = kLanes<A>;
    for (int64_t at = first_unit * unit_elements; at < end_unit * unit_elements;
         at += N) {
      const Vec<A, N> run = Load<N>(sums + at);
      Store<N>(total + at, i < plan.run ? run : Load<N>(total + at) + run);
    }
  }
}

template <typename T>
void WriteTask(const void* state, int64_t index) {
  using A = Acc<T>;
  const FilterArgs& a = *static_cast<const FilterArgs*>(state);
  const FilterPlan& plan = a.plan;
  const int64_t slices = SliceCount(a), unit = index / slices;
  const Slice slice = SliceAt<A>(a, index % slices);
  const A* from = static_cast<const A*>(a.workspace) + plan.tasks * TaskElements(plan) +
                  (unit * plan.rows + slice.first * plan.taps) * kBlock<A>;
  WriteSlice<T>(a, unit, slice, from, plan.splits, plan.copy * (plan.two_levels ? 2 : 1));
}

template <typename T>
void PrepareFilter(const FilterArgs& a, CpuJob* job) {
  SetState(job, a);
  job->stages = a.plan.at_once ? 1 : 2;
  job->stage[0] = {a.plan.tasks, MultiplyTask<T>};
  job->stage[1] = {a.plan.units * SliceCount(a), WriteTask<T>};
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
