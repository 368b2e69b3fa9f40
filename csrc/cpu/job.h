// What kernel_cpu.cc, compiled for the baseline processor, hands to the kernels,
// which are compiled once per instruction set (entries.h), and what it gets back.
//
// The rule that keeps the library running on an old processor: a translation unit
// compiled for AVX must not emit an inline or template function with external
// linkage, because the linker keeps one copy of those for the whole library and may
// keep the AVX one. So nothing of the standard library crosses this boundary, the
// phases arrive as tables, and the kernels live in unnamed namespaces.

#pragma once

#include <cstdint>

#include "../kernel.h"
#include "../phase.h"

namespace convgrad {

// The tile of dX, rows x width pixels of one plane, that a task of the few_channels
// kernel makes, and the columns of dY that it reads, over-reads of whole vectors
// included. rows = 0 if no tile is small enough.
struct PlaneTile {
  int64_t rows, width, cols;
};

struct CpuArgs {
  Problem problem;
  const void* dy;
  const void* w;
  void* dx;
  Epilogue epilogue;
  int64_t threads;  // that will share the tasks, about

  // Along axis a: phase[a][0 .. phase_count[a]). Phases beyond the input are left
  // out, so phase_count is at most axis[a].in and every phase has a position.
  const Phase* phase[kAxes];
  int64_t phase_count[kAxes];

  // Parts of the workspace; which of them exist depends on the kernel.
  void* filter;              // the packed filter, in the accumulation type
  unsigned char* nonfinite;  // a byte per filter packing task: it met an Inf or a NaN
  void* zeros;               // as many zeros as a pixel of dY has channels, in that type
  void* packed_dy;       // channels-last dY in the accumulation type, or null: read dY
  PlaneTile plane_tile;  // of the few_channels kernel

  // Of the gemm kernel: where column c of a group, an input channel unless the problem
  // was folded (kernel_cpu.cc), lies in the filter and in dX. dX offsets increase.
  const int64_t* column_w;
  const int64_t* column_dx;

  // And, if row_end > 0 (else there is no such padding), to be computed by its strips
  // (gemm_strips.h): a row of dY is as long as the problem says, but its elements before
  // row_first and from row_end on are padding that is not in memory. `dy` is where
  // element row_first of the first row lies.
  int64_t row_first, row_end;
};

// What such a problem may have at most, so that strips of any instruction set take it:
// taps, and elements that a register tile reads; and the least positions of a row.
constexpr int kStripTaps = 64;
constexpr int64_t kStripTileElements = 4096;
constexpr int64_t kMostStripRows = 14;  // of a register tile

// task(0) .. task(count - 1) of a stage may run in any order on any threads; a stage
// starts when the one before it has finished.
struct CpuStage {
  int64_t count;
  void (*task)(const void* state, int64_t index);
};

constexpr int kMaxStages = 3;
constexpr int kStateBytes = 1024;

struct CpuJob {
  int stages = 0;
  CpuStage stage[kMaxStages];
  alignas(64) unsigned char state[kStateBytes];  // the kernel's own, trivially copyable
};

template <typename State>
inline __attribute__((always_inline)) void SetState(CpuJob* job, const State& state) {
  static_assert(sizeof(State) <= kStateBytes, "enlarge kStateBytes");
  __builtin_memcpy(job->state, &state, sizeof(state));
}

struct FilterArgs;  // filter/job.h
struct PoolArgs;    // pooling/job.h

// The kernels of one instruction set. Each fills in the job and computes nothing.
struct CpuKernels {
  void (*direct)(const CpuArgs& args, CpuJob* job);
  void (*gemm)(const CpuArgs& args, CpuJob* job);
  void (*depthwise)(const CpuArgs& args, CpuJob* job);         // lanes hold channels
  void (*few_channels)(const CpuArgs& args, CpuJob* job);      // lanes hold pixels
  void (*few_channels_dot)(const CpuArgs& args, CpuJob* job);  // lanes hold out channels
  void (*filter)(const FilterArgs& args, CpuJob* job);         // the filter gradient
  void (*max_pool_grad)(const PoolArgs& args, CpuJob* job);
};

// Limits that the planner and the kernels share, whatever the instruction set.

// gemm: filter columns are padded to at most this many.
constexpr int64_t kMaxPanelColumns = 64;
constexpr int64_t kMinPanelColumns = 4;
constexpr int64_t kFilterPackChannels = 64;  // out channels that one packing task takes
constexpr int64_t kTileChannels = 32;        // out channels that an AMX tile holds

// depthwise: the largest group (in or out channels) that a vector is shared by, and
// the most filter rows (taps of the two leading axes) that one output row sees.
constexpr int64_t kMaxSharedGroup = 8;
constexpr int64_t kMaxFilterRows = 1024;
constexpr int64_t kMaxLanes = 16;

// few_channels: the window of dY that one task keeps on its stack, and the longest row of
// dX that it makes at a time, both in the accumulation type. A filter of many rows may
// have a window that no first-level cache holds.
constexpr int64_t kWindowBytes = 48 * 1024, kLargeWindowBytes = 192 * 1024;
constexpr int64_t kRowBytes = 2 * 1024;
constexpr int64_t kMaxRowPhases = 16, kMaxStrands = 4;
constexpr int64_t kPlaneChannels = 4;  // channels of dX made at a time

// Always inlined, for the reason above.
__attribute__((always_inline)) constexpr int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Which way the taps of a filter lie side by side in memory: 1 if forwards, -1 if
// backwards (the forward pass reads them so), 0 if they do not.
__attribute__((always_inline)) inline int64_t RunOfTaps(const Problem& p) {
  for (const int64_t direction : {int64_t{1}, int64_t{-1}}) {
    bool is_run = true;
    int64_t step = direction;
    for (int x = kAxes - 1; x >= 0; --x) {
      is_run &= p.axis[x].win == 1 || p.w.axis[x] == step;
      step *= p.axis[x].win;
    }
    if (is_run) return direction;
  }
  return 0;
}

}  // namespace convgrad
