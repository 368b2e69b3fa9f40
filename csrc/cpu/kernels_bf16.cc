// The gemm kernel in bfloat16 for the instruction sets that multiply it, CONVGRAD_ISA =
// avx512_bf16 or amx: the rest of what these processors run is kernels.cc for avx512.
// job.h says what being compiled for one instruction set asks of the code.

#include "job.h"

#ifndef CONVGRAD_ISA
#error "define CONVGRAD_ISA as avx512_bf16 or amx"
#endif

#include "gemm.h"
#include "vec.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void GemmBf16(const CpuArgs& args, CpuJob* job);
void GemmBf16(const CpuArgs& args, CpuJob* job) { PrepareGemm<BF16>(args, job); }

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
