// The table of CUDA kernels as the planner sees it: for each a function that plans
// a problem and one that launches the plan. A kernel lives in one .cu file of this
// folder, which the host compiler or nvcc reads; this header needs no CUDA.
//
// A plan function returns false if its kernel does not take the problem. Otherwise it
// fills in the whole plan except the kernel's name, from its arguments and rates.h
// alone: not from the GPU that is there, which may not be the one that runs the program.

#pragma once

#include <algorithm>
#include <cstring>

#include "../kernel.h"
#include "rates.h"

namespace convgrad {

// The GPU that plans are made for: what the models count with. Another one computes the
// same results, with tiles that suit it less.
struct ReferenceGpu {
  static constexpr const char* kName = kRatesGpu;
  static constexpr int64_t kMultiprocessors = 132;
  static constexpr double kCyclesPerUs = 1755;
  static constexpr int64_t kSharedBytes = 227 * 1024;  // of a multiprocessor, for blocks
  static constexpr double kCopyBytesPerUs = kRatesCopyBytesPerUs;
  // Products (a multiply and an add) per microsecond, all multiprocessors: nominal, what
  // the corrections of rates.h are relative to.
  static constexpr double kFmaF32PerUs = 30e6;  // on the FP32 units
  static constexpr double kFmaF64PerUs = 15e6;  // on the FP64 units
  // mma.sync, bf16 and f16: two thirds of what its instructions alone reach, an estimate.
  static constexpr double kMma16PerUs = 200e6;
  static constexpr double kMmaTf32PerUs = 100e6;
  static constexpr double kWgmma16PerUs = 350e6;  // wgmma, an estimate
  static constexpr double kWgmmaTf32PerUs = 175e6;
  // The roof: what its largest matrix products reach, whatever the instructions. The
  // first is from others' measurements, the rest follow it as in the data sheet.
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

inline Operands OperandsOf(const Problem& problem) {
  switch (problem.dtype) {
    case DType::kF64: return Operands::kF64;
    case DType::kF32: return problem.allow_tf32 ? Operands::kTf32 : Operands::kF32;
    case DType::kBF16: break;
    case DType::kF16: break;
  }
  return Operands::k16Bit;
}

// Of a kernel by name. Where it might round to TF32 and has no row for that, it does not.
inline Correction CorrectionOf(const char* kernel, const Problem& problem) {
  const auto row = [kernel](Operands operands) {
    return std::find_if(
        std::begin(kCorrections), std::end(kCorrections), [=](const Correction& c) {
          return c.operands == operands && std::strcmp(c.kernel, kernel) == 0;
        });
  };
  const Operands operands = OperandsOf(problem);
  const Correction* found = row(operands);
  if (found == std::end(kCorrections) && operands == Operands::kTf32) {
    found = row(Operands::kF32);
  }
  return found == std::end(kCorrections) ? Correction{kernel, operands, 1, 1, 0, 0}
                                         : *found;
}

// Of so many launches of the same.
inline Cost Repeated(const Cost& cost, int64_t times) {
  const double n = static_cast<double>(times);
  return {n * cost.launches, n * cost.fixed_us, n * cost.arithmetic_us,
          n * cost.memory_us, cost.unhidden};
}

// The estimate that plans are compared by, of a kernel's tiles and between kernels.
inline double ModelUs(const Cost& cost, const Correction& correction) {
  const double arithmetic_us = correction.arithmetic * cost.arithmetic_us;
  const double memory_us = correction.memory * cost.memory_us;
  return kRatesLaunchUs * cost.launches + cost.fixed_us +
         std::max(arithmetic_us, memory_us) +
         cost.unhidden * std::min(arithmetic_us, memory_us);
}

// Blocks of a grid's first dimension; the other two end at 65535.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// `shared_bytes` is what a block may have of shared memory on the GPU that will run the
// plan.
using PlanFunction = bool(const Problem& problem, int64_t shared_bytes, Plan* plan);
// Returns null, or a static error text.
using LaunchFunction = const char*(CUstream_st* stream, const Problem& problem,
                                   const Plan& plan, const void* dy, const void* w,
                                   void* dx, void* workspace, const Epilogue& epilogue);

PlanFunction PlanDirect, PlanTiled, PlanMma, PlanMma3xTf32, PlanWgmma;
PlanFunction PlanDepthwise, PlanGrouped, PlanFewChannels, PlanFewChannels3xTf32;
LaunchFunction LaunchDirect, LaunchTiled, LaunchMma, LaunchMma3xTf32, LaunchWgmma;
LaunchFunction LaunchDepthwise, LaunchGrouped, LaunchFewChannels, LaunchFewChannels3xTf32;

}  // namespace convgrad
