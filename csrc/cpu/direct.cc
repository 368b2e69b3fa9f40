#include "direct.h"

#include "entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void Direct(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareDirect<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
