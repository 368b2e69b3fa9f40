// The gemm kernel in bfloat16 for the instruction sets that multiply it, CONVGRAD_ISA =
// avx512_bf16 or amx. The other kernels of these processors are those for avx512.

#include "entries.h"
#include "gemm.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void GemmBf16(const CpuArgs& args, CpuJob* job) { PrepareGemm<BF16>(args, job); }

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
