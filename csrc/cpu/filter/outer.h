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

#include "chunk.h"
#include "dots.h"
#include "loop.h"
#include "pack.h"
#include "write.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// ---- the product ------------------------------------------------------------------

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

// ---- the task ---------------------------------------------------------------------

// The products of some taps in a chunk, and where both operands begin. `strides` are
// those of one position.
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

// Adds one chunk to all rows of one block of dW; or, at once, writes them; or, by rows,
// makes part `part` of the rows of all blocks.
template <typename T, bool kVectors>
CONVGRAD_NOINLINE void MultiplyChunk(const FilterArgs& a, const Chunk& c, int64_t unit,
                                     const Acc<T>* x, const Acc<T>* y, const Meets* meets,
                                     bool each_tap, bool add, int64_t part,
                                     Acc<T>* sums) {
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
    int64_t loop_first = 0, loop_last = 0;  // the taps that `loop` is for
    Loop loop = LoopOver(a, c.images, meets, strides, 0, 0, &x_first, &y_first);
    const int64_t rows = plan.taps * slice.channels;
    const int64_t tiles = CeilDiv(rows, kTileRows);
    const int64_t parts = plan.by_rows ? plan.unit_tasks : 1;
    const int64_t first_tile = tiles * part / parts;
    int64_t row = rows * first_tile / tiles;
    for (int64_t t = first_tile; t < tiles * (part + 1) / parts; ++t) {
      const int64_t tile_end = rows * (t + 1) / tiles;
      while (row < tile_end) {
        int64_t end = tile_end;
        if (!inside) {
          const int64_t tap = row / slice.channels;
          if (each_tap) end = Min(end, (tap + 1) * slice.channels);
          const int64_t last_tap = (end - 1) / slice.channels;
          if (tap != loop_first || last_tap != loop_last) {
            loop =
                LoopOver(a, c.images, meets, strides, tap, last_tap, &x_first, &y_first);
            loop_first = tap;
            loop_last = last_tap;
          }
        }
        if (plan.by_rows) {
          const RowPlaces places = PlaceRows(a, slice, row, end);
          for (int64_t u = 0; u < plan.units; ++u) {
            TileOf<A, kVectors>(end - row, base + x_first, offset + row,
                                y + u * plan.packed_y + y_first, loop, false, sums);
            const int64_t lane = u * kBlock<A>;
            const int64_t lanes = Min(kBlock<A>, plan.lane_count - lane);
            for (int64_t i = 0; i < end - row; ++i) {
              StoreRun(static_cast<T*>(a.dw) + places.at[i] + lane, sums + i * kBlock<A>,
                       lanes);
            }
          }
        } else {
          TileOf<A, kVectors>(end - row, base + x_first, offset + row, y + y_first, loop,
                              add, sums + row * kBlock<A>);
        }
        row = end;
      }
    }
    offset += rows;
    if (plan.by_rows) continue;
    if (plan.at_once) {
      WriteSlice<T>(a, unit, slice, sums, 1, 0);
    } else {
      sums += rows * kBlock<A>;
    }
  }
}

// Where the workspace has what tasks need for themselves ends, and copies of dW begin.
CONVGRAD_INLINE int64_t TaskElements(const FilterPlan& plan) {
  return plan.packed_x + plan.packed_y * plan.packed_units + plan.meets;
}

// Adds one chunk to some units of dW, which begin at `sums`; or, at once, writes them.
template <typename T>
CONVGRAD_NOINLINE void MultiplyUnits(const FilterArgs& a, const Chunk& chunk,
                                     int64_t first_unit, int64_t end_unit, Acc<T>* x,
                                     Acc<T>* y, const Meets* meets, bool add,
                                     Acc<T>* sums) {
  using A = Acc<T>;
  const FilterPlan& plan = a.plan;
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
    A* const of_unit = plan.at_once ? sums : sums + unit * plan.rows * kBlock<A>;
    if (plan.many_groups) {
      MultiplyChunk<T, true>(a, chunk, unit, x, y, meets, each_tap, add, 0, of_unit);
    } else {
      MultiplyChunk<T, false>(a, chunk, unit, x, y, meets, each_tap, add, 0, of_unit);
    }
  }
}

// Writes part `part` of the rows of dW, for all units.
template <typename T>
CONVGRAD_NOINLINE void MultiplyRows(const FilterArgs& a, const Chunk& chunk, int64_t part,
                                    Acc<T>* x, Acc<T>* y, const Meets* meets,
                                    Acc<T>* sums) {
  constexpr int64_t B = kBlock<Acc<T>>;
  const FilterPlan& plan = a.plan;
  PackX<T>(a, chunk, 0, 0, 0, x);
  bool each_tap = plan.each_tap;
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    each_tap |= PackY<T>(a, chunk, 0, unit * B, Min(B, plan.lane_count - unit * B),
                         y + unit * plan.packed_y);
  }
  MultiplyChunk<T, false>(a, chunk, 0, x, y, meets, each_tap, false, part, sums);
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
  Meets* const meets = reinterpret_cast<Meets*>(y + plan.packed_y * plan.packed_units);
  const int64_t split = index / plan.unit_tasks, part = index % plan.unit_tasks;
  A* const total = base + plan.tasks * TaskElements(plan) +
                   (plan.at_once ? part : split) * plan.copy * (plan.two_levels ? 2 : 1);
  A* const sums = plan.two_levels ? total + plan.copy : total;
  const int64_t first_chunk = plan.chunks * split / plan.splits;
  const int64_t chunks = plan.chunks * (split + 1) / plan.splits - first_chunk;
  const int64_t first_unit = plan.units * part / plan.unit_tasks;
  const int64_t end_unit = plan.units * (part + 1) / plan.unit_tasks;
  for (int64_t i = 0; i < chunks; ++i) {
    const Chunk chunk = ChunkAt(a.problem, plan, first_chunk + i);
    const bool add = i % plan.run != 0;
    if (plan.dots) {
      DotChunk<T>(a, chunk, first_unit, end_unit, add, sums);
    } else {
      FillMeets(a.problem, plan, chunk, meets);
      if (plan.by_rows) {
        MultiplyRows<T>(a, chunk, part, x, y, meets, sums);
      } else {
        MultiplyUnits<T>(a, chunk, first_unit, end_unit, x, y, meets, add, sums);
      }
    }
    if (!plan.two_levels || ((i + 1) % plan.run != 0 && i + 1 < chunks)) continue;
    constexpr int N = kLanes<A>;
    const int64_t unit_elements = plan.rows * kBlock<A>;
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
