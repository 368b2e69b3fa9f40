// The kernels of one instruction set, CONVGRAD_ISA: an entry point for each family, in a
// source file of its own so that the compiler can work on several at once. job.h says
// what being compiled for one instruction set asks of the code.

#pragma once

#ifndef CONVGRAD_ISA
#error "define CONVGRAD_ISA as the instruction set that this file is compiled for"
#endif

#include "job.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {

// Members of CpuKernels.
void Direct(const CpuArgs& args, CpuJob* job);
void Gemm(const CpuArgs& args, CpuJob* job);
void Depthwise(const CpuArgs& args, CpuJob* job);
void FewChannels(const CpuArgs& args, CpuJob* job);
void FewChannelsDot(const CpuArgs& args, CpuJob* job);
void Filter(const FilterArgs& args, CpuJob* job);
void MaxPoolGrad(const PoolArgs& args, CpuJob* job);
// In place of Gemm where the instruction set multiplies bfloat16.
void GemmBf16(const CpuArgs& args, CpuJob* job);

namespace {

// Calls prepare with a value of the element type.
template <typename Prepare>
inline void ByDType(DType dtype, Prepare prepare) {
  switch (dtype) {
    case DType::kF64: return prepare(double{});
    case DType::kF32: return prepare(float{});
    case DType::kBF16: return prepare(BF16{});
    case DType::kF16: return prepare(F16{});
  }
}

}  // namespace
}  // namespace CONVGRAD_ISA
}  // namespace convgrad
