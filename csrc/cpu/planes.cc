#include "planes.h"

#include "entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void Planes(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PreparePlanes<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
