// The filter gradient's units of work (outer.h): blocks of dW, chunks of the sum, and
// slices of the channels that a chunk packs.

#pragma once

#include "../footprint.h"
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

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
