// The filter gradient: what the planner (plan.cc), compiled for the baseline processor,
// hands to the kernel (outer.h), which is compiled once for each instruction set. job.h
// of the directory above says what that asks of the code.
//
//   dW[g,k,c,r] = sum over n, p  dY[n,g,k,p] * X[n,g,c,h],
//   where, on every spatial axis,  h*lhs_dilation = p*stride - pad_lo + r*rhs_dilation
//
// The sum is cut into chunks: boxes of images and positions of dY, a grid that depends on
// the problem alone. A task packs what a chunk reads and adds up some rows of dW, so the
// bits do not depend on the number of threads.

#pragma once

#include "../job.h"

namespace convgrad {

// dW is computed in blocks of as many out channels as 64 bytes hold sums of, a multiple
// of every vector.
constexpr int64_t kBlockBytes = 64;

// Channels of x that are packed beside each other: a multiple of the rows of every tile,
// and few enough for the positions of a chunk to stay in a second-level cache.
constexpr int64_t kSliceChannels = 48;

// Private copies of dW are added up in registers.
constexpr int64_t kMaxSplits = 32;

// Positions that lie side by side in memory, at least, where lanes hold positions.
constexpr int64_t kLeastDotRun = 16;

struct FilterTap {
  int64_t r[kAxes];
};

// Along an axis, the positions of a chunk's dY at which a tap is inside x, and what they
// read there, both counted within the chunk.
struct Meets {
  int64_t first, count, step;
  int64_t x_first, x_step;
};

struct FilterPlan {
  // Lanes hold out channels of one group, and rows of dW are pairs of a tap and a
  // channel; or, where groups are narrow, out channels of several groups, and x is packed
  // once for each channel of a group, in the lanes of the out channels that meet it. With
  // `dots` the layout of the sums is the former, but vectors hold positions (dots.h), and
  // nothing is packed.
  bool many_groups, dots;

  int64_t lanes;       // of a block, valid ones or not
  int64_t lane_count;  // out channels that share x: of a group, or all
  int64_t groups;      // that are computed one after the other: 1 if lanes hold several
  int64_t blocks;      // of lanes in a group
  int64_t units;       // blocks of all groups
  int64_t taps, rows;  // of dW, for each lane: taps times channels of a group

  // Images and positions of dY in a chunk, at most; chunks along each of them; all
  // chunks.
  int64_t chunk[1 + kAxes], grid[1 + kAxes], chunks;

  // The packed x of a chunk. Along axis a its position j holds h = h0 + j*x_step; the
  // next position of dY reads y_step further, and the next tap tap_step.
  int64_t extent[kAxes], x_step[kAxes], y_step[kAxes], tap_step[kAxes];
  // Tiles are cut at each tap, and x is packed without padding: each tap counts for
  // itself from where it meets x first (Meets).
  bool each_tap;
  int64_t meets_every[kAxes];  // positions of dY until a tap meets an x again
  bool pads;                   // some tap of some position lies outside x

  // The sum is one chunk: a task writes a slice's rows of dW as soon as it has them.
  bool at_once;

  // And of few positions, so that writing dW is what takes the time: a task packs all of
  // dY and makes some tiles of rows, each for all blocks, in order of memory.
  bool by_rows;
  int64_t packed_units;  // blocks of dY that a task has packed at once

  int64_t splits;      // private copies of dW, each the sum of some chunks
  int64_t unit_tasks;  // tasks of a split: parts of dW's blocks or, by rows, of its tiles
  int64_t tasks;       // splits times unit_tasks
  int64_t run;         // chunks that are added up before their sum joins that of others

  // Elements of the workspace, of the accumulation type: of a task, which packs (one
  // block of dY is packed_y) and keeps a table of Meets, and of a copy of dW or, at once,
  // a task's slice of one.
  int64_t packed_x, packed_y, meets, copy;
  bool two_levels;  // a copy has room for a sum of sums
};

struct FilterArgs {
  Problem problem;  // strides `dx` are those of x
  FilterPlan plan;
  const void* x;
  const void* dy;
  void* dw;
  void* workspace;
  const FilterTap* tap;
  // For each row of dW, slice by slice and tap by tap: where its channel lies in a
  // position of the packed x, and unless each tap counts for itself its tap.
  const int64_t* row_offset;
};

}  // namespace convgrad
