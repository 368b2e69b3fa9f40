#include "depthwise.h"

#include "entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void Depthwise(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareDepthwise<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
