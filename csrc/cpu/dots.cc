#include "dots.h"

#include "entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void Dots(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareDots<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
