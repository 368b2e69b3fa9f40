#include "max_grad.h"

#include "../entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void MaxPoolGrad(const PoolArgs& args, CpuJob* job) {
  ByDType(args.dtype, [&](auto t) { PreparePoolGrad<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
