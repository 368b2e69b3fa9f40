// Which positions of dY some neighbouring positions of dX read.

#pragma once

#include "job.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

CONVGRAD_INLINE int64_t FloorDiv(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

// Positions [lo, hi) of dY that inputs [h_lo, h_hi) read along an axis, unclipped.
struct Footprint {
  int64_t lo, hi;
};

CONVGRAD_INLINE Footprint FootprintOf(const Axis& x, int64_t h_lo, int64_t h_hi) {
  const int64_t least = h_lo * x.lhs_dilation + x.pad_lo - (x.win - 1) * x.rhs_dilation;
  const int64_t most = (h_hi - 1) * x.lhs_dilation + x.pad_lo;
  return {-FloorDiv(-least, x.stride), FloorDiv(most, x.stride) + 1};
}

CONVGRAD_INLINE Footprint Clip(Footprint r, int64_t out) {
  if (r.lo < 0) r.lo = 0;
  if (r.hi > out) r.hi = out;
  if (r.hi < r.lo) r.hi = r.lo;
  return r;
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
