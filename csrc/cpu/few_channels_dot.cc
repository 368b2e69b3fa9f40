#include "few_channels_dot.h"

#include "entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void FewChannelsDot(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype,
          [&](auto t) { PrepareFewChannelsDot<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
