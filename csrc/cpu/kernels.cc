// The CPU kernels of one instruction set, CONVGRAD_ISA. Compiled once for each, with its
// flags; job.h says what that asks of the code. kernel_cpu.cc picks one at run time.

#include "job.h"

#ifndef CONVGRAD_ISA
#error "define CONVGRAD_ISA as avx512, avx2 or portable"
#endif

#include "channels.h"
#include "direct.h"
#include "dots.h"
#include "gemm.h"
#include "planes.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {
namespace {

// Calls prepare with a value of the element type.
template <typename Prepare>
void ByDType(DType dtype, Prepare prepare) {
  switch (dtype) {
    case DType::kF64: return prepare(double{});
    case DType::kF32: return prepare(float{});
    case DType::kBF16: return prepare(BF16{});
    case DType::kF16: return prepare(F16{});
  }
}

void Direct(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareDirect<decltype(t)>(args, job); });
}

void Gemm(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareGemm<decltype(t)>(args, job); });
}

void Channels(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareChannels<decltype(t)>(args, job); });
}

void Planes(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PreparePlanes<decltype(t)>(args, job); });
}

void Dots(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareDots<decltype(t)>(args, job); });
}

}  // namespace

extern const CpuKernels kKernels;
const CpuKernels kKernels = {Direct, Gemm, Channels, Planes, Dots};

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
