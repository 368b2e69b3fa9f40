// The gradient of max pooling: what plan.cc, compiled for the baseline processor, hands
// to the kernel, which is compiled once for each instruction set (max_grad.h).

#pragma once

#include "../job.h"

namespace convgrad {

constexpr int kPoolAxes = 3;

// An axis that windows move along. A position counts from the first one of the padding
// on: h of x is position h + pad_lo. Group g is the positions g * stride .. (g + 1) *
// stride - 1, and where in its group a position is we call its phase. Window p begins at
// position p * stride, so that group g lies in the windows g - cover + 1 .. g, as far as
// they exist.
struct PoolAxis {
  int64_t in, out, window, stride, pad_lo;
  int64_t cover;                // ceil(window / stride)
  int64_t first_group, groups;  // that dX has
  int64_t tile_groups, tiles;   // groups that one task makes, and how many tasks
};

// Row-major arrays: x and dX are [outer, in.., inner], and dY is [outer, out.., inner].
struct PoolArgs {
  DType dtype;
  int64_t outer, inner;
  PoolAxis axis[kPoolAxes];
  int64_t channels, channel_tiles;  // of `inner` that one task makes, and how many tasks

  // What a task has on its stack, in elements of the accumulation type: a row of windows
  // with its margins, a packed row of x, a phase of a row of dX. Then how many rows of
  // windows there are, and of x: all that a window has, or else one, of some taps maybe.
  int64_t row, x_row, dx_row;
  int64_t rows, x_slots;

  const void *x, *dy;
  void* dx;
};

// Rows of dX, each of a phase, that a task holds: the two of stride 2 alternate in
// planes, and then there are as many for the result.
__attribute__((always_inline)) constexpr int64_t PhasesAtOnce(const PoolArgs& a) {
  return a.axis[kPoolAxes - 1].stride == 2 && a.inner == 1 ? 4 : 1;
}

// The most rows of x that a task holds, and the most taps along one at a time.
constexpr int64_t kPoolSlots = 16, kPoolTaps = 64;

// A task's stack, and the most bytes of vectors that its loops take at once. Rows are
// padded to multiples of those and rows of windows have as much as a margin at either
// end.
constexpr int64_t kPoolStackBytes = 192 * 1024;
constexpr int64_t kPoolBlockBytes = 128;

}  // namespace convgrad
