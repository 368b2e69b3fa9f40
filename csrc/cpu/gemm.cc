#include "gemm.h"

#include "entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void Gemm(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareGemm<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
