// The ladder of CUDA kernels as the planner sees it: for each rung a function that plans
// a problem and one that launches the plan. A rung lives in one .cu file of this folder,
// which the host compiler or nvcc reads; this header needs no CUDA.
//
// A plan function returns false if its kernel does not take the problem. Otherwise it
// fills in the whole plan, `model_us` included, from the problem alone: not from the GPU
// that is there, which may not be the one that runs the program.

#pragma once

#include "../kernel.h"

namespace convgrad {

// The GPU that plans are made for, an H200 SXM: what the models count with. Another one
// computes the same results, with tiles that suit it less.
struct ReferenceGpu {
  static constexpr int64_t kMultiprocessors = 132;
  static constexpr int64_t kSharedBytes = 227 * 1024;  // of a multiprocessor, for blocks
  static constexpr double kCopyBytesPerUs = 4.3e6;     // read and written
  static constexpr double kLaunchUs = 2.5;             // a kernel that does nothing
  // Products (a multiply and an add) per microsecond, all multiprocessors.
  static constexpr double kFmaF32PerUs = 30e6;  // on the FP32 units
  static constexpr double kFmaF64PerUs = 15e6;  // on the FP64 units
  static constexpr double kMma16PerUs = 300e6;  // mma.sync, bf16 and f16
  static constexpr double kMmaTf32PerUs = 150e6;
};

// Blocks of a grid's first dimension; the other two end at 65535.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

using PlanFunction = bool(const Problem& problem, Plan* plan);
// Returns null, or a static error text.
using LaunchFunction = const char*(CUstream_st* stream, const Problem& problem,
                                   const Plan& plan, const void* dy, const void* w,
                                   void* dx, void* workspace);

PlanFunction PlanDirect, PlanTiled, PlanMma, PlanMma3xTf32, PlanGrouped;
LaunchFunction LaunchDirect, LaunchTiled, LaunchMma, LaunchMma3xTf32, LaunchGrouped;

}  // namespace convgrad
