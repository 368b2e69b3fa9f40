// The ladder of CUDA kernels as the planner sees it: for each rung a function that plans
// a problem and one that launches the plan. A rung lives in one .cu file of this folder,
// which the host compiler or nvcc reads; this header needs no CUDA.
//
// A plan function returns false if its kernel does not take the problem. Otherwise it
// fills in the whole plan, `model_us` included, from its arguments alone: not from the
// GPU that is there, which may not be the one that runs the program.

#pragma once

#include "../kernel.h"

namespace convgrad {

// The GPU that plans are made for, an H200 SXM: what the models count with. Another one
// computes the same results, with tiles that suit it less.
struct ReferenceGpu {
  static constexpr const char* kName = "H200 SXM";
  static constexpr int64_t kMultiprocessors = 132;
  static constexpr double kCyclesPerUs = 1755;
  static constexpr int64_t kSharedBytes = 227 * 1024;  // of a multiprocessor, for blocks
  static constexpr double kCopyBytesPerUs = 4.3e6;     // read and written
  static constexpr double kLaunchUs = 2.5;             // a kernel that does nothing
  // Products (a multiply and an add) per microsecond, all multiprocessors.
  static constexpr double kFmaF32PerUs = 30e6;  // on the FP32 units
  static constexpr double kFmaF64PerUs = 15e6;  // on the FP64 units
  static constexpr double kMma16PerUs = 300e6;  // mma.sync, bf16 and f16
  static constexpr double kMmaTf32PerUs = 150e6;
  static constexpr double kWgmma16PerUs = 350e6;  // wgmma, an estimate
  static constexpr double kWgmmaTf32PerUs = 175e6;
  // The roof: what its largest matrix products reach, whatever the instructions. The
  // first is measured, the others follow it as in the data sheet.
  static constexpr double kPeak16PerUs = 395e6;
  static constexpr double kPeakTf32PerUs = 197e6;
  static constexpr double kPeakF64PerUs = 27e6;

  // Products per microsecond that no kernel of a dtype can exceed. float32 without TF32
  // is at best three products of TF32.
  static constexpr double PeakPerUs(DType dtype, bool allow_tf32) {
    switch (dtype) {
      case DType::kF64: return kPeakF64PerUs;
      case DType::kF32: return allow_tf32 ? kPeakTf32PerUs : kPeakTf32PerUs / 3;
      case DType::kBF16: break;
      case DType::kF16: break;
    }
    return kPeak16PerUs;
  }
};

// Blocks of a grid's first dimension; the other two end at 65535.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// `shared_bytes` is what a block may have of shared memory on the GPU that will run the
// plan.
using PlanFunction = bool(const Problem& problem, int64_t shared_bytes, Plan* plan);
// Returns null, or a static error text.
using LaunchFunction = const char*(CUstream_st* stream, const Problem& problem,
                                   const Plan& plan, const void* dy, const void* w,
                                   void* dx, void* workspace);

PlanFunction PlanDirect, PlanTiled, PlanMma, PlanMma3xTf32, PlanWgmma;
PlanFunction PlanDepthwise, PlanGrouped, PlanFewChannels, PlanFewChannels3xTf32;
LaunchFunction LaunchDirect, LaunchTiled, LaunchMma, LaunchMma3xTf32, LaunchWgmma;
LaunchFunction LaunchDepthwise, LaunchGrouped, LaunchFewChannels, LaunchFewChannels3xTf32;

}  // namespace convgrad
