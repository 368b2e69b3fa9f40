#include "outer.h"

#include "../entries.h"

namespace convgrad {
namespace CONVGRAD_ISA {

void Filter(const FilterArgs& args, CpuJob* job) {
  ByDType(args.problem.dtype, [&](auto t) { PrepareFilter<decltype(t)>(args, job); });
}

}  // namespace CONVGRAD_ISA
}  // namespace convgrad
