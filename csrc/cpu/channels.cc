#include "channels.h"

#include "entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void Channels(const CpuArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareChannels<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
