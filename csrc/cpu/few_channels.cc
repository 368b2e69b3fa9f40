#include "few_channels.h"

#include "entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void FewChannels(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype,
          [&](auto t) { PrepareFewChannels<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
